"""The data files of a log-prob store: where each lies and what its header must say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustgate.lm.manifest import FORMAT, VERSION, Manifest
from robustgate.lm.tensorfile import DamagedFileError, read_tensor, write_tensor
from robustgate.lm.windows import slice_documents


@dataclass(frozen=True)
class Shard:
    """The log-probabilities of one expert on a run of documents, whether or not they are there.

    Attributes:
        path: the file.
        identity: what its header must say.
        expert: the expert's name.
        corpus: the corpus's name.
        first: number of the first document.
        offsets: where its documents start among the corpus's tokens, and where the last one ends,
            int64 [documents of the shard + 1].
    """

    path: Path
    identity: dict[str, Any]
    expert: str
    corpus: str
    first: int
    offsets: Tensor  # [documents of the shard + 1]

    @property
    def documents(self) -> tuple[int, int]:
        """The number of the first document and one behind the last."""
        return self.first, self.first + len(self.offsets) - 1

    @property
    def rows(self) -> slice:
        """Its tokens among those of the corpus."""
        return slice(int(self.offsets[0]), int(self.offsets[-1]))

    @property
    def tokens(self) -> int:
        """The number of its tokens."""
        return int(self.offsets[-1] - self.offsets[0])

    def read(self) -> Tensor:  # [tokens]
        """Return the log-probabilities, float32, or raise as ``read_tensor`` does."""
        return read_tensor(self.path, self.identity)

    def sound(self) -> bool:
        """Whether the file is there, whole, and what it must be."""
        try:
            self.read()
        except (FileNotFoundError, DamagedFileError):
            return False
        return True

    def write(self, log_probs: Tensor) -> None:  # [tokens]
        """Write the file atomically; see ``LogProbStore.write``."""
        if log_probs.dtype != torch.float32 or tuple(log_probs.shape) != (self.tokens,):
            raise ValueError(
                f"log_probs: expected float32 [{self.tokens}] for documents {self.documents[0]} to "
                f"{self.documents[1] - 1} of corpus {self.corpus!r}, got {log_probs.dtype} "
                f"{list(log_probs.shape)}"
            )
        bad = (log_probs.isnan() | log_probs.isposinf()).nonzero().flatten()
        if len(bad):
            token = self.rows.start + int(bad[0])
            document = int(torch.searchsorted(self.offsets, token, right=True)) - 1
            raise ValueError(
                f"expert {self.expert!r} gives log-probability {float(log_probs[bad[0]])} to token "
                f"{token - int(self.offsets[document])} of document {self.first + document} of "
                f"corpus {self.corpus!r}: its weights or logits are not finite. Nothing was stored "
                "for this run of documents"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_tensor(self.path, log_probs, self.identity)


def shards_of(folder: Path, manifest: Manifest, expert: str, corpus: str) -> list[Shard]:
    """Return every shard of an expert on a corpus.

    Args:
        folder: the store.
        manifest: its manifest.
        expert: the name of an expert in it.
        corpus: the name of a corpus in it.

    Returns:
        The shards, in the order of the documents.

    Raises:
        ValueError: an unknown name, or the corpus's offsets are missing, truncated or altered.
    """
    entry = manifest.corpus(corpus)
    identity = {
        **_identity("token log-probabilities", manifest, corpus),
        "expert_sha256": manifest.expert(expert).sha256,
    }
    offsets = read_offsets(folder, manifest, corpus)
    return [
        Shard(
            folder / "shards" / expert / corpus / f"{index:05d}.safetensors",
            {**identity, "documents": [first, last]},
            expert,
            corpus,
            first,
            offsets[first : last + 1],
        )
        for index, (first, last) in enumerate(slice_documents(offsets, entry.slice_tokens))
    ]


def offsets_path(folder: Path, corpus: str) -> Path:
    """Return the file that says where the documents of a corpus start."""
    return folder / "offsets" / f"{corpus}.safetensors"


def write_offsets(
    folder: Path,
    manifest: Manifest,
    corpus: str,
    offsets: Tensor,  # [n_docs + 1]
) -> None:
    """Write where each document starts among the scored tokens of a corpus."""
    path = offsets_path(folder, corpus)
    path.parent.mkdir(exist_ok=True)
    write_tensor(path, offsets.to(torch.int64), _identity("offsets", manifest, corpus))


def read_offsets(folder: Path, manifest: Manifest, corpus: str) -> Tensor:  # [n_docs + 1]
    """Read where each document starts, int64, or raise ``ValueError`` with the remedy."""
    try:
        return read_tensor(offsets_path(folder, corpus), _identity("offsets", manifest, corpus))
    except (FileNotFoundError, DamagedFileError) as error:
        raise ValueError(
            f"{error}; restore it from a copy, or remove corpus {corpus!r} from the store and "
            "score it again"
        ) from error


def _identity(content: str, manifest: Manifest, corpus: str) -> dict[str, Any]:
    """Return what the header of a file on this corpus must say."""
    entry = manifest.corpus(corpus)
    return {
        "content": content,
        "format": f"{FORMAT} {VERSION}",
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "corpus_sha256": entry.sha256,
        "window": entry.window,
        "stride": entry.stride,
    }

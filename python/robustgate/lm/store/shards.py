"""The data files of a log-prob store: where each lies and what its header must say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustgate.lm.files import exclusive, sha256_json
from robustgate.lm.store.manifest import FORMAT, VERSION, Manifest, read_manifest
from robustgate.lm.store.tensorfile import DamagedFileError, read_tensor, write_tensor
from robustgate.lm.store.windows import slice_documents

LOG_PROBS = "token log-probabilities"
"""The kind of shard that every expert has; the others are features."""


@dataclass(frozen=True)
class Shard:
    """What one expert, or all together, say about a run of documents, there or not.

    Attributes:
        path: the file.
        identity: what its header must say.
        kind: ``LOG_PROBS``, ``"entropy"``, ``"top"``, ``"argmax"``, ``"hidden-<h>"`` or ``"jsd"``.
        experts: the names of the experts it comes from: one, or all for ``"jsd"``.
        corpus: the corpus's name.
        first: number of the first document.
        offsets: where its documents start among the corpus's tokens, and where the last one ends,
            int64 [documents of the shard + 1].
        store: the folder of the store.
        manifest: that of the store, when the shard was asked for.
    """

    path: Path
    identity: dict[str, Any]
    kind: str
    experts: tuple[str, ...]
    corpus: str
    first: int
    offsets: Tensor  # [documents of the shard + 1]
    store: Path
    manifest: Manifest = field(repr=False)

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

    @property
    def dtype(self) -> torch.dtype:
        """The type of its values."""
        return torch.int32 if self.kind == "argmax" else torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its values: one number a token, or h for ``"hidden-<h>"``."""
        name, _, size = self.kind.partition("-")
        return (self.tokens, int(size)) if name == "hidden" else (self.tokens,)

    def read(self) -> Tensor:  # [tokens] or [tokens, h]
        """Return the values, or raise as ``read_tensor`` does."""
        return read_tensor(self.path, self.identity)

    def sound(self) -> bool:
        """Whether the file is there, whole, and what it must be."""
        try:
            self.read()
        except (FileNotFoundError, DamagedFileError):
            return False
        return True

    def write(self, values: Tensor) -> None:  # [tokens] or [tokens, h]
        """Write the file atomically; see ``LogProbStore.write``."""
        if values.dtype != self.dtype or tuple(values.shape) != self.shape:
            raise ValueError(
                f"values: expected {str(self.dtype).partition('.')[2]} {list(self.shape)} for "
                f"documents {self.documents[0]} to {self.documents[1] - 1} of corpus "
                f"{self.corpus!r}, got {values.dtype} {list(values.shape)}"
            )
        table = values.unsqueeze(-1).flatten(1)  # [tokens, 1] or [tokens, h]
        bad = (table.isnan() | table.isposinf()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            value = float(table[row, column])
            token = self.rows.start + row
            document = int(torch.searchsorted(self.offsets, token, right=True)) - 1
            what = "log-probability" if self.kind == LOG_PROBS else self.kind
            raise ValueError(
                f"expert {', '.join(map(repr, self.experts))} gives {what} {value} to token "
                f"{token - int(self.offsets[document])} of document {self.first + document} of "
                f"corpus {self.corpus!r}: its weights or logits are not finite. Nothing was stored "
                "for this run of documents"
            )
        with exclusive(self.store / "manifest.lock"):
            self._check_registered()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_tensor(self.path, values, self.identity)

    def _check_registered(self) -> None:
        """Raise ``ValueError`` if what the shard belongs to was removed after it was asked for."""
        now, then = read_manifest(self.store), self.manifest
        gone = [f"expert {n!r}" for n in self.experts if now.experts.get(n) != then.experts[n]]
        if now.corpora.get(self.corpus) != then.corpora[self.corpus]:
            gone.append(f"corpus {self.corpus!r}")
        if gone:
            raise ValueError(
                f"{self.store}: {', '.join(gone)} was removed while it was being scored, so these "
                "scores were not stored; score it again if it is to be there"
            )


def shards_of(
    folder: Path, manifest: Manifest, expert: str, corpus: str, kind: str = LOG_PROBS
) -> list[Shard]:
    """Return every shard of one kind of an expert on a corpus.

    Args:
        folder: the store.
        manifest: its manifest.
        expert: the name of an expert in it.
        corpus: the name of a corpus in it.
        kind: see ``Shard``.

    Returns:
        The shards, in the order of the documents.

    Raises:
        ValueError: an unknown name, or the corpus's offsets are missing, truncated or altered.
    """
    identity = {
        **_identity(kind, manifest, corpus),
        "expert_sha256": manifest.expert(expert).sha256,
    }
    place = folder / "shards" / expert / corpus
    return _cut(folder, manifest, corpus, kind, (expert,), identity, place)


def joint_shards(
    folder: Path, manifest: Manifest, experts: Sequence[str], corpus: str
) -> list[Shard]:
    """Return every shard of the Jensen-Shannon divergence of several experts on a corpus.

    Args:
        folder: the store.
        manifest: its manifest.
        experts: their names, in any order.
        corpus: the name of a corpus in it.

    Returns:
        The shards, in the order of the documents.

    Raises:
        ValueError: as for ``shards_of``.
    """
    names = tuple(sorted(experts))
    members = {name: manifest.expert(name).sha256 for name in names}
    identity = {**_identity("jsd", manifest, corpus), "experts_sha256": members}
    place = folder / "joint" / joint_name(manifest, names) / corpus
    return _cut(folder, manifest, corpus, "jsd", names, identity, place)


def joint_name(manifest: Manifest, experts: Sequence[str]) -> str:
    """Return the name of the folder of what experts say together."""
    members = {name: manifest.expert(name).sha256 for name in experts}
    return sha256_json(members)[:16]


def _cut(
    folder: Path,
    manifest: Manifest,
    corpus: str,
    kind: str,
    experts: tuple[str, ...],
    identity: dict[str, Any],
    place: Path,
) -> list[Shard]:
    """Return one shard for each slice of a corpus."""
    offsets = read_offsets(folder, manifest, corpus)
    suffix = "" if kind == LOG_PROBS else f".{kind}"
    return [
        Shard(
            place / f"{index:05d}{suffix}.safetensors",
            {**identity, "documents": [first, last]},
            kind,
            experts,
            corpus,
            first,
            offsets[first : last + 1],
            folder,
            manifest,
        )
        for index, (first, last) in enumerate(
            slice_documents(offsets, manifest.corpus(corpus).slice_tokens)
        )
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

"""Reading a log-prob store: whole tensors, or sums of documents one shard at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from robustgate.lm.store.features import FeatureSpec, assemble
from robustgate.lm.store.manifest import CorpusEntry, ExpertEntry, read_manifest
from robustgate.lm.store.shards import LOG_PROBS, Shard, joint_shards, read_offsets, shards_of
from robustgate.lm.store.tensorfile import DamagedFileError


class StoreReader:
    """What can be asked of a log-prob store; see ``LogProbStore``.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the folder; nothing is read or made."""
        self.path = Path(path)

    @property
    def tokenizer_sha256(self) -> str:
        """The hash of the tokenizer all log-probabilities belong to."""
        return read_manifest(self.path).tokenizer_sha256

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts, and of what they were compared with, sorted."""
        return tuple(sorted(read_manifest(self.path).experts))

    @property
    def entrants(self) -> tuple[str, ...]:
        """The names of the experts without what they were only compared with, sorted."""
        compared = self.compared
        return tuple(name for name in self.experts if name not in compared)

    @property
    def compared(self) -> dict[str, dict[str, str]]:
        """Which of ``experts`` are only compared with, and the hashes of what each is made from.

        The weight-averaged soup is made from experts, by name, a monolith from none.
        """
        return read_manifest(self.path).compared

    @property
    def corpora(self) -> tuple[str, ...]:
        """The corpora's names, sorted."""
        return tuple(sorted(read_manifest(self.path).corpora))

    def expert_sha256(self, name: str) -> str:
        """Return the hash of an expert's configuration and weights."""
        return self.expert(name).sha256

    def expert(self, name: str) -> ExpertEntry:
        """Return what the manifest says about an expert."""
        return read_manifest(self.path).expert(name)

    def corpus(self, name: str) -> CorpusEntry:
        """Return what the manifest says about a corpus."""
        return read_manifest(self.path).corpus(name)

    def shards(self, expert: str, corpus: str, kind: str = LOG_PROBS) -> list[Shard]:
        """Return the shards of an expert on a corpus, whether or not they are there.

        Args:
            expert: its name.
            corpus: its name.
            kind: log-probabilities if left out, or one of ``FeatureSpec.kinds``.

        Returns:
            One ``Shard`` for each run of documents; ``shard.sound()`` says if it is scored.

        Raises:
            ValueError: an unknown name, or the corpus's offsets are missing or damaged.
        """
        return shards_of(self.path, read_manifest(self.path), expert, corpus, kind)

    def joint_shards(self, experts: Sequence[str], corpus: str) -> list[Shard]:
        """Return the shards of the experts' Jensen-Shannon divergence; otherwise as ``shards``."""
        return joint_shards(self.path, read_manifest(self.path), experts, corpus)

    def offsets(self, corpus: str) -> Tensor:  # [n_docs + 1]
        """Return where each document starts among the corpus's scored tokens.

        Args:
            corpus: its name.

        Returns:
            int64 [n_docs + 1]; document i has the tokens offsets[i] to offsets[i + 1].

        Raises:
            ValueError: no corpus has this name, or the file is truncated or altered.
        """
        return read_offsets(self.path, read_manifest(self.path), corpus)

    def token_log_probs(
        self, corpus: str, experts: Sequence[str] | None = None
    ) -> Tensor:  # [tokens, K]
        """Return the log-probability that each expert gives each token.

        Args:
            corpus: its name.
            experts: which, and in which order; all, sorted by name, if left out.

        Returns:
            float32 [tokens, K].

        Raises:
            ValueError: an unknown name, or a shard that is not scored yet, truncated or altered;
                the message names the file and the remedy.
        """
        names = self.experts if experts is None else tuple(experts)
        out = torch.empty(self.corpus(corpus).tokens, len(names), dtype=torch.float32)
        for column, name in enumerate(names):
            for shard in self.shards(name, corpus):
                out[shard.rows, column] = read_shard(shard)
        return out

    def document_log_probs(
        self, corpus: str, experts: Sequence[str] | None = None
    ) -> Tensor:  # [n_docs, K]
        """Return the log-probability that each expert gives each whole document.

        One shard is in memory at a time, however long the corpus.

        Args:
            corpus: its name.
            experts: which, and in which order; all, sorted by name, if left out.

        Returns:
            float64 [n_docs, K], the token log-probabilities summed in float64.

        Raises:
            ValueError: as for ``token_log_probs``.
        """
        names = self.experts if experts is None else tuple(experts)
        out = torch.zeros(self.corpus(corpus).documents, len(names), dtype=torch.float64)
        for column, name in enumerate(names):
            for shard in self.shards(name, corpus):
                first, last = shard.documents
                document = torch.repeat_interleave(torch.arange(first, last), shard.offsets.diff())
                out[:, column].index_add_(0, document, read_shard(shard).double())
        return out

    def context_features(
        self, corpus: str, spec: FeatureSpec, experts: Sequence[str] | None = None
    ) -> Tensor:  # [tokens, F]
        """Return what a gate knows before each token.

        Args:
            corpus: its name.
            spec: which features; they must have been scored.
            experts: which, and in which order; all, sorted by name, if left out.

        Returns:
            float32 [tokens, F], ``F = spec.width(K)``. Row t comes from the distributions that
            predict token t, and belongs with row t of ``token_log_probs``.

        Raises:
            ValueError: as for ``token_log_probs``.
        """
        names = self.experts if experts is None else tuple(experts)
        if not names:
            raise ValueError("experts: expected at least one, got none")
        out = torch.empty(self.corpus(corpus).tokens, spec.width(len(names)), dtype=torch.float32)
        own = [[self.shards(name, corpus, kind) for kind in spec.kinds] for name in names]
        joint = self.joint_shards(names, corpus) if spec.jsd else []
        for index, place in enumerate(self.shards(names[0], corpus)):
            columns = [
                {shards[index].kind: read_shard(shards[index]) for shards in kinds} for kinds in own
            ]
            together = read_shard(joint[index]) if spec.jsd else None
            out[place.rows] = assemble(spec, columns, together, (place.tokens,))
        return out


def read_shard(shard: Shard) -> Tensor:
    """Return the values of a shard, or raise ``ValueError`` saying how to get it back."""
    try:
        return shard.read()
    except (FileNotFoundError, DamagedFileError) as error:
        names = ", ".join(map(repr, shard.experts))
        asked = "" if shard.kind == LOG_PROBS else f" with feature {shard.kind}"
        raise ValueError(
            f"{error}; score expert {names} on corpus {shard.corpus!r} again{asked}, which fills "
            "in the shards that are missing or damaged and keeps the others"
        ) from error

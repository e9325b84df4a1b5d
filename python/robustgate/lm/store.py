"""The log-prob store: what every expert says about every token, scored once and kept.

::

    store/
      manifest.json                                    format, tokenizer, corpora, experts
      offsets/<corpus>.safetensors                     int64 [n_docs + 1]
      shards/<expert>/<corpus>/<slice>.safetensors     float32 [tokens of the slice]

Only registering or removing a corpus or an expert writes the manifest, under a lock. A shard
depends on nothing but its expert and its documents and appears whole by a rename, so any number of
processes can fill one store. Each shard says in its header what it holds: one that belongs to
another checkpoint, corpus or tokenizer is refused even if it lies in the right place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from robustgate.lm.files import check_name, exclusive, remove_abandoned, remove_folder
from robustgate.lm.manifest import (
    CorpusEntry,
    ExpertEntry,
    Manifest,
    change_manifest,
    check_same,
    read_manifest,
    write_manifest,
)
from robustgate.lm.shards import Shard, read_offsets, shards_of, write_offsets
from robustgate.lm.tensorfile import DamagedFileError

SLICE_TOKENS = 1 << 16
"""Tokens in one shard, up to the end of its last document."""


class LogProbStore:
    """Gold-token log-probabilities of experts on corpora, in one folder.

    An object holds no state but the folder: several, in several processes, may use one store.

    Args:
        path: the folder. Use ``LogProbStore.create`` or ``LogProbStore.open``.

    Example:
        >>> store = LogProbStore.open("store/")                   # doctest: +SKIP
        >>> store.experts, store.corpora                          # doctest: +SKIP
        (('code', 'wiki'), ('wiki',))
        >>> store.token_log_probs("wiki").shape                   # doctest: +SKIP
        torch.Size([91235, 2])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Name the folder; nothing is read or made."""
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | os.PathLike[str], tokenizer_sha256: str) -> LogProbStore:
        """Make an empty store, or open one that exists and has the same tokenizer.

        Args:
            path: the folder.
            tokenizer_sha256: ``ExpertSet.tokenizer_sha256``.

        Returns:
            The store.

        Raises:
            ValueError: the folder holds other files, or a store for another tokenizer.
        """
        store = cls(path)
        store.path.mkdir(parents=True, exist_ok=True)
        names = sorted(child.name for child in store.path.iterdir() if child.name[0] != ".")
        if "manifest.json" not in names and names not in ([], ["manifest.lock"]):
            raise ValueError(
                f"{path}: holds other files ({', '.join(names[:3])}) and no manifest.json; give "
                "the store a folder of its own"
            )
        with exclusive(store.path / "manifest.lock"):
            if not (store.path / "manifest.json").exists():
                write_manifest(store.path, Manifest(tokenizer_sha256, {}, {}))
        remedy = "the experts the store was made with, or another store"
        check_same(f"{path}", "the tokenizer", store.tokenizer_sha256, tokenizer_sha256, remedy)
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> LogProbStore:
        """Open a store.

        Args:
            path: the folder.

        Returns:
            The store.

        Raises:
            FileNotFoundError: the folder holds no store.
            ValueError: its manifest is damaged, or of a version this release does not read.
        """
        store = cls(path)
        read_manifest(store.path)
        return store

    @property
    def tokenizer_sha256(self) -> str:
        """The hash of the tokenizer all log-probabilities belong to."""
        return read_manifest(self.path).tokenizer_sha256

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, sorted."""
        return tuple(sorted(read_manifest(self.path).experts))

    @property
    def corpora(self) -> tuple[str, ...]:
        """The corpora's names, sorted."""
        return tuple(sorted(read_manifest(self.path).corpora))

    def expert_sha256(self, name: str) -> str:
        """Return the hash of an expert's configuration and weights."""
        return read_manifest(self.path).expert(name).sha256

    def corpus(self, name: str) -> CorpusEntry:
        """Return what the manifest says about a corpus."""
        return read_manifest(self.path).corpus(name)

    def add_corpus(
        self,
        name: str,
        *,
        sha256: str,
        offsets: Tensor,  # [n_docs + 1]
        window: int,
        stride: int,
        slice_tokens: int = SLICE_TOKENS,
    ) -> None:
        """Register a corpus; one that is already there must be the same.

        Args:
            name: its name.
            sha256: ``Corpus.sha256``.
            offsets: where each document starts among the scored tokens, int64 [n_docs + 1].
            window: tokens a model reads at once.
            stride: by how many tokens the window moves along a longer document.
            slice_tokens: tokens in one shard.

        Raises:
            ValueError: a corpus of this name has other documents, window, stride or shards.
        """
        entry = CorpusEntry(
            sha256, len(offsets) - 1, int(offsets[-1]), window, stride, slice_tokens
        )
        check_name(name, "corpus")
        with change_manifest(self.path) as manifest:
            known = manifest.corpora.setdefault(name, entry)
            if known is entry:
                write_offsets(self.path, manifest, name, offsets)
        remedy = f"remove_corpus({name!r}) and score it again, another name, or another store"
        for key, value in asdict(entry).items():
            stored = asdict(known)[key]
            check_same(f"{self.path}: corpus {name!r}", key, stored, value, remedy)

    def add_expert(self, name: str, *, sha256: str) -> None:
        """Register an expert; one that is already there must be the same checkpoint.

        Args:
            name: its name.
            sha256: ``ExpertSet.sha256(name)``.

        Raises:
            ValueError: an expert of this name is another checkpoint.
        """
        check_name(name, "expert")
        with change_manifest(self.path) as manifest:
            known = manifest.experts.setdefault(name, ExpertEntry(sha256))
        remedy = f"remove_expert({name!r}) and score it again, another name, or another store"
        check_same(f"{self.path}: expert {name!r}", "sha256", known.sha256, sha256, remedy)

    def remove_expert(self, name: str) -> None:
        """Delete all log-probabilities of an expert; nothing of it stays in the store.

        It is gone at once for every reader; if this is killed before the files are deleted, the
        next ``clean`` deletes them.

        Raises:
            ValueError: no expert has this name.
        """
        with change_manifest(self.path) as manifest:
            manifest.expert(name)
            del manifest.experts[name]
        self.clean()

    def remove_corpus(self, name: str) -> None:
        """Delete all log-probabilities on a corpus, as ``remove_expert`` does for an expert.

        Raises:
            ValueError: no corpus has this name.
        """
        with change_manifest(self.path) as manifest:
            manifest.corpus(name)
            del manifest.corpora[name]
        self.clean()

    def clean(self) -> None:
        """Delete what removals and killed runs have left; writers still at work keep theirs."""
        remove_abandoned(self.path)
        with change_manifest(self.path) as manifest:
            for folder in (self.path / "shards").glob("[!.]*"):
                if folder.name not in manifest.experts:
                    remove_folder(folder)
            for folder in (self.path / "shards").glob("[!.]*/[!.]*"):
                if folder.name not in manifest.corpora:
                    remove_folder(folder)
            for file in (self.path / "offsets").glob("[!.]*.safetensors"):
                if file.stem not in manifest.corpora:
                    file.unlink()

    def shards(self, expert: str, corpus: str) -> list[Shard]:
        """Return the shards of an expert on a corpus, whether or not they are there.

        Args:
            expert: its name.
            corpus: its name.

        Returns:
            One ``Shard`` for each run of documents; ``shard.sound()`` says if it is scored.

        Raises:
            ValueError: an unknown name, or the corpus's offsets are missing or damaged.
        """
        return shards_of(self.path, read_manifest(self.path), expert, corpus)

    def write(
        self,
        expert: str,
        corpus: str,
        index: int,
        log_probs: Tensor,  # [tokens of the slice]
    ) -> None:
        """Write one shard.

        Args:
            expert: the name of a registered expert.
            corpus: the name of a registered corpus.
            index: the shard's number, an index into ``shards(expert, corpus)``.
            log_probs: gold-token log-probabilities, float32 [tokens of the slice]. Minus infinity
                is allowed: the expert rules the token out.

        Raises:
            ValueError: wrong dtype or shape, or a value is NaN or plus infinity; the message
                names the expert, the corpus and the document.
            OSError: the file could not be written; nothing half-written stays.
        """
        self.shards(expert, corpus)[index].write(log_probs)

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
                try:
                    out[shard.rows, column] = shard.read()
                except (FileNotFoundError, DamagedFileError) as error:
                    raise ValueError(
                        f"{error}; score expert {name!r} on corpus {corpus!r} again, which fills "
                        "in the shards that are missing or damaged and keeps the others"
                    ) from error
        return out

    def document_log_probs(
        self, corpus: str, experts: Sequence[str] | None = None
    ) -> Tensor:  # [n_docs, K]
        """Return the log-probability that each expert gives each whole document.

        Args:
            corpus: its name.
            experts: which, and in which order; all, sorted by name, if left out.

        Returns:
            float64 [n_docs, K], the token log-probabilities summed in float64.

        Raises:
            ValueError: as for ``token_log_probs``.
        """
        tokens = self.token_log_probs(corpus, experts).double()
        lengths = self.offsets(corpus).diff()
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        out = torch.zeros(len(lengths), tokens.shape[1], dtype=torch.float64)
        return out.index_add_(0, document, tokens)

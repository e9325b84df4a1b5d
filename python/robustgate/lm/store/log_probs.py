"""The log-prob store: what every expert says about every token, scored once and kept.

::

    store/
      manifest.json                                          format, tokenizer, corpora, experts
      offsets/<corpus>.safetensors                           int64 [n_docs + 1]
      shards/<expert>/<corpus>/<slice>.safetensors           float32 [tokens of the slice]
      shards/<expert>/<corpus>/<slice>.<kind>.safetensors    a feature of every token, if asked for
      joint/<experts>/<corpus>/<slice>.jsd.safetensors       what experts say only together

Only registering or removing a corpus or an expert writes the manifest, under a lock. A shard
depends on nothing but its expert and its documents and appears whole by a rename, so any number of
processes can fill one store; the lock is held while a finished shard is written, which is refused
once its expert is gone. Each shard says in its header what it holds: one that belongs to another
checkpoint, corpus or tokenizer is refused even if it lies in the right place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from torch import Tensor

from robustgate.lm.files import check_name, exclusive, remove_abandoned, remove_folder
from robustgate.lm.store.manifest import (
    CorpusEntry,
    ExpertEntry,
    Manifest,
    change_manifest,
    check_same,
    read_manifest,
    write_manifest,
)
from robustgate.lm.store.reader import StoreReader, read_shard
from robustgate.lm.store.shards import LOG_PROBS, joint_name, write_offsets

_COUNTS = ("documents", "tokens")  # of a corpus, which its offsets say too

SLICE_TOKENS = 1 << 16
"""Tokens in one shard, up to the end of its last document."""


class LogProbStore(StoreReader):
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
                write_manifest(store.path, Manifest(tokenizer_sha256, {}, {}, {}))
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
            ValueError: a corpus of this name has other documents, window, stride or shards, or a
                document has no token, not even its end.
        """
        if empty := (offsets.diff() < 1).nonzero().flatten().tolist():
            raise ValueError(
                f"offsets: expected at least one token in each document of corpus {name!r}, its "
                f"end, got none in document {empty[0]}; leave it out"
            )
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

    def add_expert(
        self,
        name: str,
        *,
        sha256: str,
        dtype: str | None = None,
        compared: Mapping[str, str] | None = None,
    ) -> None:
        """Register an expert; one that is already there must be the same checkpoint.

        Args:
            name: its name.
            sha256: ``ExpertSet.sha256(name)``.
            dtype: type its weights are converted to for scoring, such as ``"bfloat16"``; ``None``
                for their own.
            compared: given for a model that experts are only compared with: the hashes of the
                experts it was made from, by name, which must be in the store; empty if of none.
                What is there as an expert stays one; added again without this, it becomes one.

        Raises:
            ValueError: an expert of this name is another checkpoint, or of another type, or one
                that it was made from is not in the store.
        """
        check_name(name, "expert")
        entry = ExpertEntry(sha256, dtype)
        with change_manifest(self.path) as manifest:
            for member, own in (compared or {}).items():
                if manifest.expert(member).sha256 != own:
                    raise ValueError(
                        f"{self.path}: {name!r} was made from another checkpoint than expert "
                        f"{member!r} of this store; make it again"
                    )
            known = manifest.experts.setdefault(name, entry)
            if known is entry:  # what lies there is of one removed before, perhaps of another type
                remove_folder(self.path / "shards" / name)
                if compared is not None:
                    manifest.compared[name] = dict(compared)
            elif known == entry and compared is None:
                manifest.compared.pop(name, None)
        remedy = f"remove_expert({name!r}) and score it again, another name, or another store"
        for key, value in asdict(entry).items():
            stored = asdict(known)[key]
            check_same(f"{self.path}: expert {name!r}", key, stored, value, remedy)

    def add_joint(self, experts: Sequence[str]) -> None:
        """Register experts as a set whose joint features the store may hold.

        Args:
            experts: names of registered experts, in any order.

        Raises:
            ValueError: no expert has one of the names.
        """
        with change_manifest(self.path) as manifest:
            folder = joint_name(manifest, experts)
            if folder not in manifest.joint:
                remove_folder(self.path / "joint" / folder)
            manifest.joint[folder] = sorted(experts)

    def remove_expert(self, name: str) -> None:
        """Delete all that an expert has a part in; nothing of it stays in the store.

        It is gone at once for every reader; if this is killed before the files are deleted, the
        next ``clean`` deletes them.

        Raises:
            ValueError: no expert has this name.
        """
        with change_manifest(self.path) as manifest:
            manifest.expert(name)
            del manifest.experts[name]
            manifest.compared.pop(name, None)
            for folder in [key for key, names in manifest.joint.items() if name in names]:
                del manifest.joint[folder]
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
            for place, known in (("shards", manifest.experts), ("joint", manifest.joint)):
                for folder in (self.path / place).glob("[!.]*"):
                    if folder.name not in known:
                        remove_folder(folder)
                for folder in (self.path / place).glob("[!.]*/[!.]*"):
                    if folder.name not in manifest.corpora:
                        remove_folder(folder)
            for file in (self.path / "offsets").glob("[!.]*.safetensors"):
                if file.stem not in manifest.corpora:
                    file.unlink()

    def copy_to(self, other: LogProbStore) -> None:
        """Write all that this store holds into another one, from its values.

        Args:
            other: a store for the same tokenizer.

        Raises:
            ValueError: a shard is truncated or altered, or the other store has another expert or
                corpus under one of the names.
        """
        known = read_manifest(self.path)
        for corpus, entry in known.corpora.items():
            given = {key: value for key, value in asdict(entry).items() if key not in _COUNTS}
            other.add_corpus(corpus, offsets=self.offsets(corpus), **given)
        for expert, about in known.experts.items():
            other.add_expert(expert, **asdict(about))
        with change_manifest(other.path) as manifest:
            manifest.compared.update(known.compared)
        for members in known.joint.values():
            other.add_joint(members)
        for corpus in known.corpora:
            pairs = [
                (self.joint_shards(members, corpus), other.joint_shards(members, corpus))
                for members in known.joint.values()
            ]
            for expert in known.experts:
                files = (self.path / "shards" / expert / corpus).glob("[!.]*.safetensors")
                for kind in {file.name.split(".")[1] for file in files}:
                    kind = LOG_PROBS if kind == "safetensors" else kind
                    pairs.append(
                        (self.shards(expert, corpus, kind), other.shards(expert, corpus, kind))
                    )
            for mine, theirs in pairs:
                for one, copy in zip(mine, theirs, strict=True):
                    if one.path.exists():
                        copy.write(read_shard(one))

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

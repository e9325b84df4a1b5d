"""Scoring: experts read corpora, and every token's log-probability goes into the store."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.progress import ProgressBar
from robustgate.lm.scoring.forward import check_causal, read_documents
from robustgate.lm.store.features import FeatureSpec
from robustgate.lm.store.log_probs import SLICE_TOKENS, LogProbStore
from robustgate.lm.store.manifest import CorpusEntry
from robustgate.lm.store.shards import LOG_PROBS, Shard
from robustgate.lm.store.windows import plan_share
from robustgate.lm.tokenizer import Tokens, encode


@dataclass(frozen=True)
class _Piece:
    """Some experts reading one slice of a corpus, and the shards that come of it."""

    experts: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def tokens(self) -> int:
        return len(self.experts) * self.shards[0].tokens


def score(
    experts: ExpertSet,
    corpora: Sequence[Corpus],
    store: str | os.PathLike[str],
    *,
    features: FeatureSpec | None = None,
    shard: tuple[int, int] = (1, 1),
    batch_tokens: int = 4096,
    window: int | None = None,
    stride: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    slice_tokens: int = SLICE_TOKENS,
    compared: Mapping[str, str] | None = None,
    progress: bool = True,
) -> LogProbStore:
    """Score every document under every expert and keep the token log-probabilities.

    A document is ``[BOS] + tokens + [EOS]`` and every token but the BOS is scored. A document
    longer than ``window`` is read in windows that move by ``stride``, so that each token sees at
    least ``window - stride`` tokens of its past. What the store already holds is not computed
    again: a run that was killed goes on where it stopped, and its result has the same bits as one
    that was not (on the same machine, with the same threads, ``batch_tokens``, ``device`` and
    ``dtype``), as has that of several runs side by side.

    Args:
        experts: the checkpoints.
        corpora: the documents; their names are those of the domains.
        store: the folder of the store, made if needed.

    Other:
        features: what to keep of every next-token distribution beside the log-probability, for
            gates that read it. With ``jsd`` all experts are in memory at once, else one.
        shard: ``(i, n)``: do the i-th of n parts of the work, i from 1. Any number of processes on
            any machines that see the folder fill one store so, without waiting for each other;
            each is called with the same experts and corpora.
        batch_tokens: the most inputs in one batch, padding included. Logits take at most
            ``batch_tokens * V`` numbers, or ``window * V`` if that is more.
        window: tokens a model reads at once; what the store records for the corpus, or else the
            shortest context among the experts, if left out.
        stride: by how many tokens the window moves, 1 to ``window``; what the store records for
            the corpus, or else half the window, if left out.
        device: where the models run; CUDA if there is one, else the CPU, if left out.
        dtype: type to convert the weights to; what the store records for the expert, or else that
            of each checkpoint, if left out.
        slice_tokens: tokens in one shard, which is what a killed run can lose.
        compared: given if these are models that experts are only compared with; see
            ``LogProbStore.add_expert``.
        progress: show a bar when scoring takes longer than two seconds.

    Returns:
        The store; complete once every part of the work is done.

    Raises:
        ValueError: the store belongs to another tokenizer, holds another corpus or checkpoint
            under one of the names, an expert cannot read ``window`` tokens or looks ahead, two
            corpora have one name, a log-probability is NaN or plus infinity, or an expert was
            removed from the store meanwhile.
        OSError: a shard could not be written; what was complete stays.

    Example:
        >>> experts = ExpertSet.open("experts/")                                # doctest: +SKIP
        >>> store = score(experts, [read_corpus("wiki.txt")], "store/")         # doctest: +SKIP
        >>> store.document_log_probs("wiki").shape                              # doctest: +SKIP
        torch.Size([57, 5])
    """
    if not len(experts):
        raise ValueError("experts: expected at least one, got an empty set")
    names = [corpus.name for corpus in corpora]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"corpora: expected at least one, with different names, got {names}")
    if batch_tokens < 1 or slice_tokens < 1:
        raise ValueError(
            f"batch_tokens, slice_tokens: expected at least 1, got {batch_tokens}, {slice_tokens}"
        )
    part, parts = shard
    if not 1 <= part <= parts:
        raise ValueError(f"shard: expected (i, n) with i from 1 to n, got {shard}")
    target = LogProbStore.create(store, experts.tokenizer_sha256)
    target.clean()
    encoded = {}
    for corpus in corpora:
        encoded[corpus.name] = encode(experts.tokenizer, corpus.documents, progress=progress)
        known = target.corpus(corpus.name) if corpus.name in target.corpora else None
        width, step = _window(experts, window, stride, known)
        target.add_corpus(
            corpus.name,
            sha256=corpus.sha256,
            offsets=encoded[corpus.name].gold_offsets,
            window=width,
            stride=step,
            slice_tokens=known.slice_tokens if known else slice_tokens,
        )
    for expert in experts.names:
        recorded = target.expert(expert).dtype if expert in target.experts else None
        target.add_expert(
            expert,
            sha256=experts.sha256(expert, progress=progress),
            dtype=recorded if dtype is None else str(dtype).removeprefix("torch."),
            compared=compared,
        )
    wanted = FeatureSpec() if features is None else features
    if wanted.jsd:
        target.add_joint(experts.names)
    pieces = _pieces(target, experts, sorted(encoded), wanted)
    own = plan_share([piece.tokens for piece in pieces], part, parts)
    _fill(
        target, experts, encoded, wanted, [pieces[i] for i in own], batch_tokens, device, progress
    )
    return target


def _window(
    experts: ExpertSet, window: int | None, stride: int | None, known: CorpusEntry | None
) -> tuple[int, int]:
    """Return the window and the stride to use, if every expert can read so many tokens."""
    if window is None:
        window = experts.context if known is None else known.window
    if not 1 <= window <= experts.context:
        raise ValueError(
            f"window: expected 1 to {experts.context}, the shortest context among the experts, got "
            f"{window}; a corpus that the store holds keeps its window, so score these experts "
            "into another store"
        )
    if stride is None:
        stride = known.stride if known and known.window == window else max(1, window // 2)
    if not 1 <= stride <= window:
        raise ValueError(f"stride: expected 1 to {window}, the window, got {stride}")
    return window, stride


def _pieces(
    store: LogProbStore, experts: ExpertSet, corpora: Sequence[str], spec: FeatureSpec
) -> list[_Piece]:
    """Return all the work, in an order that every process finds the same."""
    names = sorted(experts.names)
    kinds = (LOG_PROBS, *spec.kinds)
    pieces = []
    for group in [tuple(names)] if spec.jsd else [(name,) for name in names]:
        for corpus in corpora:
            files = [store.shards(name, corpus, kind) for name in group for kind in kinds]
            if spec.jsd:
                files.append(store.joint_shards(group, corpus))
            pieces += [_Piece(group, shards) for shards in zip(*files, strict=True)]
    return pieces


def _fill(
    store: LogProbStore,
    experts: ExpertSet,
    encoded: dict[str, Tokens],
    spec: FeatureSpec,
    pieces: Sequence[_Piece],
    batch_tokens: int,
    device: torch.device | str | None,
    progress: bool,
) -> None:
    """Compute and write the shards that are missing; in memory are one piece's experts."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = [piece for piece in pieces if not all(shard.sound() for shard in piece.shards)]
    total = sum(piece.tokens for piece in pieces)
    done = total - sum(piece.tokens for piece in missing)
    with ProgressBar("score", total, done=done, show=progress) as bar:
        for group, work in groupby(missing, lambda piece: piece.experts):
            bar.describe(f"score {group[0] if len(group) == 1 else 'all experts'}")
            models = []
            for name in group:
                dtype = store.expert(name).dtype
                kept = None if dtype is None else getattr(torch, dtype)
                models.append(experts.load(name, device=device, dtype=kept))
                check_causal(models[-1], name)
            for piece in work:
                corpus = store.corpus(piece.shards[0].corpus)
                columns, together = read_documents(
                    models,
                    encoded[piece.shards[0].corpus].documents(*piece.shards[0].documents),
                    spec,
                    vocab_size=experts.vocab_size,
                    window=corpus.window,
                    stride=corpus.stride,
                    batch_tokens=batch_tokens,
                    bar=bar,
                )
                for shard in piece.shards:
                    if not shard.sound():
                        own = columns[group.index(shard.experts[0])]
                        shard.write((together if shard.kind in together else own)[shard.kind])

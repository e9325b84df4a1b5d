"""Scoring: experts read corpora, and every token's log-probability goes into the store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby

import torch

from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.forward import check_causal, token_log_probs
from robustgate.lm.manifest import CorpusEntry
from robustgate.lm.progress import ProgressBar
from robustgate.lm.store import SLICE_TOKENS, LogProbStore
from robustgate.lm.tokenizer import Tokens, encode


def score(
    experts: ExpertSet,
    corpora: Sequence[Corpus],
    store: str | os.PathLike[str],
    *,
    batch_tokens: int = 4096,
    window: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    slice_tokens: int = SLICE_TOKENS,
    progress: bool = True,
) -> LogProbStore:
    """Score every document under every expert and keep the token log-probabilities.

    A document is ``[BOS] + tokens + [EOS]`` and every token but the BOS is scored. A document
    longer than ``window`` is read in windows that move by half a window, so that each token sees
    at least half a window of its past. What the store already holds is not computed again: a run
    that was killed goes on where it stopped, and its result has the same bits as one that was not
    (on the same machine, with the same threads, ``batch_tokens``, ``device`` and ``dtype``).

    Args:
        experts: the checkpoints.
        corpora: the documents; their names are those of the domains.
        store: the folder of the store, made if needed.

    Other:
        batch_tokens: the most inputs in one batch, padding included. Logits take at most
            ``batch_tokens * V`` numbers, or ``window * V`` if that is more.
        window: tokens a model reads at once; what the store records for the corpus, or else the
            shortest context among the experts, if left out.
        device: where the models run; CUDA if there is one, else the CPU, if left out.
        dtype: the weights' type; that of each checkpoint if left out.
        slice_tokens: tokens in one shard, which is what a killed run can lose.
        progress: show a bar when scoring takes longer than two seconds.

    Returns:
        The store.

    Raises:
        ValueError: the store belongs to another tokenizer, holds another corpus or checkpoint
            under one of the names, an expert cannot read ``window`` tokens or looks ahead, two
            corpora have one name, or a log-probability is NaN or plus infinity.
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
    target = LogProbStore.create(store, experts.tokenizer_sha256)
    target.clean()
    encoded = {}
    for corpus in corpora:
        encoded[corpus.name] = encode(experts.tokenizer, corpus.documents, progress=progress)
        known = target.corpus(corpus.name) if corpus.name in target.corpora else None
        width = _window(experts, window, known)
        target.add_corpus(
            corpus.name,
            sha256=corpus.sha256,
            offsets=encoded[corpus.name].gold_offsets,
            window=width,
            stride=max(1, width // 2),
            slice_tokens=known.slice_tokens if known else slice_tokens,
        )
    for expert in experts.names:
        target.add_expert(expert, sha256=experts.sha256(expert, progress=progress))
    _fill(target, experts, encoded, batch_tokens, device, dtype, progress)
    return target


def _window(experts: ExpertSet, window: int | None, known: CorpusEntry | None) -> int:
    """Return the window to use, if every expert can read so many tokens."""
    if window is None:
        window = experts.context if known is None else known.window
    if not 1 <= window <= experts.context:
        raise ValueError(
            f"window: expected 1 to {experts.context}, the shortest context among the experts, got "
            f"{window}; a corpus that the store holds keeps its window, so score these experts "
            "into another store"
        )
    return window


def _fill(
    store: LogProbStore,
    experts: ExpertSet,
    encoded: dict[str, Tokens],
    batch_tokens: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    progress: bool,
) -> None:
    """Compute and write the shards that are missing, one expert in memory at a time."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    shards = [
        shard
        for expert in experts.names
        for corpus in encoded
        for shard in store.shards(expert, corpus)
    ]
    missing = [shard for shard in shards if not shard.sound()]
    total = sum(shard.tokens for shard in shards)
    done = total - sum(shard.tokens for shard in missing)
    with ProgressBar("score", total, done=done, show=progress) as bar:
        for expert, work in groupby(missing, lambda shard: shard.expert):
            bar.describe(f"score {expert}")
            model = experts.load(expert, device=device, dtype=dtype)
            check_causal(model, expert)
            for shard in work:
                entry = store.corpus(shard.corpus)
                log_probs = token_log_probs(
                    model,
                    encoded[shard.corpus].documents(*shard.documents),
                    vocab_size=experts.vocab_size,
                    window=entry.window,
                    stride=entry.stride,
                    batch_tokens=batch_tokens,
                    bar=bar,
                )
                shard.write(log_probs)

"""Topic switches: documents whose second half comes from another domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from robustgate.lm.evaluation.findings import SwitchResult, TopicSwitch
from robustgate.lm.evaluation.systems import ORACLE, STATIC, Contest
from robustgate.lm.gates.weigh import token_log_probs
from robustgate.lm.store.batches import Batch, first_documents
from robustgate.ops import mixture_log_prob

_REACH = (-4, 16)
"""Bins shown around the switch."""


def topic_switch(
    contest: Contest,
    domains: Sequence[str],
    best: Mapping[str, str],
    *,
    documents: int = 64,
    width: int = 8,
) -> TopicSwitch | None:
    """Judge the causal gates on documents that change their domain half way.

    Document i of each domain gives its first half, document i of another domain its second half,
    the other domains taking turns. Log-probabilities and features are those of the two documents,
    each read from its beginning; the gate is not told of the switch.

    Args:
        contest: The systems and the scores.
        domains: Names of corpora in the store.
        best: The oracle's choice for each domain.

    Other:
        documents: Glued documents for each domain, at most.
        width: Tokens in a bin of the excess around the switch.

    Returns:
        The losses of the oracle, the static mixture and every causal gate; ``None`` if there is a
        single domain, or no document with two tokens.
    """
    if len(domains) < 2:
        return None
    features = contest.spec.features
    read = [
        first_documents(contest.store, domain, contest.experts, documents, features)
        for domain in domains
    ]
    found = _glue(read, [contest.experts.index(best[domain]) for domain in domains])
    if found is None:
        return None
    glued, middles, oracle = found
    own = glued.log_probs.double()
    losses = {
        ORACLE: -own.gather(1, oracle.unsqueeze(1)).squeeze(1),
        STATIC: -mixture_log_prob(own, torch.zeros(own.shape[1], dtype=torch.float64)),
    }
    for name, gate in contest.causal_gates().items():
        losses[name] = -token_log_probs(gate, glued)
    shown = contest.kinds()
    distance = torch.arange(len(own)) - torch.repeat_interleave(
        glued.offsets[:-1] + middles, glued.offsets.diff()
    )  # [T], from the switch
    bins = [b for b in range(*_REACH) if _enough(distance, b, width, len(middles))]
    return TopicSwitch(
        len(middles),
        tuple(b * width for b in bins),
        width,
        tuple(
            _result(name, loss, loss - losses[ORACLE], distance, bins, width)
            for name, loss in losses.items()
            if name in shown
        ),
    )


def _glue(
    read: Sequence[Batch],
    best: Sequence[int],
) -> tuple[Batch, Tensor, Tensor] | None:
    """Return the glued documents, the middle of each, and the oracle's choice by token."""
    pieces: list[tuple[int, slice]] = []  # domain, rows
    for d, batch in enumerate(read):
        for i in range(len(batch.offsets) - 1):
            e = (d + 1 + i % (len(read) - 1)) % len(read)
            if i < len(read[e].offsets) - 1:
                start, end = batch.offsets[i : i + 2].tolist()
                other, last = read[e].offsets[i : i + 2].tolist()
                halves = slice(start, (start + end) // 2), slice((other + last + 1) // 2, last)
                if all(half.start < half.stop for half in halves):
                    pieces += zip((d, e), halves, strict=True)
    if not pieces:
        return None
    features = [batch.features for batch in read if batch.features is not None]
    lengths = torch.tensor([half.stop - half.start for _, half in pieces])
    ends = lengths.cumsum(0)[1::2]
    return (
        Batch(
            torch.cat([read[d].log_probs[half] for d, half in pieces]),
            torch.cat([ends.new_zeros(1), ends]),
            torch.cat([features[d][half] for d, half in pieces]) if features else None,
        ),
        lengths[::2],
        torch.tensor([best[d] for d, _ in pieces]).repeat_interleave(lengths),
    )


def _enough(distance: Tensor, number: int, width: int, documents: int) -> bool:
    """Whether half of the documents reach into a bin."""
    return int((distance == number * width).sum()) * 2 >= documents


def _result(
    name: str,
    loss: Tensor,  # [T]
    excess: Tensor,  # [T]
    distance: Tensor,  # [T]
    bins: Sequence[int],
    width: int,
) -> SwitchResult:
    number = distance.div(width, rounding_mode="floor")
    return SwitchResult(
        name,
        float(loss[distance < 0].mean()),
        float(loss[distance >= 0].mean()),
        tuple(float(excess[number == b].mean()) for b in bins),
    )

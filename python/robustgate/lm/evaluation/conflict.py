"""Why combine experts: how far they are apart, and how a single model's gradients collide.

Unlike the rest of the evaluation this runs models, on a few tokens of every domain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustgate.game import gradient_conflict, interference
from robustgate.lm.corpus import Corpus
from robustgate.lm.evaluation.findings import Conflict, Divergence
from robustgate.lm.experts import ExpertSet
from robustgate.lm.tokenizer import encode

_LOGITS = 1 << 28
"""Numbers held at once: the logits of all experts on all domains, 1 GiB."""
_DOCUMENTS = 64
"""Documents of a domain that are looked at, at most."""


@torch.inference_mode()
def expert_divergence(
    experts: ExpertSet, corpora: Sequence[Corpus], *, tokens: int = 256
) -> Divergence:
    """Measure how far the experts' next-token distributions are from each other.

        JSD_w(p_1, ..., p_K) = sum_k w_k KL(p_k || m),   m = sum_k w_k p_k,   w_k = 1/K

    averaged over the contexts of the beginnings of documents: for each pair, and for all together.

    Args:
        experts: The K experts; one is in memory at a time.
        corpora: One corpus per domain.

    Other:
        tokens: Of each domain, at most; fewer where the logits of all would exceed 1 GiB.

    Returns:
        The divergences, in nats per token.
    """
    room = _LOGITS // (len(experts) * len(corpora) * experts.vocab_size)
    count = max(1, min(tokens, room))
    texts = [_beginnings(experts, corpus, count) for corpus in corpora]
    logits: list[list[Tensor]] = [[] for _ in corpora]  # D x K x [N, V]
    for name in experts.names:
        model = experts.load(name)
        for own, text in zip(logits, texts, strict=True):
            rows = [
                model(input_ids=ids[:-1].unsqueeze(0), use_cache=False).logits[0] for ids in text
            ]
            own.append(torch.cat(rows)[:, : experts.vocab_size].float().contiguous())
    names = [corpus.name for corpus in corpora]
    found = interference(dict(zip(names, logits, strict=True)))
    return Divergence(
        min(len(own[0]) for own in logits),
        tuple(tuple(tuple(row) for row in found.pairwise[name].tolist()) for name in names),
        tuple(found.together[name] for name in names),
    )


def monolith_conflict(
    monolith: ExpertSet, corpora: Sequence[Corpus], *, tokens: int = 512
) -> Conflict:
    """Measure how far the gradients of one model's losses on several domains pull apart.

    Args:
        monolith: A set of one model.
        corpora: One corpus per domain.

    Other:
        tokens: Of each domain, at most.

    Returns:
        Cosines between the domains' gradients; see ``robustgate.game.gradient_conflict``.
    """
    (name,) = monolith.names
    model = monolith.load(name).requires_grad_(True)
    losses = {}
    for corpus in corpora:
        text = _beginnings(monolith, corpus, tokens)
        nats = [
            torch.nn.functional.cross_entropy(
                model(input_ids=ids[:-1].unsqueeze(0), use_cache=False).logits[0].float(),
                ids[1:],
                reduction="sum",
            )
            for ids in text
        ]
        losses[corpus.name] = torch.stack(nats).sum() / sum(len(ids) - 1 for ids in text)
    found = gradient_conflict(losses, model.parameters())
    return Conflict(
        name, tokens, tuple(tuple(row) for row in found.cosine.tolist()), found.negative_share
    )


def _beginnings(experts: ExpertSet, corpus: Corpus, tokens: int) -> list[Tensor]:
    """Return the beginnings of documents, ``tokens`` predictions in all, as ids with BOS."""
    encoded = encode(experts.tokenizer, corpus.documents[:_DOCUMENTS])
    share = min(experts.context, max(2, tokens // 8))  # of one document: at least eight of them
    texts, missing = [], tokens
    for start, end in zip(encoded.offsets[:-1].tolist(), encoded.offsets[1:].tolist(), strict=True):
        if missing > 0:
            length = min(end - start, share + 1, missing + 1)
            texts.append(encoded.ids[start : start + length])
            missing -= length - 1
    return texts

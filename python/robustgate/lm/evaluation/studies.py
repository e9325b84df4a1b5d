"""What-if questions that the scores of whole documents answer: removals, and known mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from robustgate.game import Vertices, robust_prior
from robustgate.lm.evaluation.findings import Forgetting, PairCurve
from robustgate.lm.evaluation.systems import ORACLE, DomainLosses
from robustgate.ops import mixture_log_prob

_SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 1.0)
_ALL_PAIRS = 6
"""Up to so many domains every pair has a curve; of more, each domain and the next."""
_DOCUMENTS = 2000


def forgetting(
    experts: Sequence[str],
    prior: Tensor,  # [K]
    losses: Sequence[DomainLosses],
) -> Forgetting | None:
    """Return what the certified mixture loses on each domain when each expert is taken out.

        log sum_{j != k} w_j / (1 - w_k) exp L_j(x)

    The survivors' weights are renormalised and nothing is fitted again, as after an opt-out.

    Args:
        experts: The K experts.
        prior: The certified prior ``w``, ``[K]``.
        losses: Of every domain.

    Returns:
        Nats per token; ``None`` for a single expert.
    """
    if len(experts) < 2:
        return None
    whole, without = [], []
    for own in losses:
        tokens = float(own.lengths.sum())
        whole.append(-float(mixture_log_prob(own.log_probs, prior.log()).sum()) / tokens)
        row = []
        for k in range(len(experts)):
            left = [j for j in range(len(experts)) if j != k]
            weights = prior[left]
            if float(weights.sum()) == 0.0:
                weights = torch.ones_like(weights)
            mixture = mixture_log_prob(own.log_probs[:, left], weights.log())
            row.append(-float(mixture.sum()) / tokens)
        without.append(tuple(row))
    return Forgetting(tuple(experts), tuple(whole), tuple(without))


def pair_curves(losses: Sequence[DomainLosses]) -> tuple[PairCurve, ...]:
    """Return the excess of the best fixed weights for mixtures of two domains, by their shares.

    Args:
        losses: Of every domain; its first 2,000 documents are used.

    Returns:
        A curve for each pair of up to six domains; of more, for each domain and the next.
    """
    pairs = list(combinations(losses, 2))
    if len(losses) > _ALL_PAIRS:
        pairs = [(one, losses[i - 1]) for i, one in enumerate(losses)]
    return tuple(
        PairCurve(
            one.domain,
            two.domain,
            _SHARES,
            tuple(_tuned(one, two, share) for share in _SHARES),
        )
        for one, two in pairs
    )


def _tuned(one: DomainLosses, two: DomainLosses, share: float) -> float:
    """Return ``e(s)`` of ``PairCurve``."""
    log_probs = {own.domain: own.log_probs[:_DOCUMENTS] for own in (one, two)}
    oracle = {own.domain: float(own.nll[ORACLE][:_DOCUMENTS].mean()) for own in (one, two)}
    known = Vertices([[1.0 - share, share]])
    return robust_prior(log_probs, baseline=oracle, mixtures=known, tol=1e-4).value

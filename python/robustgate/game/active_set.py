"""Which experts and which domains decide a robust prior."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robustgate.game.robust_prior import RobustPrior


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """What matters in a solution, made by :func:`active_set`.

    Attributes:
        experts: indices of the experts in use.
        domains: names of the domains in the least favourable mixture.
        prices: ``a_k = sum_d lambda_d E_d[pi_k / pi_w]``, ``[K]``: 1 for experts in use; below 1
            for the others, and the further below the further from being of use.
        slacks: worst case minus ``l_d(w)``, ``[D]`` nats: 0 for the domains that bind (over the
            whole simplex), and how much worse another may become before it does.
    """

    experts: tuple[int, ...]
    domains: tuple[str, ...]
    prices: Tensor
    slacks: Tensor


def active_set(solution: RobustPrior, threshold: float = 1e-3) -> ActiveSet:
    """Report the experts and domains with a weight of at least ``threshold``.

    An expert that was not in the game lowers its value only if its price, computed at this ``w``
    and ``lambda``, exceeds 1. A small weight is not a small role: a document that no other expert
    explains can depend on it. What leaving an expert out costs, solving without it tells.

    Args:
        solution: of :func:`robust_prior`.
        threshold: in (0, 1].

    Returns:
        An :class:`ActiveSet`.

    Raises:
        ValueError: ``threshold`` out of range, or above the weight of every expert.

    Example:
        >>> import torch
        >>> from robustgate.game import active_set, robust_prior
        >>> likelihoods = {
        ...     "a": torch.tensor([[1.0, 0.5, 0.1]]),
        ...     "b": torch.tensor([[0.2, 1.0, 0.1]]),
        ...     "easy": torch.tensor([[1.0, 1.0, 1.0]]),
        ... }
        >>> log_probs = {domain: matrix.log() for domain, matrix in likelihoods.items()}
        >>> report = active_set(robust_prior(log_probs, baseline="raw"))
        >>> report.experts, report.domains, round(report.slacks[2].item(), 4)
        ((0, 1), ('a', 'b'), 0.3677)

    Source: docs/theory.md, "What matters".
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold: expected a number in (0, 1], got {threshold}")
    prior = solution.prior.tolist()
    experts = tuple(k for k, weight in enumerate(prior) if weight >= threshold)
    if not experts:
        raise ValueError(f"threshold: no expert has a weight of {threshold}; largest: {max(prior)}")
    named = zip(solution.domains, solution.mixture.tolist(), strict=True)
    return ActiveSet(
        experts=experts,
        domains=tuple(name for name, weight in named if weight >= threshold),
        prices=solution.prices,
        slacks=float(solution.losses.amax()) - solution.losses,
    )

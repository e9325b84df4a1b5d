"""Accelerated Blahut-Arimoto: mirror ascent on a concave function of the mixture.

    lambda <- argmax_{lambda' in Lambda} step lambda' . l(lambda) - KL(lambda' || lambda)

climbs ``phi(lambda) = lambda . l(lambda)`` where ``l`` is its gradient and ``phi`` falls short of
its tangents by no more than ``KL(lambda' || lambda)``. The capacity and the value of the exact game
are such functions: a step of 1 never loses, and after T of them ``max phi - phi <= log D / T``. The
step grows while the value rises and returns to 1 when it drops.

Source: Blahut (1972), Arimoto (1972); Beck and Teboulle (2003) for mirror steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from robustgate.game.mixtures import TINY, MixtureSet

_STEP_GROWTH: Final = 1.5
_MAX_STEP: Final = 1e9

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


class Ascent(NamedTuple):
    """Where the ascent ended, one entry for each problem of the leading dimensions."""

    mixture: Tensor  # [..., D]
    losses: Tensor  # [..., D]    gradient there
    value: Tensor  # [...]        phi, a lower bound on its maximum
    upper: Tensor  # [...]        max_{lambda' in Lambda} lambda' . l, an upper bound
    iterations: Tensor  # [...]   int64


def ascend(
    evaluate: Evaluate,
    start: Tensor,  # [..., D]
    mixtures: MixtureSet,
    tol: float,
    max_iterations: int,
) -> Ascent:
    """Climb until ``upper - value <= tol`` for every problem, or until the budget is spent.

    Args:
        evaluate: takes mixtures ``[..., D]``, returns losses ``[..., D]`` and values ``[...]``.
        start: positive wherever a mixture of the set is.
        mixtures: the set Lambda.
        tol: gap to reach.
        max_iterations: evaluations after the first.
    """
    smallest = TINY * (start > 0).to(start)  # a weight of exactly 0 would never come back
    mixture = start
    losses, value = evaluate(mixture)
    upper, _ = mixtures.worst_case(losses)
    step = torch.ones_like(value)
    iterations = torch.zeros_like(value, dtype=torch.int64)
    for _ in range(max_iterations):
        active = upper - value > tol
        if not bool(active.any()):
            break
        iterations += active
        proposal = mixtures.mirror_step(mixture, losses, step).maximum(smallest)
        proposed_losses, proposed_value = evaluate(proposal)
        dropped = (step > 1.0) & (proposed_value < value)
        moved = active & ~dropped
        mixture = torch.where(moved.unsqueeze(-1), proposal, mixture)
        losses = torch.where(moved.unsqueeze(-1), proposed_losses, losses)
        value = torch.where(moved, proposed_value, value)
        upper = torch.where(moved, mixtures.worst_case(losses)[0], upper)
        step = torch.where(dropped, 1.0, (step * _STEP_GROWTH).clamp(max=_MAX_STEP))
    return Ascent(mixture, losses, value, upper, iterations)


def nearest_to_uniform(mixtures: MixtureSet, like: Tensor) -> Tensor:  # [..., D] -> [..., D]
    """Return the mixture of the set nearest to uniform, where the ascent starts."""
    uniform = torch.full_like(like, 1.0 / like.shape[-1])
    return mixtures.mirror_step(uniform, torch.zeros_like(like), 1.0)

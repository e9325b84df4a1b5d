"""Newton's method with a logarithmic barrier: the last digits of a concave game on the simplex.

Blahut-Arimoto slows down where a weight is to vanish although its loss is nearly the largest. Here

    max_q  phi(q) + nu sum_j log q_j,   sum_j q_j = 1

is climbed for falling ``nu``; at its maximum every loss is ``c - nu / q_j`` for one c, so that the
gap ``max_j l_j - q . l`` is at most ``J nu``. A step solves one dense system of size J.

Source: Boyd and Vandenberghe, Convex Optimization (2004), chapter 11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

_BARRIER_SHARE: Final = 0.3  # J nu ends at this share of tol
_REDUCTION: Final = 0.1  # of nu, once centred
_CENTRED: Final = 0.3  # squared Newton decrement over nu below which a point counts as centred
_BOUNDARY_FRACTION: Final = 0.95  # how much of the way to the boundary a step may go
_SUFFICIENT: Final = 1e-4  # share of the predicted gain that a step must bring
_SHORTEST: Final = 1e-9  # a step that has to be shorter has met the rounding of phi
_MOST_STEPS: Final = 300  # ten times what hard games take; beyond it only rounding moves


class Slope(NamedTuple):
    """A concave function at a point of the simplex, one entry for each game."""

    losses: Tensor  # [..., J]        gradient
    value: Tensor  # [...]            phi
    curvature: Tensor  # [..., J, J]  minus the Hessian


def barrier_newton(
    evaluate: Callable[[Tensor], Slope],
    start: Tensor,  # [..., J]
    tol: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:  # [..., J], [...]
    """Climb to a gap of ``tol`` and return the weights of least gap seen, and the evaluations.

    Args:
        evaluate: takes weights ``[..., J]``.
        start: ``[..., J]``, on the simplex.
        tol: gap to reach.
        max_iterations: evaluations after the first.
    """
    count = start.shape[-1]
    weights = 0.9 * start + 0.1 / count  # away from the boundary
    slope = evaluate(weights)
    best, gap = start, torch.full_like(slope.value, torch.inf)
    found = _gap(slope)
    nu = (found / count).clamp(min=_BARRIER_SHARE * tol / count)
    shrink = torch.ones_like(nu)
    direction, decrement = _newton_direction(weights, slope, nu)
    iterations = torch.zeros_like(nu, dtype=torch.int64)
    for _ in range(min(max_iterations, _MOST_STEPS)):
        best = torch.where((found < gap).unsqueeze(-1), weights, best)
        gap = gap.minimum(found)
        active = (gap > tol) & (shrink > _SHORTEST)
        if not bool(active.any()):
            break
        iterations += active
        longest = _BOUNDARY_FRACTION / (-direction).amax(dim=-1).clamp(min=_BOUNDARY_FRACTION)
        step = (shrink * longest).unsqueeze(-1)
        proposal = weights * (1.0 + step * direction)
        proposal = proposal / proposal.sum(dim=-1, keepdim=True)
        after = evaluate(proposal)
        gain = _objective(proposal, after, nu) - _objective(weights, slope, nu)
        # Near the maximum the gain drowns in the rounding of phi, of order 1e-15.
        enough = gain >= _SUFFICIENT * step.squeeze(-1) * decrement - 1e-14
        weights = torch.where(enough.unsqueeze(-1), proposal, weights)
        slope = Slope(
            torch.where(enough.unsqueeze(-1), after.losses, slope.losses),
            torch.where(enough, after.value, slope.value),
            torch.where(enough[..., None, None], after.curvature, slope.curvature),
        )
        found = _gap(slope)
        shrink = torch.where(enough, 1.0, 0.5 * shrink)
        direction, decrement = _newton_direction(weights, slope, nu)
        centred = enough & (decrement <= _CENTRED * nu)
        lower = (_REDUCTION * nu).clamp(min=_BARRIER_SHARE * tol / count)
        nu = torch.where(centred, lower, nu)
        direction, decrement = _newton_direction(weights, slope, nu)
    return best, iterations


def _gap(slope: Slope) -> Tensor:  # [...]
    return slope.losses.amax(dim=-1) - slope.value


def _objective(weights: Tensor, slope: Slope, nu: Tensor) -> Tensor:  # [..., J], [...] -> [...]
    return slope.value + nu * weights.log().sum(dim=-1)


def _newton_direction(
    weights: Tensor,  # [..., J]
    slope: Slope,
    nu: Tensor,  # [...]
) -> tuple[Tensor, Tensor]:  # [..., J], [...]
    """Return the relative change ``dq / q`` of a Newton step, and the gain it predicts, twice.

    Scaling by q bounds the matrix from below by nu, however small a weight becomes.
    """
    identity = torch.eye(weights.shape[-1], dtype=weights.dtype)
    matrix = weights.unsqueeze(-1) * slope.curvature * weights.unsqueeze(-2)
    matrix = matrix + nu[..., None, None] * identity
    centred = slope.losses - (weights * slope.losses).sum(dim=-1, keepdim=True)
    right = torch.stack([weights * centred + nu.unsqueeze(-1), weights], dim=-1)  # [..., J, 2]
    # A singular system gives a direction that is not finite: its steps are refused, and it ends.
    free, normal = torch.linalg.solve_ex(matrix, right).result.unbind(dim=-1)
    level = (weights * free).sum(dim=-1) / (weights * normal).sum(dim=-1)
    direction = free - level.unsqueeze(-1) * normal
    return direction, (direction * (matrix @ direction.unsqueeze(-1)).squeeze(-1)).sum(dim=-1)

"""Clip weights between bounds and scale them to sum to 1: an information projection onto a box.

    m = clip(weights / mu, lower, upper),   mu >= 0 such that sum m = 1

minimises ``KL(weights || m)``, and equally ``KL(m || weights)``, over the ``m`` with
``lower <= m <= upper`` and sum 1. The first gives the exact game's model, the second the mirror
step of mixture sets with bounds.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_SUM_TOLERANCE: Final = 1e-13  # of sum m; a sum of 10^6 doubles is exact to about 1e-15
_MAX_STEPS: Final = 300
_LARGEST: Final = 1e307  # of a bracket's point: 1 / 1e307 and twice it are still finite
_NEWTON_STEPS: Final = 12  # after these, every second step halves the bracket instead


def clip_to_one(
    weights: Tensor,  # [..., N]
    lower: Tensor,  # [..., N]
    upper: Tensor,  # [..., N]
    start: Tensor | None = None,  # [...]
) -> tuple[Tensor, Tensor]:  # [..., N], [...]
    """Return ``clip(weights / mu, lower, upper)`` that sums to 1, and ``mu``.

    - If not even ``upper`` wherever ``weights > 0`` adds up to 1, ``mu = 0``, and what is missing
      is shared out where ``weights = 0``, in proportion to ``upper - lower``.
    - If every entry is clipped, all ``mu`` of an interval fit; its point nearest 1 is returned.

    Args:
        weights: ``[..., N]`` float64, non-negative.
        lower: ``[..., N]`` float64, non-negative, of sum at most 1.
        upper: ``[..., N]`` float64, ``>= lower``, of sum at least 1.
        start: ``[...]`` float64, a guess of ``mu``; 1 where it is 0 or absent.
    """
    positive = weights > 0
    saturated = torch.where(positive, upper, lower)
    reach = saturated.sum(dim=-1)
    clipped, mu = scale_to_one(weights, lower, upper, reach, start)
    reached = (clipped.sum(dim=-1) - 1.0).abs() <= 1e-9  # not where mu underflows
    mu = torch.where(reached, _nearest_one(weights, lower, upper, mu), mu)
    clipped = torch.where((mu > 0).unsqueeze(-1), clipped, saturated)
    return fill_to_one(clipped, lower, upper), mu


def scale_to_one(
    weights: Tensor,  # [..., N]
    lower: Tensor,  # [..., N]
    upper: Tensor,  # [..., N]
    reach: Tensor,  # [...]
    start: Tensor | None = None,  # [...]
) -> tuple[Tensor, Tensor]:  # [..., N], [...]
    """:func:`clip_to_one` without its special cases: the iteration alone.

    The sum is a piecewise linear, rising function of ``1 / mu``: Newton's method, kept inside a
    bracket, ends on the right piece after finitely many steps, one or two from a good start.

    Args:
        weights, lower, upper, start: as there.
        reach: the sum of ``upper`` where ``weights > 0`` and of ``lower`` elsewhere. Where it is
            below 1, ``mu = 0`` is returned with some clipped weights or other.
    """
    short = (reach < 1.0 - _SUM_TOLERANCE).unsqueeze(-1)  # [..., 1]
    scale = torch.ones_like(reach).unsqueeze(-1)  # 1 / mu
    if start is not None:
        guess = start.unsqueeze(-1)
        scale = torch.where(guess > 0, 1.0 / guess, scale)
    low, high = torch.zeros_like(scale), torch.full_like(scale, torch.inf)
    growth = 2.0
    for count in range(_MAX_STEPS):
        scaled = weights * scale
        clipped = torch.clamp(scaled, lower, upper)
        missing = 1.0 - clipped.sum(dim=-1, keepdim=True)
        done = short | (missing.abs() <= _SUM_TOLERANCE)
        if bool(done.all()):
            break
        slope = torch.where(clipped == scaled, weights, 0.0).sum(dim=-1, keepdim=True)
        low = torch.where(missing > 0, scale, low)
        high = torch.where(missing < 0, scale, high)
        newton = scale + missing / slope  # slope 0: infinite, and refused below
        bisection = bracket_middle(low, high, scale, growth)
        growth = min(growth * growth, 1e64)
        trusted = (newton > low) & (newton < high)
        if count >= _NEWTON_STEPS and count % 2:
            trusted = torch.zeros_like(trusted)
        scale = torch.where(done, scale, torch.where(trusted, newton, bisection))
    return clipped, torch.where(short, 0.0, 1.0 / scale).squeeze(-1)


def bracket_middle(
    low: Tensor,  # [...]
    high: Tensor,  # [...]
    point: Tensor,  # [...]
    growth: float,
) -> Tensor:  # [...]
    """Return the geometric middle of a bracket; where it has an end at 0 or infinity yet, move on.

    Args:
        low: 0, or the largest point known to be too small.
        high: infinite, or the smallest point known to be too large.
        point: the last one tried.
        growth: the factor to move by.
    """
    middle = low.sqrt() * high.sqrt()
    middle = torch.where(high.isinf(), (point * growth).clamp(max=_LARGEST), middle)
    return torch.where(low == 0, point / growth, middle)


def fill_to_one(
    clipped: Tensor,  # [..., N], between lower and upper
    lower: Tensor,  # [..., N]
    upper: Tensor,  # [..., N]
) -> Tensor:  # [..., N]
    """Move every entry the same share of the way to its bound, so that the sum becomes 1."""
    missing = 1.0 - clipped.sum(dim=-1, keepdim=True)
    room = torch.where(missing > 0, upper - clipped, clipped - lower)
    total = room.sum(dim=-1, keepdim=True)
    share = torch.where(total > 0, missing / total, 0.0).clamp(-1.0, 1.0)
    return torch.clamp(clipped + share * room, lower, upper)


def _nearest_one(
    weights: Tensor,  # [..., N]
    lower: Tensor,  # [..., N]
    upper: Tensor,  # [..., N]
    mu: Tensor,  # [...]
) -> Tensor:  # [...]
    """Return ``mu``, or the point nearest 1 of the interval that clips every entry as it does."""
    level = mu.unsqueeze(-1)
    above, below = weights >= level * upper, weights <= level * lower
    inside = ~(above | below).all(dim=-1)
    fixed = (weights == 0) | (lower == upper)
    most = torch.where(fixed | ~above, torch.inf, weights / upper).amin(dim=-1)
    least = torch.where(fixed | ~below, 0.0, weights / lower).amax(dim=-1)
    nearest = torch.ones_like(mu).clamp(min=least, max=most)
    return torch.where(inside | (mu == 0), mu, nearest)

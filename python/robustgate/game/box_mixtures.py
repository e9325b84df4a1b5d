"""Mixture sets with bounds on every weight: ``Lambda = {lower <= lambda <= upper, sum = 1}``.

The worst case fills the domains up to their bounds, worst loss first. The mirror step is the
exponentiated-gradient step, clipped between the bounds and scaled to sum to 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from robustgate.game.clipping import clip_to_one
from robustgate.game.mixtures import MixtureSet, expected_loss, exponentiated, sums_to_one

_MOST_DOMAINS: Final = 10  # up to which extreme points are listed: at most a thousand or so


class _Bounded(MixtureSet):
    """What :class:`Floor`, :class:`Box` and :class:`CVaR` share."""

    def _bounds(self, losses: Tensor) -> tuple[Tensor, Tensor]:  # [..., D] -> [D], [D]
        raise NotImplementedError

    def worst_case(
        self,
        losses: Tensor,  # [..., D]
    ) -> tuple[Tensor, Tensor]:  # [...], [..., D]
        """Return ``max lambda . l`` by filling the worst domains first."""
        lower, upper = self._bounds(losses)
        order = losses.argsort(dim=-1, descending=True, stable=True)
        room = (upper - lower).expand_as(losses).gather(-1, order)
        before = room.cumsum(dim=-1) - room  # what worse domains may take
        taken = (1.0 - lower.sum() - before).clamp(min=0.0).minimum(room)
        mixture = lower + torch.zeros_like(losses).scatter(-1, order, taken)
        return expected_loss(mixture, losses), mixture

    def mirror_step(
        self,
        mixture: Tensor,  # [..., D]
        losses: Tensor,  # [..., D]
        step: float | Tensor,  # [...]
    ) -> Tensor:  # [..., D]
        """Return ``clip(nu lambda_d exp(step l_d), lower_d, upper_d)``, nu such that it sums to 1.

        Where a weight is 0 and the bounds force it up, it takes its share of what is missing.
        """
        lower, upper = self._bounds(losses.double())  # the sum of float32 bounds may miss 1
        weights = exponentiated(mixture.double(), losses, step)
        clipped, _ = clip_to_one(weights, lower.expand_as(weights), upper.expand_as(weights))
        return clipped.to(losses.dtype)

    def contains(
        self,
        mixture: Tensor,  # [..., D]
        tolerance: float = 1e-9,
    ) -> bool:
        """Return whether every weight is within its bounds and they sum to 1."""
        lower, upper = self._bounds(mixture)
        inside = (mixture >= lower - tolerance) & (mixture <= upper + tolerance)
        return sums_to_one(mixture, tolerance) and bool(inside.all())

    def vertices(self, domains: int) -> Tensor | None:  # [J, D]
        """Return all points with at most one weight off its bounds; None for D > 10."""
        if domains > _MOST_DOMAINS:
            return None
        lower, upper = self._bounds(torch.zeros(domains, dtype=torch.float64))
        sides = list(itertools.product((0.0, 1.0), repeat=domains))
        points = lower + torch.tensor(sides, dtype=torch.float64) * (upper - lower)  # [2^D, D]
        found = []
        for free in range(domains):
            candidates = points.clone()
            candidates[:, free] += 1.0 - candidates.sum(dim=1)
            rest = candidates[:, free]
            found.append(candidates[(rest >= lower[free] - 1e-12) & (rest <= upper[free] + 1e-12)])
        # Rounding makes twins of a point found by several free weights: compare 12 digits.
        listed = {
            tuple(round(weight, 12) for weight in point.tolist()): point
            for point in torch.cat(found)
        }
        return torch.stack(list(listed.values())).clamp(min=0.0)


@dataclass(frozen=True)
class Floor(_Bounded):
    """No domain below a share: ``Lambda = {lambda_d >= delta, sum lambda = 1}``.

    ``sigma(l) = delta sum_d l_d + (1 - D delta) max_d l_d``: part average, part worst case.

    Args:
        delta: in ``[0, 1 / D]``; 0 is the whole simplex, 1 / D the uniform mixture alone.

    Raises:
        ValueError: ``delta`` out of range; above 1 / D where a number of domains first shows it.

    Example:
        >>> import torch
        >>> from robustgate.game import Floor
        >>> Floor(0.25).support(torch.tensor([1.0, 3.0]))
        (2.5, tensor([0.2500, 0.7500]))
    """

    delta: float

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0.0 <= self.delta <= 1.0:
            raise ValueError(f"delta: expected a number in [0, 1 / D], got {self.delta}")

    def _bounds(self, losses: Tensor) -> tuple[Tensor, Tensor]:  # [..., D] -> [D], [D]
        domains = losses.shape[-1]
        if self.delta * domains > 1.0 + 1e-12:
            raise ValueError(
                f"delta: expected at most 1 / D = {1 / domains:.6g} for {domains} domains, "
                f"got {self.delta}"
            )
        lower = losses.new_full((domains,), self.delta)
        return lower, torch.ones_like(lower)

    def vertices(self, domains: int) -> Tensor:  # [D, D]
        """Return, for each domain, the mixture that gives it all but the others' shares."""
        unit = torch.eye(domains, dtype=torch.float64)
        lower, _ = self._bounds(unit)
        return lower + (1.0 - self.delta * domains) * unit


@dataclass(frozen=True)
class Box(_Bounded):
    """Bounds for each domain: ``Lambda = {lower_d <= lambda_d <= upper_d, sum lambda = 1}``.

    Args:
        lower: D numbers in [0, 1], of sum at most 1.
        upper: D numbers in [0, 1], ``>= lower``, of sum at least 1.

    Raises:
        ValueError: bounds that are not as described.

    Example:
        >>> import torch
        >>> from robustgate.game import Box
        >>> box = Box(lower=[0.1, 0.1, 0.2], upper=[0.5, 0.5, 1.0])
        >>> value, mixture = box.support(torch.tensor([3.0, 2.0, 1.0]))
        >>> round(value, 4), [round(weight, 4) for weight in mixture.tolist()]
        (2.3, [0.5, 0.3, 0.2])
    """

    lower: Sequence[float]
    upper: Sequence[float]

    def __post_init__(self) -> None:
        """Check the bounds and keep them as tuples."""
        lower = tuple(float(bound) for bound in self.lower)
        upper = tuple(float(bound) for bound in self.upper)
        if len(lower) != len(upper) or not lower:
            raise ValueError(
                f"lower, upper: expected one number each per domain, "
                f"got {len(lower)} and {len(upper)}"
            )
        for d, (least, most) in enumerate(zip(lower, upper, strict=True)):
            if not 0.0 <= least <= most <= 1.0:
                raise ValueError(
                    f"lower, upper: expected 0 <= lower <= upper <= 1, got {least} and {most} "
                    f"for domain {d}"
                )
        if sum(lower) > 1.0 + 1e-12 or sum(upper) < 1.0 - 1e-12:
            raise ValueError(
                f"lower, upper: expected sum(lower) <= 1 <= sum(upper), "
                f"got {sum(lower)} and {sum(upper)}"
            )
        object.__setattr__(self, "lower", lower)
        object.__setattr__(self, "upper", upper)

    def _bounds(self, losses: Tensor) -> tuple[Tensor, Tensor]:  # [..., D] -> [D], [D]
        if losses.shape[-1] != len(self.lower):
            raise ValueError(
                f"mixtures: expected {len(self.lower)} domains as in {self}, got {losses.shape[-1]}"
            )
        return losses.new_tensor(self.lower), losses.new_tensor(self.upper)


@dataclass(frozen=True)
class CVaR(_Bounded):
    """The worst share of domains: ``Lambda = {lambda_d <= 1 / (alpha D), sum lambda = 1}``.

    ``sigma(l)`` is the conditional value at risk (expected shortfall) of the losses: the mean of
    the worst ``alpha D`` of them.

    Args:
        alpha: in (0, 1]; 1 is the plain mean, ``alpha <= 1 / D`` the whole simplex.

    Raises:
        ValueError: ``alpha`` out of range.

    Example:
        >>> import torch
        >>> from robustgate.game import CVaR
        >>> CVaR(0.5).support(torch.tensor([1.0, 4.0, 2.0, 3.0]))
        (3.5, tensor([0.0000, 0.5000, 0.0000, 0.5000]))

    Source: Rockafellar and Uryasev (2000).
    """

    alpha: float

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"alpha: expected a number in (0, 1], got {self.alpha}")

    def _bounds(self, losses: Tensor) -> tuple[Tensor, Tensor]:  # [..., D] -> [D], [D]
        domains = losses.shape[-1]
        upper = losses.new_full((domains,), min(1.0, 1.0 / (self.alpha * domains)))
        return torch.zeros_like(upper), upper

"""Sets of domain mixtures: what the adversary of the robust game may choose.

A mixture set is a closed convex subset ``Lambda`` of the D-simplex. Solvers, certificates and
bootstrap intervals know it only through the methods of :class:`MixtureSet`, so a new set is one
class and no change anywhere else. Every method takes any number of leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

TINY: Final = 1e-300  # a weight that can still come back; 0 could not


class MixtureSet(Protocol):
    """A closed convex set ``Lambda`` of mixtures of D domains.

    A set of your own derives from this class and defines ``worst_case``, ``mirror_step`` and
    ``contains``; ``support`` follows, and ``vertices`` if there are few.
    """

    def worst_case(
        self,
        losses: Tensor,  # [..., D]
    ) -> tuple[Tensor, Tensor]:  # [...], [..., D]
        """Return ``sigma(l) = max_{lambda in Lambda} lambda . l`` and mixtures attaining it."""
        ...

    def mirror_step(
        self,
        mixture: Tensor,  # [..., D]
        losses: Tensor,  # [..., D]
        step: float | Tensor,  # [...]
    ) -> Tensor:  # [..., D]
        """Return ``argmax_{lambda in Lambda} step * lambda . l - KL(lambda || mixture)``."""
        ...

    def contains(
        self,
        mixture: Tensor,  # [..., D]
        tolerance: float = 1e-9,
    ) -> bool:
        """Return whether all mixtures lie in Lambda, up to ``tolerance`` in each constraint."""
        ...

    def support(
        self,
        losses: Tensor,  # [D]
    ) -> tuple[float, Tensor]:  # [], [D]
        """Return :meth:`worst_case` of one vector of losses, the value as a number."""
        value, mixture = self.worst_case(losses)
        return float(value), mixture

    def vertices(self, domains: int) -> Tensor | None:  # [J, D]
        """Return the extreme points of Lambda, or None if it has infinitely or too many."""
        return None


@dataclass(frozen=True)
class Simplex(MixtureSet):
    """Every mixture: ``Lambda = {lambda >= 0, sum lambda = 1}``, the full worst case.

    Example:
        >>> import torch
        >>> from robustgate.game import Simplex
        >>> value, mixture = Simplex().support(torch.tensor([0.5, 2.0, 1.0]))
        >>> value, mixture.tolist()
        (2.0, [0.0, 1.0, 0.0])
    """

    def worst_case(
        self,
        losses: Tensor,  # [..., D]
    ) -> tuple[Tensor, Tensor]:  # [...], [..., D]
        """Return ``max_d l_d`` and the vertex that attains it (the first one on a tie)."""
        worst = losses.argmax(dim=-1, keepdim=True)
        mixture = torch.zeros_like(losses).scatter(-1, worst, 1.0)
        return losses.gather(-1, worst).squeeze(-1), mixture

    def mirror_step(
        self,
        mixture: Tensor,  # [..., D]
        losses: Tensor,  # [..., D]
        step: float | Tensor,  # [...]
    ) -> Tensor:  # [..., D]
        """Return the exponentiated-gradient step ``lambda_d exp(step l_d) / sum_d ...``."""
        return exponentiated(mixture, losses, step)

    def contains(
        self,
        mixture: Tensor,  # [..., D]
        tolerance: float = 1e-9,
    ) -> bool:
        """Return whether every entry is non-negative and they sum to 1, up to ``tolerance``."""
        return sums_to_one(mixture, tolerance) and bool((mixture >= -tolerance).all())

    def vertices(self, domains: int) -> Tensor:  # [D, D]
        """Return the single domains."""
        return torch.eye(domains, dtype=torch.float64)


FULL_SIMPLEX: Final = Simplex()


def exponentiated(
    mixture: Tensor,  # [..., D]
    losses: Tensor,  # [..., D]
    step: float | Tensor,  # [...]
) -> Tensor:  # [..., D]
    """Return ``mixture_d exp(step l_d) / sum_d ...``: the mirror step of the whole simplex."""
    return torch.softmax(mixture.log() + scaled(losses, step), dim=-1)


def scaled(
    losses: Tensor,  # [..., D]
    step: float | Tensor,  # [...]
) -> Tensor:  # [..., D]
    """Return ``step * losses``, one step for each vector of losses."""
    return losses * step.unsqueeze(-1) if isinstance(step, Tensor) else losses * step


def expected_loss(
    mixture: Tensor,  # [..., D]
    losses: Tensor,  # [..., D]
) -> Tensor:  # [...]
    """Return ``lambda . l``, where a weight of 0 contributes 0 even to an infinite loss."""
    return (mixture * torch.where(mixture > 0, losses, 0.0)).sum(dim=-1)


def sums_to_one(
    mixture: Tensor,  # [..., D]
    tolerance: float,
) -> bool:
    """Return whether every mixture sums to 1, up to ``tolerance``."""
    return bool(((mixture.sum(dim=-1) - 1.0).abs() <= tolerance).all())

"""Sets of domain mixtures: what the adversary of the robust game may choose.

A mixture set is a closed convex subset ``Lambda`` of the D-simplex. Solvers, certificates and
bootstrap intervals know it only through the three methods of :class:`MixtureSet`, so a new set is
one class in this file and no change anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor


class MixtureSet(Protocol):
    """A closed convex set ``Lambda`` of mixtures of D domains."""

    def support(
        self,
        losses: Tensor,  # [D]
    ) -> tuple[float, Tensor]:  # [], [D]
        """Return ``sigma(l) = max_{lambda in Lambda} lambda . l`` and a mixture attaining it."""
        ...

    def mirror_step(
        self,
        mixture: Tensor,  # [D]
        losses: Tensor,  # [D]
        step: float,
    ) -> Tensor:  # [D]
        """Return ``argmax_{lambda in Lambda} step * lambda . l - KL(lambda || mixture)``."""
        ...

    def contains(
        self,
        mixture: Tensor,  # [D]
        tolerance: float = 1e-9,
    ) -> bool:
        """Return whether ``mixture`` lies in Lambda, up to ``tolerance`` in each constraint."""
        ...


@dataclass(frozen=True)
class Simplex:
    """Every mixture: ``Lambda = {lambda >= 0, sum lambda = 1}``, the full worst case.

    Example:
        >>> import torch
        >>> from robustgate.game import Simplex
        >>> value, mixture = Simplex().support(torch.tensor([0.5, 2.0, 1.0]))
        >>> value, mixture.tolist()
        (2.0, [0.0, 1.0, 0.0])
    """

    def support(
        self,
        losses: Tensor,  # [D]
    ) -> tuple[float, Tensor]:  # [], [D]
        """Return ``max_d l_d`` and the vertex that attains it (the first one on a tie)."""
        worst = int(losses.argmax())
        mixture = torch.zeros_like(losses)
        mixture[worst] = 1.0
        return float(losses[worst]), mixture

    def mirror_step(
        self,
        mixture: Tensor,  # [D]
        losses: Tensor,  # [D]
        step: float,
    ) -> Tensor:  # [D]
        """Return the exponentiated-gradient step ``lambda_d exp(step l_d) / sum_d ...``."""
        return torch.softmax(mixture.log() + step * losses, dim=-1)

    def contains(
        self,
        mixture: Tensor,  # [D]
        tolerance: float = 1e-9,
    ) -> bool:
        """Return whether every entry is non-negative and they sum to 1, up to ``tolerance``."""
        nonnegative = bool((mixture >= -tolerance).all())
        return nonnegative and abs(float(mixture.sum()) - 1.0) <= tolerance


FULL_SIMPLEX: Final = Simplex()

"""What a step of the primal-dual game found."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from robustgate.game.mixtures import MixtureSet
from robustgate.game.normaliser import Normaliser


@dataclass(frozen=True, eq=False)
class Iterate:
    """A point of the game and what it is worth on the documents it was tried on.

    Attributes:
        step: steps made before.
        losses: ``E_d[-log pi_g] - b_d``, ``[D]`` float64; for a domain absent from the batch, its
            last one.
        mixture: ``lambda`` in force, ``[D]`` float64.
        multiplier: ``mu`` in force; 0 for token documents.
        normaliser: ``Z_g`` with its standard error; None for token documents, where it is 1.
        lower_bound: ``sigma(E_d[-max_k L_k] - b_d)``: no gate whatsoever does better on these
            documents.
        upper_bound: ``sigma(losses) + log max(Z_g, 1)``: the worst case of ``pi_g / max(Z_g, 1)``.
        domains: names, in the order of ``losses`` and ``mixture``.
    """

    step: int
    losses: Tensor
    mixture: Tensor
    multiplier: float
    normaliser: Normaliser | None
    lower_bound: float
    upper_bound: float
    domains: tuple[str, ...]

    @property
    def value(self) -> float:
        """The worst case over mixtures, which is ``upper_bound``."""
        return self.upper_bound

    @property
    def gap(self) -> float:
        """``upper_bound - lower_bound``."""
        return self.upper_bound - self.lower_bound

    def scalars(self) -> dict[str, float]:
        """Return everything as named numbers, for a logger."""
        found = {"bound/lower": self.lower_bound, "bound/upper": self.upper_bound}
        for d, name in enumerate(self.domains):
            found[f"loss/{name}"] = float(self.losses[d])
            found[f"mixture/{name}"] = float(self.mixture[d])
        if self.normaliser is not None:
            low, high = self.normaliser.interval()
            found["multiplier"] = self.multiplier
            found["normaliser/value"] = self.normaliser.value
            found["normaliser/lower"] = low
            found["normaliser/upper"] = high
        return found


def worst_cases(
    losses: Tensor,  # [D]
    hindsight: Tensor,  # [D]
    mixtures: MixtureSet,
    total: Normaliser | None,
) -> tuple[float, float]:
    """Return the bounds of :class:`Iterate`; infinite while some domain has never been seen."""
    if bool(losses.isnan().any()):
        return -math.inf, math.inf
    surplus = 0.0 if total is None else math.log(max(total.value, 1.0))
    return mixtures.support(hindsight)[0], mixtures.support(losses)[0] + surplus

"""Mixture sets given by their extreme points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from robustgate.game.blahut_arimoto import ascend
from robustgate.game.mixtures import (
    FULL_SIMPLEX,
    TINY,
    MixtureSet,
    exponentiated,
    sums_to_one,
)

_GAP: Final = 1e-12  # of the mirror step's objective, nats
_MAX_ITERATIONS: Final = 10_000


@dataclass(frozen=True)
class Vertices(MixtureSet):
    """All mixtures of given mixtures: ``Lambda`` is the convex hull of J points.

    For example the mixtures seen in a few deployments. ``sigma(l) = max_j v_j . l``.

    Args:
        points: ``v_j``, J rows of D numbers, each a mixture.

    Raises:
        ValueError: no point, rows of different lengths, or one that is no mixture.

    Example:
        >>> import torch
        >>> from robustgate.game import Vertices
        >>> seen = Vertices([[0.5, 0.5, 0.0], [0.25, 0.0, 0.75]])
        >>> seen.support(torch.tensor([1.0, 2.0, 3.0]))
        (2.5, tensor([0.2500, 0.0000, 0.7500]))
    """

    points: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        """Check the points and keep them as tuples."""
        points = tuple(tuple(float(weight) for weight in point) for point in self.points)
        if not points or not points[0]:
            raise ValueError("points: expected at least one mixture of at least one domain")
        for j, point in enumerate(points):
            if len(point) != len(points[0]):
                raise ValueError(
                    f"points[{j}]: expected {len(points[0])} weights as in points[0], "
                    f"got {len(point)}"
                )
            # float32 weights sum to 1 within about 1e-6; larger errors are a caller's mistake.
            if not all(weight >= 0.0 for weight in point) or abs(sum(point) - 1.0) > 1e-5:
                raise ValueError(
                    f"points[{j}]: expected non-negative weights that sum to 1, got {list(point)}"
                )
        normalised = tuple(tuple(weight / sum(point) for weight in point) for point in points)
        object.__setattr__(self, "points", normalised)

    def _rows(self, like: Tensor) -> Tensor:  # [..., D] -> [J, D]
        rows = like.new_tensor(self.points)
        if like.shape[-1] != rows.shape[1]:
            raise ValueError(
                f"mixtures: expected {rows.shape[1]} domains as in the points of Vertices, "
                f"got {like.shape[-1]}"
            )
        return rows

    def worst_case(
        self,
        losses: Tensor,  # [..., D]
    ) -> tuple[Tensor, Tensor]:  # [...], [..., D]
        """Return ``max_j v_j . l`` and the point that attains it (the first one on a tie)."""
        rows = self._rows(losses)
        products = rows * torch.where(rows > 0, losses.unsqueeze(-2), 0.0)  # [..., J, D]
        value, worst = FULL_SIMPLEX.worst_case(products.sum(dim=-1))
        return value, worst @ rows

    def mirror_step(
        self,
        mixture: Tensor,  # [..., D]
        losses: Tensor,  # [..., D]
        step: float | Tensor,  # [...]
    ) -> Tensor:  # [..., D]
        """Return the point of the hull nearest to the exponentiated-gradient step, in KL.

        With u the exponentiated-gradient step, ``-KL(lambda || u)`` of ``lambda = sum_j q_j v_j``
        is, up to a constant, the objective; Blahut-Arimoto over q climbs it to ``1e-12`` nats.
        """
        rows = self._rows(losses.double())
        log_target = exponentiated(mixture.double(), losses, step).clamp(min=TINY).log()

        def evaluate(weights: Tensor) -> tuple[Tensor, Tensor]:  # [..., J] -> [..., J], [...]
            point = (weights @ rows).clamp(min=TINY)
            gains = (log_target - point.log()) @ rows.T
            return gains, (weights * gains).sum(dim=-1)

        start = torch.full_like(log_target @ rows.T, 1.0 / len(rows))
        weights = ascend(evaluate, start, FULL_SIMPLEX, _GAP, _MAX_ITERATIONS).mixture
        return (weights @ rows).to(losses.dtype)

    def contains(
        self,
        mixture: Tensor,  # [..., D]
        tolerance: float = 1e-9,
    ) -> bool:
        """Return whether every mixture is a convex combination of the points."""
        rows = self._rows(mixture).to(torch.float64)
        matrix = torch.cat([rows.T, rows.new_ones(1, len(rows))])  # [D + 1, J]
        for point in mixture.to(torch.float64).reshape(-1, rows.shape[1]):
            target = torch.cat([point, point.new_ones(1)])
            weights = _nonnegative_least_squares(matrix, target)
            if float((matrix @ weights - target).abs().amax()) > tolerance:
                return False
        return sums_to_one(mixture, tolerance)

    def vertices(self, domains: int) -> Tensor:  # [J, D]
        """Return the points; some may lie inside the hull of the others, which does no harm."""
        return self._rows(torch.zeros(domains, dtype=torch.float64))


def _nonnegative_least_squares(
    matrix: Tensor,  # [M, J]
    target: Tensor,  # [M]
) -> Tensor:  # [J]
    """Minimise ``|matrix x - target|`` over ``x >= 0`` by the active sets of Lawson and Hanson."""
    x = torch.zeros(matrix.shape[1], dtype=matrix.dtype)
    chosen = torch.zeros_like(x, dtype=torch.bool)
    for _ in range(3 * len(x)):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[chosen] = -torch.inf
        if float(gradient.amax()) <= 1e-12:
            break
        chosen[gradient.argmax()] = True
        while True:
            solved = torch.zeros_like(x)
            solved[chosen] = torch.linalg.lstsq(
                matrix[:, chosen], target.unsqueeze(1), driver="gelsd"
            ).solution.squeeze(1)
            negative = chosen & (solved <= 0.0)
            if not bool(negative.any()):
                break
            share = float((x / (x - solved))[negative].amin())
            x = x + share * (solved - x)
            chosen &= x > 1e-14
            x[~chosen] = 0.0
            if not bool(chosen.any()):
                break
        x = solved.clamp(min=0.0) if bool(chosen.any()) else x
    return x

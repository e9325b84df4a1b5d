"""The mixtures within a Kullback-Leibler distance of a centre.

Both of its optimisation problems are solved by tilting the centre,

    lambda_theta ~ c exp(theta a),   theta in [0, theta_max],

with the largest theta that stays in the ball: ``a = l`` and no limit for the worst case,
``a = log(mixture / c) + step l`` and ``theta_max = 1`` for the mirror step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from robustgate.game.mixtures import TINY, MixtureSet, scaled, sums_to_one

_MAX_STEPS: Final = 200


@dataclass(frozen=True)
class KLBall(MixtureSet):
    """Mixtures near a centre: ``Lambda = {lambda: KL(lambda || c) <= radius}``.

    ``sigma(l) = min_{tau > 0} tau log sum_d c_d exp(l_d / tau) + tau radius``; every tau gives an
    upper bound, so the value is one whatever the accuracy of the search.

    Args:
        radius: in nats, ``>= 0``.
        center: ``c``, D numbers that sum to 1; uniform if absent. A domain of weight 0 in ``c`` has
            weight 0 throughout the ball.

    Example:
        >>> import torch
        >>> from robustgate.game import KLBall
        >>> value, mixture = KLBall(0.1).support(torch.tensor([0.0, 1.0], dtype=torch.float64))
        >>> round(value, 4), [round(weight, 4) for weight in mixture.tolist()]
        (0.7198, [0.2802, 0.7198])

    Source: Hu and Hong (2013); docs/theory.md, "Mixture sets".
    """

    radius: float
    center: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Check the arguments and keep the centre as a tuple."""
        if not 0.0 <= self.radius < float("inf"):
            raise ValueError(f"radius: expected a number >= 0, got {self.radius}")
        if self.center is not None:
            center = tuple(float(weight) for weight in self.center)
            if not all(weight >= 0.0 for weight in center) or abs(sum(center) - 1.0) > 1e-5:
                raise ValueError(
                    f"center: expected non-negative weights that sum to 1, got {list(center)}"
                )
            object.__setattr__(self, "center", tuple(weight / sum(center) for weight in center))

    def _log_center(self, losses: Tensor) -> Tensor:  # [..., D] -> [D]
        domains = losses.shape[-1]
        if self.center is None:
            return losses.new_full((domains,), 1.0 / domains).log()
        if len(self.center) != domains:
            raise ValueError(f"center: expected {domains} weights, got {len(self.center)}")
        return losses.new_tensor(self.center).log()

    def worst_case(
        self,
        losses: Tensor,  # [..., D]
    ) -> tuple[Tensor, Tensor]:  # [...], [..., D]
        """Return the dual value above at the tau found, and the tilted centre.

        With an infinite loss in reach the value is infinite and the mixture the centre.
        """
        log_center = self._log_center(losses)
        reached = torch.where(log_center.isfinite(), losses, -torch.inf)
        top = reached.amax(dim=-1)
        infinite = top.isinf()
        finite = torch.where(infinite.unsqueeze(-1), 0.0, losses)
        theta, mixture = _tilt(log_center, finite, self.radius, torch.inf)
        tau = 1.0 / theta
        dual = tau * (torch.logsumexp(log_center + scaled(finite, theta), dim=-1) + self.radius)
        # Towards tau = 0 the dual tends to the largest loss, which always bounds it too.
        value = torch.where((theta > 0) & theta.isfinite(), dual.minimum(top), top)
        if self.radius == 0.0:
            value = (log_center.exp() * torch.where(log_center.isfinite(), finite, 0.0)).sum(dim=-1)
        return torch.where(infinite, top, value), mixture

    def mirror_step(
        self,
        mixture: Tensor,  # [..., D]
        losses: Tensor,  # [..., D]
        step: float | Tensor,  # [...]
    ) -> Tensor:  # [..., D]
        """Return the tilt of the centre towards the exponentiated-gradient step."""
        log_center = self._log_center(losses)
        log_ratio = mixture.clamp(min=TINY).log() - log_center.clamp(min=-1e3)
        return _tilt(log_center, log_ratio + scaled(losses, step), self.radius, 1.0)[1]

    def contains(
        self,
        mixture: Tensor,  # [..., D]
        tolerance: float = 1e-9,
    ) -> bool:
        """Return whether ``KL(lambda || c) <= radius + tolerance`` for mixtures that sum to 1."""
        divergence = _divergence(mixture.clamp(min=0.0), self._log_center(mixture))
        inside = (mixture >= -tolerance).all(dim=-1) & (divergence <= self.radius + tolerance)
        return sums_to_one(mixture, tolerance) and bool(inside.all())


def _divergence(mixture: Tensor, log_center: Tensor) -> Tensor:  # [..., D], [D] -> [...]
    return (torch.xlogy(mixture, mixture) - _times(mixture, log_center)).sum(dim=-1)


def _times(mixture: Tensor, values: Tensor) -> Tensor:  # [..., D] x2
    """Return the product, 0 where the weight is 0 and the value infinite."""
    return mixture * torch.where((mixture > 0) | values.isfinite(), values, 0.0)


def _tilt(
    log_center: Tensor,  # [D]
    statistic: Tensor,  # [..., D]
    radius: float,
    limit: float,
) -> tuple[Tensor, Tensor]:  # [...], [..., D]
    """Return the largest ``theta <= limit`` with ``KL(lambda_theta || c) <= radius``, and lambda.

    ``theta = inf`` where even the centre restricted to its largest statistics is in the ball.
    Newton's method on ``sqrt(KL)``, nearly linear in theta, inside a bracket; the returned end of
    the bracket is the one inside the ball.
    """
    reached = log_center.isfinite()
    statistic = torch.where(reached, statistic, -torch.inf)
    statistic = statistic - statistic.amax(dim=-1, keepdim=True)
    top = torch.where(statistic == 0, log_center, -torch.inf)
    slack = radius + torch.logsumexp(top, dim=-1)  # radius - KL in the limit of large theta
    finite = torch.where(reached, statistic, 0.0)

    def tilted(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [...] -> [..., D], [...], [...]
        mixture = torch.softmax(log_center + scaled(finite, theta), dim=-1)
        divergence = _divergence(mixture, log_center).clamp(min=0.0)
        mean = (mixture * finite).sum(dim=-1, keepdim=True)
        return mixture, divergence, (mixture * (finite - mean).square()).sum(dim=-1)

    low = torch.zeros_like(slack)
    high = torch.full_like(slack, limit)
    _, _, variance = tilted(low)
    theta = torch.where(variance > 0, (2.0 * radius / variance).sqrt(), 1.0).minimum(high)
    done = (slack >= 0) & (limit == torch.inf)
    for _ in range(_MAX_STEPS):
        _, divergence, variance = tilted(theta)
        inside = divergence <= radius
        low = torch.where(inside, theta, low)
        high = torch.where(inside, high, theta)
        reached_radius = inside & (divergence >= radius * (1.0 - 1e-12))
        close = reached_radius | (low >= limit) | (high.isfinite() & (high - low <= 1e-15 * high))
        if bool((done | close).all()):
            break
        root = divergence.sqrt()
        newton = theta + 2.0 * root * (radius**0.5 * (1.0 - 1e-13) - root) / (theta * variance)
        middle = torch.where(high.isinf(), 2.0 * theta + 1e-300, 0.5 * (low + high))
        newton = newton.minimum(torch.full_like(newton, limit))
        trusted = (newton > low) & (newton < high) | (newton == limit) & (high == limit)
        theta = torch.where(close, theta, torch.where(trusted, newton, middle))
    mixture, _, _ = tilted(low)
    vertex = torch.softmax(top, dim=-1)
    return (
        torch.where(done, torch.inf, low),
        torch.where(done.unsqueeze(-1), vertex, mixture),
    )

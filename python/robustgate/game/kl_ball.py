"""The mixtures within a Kullback-Leibler distance of a centre.

Both of its optimisation problems are solved by tilting the centre,

    lambda_theta ~ c exp(theta a),   theta in [0, theta_max],

with the largest theta that stays in the ball: ``a = l`` and no limit for the worst case,
``a = log(mixture / c) + step l`` and ``theta_max = 1`` for the mirror step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from robustgate.game.clipping import bracket_middle
from robustgate.game.mixtures import TINY, MixtureSet, scaled, sums_to_one

_MAX_STEPS: Final = 200
_SERIES: Final = 2.0**-8  # below it the series of u e^u - e^u + 1 errs by less than 1e-14


@dataclass(frozen=True)
class KLBall(MixtureSet):
    """Mixtures near a centre: ``Lambda = {lambda: KL(lambda || c) <= radius}``.

    ``sigma(l) = min_{tau > 0} tau log sum_d c_d exp(l_d / tau) + tau radius``; every tau gives an
    upper bound, so the value is one whatever the accuracy of the search.

    Args:
        radius: in nats, ``>= 0``.
        center: ``c``, D numbers that sum to 1; uniform if absent. A domain of weight 0 in ``c`` has
            weight 0 throughout the ball.

    Raises:
        ValueError: a negative or infinite ``radius``, or a ``center`` that is no mixture.

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
        log_center = self._log_center(losses.double())
        top = torch.where(log_center.isfinite(), losses, -torch.inf).amax(dim=-1)
        infinite = top.isinf()
        finite = torch.where(infinite.unsqueeze(-1), 0.0, losses)
        below, mixture = _tilt(log_center, finite, self.radius, torch.inf)
        value = torch.where(infinite, top, top + below)
        return value.to(losses.dtype), mixture.to(losses.dtype)

    def mirror_step(
        self,
        mixture: Tensor,  # [..., D]
        losses: Tensor,  # [..., D]
        step: float | Tensor,  # [...]
    ) -> Tensor:  # [..., D]
        """Return the tilt of the centre towards the exponentiated-gradient step."""
        log_center = self._log_center(losses.double())
        log_ratio = mixture.double().clamp(min=TINY).log() - log_center.clamp(min=-1e3)
        _, tilted = _tilt(log_center, log_ratio + scaled(losses, step), self.radius, 1.0)
        return tilted.to(losses.dtype)

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


class _Tilted(NamedTuple):
    """The centre tilted by ``theta``, for a statistic ``s <= 0``."""

    mixture: Tensor  # [..., D]   lambda_theta
    log_mean: Tensor  # [...]     log E_c[e^{theta s}]
    divergence: Tensor  # [...]   KL(lambda_theta || c)
    variance: Tensor  # [...]     of s under lambda_theta; theta times it is the slope of KL


def _tilted(
    log_center: Tensor,  # [D]
    statistic: Tensor,  # [..., D]
    theta: Tensor,  # [...]
) -> _Tilted:
    """Tilt the centre, without cancellation however small theta is.

    With ``u = log(lambda / c)`` the divergence is ``E_c[u e^u - e^u + 1]``, of second order in u.
    """
    center, exponent = log_center.exp(), scaled(statistic, theta)
    loss = (center * exponent.expm1()).sum(dim=-1)  # E_c[e^{theta s}] - 1, above -1
    whole = torch.logsumexp(log_center + exponent, dim=-1)
    log_mean = torch.where(loss > -0.5, loss.log1p(), whole)
    u = exponent - log_mean.unsqueeze(-1)
    mixture = (log_center + u).exp()
    series = center * u.square() * (1 / 2 + u * (1 / 3 + u * (1 / 8 + u * (1 / 30 + u / 144))))
    terms = torch.where(u.abs() < _SERIES, series, mixture * u - mixture + center)
    mean = (mixture * statistic).sum(dim=-1, keepdim=True)
    variance = (mixture * (statistic - mean).square()).sum(dim=-1)
    return _Tilted(mixture, log_mean, terms.sum(dim=-1).clamp(min=0.0), variance)


def _tilt(
    log_center: Tensor,  # [D]
    statistic: Tensor,  # [..., D]
    radius: float,
    limit: float,
) -> tuple[Tensor, Tensor]:  # [...], [..., D]
    """Tilt by the largest ``theta <= limit`` with ``KL(lambda_theta || c) <= radius``.

    Newton's method on ``sqrt(KL)``, nearly linear in theta, inside a bracket; the returned end of
    the bracket is the one inside the ball. Without a limit the centre restricted to its largest
    statistics may be in the ball, and is then the mixture.

    Returns:
        ``(log E_c[e^{theta s}] + radius) / theta <= 0``, which no mixture of the ball exceeds with
        its mean of ``s``, the statistic minus its largest value; and the mixture.
    """
    reached = log_center.isfinite()
    statistic = torch.where(reached, statistic, -torch.inf)
    statistic = statistic - statistic.amax(dim=-1, keepdim=True)
    top = torch.where(statistic == 0, log_center, -torch.inf)
    slack = radius + torch.logsumexp(top, dim=-1)  # radius - KL in the limit of large theta
    statistic = torch.where(reached, statistic, 0.0)
    spread = -statistic.amin(dim=-1)
    unit = torch.where(spread > 0, spread, 1.0)
    statistic = statistic / unit.unsqueeze(-1)  # from -1 to 0; theta is in units of 1 / spread

    low, high = torch.zeros_like(spread), torch.full_like(spread, torch.inf)
    most = limit * unit
    variance = _tilted(log_center, statistic, low).variance
    theta = torch.where(variance > 0, (2.0 * radius / variance).sqrt(), 1.0).minimum(most)
    done = (slack >= 0) & (limit == torch.inf)
    growth = 2.0
    for _ in range(_MAX_STEPS):
        here = _tilted(log_center, statistic, theta)
        inside = here.divergence <= radius
        low = torch.where(inside, theta, low)
        high = torch.where(inside, high, theta)
        reached_radius = inside & (here.divergence >= radius * (1.0 - 1e-12))
        close = reached_radius | (low >= most) | (high.isfinite() & (high - low <= 1e-15 * high))
        if bool((done | close).all()):
            break
        root = here.divergence.sqrt()
        change = radius**0.5 * (1.0 - 1e-13) - root
        newton = theta + 2.0 * root * change / (theta * here.variance)
        newton = newton.minimum(most)
        trusted = (newton > low) & (newton < high)
        middle = bracket_middle(low, high, theta, growth).minimum(most)
        growth = min(growth * growth, 1e64)
        theta = torch.where(close, theta, torch.where(trusted, newton, middle))
    found = _tilted(log_center, statistic, low)
    bound = torch.where(low > 0, (found.log_mean + radius) / low, 0.0)
    mean = (found.mixture * statistic).sum(dim=-1)  # of the centre itself, at theta = 0
    bound = torch.where((low == 0) & (radius == 0.0), mean, bound)
    return (
        unit * torch.where(done, 0.0, bound.clamp(max=0.0)),
        torch.where(done.unsqueeze(-1), torch.softmax(top, dim=-1), found.mixture),
    )

"""The normaliser of a gated mixture, ``Z_g = sum_x pi_g(x)``, from samples of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from robustgate.game.documents import Documents


@dataclass(frozen=True)
class Normaliser:
    """An estimate of ``Z_g`` and its sampling error.

    Attributes:
        value: the estimate.
        standard_error: of the estimate; 0 where the samples enumerate a finite space.
    """

    value: float
    standard_error: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the normal confidence interval, cut at 0."""
        if not 0.0 < level < 1.0:
            raise ValueError(f"level: expected a number in (0, 1), got {level}")
        margin = NormalDist().inv_cdf((1 + level) / 2) * self.standard_error
        return max(0.0, self.value - margin), self.value + margin


def normaliser(
    gate: nn.Module,
    samples: Sequence[Documents],  # K
) -> Normaliser:
    """Estimate ``Z_g`` from equally many samples of each expert.

        Z_g = E_{x ~ q}[ pi_g(x) / q(x) ],   q = (1/K) sum_k pi_k

    The mean over k of the ratio's mean under expert k. The ratio lies in ``[0, K]``, so the
    estimate has a finite variance whatever the gate: at most ``(K Z - Z^2) / n``. Samples must come
    from the experts: over training documents the same sum estimates something else.

    Args:
        gate: maps inputs to normalised log-weights ``[..., K]``.
        samples: K sets of documents, the k-th drawn from expert k, all of one size; or with
            ``weights`` ``pi_k`` over an enumerated space, where the result is exact.

    Returns:
        A :class:`Normaliser`.

    Raises:
        ValueError: not one set per expert, sets of different sizes, or fewer than two samples each.

    Example:
        >>> import torch
        >>> from robustgate.game import ConstantGate, Documents, normaliser
        >>> gate = ConstantGate(torch.tensor([0.3, 0.7]))
        >>> drawn = [Documents(torch.zeros(9, 1), torch.randn(9, 2)) for _ in range(2)]
        >>> 0.0 < normaliser(gate, drawn).value < 2.0
        True

    Source: balanced multiple importance sampling, Veach and Guibas (1995); docs/theory.md,
        "The normaliser".
    """
    check_samples(samples)
    with torch.no_grad():
        ratios = [drawn.ratio(gate) for drawn in samples]
        value = mean_ratio(samples, ratios)
    return Normaliser(float(value), standard_error(samples, ratios))


def standard_error(
    samples: Sequence[Documents],  # K
    ratios: Sequence[Tensor],  # K x [n]
) -> float:
    """Return the standard error of :func:`mean_ratio`.

    Each expert is a stratum of its own: only the spread within it is sampling error.
    """
    variance = [
        ratio.detach().var() / len(ratio)
        for drawn, ratio in zip(samples, ratios, strict=True)
        if drawn.weights is None
    ]
    return float(torch.stack(variance).sum().sqrt()) / len(samples) if variance else 0.0


def mean_ratio(
    samples: Sequence[Documents],  # K
    ratios: Sequence[Tensor],  # K x [n]
) -> Tensor:  # []
    """Return the estimate of ``Z_g`` from the ratios of :func:`normaliser`; differentiable."""
    strata = [drawn.mean(ratio) for drawn, ratio in zip(samples, ratios, strict=True)]
    return torch.stack(strata).mean()


def check_samples(samples: Sequence[Documents]) -> None:
    """Raise ValueError unless there are equally many samples, at least 2, of each expert."""
    sizes = [len(drawn) for drawn in samples]
    experts = samples[0].log_probs.shape[1] if sizes else 0
    if len(sizes) != experts or len(set(sizes)) != 1 or sizes[0] < 2:
        raise ValueError(
            f"samples: expected one set per expert, all of one size and at least 2, got sizes "
            f"{sizes} for {experts} experts"
        )

"""Sampling error of a worst case over mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from robustgate.game.mixtures import FULL_SIMPLEX, MixtureSet

_CHUNK_DRAWS: Final = 2**22  # documents drawn at once: 32 MiB of indices


def bootstrap_worst_case(
    losses: Mapping[str, Tensor],  # D x [n_d]
    *,
    mixtures: MixtureSet = FULL_SIMPLEX,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return a confidence interval for ``max_{lambda in Lambda} sum_d lambda_d E_d[loss]``.

    Documents are resampled within each domain. With ``se_d`` the standard error of the mean
    ``m_d``, let ``c`` be the ``level`` quantile over resamples of ``max_d |m*_d - m_d| / se_d``.
    All domain means lie within ``m_d +- c se_d`` at once with that confidence, and the worst case
    rises with every mean, so

        [ sigma(m - c se), sigma(m + c se) ],   sigma(l) = max_{lambda in Lambda} lambda . l

    covers it. (Quantiles of the resampled worst case itself do not: a maximum of nearly tied means,
    which is what a robust prior produces, is biased upwards, in the sample and again in each
    resample.)

    Args:
        losses: for each domain, ``[n_d]`` floating point per-document losses (baseline subtracted,
            if any), ``n_d >= 2``.
        mixtures: the set Lambda.
        level: confidence level in (0, 1).
        samples: number of resamples.
        seed: of the resampling; the result is deterministic for a seed.

    Returns:
        ``(lower, upper)`` in the unit of ``losses``.

    Raises:
        TypeError: ``losses`` is not a mapping to floating point tensors.
        ValueError: no domain, fewer than two documents, a loss that is not finite, or ``level`` or
            ``samples`` out of range.

    Example:
        >>> import torch
        >>> from robustgate.game import bootstrap_worst_case
        >>> losses = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([0.0, 0.1, 0.2])}
        >>> lower, upper = bootstrap_worst_case(losses)
        >>> lower < 2.0 < upper
        True

    Source: bootstrap of the maximal statistic, Romano and Wolf (2005); docs/theory.md,
        "Sampling error".
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    checked = _check_losses(losses)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack([loss.mean() for loss in checked])  # [D]
    errors = torch.stack([loss.std() / len(loss) ** 0.5 for loss in checked])  # [D]
    deviation = torch.zeros(samples, dtype=torch.float64)  # max_d |m*_d - m_d| / se_d
    for loss, mean, error in zip(checked, means, errors, strict=True):
        if float(error) > 0.0:  # equal losses never deviate
            resampled = _resampled_means(loss, samples, generator)
            deviation = torch.maximum(deviation, (resampled - mean).abs() / error)
    margin = torch.quantile(deviation, level) * errors  # [D]
    return mixtures.support(means - margin)[0], mixtures.support(means + margin)[0]


def _resampled_means(
    loss: Tensor,  # [n_d]
    samples: int,
    generator: torch.Generator,
) -> Tensor:  # [samples]
    size = len(loss)
    means = []
    for count in torch.arange(samples).split(max(1, _CHUNK_DRAWS // size)):
        drawn = torch.randint(size, (len(count), size), generator=generator)
        means.append(loss[drawn].mean(dim=1))
    return torch.cat(means)


def _check_losses(losses: Mapping[str, Tensor]) -> list[Tensor]:  # D x [n_d]
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"losses: expected a mapping from domain name to tensor [n_d], "
            f"got {type(losses).__name__}"
        )
    if not losses:
        raise ValueError("losses: expected at least one domain, got an empty mapping")
    checked = []
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            kind = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"losses[{name!r}]: expected a floating point tensor, got {kind}")
        if loss.dim() != 1 or len(loss) < 2:
            raise ValueError(
                f"losses[{name!r}]: expected shape [n_d] with at least 2 documents, "
                f"got {tuple(loss.shape)}"
            )
        if not bool(loss.isfinite().all()):
            document = int((~loss.isfinite()).nonzero()[0])
            raise ValueError(
                f"losses[{name!r}], document {document}: expected a finite loss, "
                f"got {float(loss[document])}"
            )
        checked.append(loss.detach().to("cpu", torch.float64))
    return checked

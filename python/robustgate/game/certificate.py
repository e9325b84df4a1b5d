"""Proof of how good a prior is: two-sided bounds on the value of the robust game.

For every prior ``w`` in the K-simplex and every mixture ``lambda`` in Lambda,

    lambda . l(w) - log max_k a_k  <=  V  <=  max_{lambda' in Lambda} lambda' . l(w),
    a_k = sum_d lambda_d E_d[ e^{L_k} / sum_j w_j e^{L_j} ],

where ``V = min_w max_lambda lambda . l(w)``. The left side holds because, for any other prior v,
``lambda . l(v) >= lambda . l(w) - log sum_k v_k a_k`` (Jensen) and ``sum_k v_k a_k <= max_k a_k``.
Nothing is asked of how ``w`` and ``lambda`` were found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robustgate.game.likelihoods import (
    BLOCK_ELEMENTS,
    Baseline,
    baseline_values,
    check_log_probs,
)
from robustgate.game.mixtures import FULL_SIMPLEX, MixtureSet
from robustgate.game.threads import one_thread
from robustgate.ops.mixture_log_prob import mixture_log_prob


@dataclass(frozen=True, eq=False)
class Certificate:
    """What a prior and a mixture prove: the value of the game lies between the two bounds.

    Attributes:
        prior: ``w``, ``[K]`` float64.
        mixture: ``lambda``, ``[D]`` float64.
        losses: ``l_d(w)``, ``[D]`` float64, baseline subtracted.
        lower_bound: no prior has a smaller worst case than this (nats).
        upper_bound: the worst case of ``prior`` over all mixtures (nats).
        prices: ``a_k``, ``[K]`` float64. ``sum_k w_k a_k = 1``; at the optimum none exceeds 1, and
            experts in use are at 1.
    """

    prior: Tensor
    mixture: Tensor
    losses: Tensor
    lower_bound: float
    upper_bound: float
    prices: Tensor

    @property
    def value(self) -> float:
        """The worst case of ``prior``, which is ``upper_bound``."""
        return self.upper_bound

    @property
    def gap(self) -> float:
        """``upper_bound - lower_bound``: ``prior`` is optimal up to this many nats."""
        return self.upper_bound - self.lower_bound


def certificate(
    log_probs: Mapping[str, Tensor],  # D x [n_d, K]
    prior: Tensor,  # [K]
    mixture: Tensor,  # [D]
    *,
    baseline: Baseline = "excess",
    mixtures: MixtureSet = FULL_SIMPLEX,
) -> Certificate:
    """Bound the value of the robust game from any prior and any mixture.

    Evaluated in log space from the log-probabilities themselves; up to float64 rounding the bounds
    hold whoever proposes ``prior`` and ``mixture``.

    Args:
        log_probs: for each domain, ``[n_d, K]`` log-probabilities of its documents.
        prior: ``[K]``, non-negative, sums to 1.
        mixture: ``[D]``, in ``mixtures``, in the order of ``log_probs``.
        baseline: as in :func:`robust_prior`.
        mixtures: the set Lambda.

    Returns:
        A :class:`Certificate`. If ``prior`` gives some document probability 0, ``upper_bound`` is
        ``inf``; ``lower_bound`` is then ``-inf`` unless ``mixture`` avoids that domain.

    Raises:
        TypeError, ValueError: inputs that are not as described; the message names the argument.

    Example:
        >>> import torch
        >>> from robustgate.game import certificate
        >>> likelihoods = {"a": torch.tensor([[1.0, 0.5]]), "b": torch.tensor([[0.2, 1.0]])}
        >>> log_probs = {domain: matrix.log() for domain, matrix in likelihoods.items()}
        >>> half = torch.tensor([0.5, 0.5])
        >>> proof = certificate(log_probs, half, half, baseline="raw")
        >>> round(proof.lower_bound, 4), round(proof.upper_bound, 4)
        (0.2451, 0.5108)

    Source: docs/theory.md, "The certificate".
    """
    with one_thread():
        checked = check_log_probs(log_probs)
        offset = baseline_values(checked, baseline)
        prior = check_distribution("prior", prior, next(iter(checked.values())).shape[1])
        mixture = check_distribution("mixture", mixture, len(checked))
        if not mixtures.contains(mixture):
            raise ValueError(f"mixture: expected an element of {mixtures}, got {mixture.tolist()}")
        return certify(checked, offset, prior, mixture, mixtures)


def certify(
    log_probs: Mapping[str, Tensor],  # D x [n_d, K]
    baseline: Tensor,  # [D]
    prior: Tensor,  # [K]
    mixture: Tensor,  # [D]
    mixtures: MixtureSet,
) -> Certificate:
    """:func:`certificate` of checked arguments."""
    losses = -baseline  # [D]
    ratios = prior.new_zeros(len(losses), len(prior))  # [D, K]
    log_prior = prior.log()
    rows = max(1, BLOCK_ELEMENTS // len(prior))
    for d, matrix in enumerate(log_probs.values()):
        for block in matrix.split(rows):  # [rows, K]
            log_mix = mixture_log_prob(block, log_prior)  # [rows]
            losses[d] -= log_mix.sum() / len(matrix)
            ratios[d] += (block - log_mix.unsqueeze(1)).exp_().sum(dim=0) / len(matrix)
    return Certificate(prior, mixture, losses, *two_sided(losses, ratios, mixture, mixtures))


def two_sided(
    losses: Tensor,  # [D]
    ratios: Tensor,  # [D, K]
    mixture: Tensor,  # [D]
    mixtures: MixtureSet,
) -> tuple[float, float, Tensor]:  # [], [], [K]
    """Return the lower and the upper bound and the ``a_k`` of the module's first formula."""
    upper, _ = mixtures.support(losses)
    played = mixture > 0  # a domain of weight 0 contributes 0, even where its loss is infinite
    weights = mixture[played]
    prices = weights @ ratios[played]
    if bool(losses[played].isinf().any()):
        return -math.inf, upper, prices
    lower = weights @ losses[played] - prices.amax().log()
    # lower <= upper holds exactly; at the optimum rounding may swap two equal numbers.
    return min(float(lower), upper), upper, prices


def check_distribution(name: str, weights: Tensor, size: int) -> Tensor:
    """Return ``weights`` as float64 on the CPU, ``[size]``, summing to 1, or say what is wrong."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(weights).__name__}")
    weights = weights.detach().to("cpu", torch.float64)
    if weights.shape != (size,):
        raise ValueError(f"{name}: expected shape [{size}], got {tuple(weights.shape)}")
    # float32 weights sum to 1 within about 1e-6; larger errors are a caller's mistake.
    if not bool((weights >= 0).all()) or abs(float(weights.sum()) - 1.0) > 1e-5:
        raise ValueError(
            f"{name}: expected non-negative weights that sum to 1, got {weights.tolist()}"
        )
    return weights / weights.sum()

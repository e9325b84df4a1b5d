"""The robust prior: constant gate weights that are best for the worst mixture of domains."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from torch import Tensor

from robustgate.game.certificate import Certificate, certify
from robustgate.game.first_order import first_order
from robustgate.game.interior_point import interior_point
from robustgate.game.likelihoods import (
    Baseline,
    DocumentLikelihoods,
    baseline_values,
    check_log_probs,
)
from robustgate.game.mixtures import FULL_SIMPLEX, MixtureSet
from robustgate.game.threads import one_thread

Method = Literal["interior-point", "first-order"]

_DEFAULT_PASSES: Final[dict[str, int]] = {"interior-point": 100, "first-order": 5000}


@dataclass(frozen=True, eq=False)
class FlooredPrior:
    """A prior without small weights, made by :meth:`RobustPrior.floor`.

    Attributes:
        prior: ``(1 - delta) w + delta / K``, ``[K]`` float64.
        guarantee: regret of its Bayes mixture against any expert on any document, at most, in nats.
        cost: what the floor adds to the loss of any domain, at most, in nats.
    """

    prior: Tensor
    guarantee: float
    cost: float


@dataclass(frozen=True, eq=False)
class RobustPrior(Certificate):
    """A solution of the robust game over constant gates, with its certificate.

    Attributes:
        prior: ``w``, the experts' weights, ``[K]`` float64.
        mixture: ``lambda``, the least favourable mixture of domains, ``[D]`` float64.
        losses: ``l_d(w)``, ``[D]`` float64, baseline subtracted.
        lower_bound: no prior has a smaller worst case than this (nats).
        upper_bound: the worst case of ``prior`` over all mixtures (nats); also ``value``.
        prices: ``a_k``, ``[K]`` float64, see :class:`Certificate`.
        domains: names, in the order of ``mixture``, ``losses`` and ``baseline``.
        baseline: ``b_d``, ``[D]`` float64.
        trajectory: the certificate after each pass over the data.
        converged: whether ``gap`` reached the tolerance asked for.
    """

    domains: tuple[str, ...]
    baseline: Tensor
    trajectory: tuple[Certificate, ...] = field(repr=False)
    converged: bool

    @property
    def guarantee(self) -> float:
        """``-log min_k w_k`` nats: the Bayes mixture's regret to any expert on any document.

        Large, or infinite, where an expert is not needed; see :meth:`floor`.
        """
        return -math.log(smallest) if (smallest := float(self.prior.amin())) > 0 else math.inf

    def floor(self, delta: float) -> FlooredPrior:
        """Mix in the uniform prior: ``w <- (1 - delta) w + delta / K``.

        Every domain's loss rises by at most ``-log(1 - delta)``, and on every document the Bayes
        mixture is within ``log(K / delta)`` nats of every single expert. Without a floor an expert
        of weight 0 stays at 0 whatever a document says.

        Args:
            delta: in (0, 1).

        Example:
            >>> import torch
            >>> from robustgate.game import robust_prior
            >>> log_probs = {"a": torch.tensor([[1.0, 0.5]]).log()}
            >>> floored = robust_prior(log_probs, baseline="raw").floor(0.01)
            >>> round(floored.cost, 5), floored.guarantee <= math.log(2 / 0.01)
            (0.01005, True)
        """
        if not 0.0 < delta < 1.0:
            raise ValueError(f"delta: expected a number in (0, 1), got {delta}")
        prior = (1.0 - delta) * self.prior + delta / len(self.prior)
        return FlooredPrior(prior, -math.log(float(prior.amin())), -math.log1p(-delta))


def robust_prior(
    log_probs: Mapping[str, Tensor],  # D x [n_d, K]
    *,
    baseline: Baseline = "excess",
    mixtures: MixtureSet = FULL_SIMPLEX,
    tol: float = 1e-6,
    method: Method = "interior-point",
    max_passes: int | None = None,
) -> RobustPrior:
    """Find the expert weights whose mixture is best on the worst mixture of domains.

        min_{w in simplex} max_{lambda in Lambda} sum_d lambda_d l_d(w),
        l_d(w) = E_{x ~ p_d}[ -log sum_k w_k e^{L_k(x)} ] - b_d

    Convex in w, so the optimum is global; the result proves how close it is. Runs on the CPU in
    float64, from document log-probabilities alone.

    Args:
        log_probs: for each domain, ``[n_d, K]`` floating point: ``L_k(x) = log pi_k(x)`` of its
            documents (total log-probability, not per token). ``-inf`` is allowed where some other
            expert is finite.
        baseline: ``b_d``. ``"excess"`` (default) is the best single expert's mean NLL on d, so that
            long or hard domains do not dominate; ``"hindsight"`` the mean NLL of the best expert of
            every single document; ``"raw"`` is 0; or numbers, as a mapping from every domain to a
            float or a tensor ``[D]``.
        mixtures: the set Lambda the adversary chooses from; the whole simplex by default.
        tol: certified gap to reach, in nats.
        method: ``"interior-point"``, or ``"first-order"`` (exponentiated gradient and EM), slower
            and less exact, the readable baseline.
        max_passes: passes over the data before giving up; 100 or 5000 by default, by method.

    Returns:
        A :class:`RobustPrior`. If ``tol`` was not reached, ``converged`` is False, a
        RuntimeWarning is given, and the bounds still hold.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no domain, an empty domain, differing K, NaN, ``+inf``, a document to which
            every expert gives probability 0, or a baseline that does not fit.

    Example:
        >>> import torch
        >>> from robustgate.game import robust_prior
        >>> likelihoods = {"a": torch.tensor([[1.0, 0.5]]), "b": torch.tensor([[0.2, 1.0]])}
        >>> log_probs = {domain: matrix.log() for domain, matrix in likelihoods.items()}
        >>> solution = robust_prior(log_probs, baseline="raw")
        >>> round(solution.value, 4), solution.gap <= 1e-6
        (0.3677, True)
        >>> [round(weight, 3) for weight in solution.prior.tolist()]
        [0.385, 0.615]

    Source: docs/theory.md, "The robust prior".
    """
    if not 0.0 < tol < math.inf:
        raise ValueError(f"tol: expected a positive number, got {tol}")
    if method not in _DEFAULT_PASSES:
        raise ValueError(f"method: expected one of {list(_DEFAULT_PASSES)}, got {method!r}")
    passes = _DEFAULT_PASSES[method] if max_passes is None else max_passes
    if passes < 1:
        raise ValueError(f"max_passes: expected at least 1, got {max_passes}")
    with one_thread():
        checked = check_log_probs(log_probs)
        offset = baseline_values(checked, baseline)
        trajectory = play(DocumentLikelihoods(checked, offset), mixtures, tol / 2, method, passes)
        best = min(trajectory, key=lambda iterate: iterate.gap)
        # Computed afresh; half of tol was left for the difference in rounding.
        proof = certify(checked, offset, best.prior, best.mixture, mixtures)
    if proof.gap > tol:
        warnings.warn(
            f"robust_prior: the certified gap is {proof.gap:.2e} nats after {len(trajectory)} "
            f"passes, above tol={tol:.2e}; the bounds still hold",
            RuntimeWarning,
            stacklevel=2,
        )
    return RobustPrior(
        prior=proof.prior,
        mixture=proof.mixture,
        losses=proof.losses,
        lower_bound=proof.lower_bound,
        upper_bound=proof.upper_bound,
        prices=proof.prices,
        domains=tuple(checked),
        baseline=offset,
        trajectory=tuple(trajectory),
        converged=proof.gap <= tol,
    )


def play(
    likelihoods: DocumentLikelihoods,
    mixtures: MixtureSet,
    tol: float,
    method: Method,
    passes: int,
) -> list[Certificate]:
    """Run a solver to a gap of ``tol`` or for so many passes; return a certificate for each."""
    solver = (
        interior_point(likelihoods, mixtures, tol)
        if method == "interior-point"
        else first_order(likelihoods, mixtures)
    )
    trajectory: list[Certificate] = []
    for iterate in solver:
        trajectory.append(iterate)
        if iterate.gap <= tol or len(trajectory) == passes:
            break
    return trajectory


def maximum_likelihood_prior(
    log_probs: Tensor,  # [n, K]
    *,
    tol: float = 1e-6,
    method: Method = "interior-point",
) -> RobustPrior:
    """Find the expert weights of highest likelihood on pooled documents.

        max_{w in simplex} (1/n) sum_x log sum_k w_k e^{L_k(x)}

    This is what expectation-maximisation converges to: the robust prior of a single domain. With
    ``method="first-order"`` it *is* EM, and ``trajectory`` holds its monotone likelihoods.

    Args:
        log_probs: ``[n, K]`` log-probabilities of the pooled documents.
        tol: certified gap to reach, in nats per document.
        method: as in :func:`robust_prior`.

    Returns:
        A :class:`RobustPrior` with one domain, ``"pooled"``; ``value`` is the mean NLL.

    Raises:
        TypeError, ValueError: as :func:`robust_prior`.

    Example:
        >>> import torch
        >>> from robustgate.game import maximum_likelihood_prior
        >>> likelihoods = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]])
        >>> solution = maximum_likelihood_prior(likelihoods.log())
        >>> [round(weight, 3) for weight in solution.prior.tolist()]
        [0.678, 0.322]
    """
    return robust_prior({"pooled": log_probs}, baseline="raw", tol=tol, method=method)

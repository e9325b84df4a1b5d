"""Capacity of the channel from domain to data: the part of the game no gate can remove."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from robustgate.game.blahut_arimoto import Ascent, ascend, nearest_to_uniform
from robustgate.game.finite import SMALLEST, check_rows
from robustgate.game.mixtures import FULL_SIMPLEX, MixtureSet
from robustgate.game.threads import one_thread


@dataclass(frozen=True, eq=False)
class Capacity:
    """Capacity and the mixture that attains it, with two-sided bounds.

    Attributes:
        mixture: ``lambda``, ``[D]`` float64.
        lower_bound: ``JSD_lambda(p)`` of this mixture, nats; also ``value``.
        upper_bound: ``max_{lambda' in Lambda} sum_d lambda'_d KL(p_d || p_lambda)``, nats; for the
            whole simplex the largest of these divergences.
        iterations: Blahut-Arimoto updates made.
        converged: whether ``gap`` reached the tolerance asked for.
    """

    mixture: Tensor
    lower_bound: float
    upper_bound: float
    iterations: int
    converged: bool

    @property
    def value(self) -> float:
        """The Jensen-Shannon divergence ``mixture`` attains, which is ``lower_bound``."""
        return self.lower_bound

    @property
    def gap(self) -> float:
        """``upper_bound - lower_bound``."""
        return self.upper_bound - self.lower_bound


def capacity(
    data_probs: Tensor,  # [D, X]
    *,
    mixtures: MixtureSet = FULL_SIMPLEX,
    tol: float = 1e-6,
    max_iterations: int = 100_000,
) -> Capacity:
    """Return the capacity of D distributions on a finite space, by Blahut-Arimoto.

        C = max_{lambda in Lambda} JSD_lambda(p),
        JSD_lambda(p) = sum_d lambda_d KL(p_d || p_lambda)

    Every model q, gated or not, has a worst case ``max_{lambda in Lambda} sum_d lambda_d
    KL(p_d || q)`` of at least C; for the whole simplex that is ``max_d KL(p_d || q)``. The update
    ``lambda_d <- lambda_d exp(step KL_d) / normaliser`` never lowers the value at step 1; the step
    grows while the value rises and returns to 1 when it drops.

    Args:
        data_probs: ``p_d(x)``, ``[D, X]`` floating point, each row sums to 1.
        mixtures: the set Lambda; all mixtures by default.
        tol: gap to reach, in nats.
        max_iterations: updates before giving up.

    Returns:
        A :class:`Capacity`. If ``tol`` was not reached, ``converged`` is False, a RuntimeWarning
        is given, and the bounds still hold.

    Raises:
        TypeError: ``data_probs`` is not a floating point tensor.
        ValueError: wrong shape, negative or non-finite entries, or a row that does not sum to 1.

    Example:
        >>> import torch
        >>> from robustgate.game import capacity
        >>> result = capacity(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))  # the Z-channel
        >>> round(result.value, 5), [round(weight, 3) for weight in result.mixture.tolist()]
        (0.22314, [0.6, 0.4])

    Source: Blahut (1972), Arimoto (1972); docs/theory.md, "Floor and ceiling".
    """
    if not 0.0 < tol < math.inf:
        raise ValueError(f"tol: expected a positive number, got {tol}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations: expected at least 1, got {max_iterations}")
    probs = check_rows("data_probs", data_probs, "D")
    if probs.dim() != 2:
        raise ValueError(
            f"data_probs: expected shape [D, X] with D, X >= 1, got {tuple(probs.shape)}"
        )
    with one_thread():
        ascent = climb(
            probs, torch.zeros(len(probs), dtype=probs.dtype), mixtures, tol, max_iterations
        )
    value, upper, iterations = float(ascent.value), float(ascent.upper), int(ascent.iterations)
    converged = upper - value <= tol
    if not converged:
        warnings.warn(
            f"capacity: the gap is {upper - value:.2e} nats after {iterations} iterations, above "
            f"tol={tol:.2e}; the bounds still hold",
            RuntimeWarning,
            stacklevel=2,
        )
    # value <= upper holds exactly; at the optimum rounding may swap two equal numbers.
    return Capacity(ascent.mixture, min(value, upper), upper, iterations, converged)


def climb(
    probs: Tensor,  # [D, X]
    offset: Tensor,  # [D]
    mixtures: MixtureSet,
    tol: float,
    max_iterations: int,
) -> Ascent:
    """Maximise ``sum_d lambda_d (offset_d + KL(p_d || p_lambda))`` over the mixtures of the set."""
    negentropy = torch.xlogy(probs, probs).sum(dim=1)  # [D]

    def evaluate(mixture: Tensor) -> tuple[Tensor, Tensor]:  # [D] -> [D], []
        mixed = (mixture @ probs).clamp(min=SMALLEST)  # [X]; a vanishing weight may underflow
        divergence = negentropy - torch.xlogy(probs, mixed).sum(dim=1)
        losses = offset + divergence.clamp(min=0.0)
        return losses, mixture @ losses

    start = nearest_to_uniform(mixtures, negentropy)
    return ascend(evaluate, start, mixtures, tol, max_iterations)

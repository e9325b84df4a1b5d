"""Capacity of the channel from domain to data: the part of the game no gate can remove."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from robustgate.game.threads import one_thread

_STEP_GROWTH: Final = 1.5  # the exponent of the update grows by this while the value rises
_LOG_WEIGHT_FLOOR: Final = -690.0  # a weight of e^-690 can still come back; 0 could not


@dataclass(frozen=True, eq=False)
class Capacity:
    """Capacity and the mixture that attains it, with two-sided bounds.

    Attributes:
        mixture: ``lambda``, ``[D]`` float64.
        lower_bound: ``JSD_lambda(p)`` of this mixture, nats; also ``value``.
        upper_bound: ``max_d KL(p_d || p_lambda)``, nats.
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
    tol: float = 1e-6,
    max_iterations: int = 100_000,
) -> Capacity:
    """Return the capacity of D distributions on a finite space, by Blahut-Arimoto.

        C = max_lambda JSD_lambda(p),  JSD_lambda(p) = sum_d lambda_d KL(p_d || p_lambda)

    Every model q, gated or not, has ``max_d KL(p_d || q) >= C``. The update
    ``lambda_d <- lambda_d exp(step KL_d) / normaliser`` never lowers the value at step 1; the step
    grows while the value rises and returns to 1 when it drops.

    Args:
        data_probs: ``p_d(x)``, ``[D, X]`` floating point, each row sums to 1.
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
    probs = _check_rows(data_probs)
    with one_thread():
        mixture, kl, iterations = _blahut_arimoto(probs, tol, max_iterations)
    value, upper = float(mixture @ kl), float(kl.amax())
    converged = upper - value <= tol
    if not converged:
        warnings.warn(
            f"capacity: the gap is {upper - value:.2e} nats after {iterations} iterations, above "
            f"tol={tol:.2e}; the bounds still hold",
            RuntimeWarning,
            stacklevel=2,
        )
    # value <= upper holds exactly; at the optimum rounding may swap two equal numbers.
    return Capacity(mixture, min(value, upper), upper, iterations, converged)


def _blahut_arimoto(
    probs: Tensor,  # [D, X]
    tol: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, int]:  # [D], [D]
    """Return the mixture, ``KL(p_d || p_lambda)`` at it, and the number of updates."""
    negative_entropy = torch.xlogy(probs, probs).sum(dim=1)  # [D]

    def divergences(log_mixture: Tensor) -> tuple[Tensor, Tensor]:  # [D] -> [D], [D]
        mixture = log_mixture.exp()
        kl = negative_entropy - torch.xlogy(probs, mixture @ probs).sum(dim=1)
        return mixture, kl.clamp(min=0.0)

    log_mixture = probs.new_full((len(probs),), -math.log(len(probs)))
    mixture, kl = divergences(log_mixture)
    value, step, iterations = float(mixture @ kl), 1.0, 0
    while float(kl.amax()) - value > tol and iterations < max_iterations:
        iterations += 1
        proposal = torch.log_softmax(log_mixture + step * kl, dim=0).clamp(min=_LOG_WEIGHT_FLOOR)
        proposed_mixture, proposed_kl = divergences(proposal)
        proposed_value = float(proposed_mixture @ proposed_kl)
        if step > 1.0 and proposed_value < value:
            step = 1.0
            continue
        log_mixture, mixture, kl, value = proposal, proposed_mixture, proposed_kl, proposed_value
        step *= _STEP_GROWTH
    return mixture, kl, iterations


def _check_rows(data_probs: Tensor) -> Tensor:  # [D, X]
    if not isinstance(data_probs, Tensor) or not data_probs.is_floating_point():
        kind = data_probs.dtype if isinstance(data_probs, Tensor) else type(data_probs).__name__
        raise TypeError(f"data_probs: expected a floating point tensor [D, X], got {kind}")
    if data_probs.dim() != 2 or 0 in data_probs.shape:
        raise ValueError(
            f"data_probs: expected shape [D, X] with D, X >= 1, got {tuple(data_probs.shape)}"
        )
    probs = data_probs.detach().to("cpu", torch.float64)
    total = probs.sum(dim=1)
    valid = (probs >= 0).all(dim=1) & ((total - 1.0).abs() <= 1e-5)  # float32 rows pass
    if not bool(valid.all()):
        row = int((~valid).nonzero()[0])
        raise ValueError(
            f"data_probs, row {row}: expected non-negative entries that sum to 1, got the sum "
            f"{float(total[row])} and the smallest entry {float(probs[row].amin())}"
        )
    return probs / total.unsqueeze(1)

"""The robust game over all normalised gates, solved exactly on a finite space."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from robustgate.game.barrier import Slope, barrier_newton
from robustgate.game.blahut_arimoto import ascend, nearest_to_uniform
from robustgate.game.clipping import clip_to_one
from robustgate.game.exact_certificate import ExactCertificate, certify_exact
from robustgate.game.finite import FiniteGame
from robustgate.game.finite_gate import maximum_entropy_gate
from robustgate.game.mixtures import FULL_SIMPLEX, TINY, MixtureSet
from robustgate.game.threads import one_thread

_FIRST_ORDER: Final = 100  # mixtures tried by Blahut-Arimoto before Newton's method takes over


@dataclass(frozen=True, eq=False)
class ExactSolution(ExactCertificate):
    """A solution of the exact game, with its certificate.

    Attributes:
        model: ``m``, ``[..., X]`` float64: the best distribution a normalised gate can realise.
        weights: ``q`` on ``vertices``, ``[..., J]``; equal to ``mixture`` for ``Simplex()``.
        vertices: ``v_j``, ``[J, D]``, the extreme points of Lambda, or the domains themselves.
        mu: multiplier of ``sum m = 1``, ``[...]``; ``m = clip(p_lambda / mu, lo, hi)``.
        losses: ``KL(p_j || m)`` of every row of ``vertices``, ``[..., J]``.
        lower_bound: no normalised gate has a smaller worst case, ``[...]`` nats.
        upper_bound: the worst case of ``model`` over all mixtures, ``[...]`` nats; also ``value``.
        linearised: whether the payoff is that of the linearised game.
        experts: ``pi_k``, ``[..., K, X]`` float64, as solved.
        iterations: mixtures tried, ``[...]`` int64.
        converged: whether ``gap`` reached the tolerance asked for, ``[...]`` bool.
    """

    experts: Tensor = field(repr=False)
    iterations: Tensor
    converged: Tensor

    @cached_property
    def gate(self) -> Tensor:
        """``g(x, k)``, ``[..., K, X]``: the gate of maximum entropy that realises ``model``.

        Computed when first asked for. Other gates have the same model and so the same value; where
        a constant gate is optimal too, this one need not be constant.
        """
        with one_thread():
            return maximum_entropy_gate(self.model, self.experts)


def solve_exact(
    data_probs: Tensor,  # [..., D, X]
    expert_probs: Tensor,  # [..., K, X]
    *,
    mixtures: MixtureSet = FULL_SIMPLEX,
    tol: float = 1e-6,
    max_iterations: int = 10_000,
) -> ExactSolution:
    """Find the normalised gate whose model is best on the worst mixture of domains.

        V = min_{g: Z_g = 1} max_{lambda in Lambda} KL(p_lambda || pi_g),
        pi_g(x) = sum_k g(x, k) pi_k(x),   Z_g = sum_x pi_g(x)

    Against a mixture the best model is ``m = clip(p_lambda / mu, min_k pi_k, max_k pi_k)``; the
    mixture climbs by accelerated Blahut-Arimoto, and what a hundred steps have not solved by
    Newton's method. Any number of games of one shape are solved at once. D and K may differ.

    Args:
        data_probs: ``p_d(x)``, ``[..., D, X]`` floating point, each row sums to 1.
        expert_probs: ``pi_k(x)``, ``[..., K, X]`` floating point, each row sums to 1.
        mixtures: the set Lambda the adversary chooses from; the whole simplex by default. For a set
            without listed vertices (``KLBall``; ``Box`` and ``CVaR`` of more than 10 domains) the
            payoff is linearised to ``sum_d lambda_d KL(p_d || pi_g)``, and ``linearised`` is True.
        tol: certified gap to reach, in nats.
        max_iterations: mixtures to try before giving up, sooner where only rounding is left.

    Returns:
        An :class:`ExactSolution`. If ``tol`` was not reached, ``converged`` is False, a
        RuntimeWarning is given, and the bounds still hold.

    Raises:
        TypeError: an argument that is not a floating point tensor.
        ValueError: shapes that do not fit, rows that are no distributions, or a point that a domain
            has and every expert rules out, where the value is infinite.

    Example:
        >>> import torch
        >>> from robustgate.game import solve_exact
        >>> data = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
        >>> experts = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
        >>> solution = solve_exact(data, experts)
        >>> round(float(solution.value), 4), [round(q, 3) for q in solution.mixture.tolist()]
        (0.8383, [0.684, 0.316])
        >>> solution.gate.shape
        torch.Size([2, 4])

    Source: docs/theory.md, "The exact game".
    """
    if not 0.0 < tol < math.inf:
        raise ValueError(f"tol: expected a positive number, got {tol}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations: expected at least 1, got {max_iterations}")
    with one_thread():
        game = FiniteGame(data_probs, expert_probs, mixtures)
        weights, iterations = _least_favourable(game, tol / 2, max_iterations)
        # Computed afresh; half of tol was left for the difference in rounding.
        target = game.mixed(weights @ game.vertices)
        model, mu = clip_to_one(target, game.lower, game.upper)
        # A domain of vanishing weight must not lose a point to underflow: its loss is finite.
        lost = (model == 0) & (game.data > 0).any(dim=-2)
        model = torch.where(lost, game.upper.clamp(max=TINY), model)
        proof = certify_exact(game, model, weights, mu)
    converged = proof.gap <= tol
    if not bool(converged.all()):
        warnings.warn(
            f"solve_exact: the certified gap is {float(proof.gap.amax()):.2e} nats after "
            f"{int(iterations.amax())} iterations, above tol={tol:.2e}; the bounds still hold",
            RuntimeWarning,
            stacklevel=2,
        )
    return ExactSolution(
        model=proof.model,
        weights=proof.weights,
        vertices=proof.vertices,
        mu=proof.mu,
        losses=proof.losses,
        lower_bound=proof.lower_bound,
        upper_bound=proof.upper_bound,
        linearised=proof.linearised,
        experts=game.experts,
        iterations=iterations,
        converged=converged,
    )


def _least_favourable(
    game: FiniteGame,
    tol: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:  # [..., J], [...]
    """Climb to the mixture against which the best model is worst.

    Each best reply starts at the multiplier of the one before.
    """
    start = nearest_to_uniform(game.choices, game.negentropy)
    # No weight ever becomes exactly 0, so the support of p_lambda is that of the start.
    covered = game.mixed(start @ game.vertices) > 0
    saturated = torch.where(covered, game.upper, game.lower)
    reach = saturated.sum(dim=-1)
    multiplier: Tensor | None = None

    def reply(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [..., J] -> X, J, []
        nonlocal multiplier
        model, multiplier = game.best_response(weights, reach, multiplier)
        if bool((multiplier == 0).any()):
            model = torch.where((multiplier > 0).unsqueeze(-1), model, saturated)
        losses = game.losses(model)
        value = (weights * losses).sum(dim=-1) + multiplier * (model.sum(dim=-1) - 1.0)
        return model, losses, value

    def slope(weights: Tensor) -> Slope:  # [..., J]
        model, losses, value = reply(weights)
        return Slope(losses, value, game.curvature(weights, model))

    first = max_iterations if game.linearised else min(max_iterations, _FIRST_ORDER)
    ascent = ascend(lambda weights: reply(weights)[1:], start, game.choices, tol, first)
    weights, iterations = ascent.mixture, ascent.iterations
    unsolved = ascent.upper - ascent.value > tol
    if bool(unsolved.any()) and max_iterations > first:
        polished, steps = barrier_newton(slope, weights, tol, max_iterations - first)
        weights = torch.where(unsolved.unsqueeze(-1), polished, weights)
        iterations = iterations + torch.where(unsolved, steps, 0)
    return weights / weights.sum(dim=-1, keepdim=True), iterations

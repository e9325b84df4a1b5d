"""Two-sided bounds on the value of the exact game, from any model, mixture and multiplier.

With ``lo <= m <= hi`` and ``sum m = 1`` the models a normalised gate can realise, for every such
``m``, every weights ``q`` on the vertices and every ``mu >= 0``,

    sum_j q_j KL(p_j || c) + mu (sum_x c(x) - 1)  <=  V  <=  max_j KL(p_j || m),
    c = clip(p_lambda / mu, lo, hi),   lambda = sum_j q_j v_j.

The left side is the minimum over ``lo <= c <= hi`` of the Lagrangian, so it holds however ``q`` and
``mu`` were found; with ``mu`` the multiplier of the sum it is the best reply to ``q``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from robustgate.game.clipping import clip_to_one, fill_to_one
from robustgate.game.finite import FiniteGame
from robustgate.game.mixtures import FULL_SIMPLEX, MixtureSet, expected_loss
from robustgate.game.threads import one_thread

_FEASIBLE: Final = (
    1e-9  # how far a model may leave the experts' range or the sum 1; repaired exactly
)


@dataclass(frozen=True, eq=False)
class ExactCertificate:
    """What a model, a mixture and a multiplier prove about the exact game.

    The leading dimensions ``...`` are those of a batch of games; none for one game.

    Attributes:
        model: ``m``, ``[..., X]`` float64, between the experts' extremes, of sum 1.
        weights: ``q`` on ``vertices``, ``[..., J]``; equal to ``mixture`` for ``Simplex()``.
        vertices: ``v_j``, ``[J, D]``, the extreme points of Lambda, or the domains themselves.
        mu: multiplier of ``sum m = 1``, ``[...]``.
        losses: ``KL(p_j || m)`` of every row of ``vertices``, ``[..., J]``.
        lower_bound: no normalised gate has a smaller worst case, ``[...]`` nats.
        upper_bound: the worst case of ``model`` over all mixtures, ``[...]`` nats.
        linearised: whether the payoff is ``sum_d lambda_d KL(p_d || m)`` with lambda in Lambda, as
            for a set without listed vertices, instead of ``KL(p_lambda || m)``.
    """

    model: Tensor
    weights: Tensor
    vertices: Tensor
    mu: Tensor
    losses: Tensor
    lower_bound: Tensor
    upper_bound: Tensor
    linearised: bool

    @property
    def mixture(self) -> Tensor:
        """``lambda = sum_j q_j v_j``, ``[..., D]``: the least favourable mixture of domains."""
        return self.weights @ self.vertices

    @property
    def value(self) -> Tensor:
        """The worst case of ``model``, which is ``upper_bound``."""
        return self.upper_bound

    @property
    def gap(self) -> Tensor:
        """``upper_bound - lower_bound``: ``model`` is optimal up to this many nats."""
        return self.upper_bound - self.lower_bound


def exact_certificate(
    data_probs: Tensor,  # [..., D, X]
    expert_probs: Tensor,  # [..., K, X]
    model: Tensor,  # [..., X]
    weights: Tensor,  # [..., J]
    mu: Tensor | float | None = None,  # [...]
    *,
    mixtures: MixtureSet = FULL_SIMPLEX,
) -> ExactCertificate:
    """Bound the value of the exact game from any model, any mixture and any multiplier.

    A gate is put to it as ``model = (gate * expert_probs).sum(-2)``; one whose mass
    ``Z = sum_x model(x)`` is not 1 is no distribution, and is refused.

    Args:
        data_probs: ``p_d(x)``, ``[..., D, X]``, each row sums to 1.
        expert_probs: ``pi_k(x)``, ``[..., K, X]``, each row sums to 1.
        model: ``m(x)``, ``[..., X]``, with ``min_k pi_k <= m <= max_k pi_k`` and sum 1.
        weights: ``[..., J]`` on the extreme points of ``mixtures``: for ``Simplex()`` the mixture
            of the domains. For a set without listed vertices, a mixture in the set.
        mu: ``[...]``, ``>= 0``; the best for ``weights`` if absent.
        mixtures: the set Lambda.

    Returns:
        An :class:`ExactCertificate`.

    Raises:
        TypeError, ValueError: inputs that are not as described; the message names the argument.

    Example:
        >>> import torch
        >>> from robustgate.game import exact_certificate
        >>> data = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
        >>> experts = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
        >>> half = torch.tensor([0.5, 0.5])
        >>> proof = exact_certificate(data, experts, experts.mean(dim=0), half)
        >>> round(float(proof.lower_bound), 4), round(float(proof.upper_bound), 4)
        (0.7855, 1.204)

    Source: docs/theory.md, "The exact game".
    """
    with one_thread():
        game = FiniteGame(data_probs, expert_probs, mixtures)
        model = _check_model(game, model)
        weights = _check_weights(game, weights)
        if mu is None:
            multiplier = clip_to_one(game.mixed(weights @ game.vertices), game.lower, game.upper)[1]
        else:
            multiplier = torch.as_tensor(mu, dtype=torch.float64).expand(weights.shape[:-1])
            if not bool(((multiplier >= 0) & multiplier.isfinite()).all()):
                raise ValueError(f"mu: expected finite numbers >= 0, got {multiplier.tolist()}")
        return certify_exact(game, model, weights, multiplier)


def certify_exact(
    game: FiniteGame,
    model: Tensor,  # [..., X]
    weights: Tensor,  # [..., J]
    mu: Tensor,  # [...]
) -> ExactCertificate:
    """:func:`exact_certificate` of checked arguments; the model is made to sum to 1 exactly."""
    model = fill_to_one(torch.clamp(model, game.lower, game.upper), game.lower, game.upper)
    losses = _losses(game, model)
    upper, _ = game.choices.worst_case(losses)
    lower = expected_loss(weights, game.negentropy) + _dual(game, weights @ game.vertices, mu)
    return ExactCertificate(
        model=model,
        weights=weights,
        vertices=game.vertices,
        mu=mu,
        losses=losses,
        # lower <= upper holds exactly; at the optimum rounding may swap two equal numbers.
        lower_bound=lower.minimum(upper),
        upper_bound=upper,
        linearised=game.linearised,
    )


def _losses(game: FiniteGame, model: Tensor) -> Tensor:  # [..., X] -> [..., J]
    """Return ``KL(p_j || m)``, infinite where ``m = 0 < p_j``."""
    lost = ((model == 0).unsqueeze(-2) & (game.data > 0)).any(dim=-1)  # [..., D]
    infinite = lost.to(torch.float64) @ game.vertices.T > 0  # [..., J]
    return torch.where(infinite, torch.inf, game.losses(model)).clamp(min=0.0)


def _dual(
    game: FiniteGame,
    mixture: Tensor,  # [..., D]
    mu: Tensor,  # [...]
) -> Tensor:  # [...]
    """Return ``mu (sum c - 1) - sum_x p_lambda log c`` with ``c = clip(p_lambda / mu, lo, hi)``.

    For ``mu = 0`` that is ``c = hi`` where ``p_lambda > 0``. The logarithm of c is clipped, not
    taken of what was clipped, so that no underflow can make it infinite.
    """
    target = game.mixed(mixture)
    level = mu.unsqueeze(-1)
    log_ratio = torch.where(target > 0, target.log() - level.log(), -torch.inf)
    log_dual = torch.clamp(log_ratio, game.lower.log(), game.upper.log())
    covered = torch.where(target > 0, target * log_dual, 0.0).sum(dim=-1)
    return mu * (log_dual.exp().sum(dim=-1) - 1.0) - covered


def _check_model(game: FiniteGame, model: Tensor) -> Tensor:  # [..., X]
    shape = tuple(game.lower.shape)
    if not isinstance(model, Tensor) or not model.is_floating_point():
        kind = model.dtype if isinstance(model, Tensor) else type(model).__name__
        raise TypeError(f"model: expected a floating point tensor of shape {shape}, got {kind}")
    model = model.detach().to("cpu", torch.float64)
    if tuple(model.shape) != shape:
        raise ValueError(f"model: expected shape {shape}, got {tuple(model.shape)}")
    mass = model.sum(dim=-1)
    # float32 models sum to 1 within about 1e-6 and so do their experts, normalised in float64.
    slack = 1e-5 * game.upper + _FEASIBLE
    outside = (model < game.lower - slack) | (model > game.upper + slack) | model.isnan()
    if bool(outside.any()):
        index = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"model, x = {index[-1]}: expected a number between the experts' extremes "
            f"{float(game.lower[index]):.6g} and {float(game.upper[index]):.6g}, "
            f"got {float(model[index]):.6g}"
        )
    error = float((mass - 1.0).abs().amax())
    if error > 1e-5:
        raise ValueError(
            f"model: expected sum 1 (a gate in G_1), got the mass Z = {mass.tolist()}; a gate of "
            f"another mass defines no distribution"
        )
    return model


def _check_weights(game: FiniteGame, weights: Tensor) -> Tensor:  # [..., J]
    expected = (*game.negentropy.shape[:-1], len(game.vertices))
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights: expected a tensor, got {type(weights).__name__}")
    weights = weights.detach().to("cpu", torch.float64)
    if tuple(weights.shape) != expected:
        raise ValueError(
            f"weights: expected shape {expected}, one weight for each vertex of the mixture set, "
            f"got {tuple(weights.shape)}"
        )
    total = weights.sum(dim=-1, keepdim=True)
    if not bool((weights >= 0).all()) or float((total - 1.0).abs().amax()) > 1e-5:
        raise ValueError(
            f"weights: expected non-negative numbers that sum to 1, got {weights.tolist()}"
        )
    weights = weights / total
    if not game.choices.contains(weights):
        raise ValueError(f"weights: expected an element of {game.choices}, got {weights.tolist()}")
    return weights

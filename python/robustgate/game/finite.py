"""The robust game on a finite space: its data, checked, and the best model against a mixture.

Shape letters: D domains, K experts, X points, J vertices of the mixture set; ``...`` independent
games. A gate at a point chooses ``m(x) = sum_k g_k pi_k(x)``, that is, any number between
``lo(x) = min_k pi_k(x)`` and ``hi(x) = max_k pi_k(x)``; the game needs nothing else of the experts.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from robustgate.game.clipping import scale_to_one
from robustgate.game.mixtures import FULL_SIMPLEX, MixtureSet

SMALLEST: Final = 5e-324  # the logarithm of a probability that underflowed stays finite


def check_rows(
    name: str,
    probs: Tensor,  # [..., N, X]
    rows: str,
) -> Tensor:  # [..., N, X]
    """Return distributions as float64 on the CPU, every row summing to 1, or say what is wrong.

    Args:
        name: of the argument.
        probs: ``[..., N, X]``.
        rows: the letter of N in messages.
    """
    if not isinstance(probs, Tensor) or not probs.is_floating_point():
        kind = probs.dtype if isinstance(probs, Tensor) else type(probs).__name__
        raise TypeError(f"{name}: expected a floating point tensor [{rows}, X], got {kind}")
    if probs.dim() < 2 or 0 in probs.shape:
        raise ValueError(
            f"{name}: expected shape [{rows}, X] with {rows}, X >= 1, got {tuple(probs.shape)}"
        )
    probs = probs.detach().to("cpu", torch.float64)
    total = probs.sum(dim=-1)
    valid = (probs >= 0).all(dim=-1) & ((total - 1.0).abs() <= 1e-5)  # float32 rows pass
    if not bool(valid.all()):
        *game, row = (~valid).nonzero()[0].tolist()
        where = f"{name}, game {game}, row {row}" if game else f"{name}, row {row}"
        index = (*game, row)
        raise ValueError(
            f"{where}: expected non-negative entries that sum to 1, got the sum "
            f"{float(total[index])} and the smallest entry {float(probs[index].amin())}"
        )
    return probs / total.unsqueeze(-1)


class FiniteGame:
    """A checked game over a mixture set, or a batch of them.

    With ``v_j`` the vertices of Lambda the adversary's pure choices are the distributions
    ``p_j = sum_d v_jd p_d``, and its mixed ones weights ``q`` on them. KL(p_lambda || m) is convex
    in lambda, so its worst case over Lambda is at a vertex: this is the game itself. For a set
    without listed vertices the choices are the domains, ``v = I``, with ``q`` restricted to Lambda:
    the linearised game.

    Args:
        data_probs: ``[..., D, X]``.
        expert_probs: ``[..., K, X]``, leading dimensions that broadcast with those of the data.
        mixtures: the set Lambda.
    """

    def __init__(
        self,
        data_probs: Tensor,  # [..., D, X]
        expert_probs: Tensor,  # [..., K, X]
        mixtures: MixtureSet,
    ) -> None:
        """Check the distributions and reduce the experts to ``lo`` and ``hi``."""
        data = check_rows("data_probs", data_probs, "D")
        experts = check_rows("expert_probs", expert_probs, "K")
        if data.shape[-1] != experts.shape[-1]:
            raise ValueError(
                f"expert_probs: expected X = {data.shape[-1]} points as in data_probs, "
                f"got {experts.shape[-1]}"
            )
        try:
            games = torch.broadcast_shapes(data.shape[:-2], experts.shape[:-2])
        except RuntimeError as error:
            raise ValueError(
                f"expert_probs: expected leading dimensions that broadcast with "
                f"{tuple(data.shape[:-2])} of data_probs, got {tuple(experts.shape[:-2])}"
            ) from error
        self.data = data.expand(*games, *data.shape[-2:])  # [..., D, X]
        self.experts = experts.expand(*games, *experts.shape[-2:])  # [..., K, X]
        self.lower, self.upper = self.experts.amin(dim=-2), self.experts.amax(dim=-2)  # [..., X]
        self._check_reachable()
        domains = data.shape[-2]
        vertices = mixtures.vertices(domains)
        self.linearised = vertices is None
        self.vertices = (
            torch.eye(domains, dtype=torch.float64) if vertices is None else vertices
        )  # [J, D]
        self.choices = mixtures if vertices is None else FULL_SIMPLEX
        self.negentropy = self._negentropies()  # [..., J]

    def _check_reachable(self) -> None:
        """Refuse a point that a domain has and every expert rules out: its loss is infinite."""
        tiny = torch.finfo(torch.float64).tiny
        lost = (self.data > 0) & (self.upper < tiny).unsqueeze(-2)  # [..., D, X]
        if bool(lost.any()):
            *game, domain, point = lost.nonzero()[0].tolist()
            where = f"expert_probs, game {game}" if game else "expert_probs"
            raise ValueError(
                f"{where}: every expert gives x = {point} probability 0, where domain "
                f"{domain} has {float(self.data[(*game, domain, point)]):.6g}, so the value of "
                f"the game is infinite"
            )

    def _negentropies(self) -> Tensor:  # [..., J]
        """Return ``sum_x p_j log p_j`` of every vertex, one at a time to save memory."""
        rows = [self.mixed(vertex.expand(*self.data.shape[:-1])) for vertex in self.vertices]
        return torch.stack([torch.xlogy(row, row).sum(dim=-1) for row in rows], dim=-1)

    def mixed(
        self,
        mixture: Tensor,  # [..., D]
    ) -> Tensor:  # [..., X]
        """Return ``p_lambda``."""
        return (mixture.unsqueeze(-2) @ self.data).squeeze(-2)

    def losses(
        self,
        model: Tensor,  # [..., X]
    ) -> Tensor:  # [..., J]
        """Return ``KL(p_j || m)`` of every vertex, ``m > 0`` wherever some ``p_d > 0``."""
        log_model = model.clamp(min=SMALLEST).log()
        cross = -(self.data @ log_model.unsqueeze(-1)).squeeze(-1)  # [..., D]
        return self.negentropy + cross @ self.vertices.T

    def best_response(
        self,
        weights: Tensor,  # [..., J]
        reach: Tensor,  # [...]
        start: Tensor | None,  # [...]
    ) -> tuple[Tensor, Tensor]:  # [..., X], [...]
        """Return the model that is best against weights on the vertices, and its ``mu``."""
        target = self.mixed(weights @ self.vertices)
        return scale_to_one(target, self.lower, self.upper, reach, start)

    def curvature(
        self,
        weights: Tensor,  # [..., J]
        model: Tensor,  # [..., X]
    ) -> Tensor:  # [..., J, J]
        """Return minus the Hessian of the dual value at weights whose best response is ``model``.

        Where ``m = p_lambda / mu`` is not clipped it moves with the mixture, and mu with it:
        ``sum p_i p_j / p_lambda - (sum p_i) (sum p_j) / sum p_lambda``, over those points.
        """
        target = self.mixed(weights @ self.vertices)
        free = (model > self.lower) & (model < self.upper) & (target > 0)
        inverse = torch.where(free, 1.0 / target, 0.0).unsqueeze(-2)
        moment = (self.data * inverse) @ self.data.transpose(-1, -2)  # [..., D, D]
        share = (self.data * free.unsqueeze(-2)).sum(dim=-1)  # [..., D]
        total = torch.where(free, target, 0.0).sum(dim=-1)[..., None, None]
        rank_one = share.unsqueeze(-1) * share.unsqueeze(-2) / total.clamp(min=SMALLEST)
        return self.vertices @ (moment - rank_one) @ self.vertices.T

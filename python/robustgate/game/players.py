"""The three players of the primal-dual game: how each moves, given its gradient.

The ascending ones may be optimistic: they then move along twice the new gradient minus the last
one, which looks one step ahead as long as gradients change evenly.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from robustgate.game.mixtures import TINY, MixtureSet


class GatePlayer:
    """The gate's parameters, which AdamW lowers along their gradient."""

    def __init__(
        self,
        gate: nn.Module,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """Take the gate's trainable parameters."""
        self.parameters = [p for p in gate.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("gate: expected trainable parameters, got none")
        self._optimiser = torch.optim.AdamW(
            self.parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay
        )

    def gradient(
        self,
        objective: Tensor,  # []
    ) -> list[Tensor]:
        """Return the objective's gradient; the parameters' ``.grad`` stays as it is."""
        return list(torch.autograd.grad(objective, self.parameters, materialize_grads=True))

    def move(self, gradient: list[Tensor]) -> None:
        """Descend."""
        for parameter, value in zip(self.parameters, gradient, strict=True):
            parameter.grad = value
        self._optimiser.step()
        self._optimiser.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the parameters and of the optimiser's state."""
        values = [p.detach() for p in self.parameters]
        return copy.deepcopy({"values": values, "optimiser": self._optimiser.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        expected = [tuple(p.shape) for p in self.parameters]
        found = [tuple(value.shape) for value in state["values"]]
        if found != expected:
            raise ValueError(f"state: expected a gate's parameters {expected}, got {found}")
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["values"], strict=True):
                parameter.copy_(value)
        self._optimiser.load_state_dict(state["optimiser"])


class MixturePlayer:
    """The mixture lambda, which a mirror step of its set raises along the losses."""

    def __init__(self, domains: int, mixtures: MixtureSet, step: float, optimistic: bool) -> None:
        """Start from the mixture of the set nearest to the uniform one."""
        uniform = torch.full((domains,), 1.0 / domains, dtype=torch.float64)
        self.mixture = mixtures.mirror_step(uniform, torch.zeros_like(uniform), 1.0)
        self._mixtures, self._step, self._optimistic = mixtures, step, optimistic
        self._smallest = TINY * (self.mixture > 0).to(self.mixture)
        self._last: Tensor | None = None

    def move(
        self,
        losses: Tensor,  # [D]
    ) -> None:
        """Ascend; a weight that underflowed to 0 could not come back, so none falls that low."""
        last = self._last if self._optimistic and self._last is not None else losses
        moved = self._mixtures.mirror_step(self.mixture, 2 * losses - last, self._step)
        self.mixture = moved.maximum(self._smallest)
        self._last = losses

    def state_dict(self) -> dict[str, Any]:
        """Return the mixture and the last losses."""
        return copy.deepcopy({"mixture": self.mixture, "last": self._last})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.mixture, self._last = state["mixture"].clone(), copy.deepcopy(state["last"])


class MultiplierPlayer:
    """The multiplier ``mu >= 0`` of ``Z_g <= 1``, raised along ``Z_g - 1`` from 1."""

    def __init__(self, step: float, optimistic: bool) -> None:
        """Start from 1, its value where the constraint binds and nothing is clipped."""
        self.value = 1.0
        self._step, self._optimistic = step, optimistic
        self._last: float | None = None

    def move(self, surplus: float) -> None:
        """Ascend."""
        last = self._last if self._optimistic and self._last is not None else surplus
        self.value = max(0.0, self.value + self._step * (2 * surplus - last))
        self._last = surplus

    def state_dict(self) -> dict[str, Any]:
        """Return the multiplier and the last surplus."""
        return {"value": self.value, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self.value, self._last = state["value"], state["last"]

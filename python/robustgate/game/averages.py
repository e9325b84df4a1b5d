"""Averages of a gate over training: of its parameters, and of its outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AveragedGate(nn.Module):
    """The mean of several gates' weights: ``g(x, k) = (1/M) sum_m g_m(x, k)``.

    ``Z_g`` is linear in g, so the mean of normalised gates is normalised; the mean of parameters
    gives no such thing.

    Args:
        gates: of one signature, at least one.

    Raises:
        ValueError: no gate.

    Example:
        >>> import torch
        >>> from robustgate.game import AveragedGate, ConstantGate
        >>> gates = [ConstantGate(torch.tensor(w)) for w in ([0.2, 0.8], [0.6, 0.4])]
        >>> AveragedGate(gates)(torch.zeros(1, 5)).exp()
        tensor([[0.4000, 0.6000]], dtype=torch.float64)

    Source: docs/theory.md, "Primal-dual training".
    """

    def __init__(self, gates: Sequence[nn.Module]) -> None:
        """Keep the gates."""
        super().__init__()
        if not gates:
            raise ValueError("gates: expected at least one, got none")
        self.gates = nn.ModuleList(gates)

    def forward(self, inputs: Tensor, **options: Any) -> Tensor:  # [..., F] -> [..., K]
        """Return the log of the mean weights; ``options`` go to every gate."""
        log_weights = torch.stack([gate(inputs, **options) for gate in self.gates])
        return torch.logsumexp(log_weights, dim=0) - math.log(len(self.gates))


class Averages:
    """Moving average and evenly spaced snapshots of a gate's trainable parameters.

    Snapshots are taken at every ``stride``-th step. When there are more than twice as many as asked
    for, every other one goes and the stride doubles: whenever training stops, they are spread
    evenly over all of it. :meth:`averaged` uses those of its latter half.

    Args:
        gate: the gate being trained.
        decay: of the moving average, in [0, 1); it warms up as ``(1 + t) / (10 + t)``.
        snapshots: how many to keep at least, once there were so many steps.
    """

    def __init__(self, gate: nn.Module, decay: float, snapshots: int) -> None:
        """Start from the gate as it is."""
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema: expected a number in [0, 1), got {decay}")
        if snapshots < 2:
            raise ValueError(f"snapshots: expected at least 2, got {snapshots}")
        self.decay, self.snapshots, self.stride = decay, snapshots, 1
        self._gate = gate
        self._moving = self._parameters()
        self._kept: list[tuple[int, list[Tensor], Tensor]] = []  # step, parameters, mixture

    def update(self, step: int, mixture: Tensor) -> None:
        """Take in the gate and the mixture after ``step`` steps, 1, 2, ..."""
        now = self._parameters()
        decay = min(self.decay, (1 + step) / (10 + step))
        for mean, value in zip(self._moving, now, strict=True):
            mean.lerp_(value, 1 - decay)
        if step % self.stride == 0:
            self._kept.append((step, now, mixture.clone()))
        if len(self._kept) > 2 * self.snapshots:
            self.stride *= 2
            self._kept = [entry for entry in self._kept if entry[0] % self.stride == 0]

    def moving(self) -> nn.Module:
        """Return a copy of the gate with the moving average of its parameters."""
        return self._copy(self._moving)

    def averaged(self) -> AveragedGate:
        """Return the mean of the outputs of the latter half's gates."""
        return AveragedGate([self._copy(values) for _, values, _ in self._latter()])

    def mixture(self) -> Tensor:  # [D]
        """Return the mean of the latter half's mixtures."""
        return torch.stack([mixture for _, _, mixture in self._latter()]).mean(dim=0)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {"moving": self._moving, "kept": self._kept, "stride": self.stride}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._moving = [value.clone() for value in state["moving"]]
        self._kept = list(state["kept"])
        self.stride = state["stride"]

    def _latter(self) -> list[tuple[int, list[Tensor], Tensor]]:
        if not self._kept:
            raise ValueError("averages: no step has been made")
        last = self._kept[-1][0]
        return [entry for entry in self._kept if 2 * entry[0] >= last]

    def _parameters(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._gate.parameters() if p.requires_grad]

    def _copy(self, values: list[Tensor]) -> nn.Module:
        gate = copy.deepcopy(self._gate)
        trainable = (p for p in gate.parameters() if p.requires_grad)
        with torch.no_grad():
            for parameter, value in zip(trainable, values, strict=True):
                parameter.copy_(value)
        return gate.requires_grad_(False)

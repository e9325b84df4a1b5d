"""The variants of ``mixture_nll``: ours, three eager formulations, two compiled ones.

Bytes are counted by formula: each pass over the logits reads or writes K N V elements; the [N, K]
values are left out. ``forward`` reads once; ``frozen`` (forward and backward to the gate) reads
once; ``backward`` (to every expert's logits, without the forward pass) reads once and writes once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import robustgate as rg

MODES = {"forward": 1, "frozen": 1, "backward": 2}  # mode -> passes over the logits

Loss = Callable[[list[Tensor], Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement: N rows, K experts, V columns."""

    rows: int
    experts: int
    vocab: int


def _ours(logits: list[Tensor], gate: Tensor, target: Tensor) -> Tensor:
    return rg.mixture_nll(logits, gate, target)


def _log_softmax(logits: list[Tensor], gate: Tensor, target: Tensor) -> Tensor:
    index = target.unsqueeze(-1)
    log_prob = torch.cat([F.log_softmax(z.float(), -1).gather(-1, index) for z in logits], -1)
    return -torch.logsumexp(F.log_softmax(gate, -1) + log_prob, -1).mean()


def _log_sum_exp(logits: list[Tensor], gate: Tensor, target: Tensor) -> Tensor:
    index = target.unsqueeze(-1)
    log_prob = torch.stack(
        [z.gather(-1, index).squeeze(-1).float() - torch.logsumexp(z.float(), -1) for z in logits],
        -1,
    )
    return -torch.logsumexp(F.log_softmax(gate, -1) + log_prob, -1).mean()


def _cross_entropy(logits: list[Tensor], gate: Tensor, target: Tensor) -> Tensor:
    log_prob = torch.stack(
        [-F.cross_entropy(z.float(), target, reduction="none") for z in logits], -1
    )
    return -torch.logsumexp(F.log_softmax(gate, -1) + log_prob, -1).mean()


EAGER: dict[str, Loss] = {
    "eager log_softmax": _log_softmax,
    "eager logsumexp": _log_sum_exp,
    "eager cross_entropy": _cross_entropy,
}


def variants() -> dict[str, Loss]:
    """Return every formulation by name; compiled ones are compiled on their first call."""
    return {
        "robustgate": _ours,
        **EAGER,
        "compiled log_softmax": torch.compile(_log_softmax, dynamic=False),
        "compiled logsumexp": torch.compile(_log_sum_exp, dynamic=False),
    }


def inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, logits_grad: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return initialised logits, gate logits and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = [
        (torch.randn(shape.rows, shape.vocab, generator=generator) * 3)
        .to(device=device, dtype=dtype)
        .requires_grad_(logits_grad)
        for _ in range(shape.experts)
    ]
    gate = torch.randn(shape.rows, shape.experts, generator=generator).to(device).requires_grad_()
    target = torch.randint(0, shape.vocab, (shape.rows,), generator=generator).to(device)
    return logits, gate, target


def call(
    loss: Loss, mode: str, logits: list[Tensor], gate: Tensor, target: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Return the function of no argument that one measurement times."""
    if mode == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (loss(logits, gate, target),)

        return forward
    if mode == "frozen":
        return lambda: torch.autograd.grad(loss(logits, gate, target), gate)
    value = loss(logits, gate, target)
    return lambda: torch.autograd.grad(value, logits, retain_graph=True)


def truth(mode: str, logits: list[Tensor], gate: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return what :func:`call` should return, in float64."""
    exact = [z.detach().double().requires_grad_(z.requires_grad) for z in logits]
    exact_gate = gate.detach().double().requires_grad_()
    index = target.unsqueeze(-1)
    log_prob = torch.cat([F.log_softmax(z, -1).gather(-1, index) for z in exact], -1)
    value = -torch.logsumexp(F.log_softmax(exact_gate, -1) + log_prob, -1).mean()
    if mode == "forward":
        return (value.detach(),)
    return torch.autograd.grad(value, exact_gate if mode == "frozen" else exact)

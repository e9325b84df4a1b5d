"""Initialised inputs, and what the formulations in plain torch share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustgate.bench.benchmark import Shape

_SPREAD = 3.0  # standard deviation of the logits: entropies of about half of log V


def wide(values: Tensor) -> Tensor:
    """Return the values in float32, or unchanged where they are wider: as users write losses."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_softmax(logits: list[Tensor]) -> list[Tensor]:
    """Return each expert's log-probabilities, K x [N, V]."""
    return [F.log_softmax(wide(z), dim=-1) for z in logits]


def total(terms: list[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape, without stacking them."""
    first, *others = terms
    for term in others:
        first = first + term
    return first


def log_weights(gate_logits: Tensor) -> Tensor:  # [N, K] -> [K, N, 1]
    """Return the log-weights of the rows, to add to stacked log-probabilities [K, N, V]."""
    return F.log_softmax(gate_logits, dim=-1).t().unsqueeze(-1)


def draw_logits(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:  # K x [N, V]
    """Return normal logits."""
    size = (shape.rows, shape.vocab)
    return [
        (torch.randn(size, generator=generator) * _SPREAD).to(dtype) for _ in range(shape.experts)
    ]


def draw_gate(shape: Shape, generator: torch.Generator) -> Tensor:  # [N, K]
    """Return gate logits, float32."""
    return torch.randn(shape.rows, shape.experts, generator=generator)


def draw_target(shape: Shape, generator: torch.Generator) -> Tensor:  # [N]
    """Return token ids."""
    return torch.randint(0, shape.vocab, (shape.rows,), generator=generator)


def draw_heads(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:  # K x [N, H], K x [V, H]
    """Return hidden states and heads whose products spread like :func:`draw_logits`."""

    def draw(rows: int, spread: float) -> list[Tensor]:
        size = (rows, shape.hidden)
        return [
            (torch.randn(size, generator=generator) * spread).to(dtype)
            for _ in range(shape.experts)
        ]

    return draw(shape.rows, 1.0), draw(shape.vocab, _SPREAD / shape.hidden**0.5)

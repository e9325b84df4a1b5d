"""``linear_mixture_nll`` and ``linear_jsd``: from hidden states and heads, limited by products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import robustgate as rg
from robustgate.bench.benchmark import Argument, Benchmark, Function, Shape
from robustgate.bench.ops.divergences import JSD_FORMULATIONS
from robustgate.bench.ops.likelihoods import NLL_FORMULATIONS
from robustgate.bench.ops.peers import (
    CCE,
    CCE_COMPILED,
    LIGER_LINEAR_CROSS_ENTROPY,
    LIGER_LINEAR_JSD,
    TORCH_LINEAR_CROSS_ENTROPY,
)
from robustgate.bench.ops.tensors import draw_gate, draw_heads, draw_target, wide


def _projected(loss: Function) -> Function:
    """Return a loss of logits as one of hidden states and heads; products in float32 or better."""

    def linear(hidden: list[Tensor], heads: list[Tensor], *rest: Tensor) -> Tensor:
        logits = [F.linear(wide(h), wide(w)) for h, w in zip(hidden, heads, strict=True)]
        return loss(logits, *rest)

    return linear


def _linear_jsd(hidden: list[Tensor], heads: list[Tensor], weight_logits: Tensor) -> Tensor:
    return rg.linear_jsd(hidden, heads, torch.softmax(weight_logits, dim=-1))


def _gated(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Argument, ...]:  # hidden, heads, gate logits, target
    heads = draw_heads(shape, dtype, generator)
    return (*heads, draw_gate(shape, generator), draw_target(shape, generator))


def _equally_weighted(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Argument, ...]:  # hidden, heads, weight logits
    return (*draw_heads(shape, dtype, generator), torch.zeros(shape.rows, shape.experts))


LINEAR_MIXTURE_NLL = Benchmark(
    op="linear_mixture_nll",
    ours=rg.linear_mixture_nll,
    formulations={name: _projected(form) for name, form in NLL_FORMULATIONS.items()},
    compiled=("log_softmax", "logsumexp"),
    truth="log_softmax",
    inputs=_gated,
    by_row=(True, False, True, True),
    trained=lambda hidden, heads, gate, target: [*hidden, *heads],
    gate=lambda hidden, heads, gate, target: [gate],
    shape=Shape(rows=256, experts=2, vocab=32000, hidden=512),
    bytes={
        "forward": "K N H e + K V H e",
        "frozen": "K N H e + K V H e",
        "backward": "2 K N H e + 2 K V H e",
        "forward_backward": "3 K N H e + 3 K V H e",
    },
    flops={
        "forward": "2 K N V H",
        "frozen": "2 K N V H",
        "backward": "4 K N V H",
        "forward_backward": "6 K N V H",
    },
    peers=(TORCH_LINEAR_CROSS_ENTROPY, CCE_COMPILED, CCE, LIGER_LINEAR_CROSS_ENTROPY),
)

# Distillation: the first expert is the student, the others are frozen teachers; weights 1/K, the
# only ones that its peer has at K = 2.
LINEAR_JSD = Benchmark(
    op="linear_jsd",
    ours=_linear_jsd,
    formulations={name: _projected(form) for name, form in JSD_FORMULATIONS.items()},
    compiled=("kl_div", "probabilities"),
    truth="probabilities",
    inputs=_equally_weighted,
    by_row=(True, False, True),
    trained=lambda hidden, heads, weight_logits: [hidden[0], heads[0]],
    gate=lambda hidden, heads, weight_logits: [weight_logits],
    shape=Shape(rows=256, experts=2, vocab=32000, hidden=512),
    bytes={
        "forward": "K N H e + K V H e",
        "frozen": "K N H e + K V H e",
        "backward": "K N H e + K V H e + N H e + V H e",
        "forward_backward": "2 K N H e + 2 K V H e + N H e + V H e",
    },
    flops={
        "forward": "2 K N V H",
        "frozen": "2 K N V H",
        "backward": "4 N V H",
        "forward_backward": "2 K N V H + 4 N V H",
    },
    peers=(LIGER_LINEAR_JSD,),
)

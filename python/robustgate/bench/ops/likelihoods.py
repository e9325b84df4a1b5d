"""``expert_log_prob``, ``mixture_nll`` and ``mixture_log_softmax``: one read of the logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import robustgate as rg
from robustgate.bench.benchmark import Argument, Benchmark, Shape
from robustgate.bench.ops.tensors import (
    draw_gate,
    draw_logits,
    draw_target,
    log_softmax,
    log_weights,
    total,
    wide,
)

Logits = list[Tensor]  # K x [N, V]
NLL = Callable[[Logits, Tensor, Tensor], Tensor]


def _log_softmax(logits: Logits, target: Tensor) -> Tensor:  # [N, K]
    index = target.unsqueeze(-1)
    return torch.cat([log_p.gather(-1, index) for log_p in log_softmax(logits)], dim=-1)


def _log_sum_exp(logits: Logits, target: Tensor) -> Tensor:  # [N, K]
    index = target.unsqueeze(-1)
    columns = [wide(z.gather(-1, index)) - torch.logsumexp(wide(z), -1, True) for z in logits]
    return torch.cat(columns, dim=-1)


def _cross_entropy(logits: Logits, target: Tensor) -> Tensor:  # [N, K]
    columns = [-F.cross_entropy(wide(z), target, reduction="none") for z in logits]
    return torch.stack(columns, dim=-1)


def _nll(expert_log_prob: Callable[[Logits, Tensor], Tensor]) -> NLL:
    """Return the mixture's loss for a way to write the experts' log-probs."""

    def nll(logits: Logits, gate: Tensor, target: Tensor) -> Tensor:
        log_prob = expert_log_prob(logits, target)
        return -torch.logsumexp(F.log_softmax(gate, dim=-1) + log_prob, dim=-1).mean()

    return nll


NLL_FORMULATIONS: dict[str, NLL] = {
    "log_softmax": _nll(_log_softmax),
    "logsumexp": _nll(_log_sum_exp),
    "cross_entropy": _nll(_cross_entropy),
}


def _mixture_logsumexp(logits: Logits, gate: Tensor) -> Tensor:  # [N, V]
    return torch.logsumexp(torch.stack(log_softmax(logits)) + log_weights(gate), dim=0)


def _mixture_probabilities(logits: Logits, gate: Tensor) -> Tensor:  # [N, V]
    weights = F.softmax(gate, dim=-1).split(1, dim=-1)  # K x [N, 1]
    p = [F.softmax(wide(z), dim=-1) for z in logits]
    return total([w * q for w, q in zip(weights, p, strict=True)]).log()


def _mixture_matmul(logits: Logits, gate: Tensor) -> Tensor:  # [N, V]
    p = torch.stack([F.softmax(wide(z), dim=-1) for z in logits], dim=1)  # [N, K, V]
    return (F.softmax(gate, dim=-1).unsqueeze(1) @ p).squeeze(1).log()


def _experts(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Argument, ...]:  # logits, target
    return draw_logits(shape, dtype, generator), draw_target(shape, generator)


def _gated_experts(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Argument, ...]:  # logits, gate logits
    return draw_logits(shape, dtype, generator), draw_gate(shape, generator)


def _all(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Argument, ...]:  # logits, gate logits, target
    return (*_gated_experts(shape, dtype, generator), draw_target(shape, generator))


EXPERT_LOG_PROB = Benchmark(
    op="expert_log_prob",
    ours=rg.expert_log_prob,
    formulations={
        "log_softmax": _log_softmax,
        "logsumexp": _log_sum_exp,
        "cross_entropy": _cross_entropy,
    },
    compiled=("log_softmax", "logsumexp"),
    truth="log_softmax",
    inputs=_experts,
    by_row=(True, True),
    trained=lambda logits, target: logits,
    gate=None,
    shape=Shape(rows=512, experts=4, vocab=32000),
    bytes={
        "forward": "K N V e",
        "backward": "2 K N V e",
        "forward_backward": "3 K N V e",
    },
)

MIXTURE_NLL = Benchmark(
    op="mixture_nll",
    ours=rg.mixture_nll,
    formulations=NLL_FORMULATIONS,
    compiled=("log_softmax", "logsumexp"),
    truth="log_softmax",
    inputs=_all,
    by_row=(True, True, True),
    trained=lambda logits, gate, target: logits,
    gate=lambda logits, gate, target: [gate],
    shape=Shape(rows=512, experts=4, vocab=32000),
    bytes={
        "forward": "K N V e",
        "frozen": "K N V e",
        "backward": "2 K N V e",
        "forward_backward": "3 K N V e",
    },
)

# The result and its upstream gradient are float32: 4 bytes.
MIXTURE_LOG_SOFTMAX = Benchmark(
    op="mixture_log_softmax",
    ours=rg.mixture_log_softmax,
    formulations={
        "logsumexp": _mixture_logsumexp,
        "probabilities": _mixture_probabilities,
        "matmul": _mixture_matmul,
    },
    compiled=("probabilities", "matmul"),
    truth="logsumexp",
    inputs=_gated_experts,
    by_row=(True, True),
    trained=lambda logits, gate: logits,
    gate=lambda logits, gate: [gate],
    shape=Shape(rows=256, experts=4, vocab=32000),
    bytes={
        "forward": "K N V e + 4 N V",
        "frozen": "2 K N V e + 12 N V",
        "backward": "2 K N V e + 8 N V",
        "forward_backward": "3 K N V e + 12 N V",
    },
)

"""``mixture_log_prob`` and ``sequence_log_prob``: sums of log-probabilities already at hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import robustgate as rg
from robustgate.bench.benchmark import Argument, Benchmark, Shape
from robustgate.bench.ops.tensors import draw_gate

_DOCUMENT = 1000  # tokens in a document, about


def _normalised(log_prob: Tensor, gate: Tensor) -> Tensor:  # [N]
    return torch.logsumexp(F.log_softmax(gate, dim=-1) + log_prob, dim=-1)


def _difference(log_prob: Tensor, gate: Tensor) -> Tensor:  # [N]
    return torch.logsumexp(gate + log_prob, dim=-1) - torch.logsumexp(gate, dim=-1)


def _probabilities(log_prob: Tensor, gate: Tensor) -> Tensor:  # [N]
    return (F.softmax(gate, dim=-1) * log_prob.exp()).sum(-1).log()


def _log_probs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:  # [N, K]
    uniform = torch.rand(shape.rows, shape.experts, generator=generator)
    return uniform.clamp_min(1e-6).log().mul(3).to(dtype)


def _gated(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Argument, ...]:  # log-probs, gate logits
    return _log_probs(shape, dtype, generator), draw_gate(shape, generator)


def _index_add(log_prob: Tensor, cu_seqlens: Tensor) -> Tensor:  # [n, K]
    documents = len(cu_seqlens) - 1
    index = torch.repeat_interleave(
        torch.arange(documents, device=log_prob.device),
        cu_seqlens.diff(),
        output_size=len(log_prob),
    )
    sums = log_prob.new_zeros(documents, log_prob.shape[1], dtype=torch.float64)
    return sums.index_add(0, index, log_prob.double())


def _cumsum(log_prob: Tensor, cu_seqlens: Tensor) -> Tensor:  # [n, K]
    return F.pad(log_prob.double().cumsum(0), (0, 0, 1, 0))[cu_seqlens].diff(dim=0)


def _split(log_prob: Tensor, cu_seqlens: Tensor) -> Tensor:  # [n, K]
    documents = log_prob.split(cu_seqlens.diff().tolist())
    return torch.stack([document.sum(0, dtype=torch.float64) for document in documents])


def _packed(
    shape: Shape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Argument, ...]:  # log-probs, cu_seqlens
    inner = torch.randperm(shape.rows - 1, generator=generator)[: shape.rows // _DOCUMENT + 1] + 1
    ends = torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([shape.rows])])
    return _log_probs(shape, dtype, generator), ends


MIXTURE_LOG_PROB = Benchmark(
    op="mixture_log_prob",
    ours=rg.mixture_log_prob,
    formulations={
        "log_softmax": _normalised,
        "difference": _difference,
        "probabilities": _probabilities,
    },
    compiled=("log_softmax", "difference"),
    truth="log_softmax",
    inputs=_gated,
    by_row=(True, True),
    trained=lambda log_prob, gate: [log_prob, gate],
    gate=lambda log_prob, gate: [gate],
    shape=Shape(rows=1 << 20, experts=4),
    bytes={
        "forward": "2 K N e + N e",
        "frozen": "5 K N e + 2 N e",
        "backward": "4 K N e + N e",
        "forward_backward": "6 K N e + 2 N e",
    },
    dtypes=(torch.float32,),
)

# Documents have unequal lengths: the rows are drawn whole, not repeated.
SEQUENCE_LOG_PROB = Benchmark(
    op="sequence_log_prob",
    ours=rg.sequence_log_prob,
    formulations={"index_add": _index_add, "cumsum": _cumsum, "split": _split},
    compiled=("index_add", "cumsum"),
    truth="index_add",
    inputs=_packed,
    by_row=(True, False),
    trained=lambda log_prob, cu_seqlens: [log_prob],
    gate=None,
    shape=Shape(rows=1 << 20, experts=4),
    bytes={"forward": "K N e", "backward": "K N e", "forward_backward": "2 K N e"},
    dtypes=(torch.float32,),
    block=1 << 30,
)

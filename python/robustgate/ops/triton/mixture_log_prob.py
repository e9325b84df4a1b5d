"""log m = log sum_k g_k exp(l_k), g = softmax(a); its gradients c r_k and c (r_k - g_k).

r = softmax(log g + l), the responsibilities. One program holds some rows with all K of their
numbers, float32 or float64; sums over k are tree sums. A weight of 0 (a = -inf) and an expert of
probability 0 (l = -inf) contribute nothing; if nothing contributes the value is -inf with gradient
0. NaN stays in its row.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustgate.ops.triton.launch import OPTIONS, on_device

_TERMS = 1024  # of a program
_NO_TARGET = -1  # stands for the absent target's ignore_index


@triton.jit
def _relative_to_max(x):
    """Return x - max_k x and exp of it; relative to 0 where the maximum is not finite."""
    top = tl.max(x, 1)
    top = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    return x - top[:, None], tl.exp(x - top[:, None]), top


@triton.jit
def _joint(log_prob, gate, gate_stride, rows, experts, mask):
    """Return log g, and log g + l, [rows, K]; -inf beyond K."""
    a = tl.load(gate + rows[:, None] * gate_stride + experts[None, :], mask, other=-float("inf"))
    relative, weights, _top = _relative_to_max(a)
    log_gate = relative - tl.log(tl.sum(weights, 1))[:, None]
    return log_gate, log_gate + log_prob


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(
    log_prob,  # [N, K]
    gate,  # [N, K] or [K]
    gate_stride,
    target,  # [N]
    out,  # [N]
    N,
    K,
    sign,
    ignore_index,
    MASKED: tl.constexpr,  # whether there is a target
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, EXPERTS)
    mask = (rows < N)[:, None] & (experts < K)[None, :]
    offsets = rows[:, None] * K + experts[None, :]
    x = tl.load(log_prob + offsets, mask, other=0.0)
    _log_gate, joint = _joint(x, gate, gate_stride, rows, experts, mask)
    _relative, terms, top = _relative_to_max(joint)
    value = (top + tl.log(tl.sum(terms, 1))) * sign
    if MASKED:
        ignored = tl.load(target + rows, rows < N, other=0) == ignore_index
        value = tl.where(ignored, 0.0, value)
    tl.store(out + rows, value, rows < N)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    grad,  # [N]
    log_prob,  # [N, K]
    gate,  # [N, K] or [K]
    gate_stride,
    target,  # [N]
    grad_log_prob,  # [N, K]
    grad_gate,  # [N, K]
    N,
    K,
    sign,
    ignore_index,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, EXPERTS)
    mask = (rows < N)[:, None] & (experts < K)[None, :]
    offsets = rows[:, None] * K + experts[None, :]
    x = tl.load(log_prob + offsets, mask, other=0.0)
    upstream = tl.load(grad + rows, rows < N, other=0.0)
    log_gate, joint = _joint(x, gate, gate_stride, rows, experts, mask)
    _relative, terms, _top = _relative_to_max(joint)
    total = tl.sum(terms, 1)
    # Nothing contributes, or nothing is asked: the gradient is 0, not 0 / 0.
    nothing = (upstream == 0) | (total == 0)
    if MASKED:
        nothing = nothing | (tl.load(target + rows, rows < N, other=0) == ignore_index)
    share = terms / tl.where(nothing, 1.0, total)[:, None]
    scale = (upstream * sign)[:, None]
    nothing = nothing[:, None]
    tl.store(grad_log_prob + offsets, tl.where(nothing, 0.0, scale * share), mask)
    difference = share - tl.exp(log_gate)
    tl.store(grad_gate + offsets, tl.where(nothing, 0.0, scale * difference), mask)


def _sizes(log_prob: Tensor) -> tuple[int, int, int, int]:
    """Return N, K and the block's rows and (padded) experts, which N does not change."""
    experts = log_prob.shape[-1]
    padded = 1 << (experts - 1).bit_length()
    return log_prob.numel() // experts, experts, max(1, min(64, _TERMS // padded)), padded


def forward(
    log_prob: Tensor,  # [..., K]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor | None,  # [...]
    sign: float,
    ignore_index: int,
) -> Tensor:  # [...]
    """Return ``sign * log sum_k g_k exp(l_k)``, 0 where the target is ``ignore_index``."""
    log_prob, gate = log_prob.contiguous(), gate_logits.contiguous()
    out = log_prob.new_empty(log_prob.shape[:-1])
    rows, experts, block, padded = _sizes(log_prob)
    if rows:
        with on_device(log_prob):
            _forward_kernel[(triton.cdiv(rows, block),)](
                log_prob,
                gate,
                experts if gate.dim() == log_prob.dim() else 0,
                gate if target is None else target.contiguous(),
                out,
                rows,
                experts,
                sign,
                ignore_index,
                MASKED=target is not None,
                ROWS=block,
                EXPERTS=padded,
                num_warps=4,
                **OPTIONS,
            )
    return out


def backward(
    grad: Tensor,  # [...]
    log_prob: Tensor,  # [..., K]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor | None,  # [...]
    sign: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # [..., K], [..., K]
    """Return the gradients of :func:`forward` for an upstream ``grad``."""
    log_prob, gate = log_prob.contiguous(), gate_logits.contiguous()
    grad_log_prob, grad_gate = torch.empty_like(log_prob), torch.empty_like(log_prob)
    rows, experts, block, padded = _sizes(log_prob)
    if rows:
        with on_device(log_prob):
            _backward_kernel[(triton.cdiv(rows, block),)](
                grad.contiguous(),
                log_prob,
                gate,
                experts if gate.dim() == log_prob.dim() else 0,
                gate if target is None else target.contiguous(),
                grad_log_prob,
                grad_gate,
                rows,
                experts,
                sign,
                ignore_index,
                MASKED=target is not None,
                ROWS=block,
                EXPERTS=padded,
                num_warps=4,
                **OPTIONS,
            )
    return grad_log_prob, grad_gate


def mixture_log_prob(log_prob: Tensor, gate_logits: Tensor) -> Tensor:
    """The raw op."""
    return forward(log_prob, gate_logits, None, 1.0, _NO_TARGET)


def mixture_log_prob_backward(
    grad: Tensor, log_prob: Tensor, gate_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """The raw op."""
    return backward(grad, log_prob, gate_logits, None, 1.0, _NO_TARGET)

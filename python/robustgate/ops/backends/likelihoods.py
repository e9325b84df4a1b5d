"""Native kernels, CPU and CUDA, of the ops over the log-probs of one column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustgate.ops.backends import native
from robustgate.ops.expert_log_prob import raise_target_out_of_range
from robustgate.ops.reference import statistics_dtype

if native.import_error is None:
    from robustgate import _C


def expert_log_prob(
    logits: Sequence[Tensor],
    target: Tensor,
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    target = target.contiguous()
    shape = (*target.shape, len(logits))
    log_prob = target.new_empty(shape, dtype=statistics_dtype(logits[0].dtype))
    lse = torch.empty_like(log_prob, dtype=torch.float64)
    rows, _kept = native.address_rows(logits)
    bad_row = _C.expert_log_prob(
        rows,
        target.data_ptr(),
        log_prob.data_ptr(),
        lse.data_ptr(),
        native.logits_spec(
            logits[0], target.numel(), vocab_size, ignore_index, temperature, softcap
        ),
        native.where(target),
    )
    if bad_row >= 0:
        raise_target_out_of_range(target, bad_row, vocab_size)
    return log_prob, lse


def expert_log_prob_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    logits: Sequence[Tensor],
    target: Tensor,
    lse: Tensor,
    *settings: Any,
) -> list[Tensor]:
    target, grad, lse = target.contiguous(), grad.contiguous(), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grads = [z.new_empty(z.shape) for z in logits]
    rows, _kept = native.address_rows(logits)
    # Fresh and contiguous: flattening to rank 3 is a view, nothing is copied.
    grad_rows, _ = native.address_rows([g if g.dim() <= 3 else g.flatten(0, -3) for g in grads])
    _C.expert_log_prob_backward(
        rows,
        target.data_ptr(),
        lse.data_ptr(),
        grad.data_ptr(),
        0 if grad_lse is None else grad_lse.data_ptr(),
        grad_rows,
        [z.shape[-1] for z in logits],
        native.logits_spec(logits[0], target.numel(), *settings),
        native.where(target),
    )
    return grads


def mixture_log_prob(log_prob: Tensor, gate_logits: Tensor) -> Tensor:
    log_prob, gate_logits = log_prob.contiguous(), gate_logits.contiguous()
    out = log_prob.new_empty(log_prob.shape[:-1])
    _C.mixture_log_prob(
        log_prob.data_ptr(),
        gate_logits.data_ptr(),
        0,
        out.data_ptr(),
        _mixture_spec(log_prob, gate_logits, 1.0, 0),
        native.where(log_prob),
    )
    return out


def mixture_log_prob_backward(
    grad: Tensor, log_prob: Tensor, gate_logits: Tensor
) -> tuple[Tensor, Tensor]:
    return _mixture_backward(grad, log_prob, gate_logits, None, 1.0, 0)


def mixture_nll(
    logits: Sequence[Tensor],
    gate_logits: Tensor,
    target: Tensor,
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # empty_like is the cheapest allocation; its argument has to be contiguous.
    target, gate_logits = target.contiguous(), gate_logits.contiguous()
    experts = len(logits)
    nll = torch.empty_like(target, dtype=gate_logits.dtype)
    if gate_logits.dim() > target.dim():
        gate_stride = experts
        log_prob = torch.empty_like(gate_logits)
    else:
        gate_stride = 0
        log_prob = gate_logits.new_empty((*target.shape, experts))
    lse = torch.empty_like(log_prob, dtype=torch.float64)
    rows, _kept = native.address_rows(logits)
    bad_row = _C.mixture_nll(
        rows,
        gate_logits.data_ptr(),
        gate_stride,
        target.data_ptr(),
        nll.data_ptr(),
        log_prob.data_ptr(),
        lse.data_ptr(),
        native.logits_spec(
            logits[0], target.numel(), vocab_size, ignore_index, temperature, softcap
        ),
        native.where(target),
    )
    if bad_row >= 0:
        raise_target_out_of_range(target, bad_row, vocab_size)
    return nll, log_prob, lse


def mixture_nll_backward(
    grad: Tensor,
    log_prob: Tensor,
    gate_logits: Tensor,
    target: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    return _mixture_backward(grad, log_prob, gate_logits, target.contiguous(), -1.0, ignore_index)


def _mixture_spec(
    log_prob: Tensor, gate_logits: Tensor, sign: float, ignore_index: int
) -> tuple[int, int, int, int, float, int]:
    experts = log_prob.shape[-1]
    gate_stride = experts if gate_logits.dim() == log_prob.dim() else 0
    code = native.dtype_code(log_prob)
    return (log_prob.numel() // experts, experts, gate_stride, ignore_index, sign, code)


def _mixture_backward(
    grad: Tensor,
    log_prob: Tensor,
    gate_logits: Tensor,
    target: Tensor | None,
    sign: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    log_prob, gate_logits = log_prob.contiguous(), gate_logits.contiguous()
    grad = grad.contiguous()
    grad_log_prob, grad_gate = torch.empty_like(log_prob), torch.empty_like(log_prob)
    _C.mixture_log_prob_backward(
        log_prob.data_ptr(),
        gate_logits.data_ptr(),
        0 if target is None else target.data_ptr(),
        grad.data_ptr(),
        grad_log_prob.data_ptr(),
        grad_gate.data_ptr(),
        _mixture_spec(log_prob, gate_logits, sign, ignore_index),
        native.where(log_prob),
    )
    return grad_log_prob, grad_gate


KERNELS: tuple[Callable[..., Any], ...] = (
    expert_log_prob,
    expert_log_prob_backward,
    mixture_log_prob,
    mixture_log_prob_backward,
    mixture_nll,
    mixture_nll_backward,
)

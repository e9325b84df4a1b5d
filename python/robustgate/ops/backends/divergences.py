"""Native kernels, CPU and CUDA, of the ops that look at every column of every expert together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustgate.ops.backends import native

if native.import_error is None:
    from robustgate import _C


def _statistics(logits: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialised float32 [...] and [..., K], and float64 [..., K]."""
    z = logits[0]
    leading = z.shape[:-1]
    per_expert = z.new_empty((*leading, len(logits)), dtype=torch.float32)
    return (
        z.new_empty(leading, dtype=torch.float32),
        per_expert,
        torch.empty_like(per_expert, dtype=torch.float64),
    )


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _per_row(values: Tensor, like: Tensor) -> tuple[int, int]:
    """Return address and row stride of gate logits or weights, [K] or [..., K] as ``like`` is."""
    return values.data_ptr(), values.shape[-1] if values.dim() == like.dim() else 0


def _fresh_gradients(
    logits: Sequence[Tensor], needs_grad: Sequence[bool]
) -> tuple[list[Tensor], list[int]]:
    """Return gradients of the experts that need one, and every expert's rows (0: none)."""
    grads, flat = [], []
    for z, needed in zip(logits, needs_grad, strict=True):
        if not needed:
            flat += [0, 0, 0]
            continue
        grad = z.new_empty(z.shape)
        # Fresh and contiguous: flattening to rank 3 is a view, nothing is copied.
        flat += native.address_rows([grad if grad.dim() <= 3 else grad.flatten(0, -3)])[0]
        grads.append(grad)
    return grads, flat


def jsd(
    logits: Sequence[Tensor],
    weights: Tensor,
    lse: Tensor | None,
    target: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    value, kl, out = _statistics(logits)
    target, lse = _dense(target), _dense(lse)
    weights = weights.contiguous()
    rows, _kept = native.address_rows(logits)
    _C.jsd(
        rows,
        _per_row(weights, kl),
        _address(target),
        _address(lse),
        value.data_ptr(),
        kl.data_ptr(),
        out.data_ptr(),
        native.logits_spec(logits[0], value.numel(), *settings),
        native.where(logits[0]),
    )
    return value, kl, out


def jsd_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    weights: Tensor,
    kl: Tensor,
    lse: Tensor,
    target: Tensor | None,
    needs_grad: Sequence[bool],
    *settings: Any,
) -> list[Tensor]:
    grad, weights, kl, lse = _contiguous(grad, weights, kl, lse)
    target = _dense(target)
    grads, grad_rows = _fresh_gradients(logits, needs_grad)
    rows, _kept = native.address_rows(logits)
    _C.jsd_backward(
        rows,
        _per_row(weights, kl),
        _address(target),
        lse.data_ptr(),
        kl.data_ptr(),
        grad.data_ptr(),
        grad_rows,
        [z.shape[-1] for z in logits],
        native.logits_spec(logits[0], grad.numel(), *settings),
        native.where(logits[0]),
    )
    return grads


def mixture_kl(
    logits: Sequence[Tensor],
    teacher: Tensor,
    student: Tensor,
    target: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    value, tilt, lse = _statistics(logits)
    teacher, student = _contiguous(teacher, student)
    target = _dense(target)
    rows, _kept = native.address_rows(logits)
    _C.mixture_kl(
        rows,
        _per_row(teacher, tilt),
        _per_row(student, tilt),
        _address(target),
        value.data_ptr(),
        tilt.data_ptr(),
        lse.data_ptr(),
        native.logits_spec(logits[0], value.numel(), *settings),
        native.where(logits[0]),
    )
    return value, tilt, lse


def mixture_kl_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    teacher: Tensor,
    student: Tensor,
    value: Tensor,
    lse: Tensor,
    target: Tensor | None,
    needs_grad: Sequence[bool],
    *settings: Any,
) -> list[Tensor]:
    grad, teacher, student, value, lse = _contiguous(grad, teacher, student, value, lse)
    target = _dense(target)
    grads, grad_rows = _fresh_gradients(logits, needs_grad)
    rows, _kept = native.address_rows(logits)
    _C.mixture_kl_backward(
        rows,
        _per_row(teacher, lse),
        _per_row(student, lse),
        _address(target),
        value.data_ptr(),
        lse.data_ptr(),
        grad.data_ptr(),
        grad_rows,
        [z.shape[-1] for z in logits],
        native.logits_spec(logits[0], grad.numel(), *settings),
        native.where(logits[0]),
    )
    return grads


def mixture_log_softmax(
    logits: Sequence[Tensor],
    gate_logits: Tensor,
    vocab_size: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    gate_logits = gate_logits.contiguous()
    leading = logits[0].shape[:-1]
    out = logits[0].new_empty((*leading, vocab_size), dtype=torch.float32)
    lse = out.new_empty((*leading, len(logits)), dtype=torch.float64)
    rows, _kept = native.address_rows(logits)
    _C.mixture_log_softmax(
        rows,
        _per_row(gate_logits, lse),
        0,
        out.data_ptr(),
        0,
        0,
        lse.data_ptr(),
        native.logits_spec(logits[0], leading.numel(), vocab_size, 0, temperature, softcap),
        native.where(logits[0]),
    )
    return out, lse


def mixture_log_softmax_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    gate_logits: Tensor,
    lse: Tensor,
    needs_grad: Sequence[bool],
    vocab_size: int,
    temperature: float,
    softcap: float | None,
) -> tuple[list[Tensor], Tensor]:
    grad, gate_logits, lse = _contiguous(grad, gate_logits, lse)
    grad_gate = lse.new_empty(lse.shape, dtype=torch.float32)
    grads, grad_rows = _fresh_gradients(logits, needs_grad)
    rows, _kept = native.address_rows(logits)
    count = lse.numel() // len(logits)
    _C.mixture_log_softmax_backward(
        rows,
        _per_row(gate_logits, lse),
        0,
        lse.data_ptr(),
        grad.data_ptr(),
        False,
        grad_gate.data_ptr(),
        grad_rows,
        [z.shape[-1] for z in logits],
        native.logits_spec(logits[0], count, vocab_size, 0, temperature, softcap),
        native.where(logits[0]),
    )
    return grads, grad_gate


def mixture_mean_log_prob(
    logits: Sequence[Tensor], gate_logits: Tensor, target: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mean, share, lse = _statistics(logits)
    gate_logits, target = _contiguous(gate_logits, target)
    rows, _kept = native.address_rows(logits)
    _C.mixture_log_softmax(
        rows,
        _per_row(gate_logits, share),
        target.data_ptr(),
        0,
        mean.data_ptr(),
        share.data_ptr(),
        lse.data_ptr(),
        native.logits_spec(logits[0], mean.numel(), *settings),
        native.where(logits[0]),
    )
    return mean, share, lse


def mixture_mean_log_prob_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    gate_logits: Tensor,
    target: Tensor,
    share: Tensor,
    lse: Tensor,
    needs_grad: Sequence[bool],
    vocab_size: int,
    *settings: Any,
) -> list[Tensor]:
    grad, gate_logits, target, lse = _contiguous(grad / vocab_size, gate_logits, target, lse)
    grads, grad_rows = _fresh_gradients(logits, needs_grad)
    rows, _kept = native.address_rows(logits)
    _C.mixture_log_softmax_backward(
        rows,
        _per_row(gate_logits, lse),
        target.data_ptr(),
        lse.data_ptr(),
        grad.data_ptr(),
        True,
        0,
        grad_rows,
        [z.shape[-1] for z in logits],
        native.logits_spec(logits[0], grad.numel(), vocab_size, *settings),
        native.where(logits[0]),
    )
    return grads


KERNELS: tuple[Callable[..., Any], ...] = (
    jsd,
    jsd_backward,
    mixture_kl,
    mixture_kl_backward,
    mixture_log_softmax,
    mixture_log_softmax_backward,
    mixture_mean_log_prob,
    mixture_mean_log_prob_backward,
)

"""Native CUDA kernels, where the wheel holds them and the driver and device can run them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from robustgate.ops.backends import native
from robustgate.ops.library import register_kernel
from robustgate.ops.mixture_nll import from_log_prob
from robustgate.ops.reference import statistics_dtype

if native.import_error is None:
    from robustgate import _C


@cache
def why_unusable(device: int = 0) -> str | None:
    """Return why the CUDA kernels cannot run on a device, or None if they can."""
    if native.import_error is not None:
        return "the compiled extension cannot be imported"
    if _C.cuda_version is None:
        return "this wheel was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _C.cuda_why_unusable(device)


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
    lse = target.new_empty(shape, dtype=torch.float64)
    device = target.device.index
    rows, _kept = native.address_rows(logits)
    _C.cuda_expert_log_prob(
        rows,
        target.data_ptr(),
        log_prob.data_ptr(),
        lse.data_ptr(),
        native.logits_spec(
            logits[0], target.numel(), vocab_size, ignore_index, temperature, softcap
        ),
        device,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return log_prob, lse


def mixture_nll(
    logits: Sequence[Tensor],
    gate_logits: Tensor,
    target: Tensor,
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    log_prob, lse = expert_log_prob(logits, target, vocab_size, ignore_index, temperature, softcap)
    return from_log_prob(log_prob, gate_logits, target, ignore_index), log_prob, lse


if why_unusable() is None:
    register_kernel("expert_log_prob", "cuda", "native", expert_log_prob)
    register_kernel("mixture_nll", "cuda", "native", mixture_nll)

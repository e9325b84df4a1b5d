"""Native CUDA kernels, where the wheel holds them and the driver and device can run them.

Nothing asks the driver before the first CUDA tensor arrives: an import that opened a context would
hold memory on device 0 in every process and break CUDA in forked children.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from robustgate.ops import reference
from robustgate.ops.backends import native
from robustgate.ops.library import register_kernel, requested_backend
from robustgate.ops.mixture_nll import from_log_prob

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


def _must_fall_back(device: int) -> bool:
    """Whether eager torch has to serve; an error if the native backend was insisted on."""
    reason = why_unusable(device)
    if reason is not None and requested_backend() == "native":
        raise RuntimeError(f"robustgate: backend 'native' on cuda:{device}: {reason}")
    return reason is not None


def expert_log_prob(
    logits: Sequence[Tensor],
    target: Tensor,
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    device = target.device.index
    settings = (vocab_size, ignore_index, temperature, softcap)
    if _must_fall_back(device):
        return reference.expert_log_prob(logits, target, *settings)
    target = target.contiguous()
    shape = (*target.shape, len(logits))
    dtype = reference.statistics_dtype(logits[0].dtype)
    log_prob = target.new_empty(shape, dtype=dtype)
    lse = target.new_empty(shape, dtype=torch.float64)
    rows, _kept = native.address_rows(logits)
    _C.cuda_expert_log_prob(
        rows,
        target.data_ptr(),
        log_prob.data_ptr(),
        lse.data_ptr(),
        native.logits_spec(logits[0], target.numel(), *settings),
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


if native.import_error is None and _C.cuda_version is not None:
    register_kernel("expert_log_prob", "cuda", "native", expert_log_prob)
    register_kernel("mixture_nll", "cuda", "native", mixture_nll)

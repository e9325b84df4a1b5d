"""The compiled extension and what its two devices share: addresses, strides, dtype codes.

Tensors cross as integers: data pointers, sizes and strides in elements. Everything that makes a
pointer safe happens here and in :mod:`robustgate.ops.checks`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

import_error: ImportError | None = None
try:
    from robustgate import _C
except ImportError as error:
    import_error = error
    warnings.warn(
        f"robustgate runs on eager torch only: its extension cannot be imported ({error})",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    _forced = os.environ.get("ROBUSTGATE_CPU")
    if _forced and _C.instruction_set() != _forced:
        raise RuntimeError(
            f"ROBUSTGATE_CPU={_forced!r} cannot be served: use baseline, avx2 or avx512, as far as "
            f"this processor has it (it would run {_C.instruction_set()})"
        )

# The order of robustgate::DType in csrc/common/dtype.h.
_DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

Where = tuple[int, int]
LogitsSpec = tuple[int, int, int, int, float, float, int]


def where(tensor: Tensor) -> Where:
    """Return where a kernel runs: (-1, threads) for a CPU tensor, else (device, its stream)."""
    if not tensor.is_cuda:
        return -1, torch.get_num_threads()
    device = tensor.device.index
    return device, torch.cuda.current_stream(device).cuda_stream


def dtype_code(tensor: Tensor) -> int:
    """Return the extension's code of a tensor's dtype."""
    return _DTYPE_CODE[tensor.dtype]


def address_rows(logits: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Return (data pointer, outer stride, inner stride) of each expert, flat, and what to keep.

    Rows are addressed in two levels, so [V], [N, V] and [B, T, V] with any strides between rows,
    such as the slice ``logits[:, :-1]``, are read in place. Other layouts are copied; the copies
    are the second value, which has to live until the kernel returns.
    """
    flat: list[int] = []
    kept: list[Tensor] = []
    for z in logits:
        strides = z.stride()
        rank = len(strides)
        if rank > 3 or (strides[-1] != 1 and z.shape[-1] != 1):
            z = z.contiguous() if rank <= 3 else z.flatten(0, -3).contiguous()
            strides = z.stride()
            rank = len(strides)
            kept.append(z)
        flat.append(z.data_ptr())
        flat.append(strides[0] if rank == 3 else 0)
        flat.append(strides[-2] if rank >= 2 else 0)
    return flat, kept


def logits_spec(
    first: Tensor,  # [..., >= V]
    rows: int,
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> LogitsSpec:
    """Return the sizes and scalars every op over logits shares."""
    inner_rows = first.shape[-2] if first.dim() >= 2 else 1
    return (
        rows,
        inner_rows or 1,
        vocab_size,
        ignore_index,
        temperature,
        softcap or 0.0,
        _DTYPE_CODE[first.dtype],
    )

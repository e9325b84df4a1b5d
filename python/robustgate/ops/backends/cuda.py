"""Native CUDA kernels, where the wheel holds them and the driver and device can run them.

float64 logits run on eager torch, and so do comparisons of more than 32 experts. Nothing asks the
driver before the first CUDA tensor arrives: an import that opened a context would hold memory on
device 0 in every process and break CUDA in forked children.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from robustgate.ops.backends import divergences, likelihoods, native
from robustgate.ops.library import eager_where, register_kernel

if native.import_error is None:
    from robustgate import _C

_MAX_EXPERTS = 32  # kMaxExperts of csrc/ops.h
LEAVES = f"float64 logits; comparisons of more than {_MAX_EXPERTS} experts"


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


def _is_float64(logits: Sequence[Tensor]) -> bool:
    return logits[0].dtype == torch.float64


def _is_unserved(logits: Sequence[Tensor]) -> bool:
    return len(logits) > _MAX_EXPERTS or _is_float64(logits)


if native.import_error is None and _C.cuda_version is not None:
    for _kernels, _unserved in (
        (likelihoods.KERNELS, _is_float64),
        (divergences.KERNELS, _is_unserved),
    ):
        for _kernel in _kernels:
            register_kernel(
                _kernel.__name__, "cuda", "native", eager_where(_unserved, _kernel), why_unusable
            )

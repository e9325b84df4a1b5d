"""Native CPU kernels: vectorised for the processor at hand, on torch's number of threads.

float64 logits of the ops that compare experts run on the reference: it is there to check the
others, and is float64 inside anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustgate.ops.backends import divergences, likelihoods, native
from robustgate.ops.library import eager_where, register_kernel

LEAVES = "the ops that compare experts in float64"


def _is_float64(logits: Sequence[Tensor]) -> bool:
    return logits[0].dtype == torch.float64


if native.import_error is None:
    for _kernel in likelihoods.KERNELS:
        register_kernel(_kernel.__name__, "cpu", "native", _kernel)
    for _kernel in divergences.KERNELS:
        register_kernel(_kernel.__name__, "cpu", "native", eager_where(_is_float64, _kernel))

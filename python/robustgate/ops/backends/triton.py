"""Triton kernels, for CUDA, ROCm and XPU tensors; for CPU tensors in Triton's interpreter.

Triton is imported when a kernel is first called, or asked for. float64 logits run on eager torch,
and so do comparisons of more than 16 experts (mixture_kl: 8), whose kernels would not fit the
registers. The interpreter (``TRITON_INTERPRET=1``) is for tests: it serves CPU tensors where
``backend("triton")`` asks for it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from robustgate.ops.backends import native
from robustgate.ops.library import Kernel, eager_where, register_kernel, register_whole

OLDEST = (3, 6)  # Triton versions before are untested

# Raw op -> (module of robustgate.ops.triton, launcher).
_LAUNCHERS = {
    "expert_log_prob": ("expert_log_prob", "forward"),
    "expert_log_prob_backward": ("expert_log_prob", "backward"),
    "mixture_log_prob": ("mixture_log_prob", "mixture_log_prob"),
    "mixture_log_prob_backward": ("mixture_log_prob", "mixture_log_prob_backward"),
    "mixture_nll": ("mixture_nll", "forward"),
    "mixture_nll_backward": ("mixture_nll", "backward"),
    "mixture_log_softmax": ("mixture_log_softmax", "forward"),
    "mixture_log_softmax_backward": ("mixture_log_softmax", "backward"),
    "mixture_mean_log_prob": ("mixture_mean_log_prob", "forward"),
    "mixture_mean_log_prob_backward": ("mixture_mean_log_prob", "backward"),
    "jsd": ("jsd", "forward"),
    "jsd_backward": ("jsd_backward", "backward"),
    "mixture_kl": ("mixture_kl", "forward"),
    "mixture_kl_backward": ("mixture_kl", "backward"),
}
# Experts a kernel compares column by column; the other ops take any number.
_MAX_EXPERTS = {
    "mixture_log_softmax": 16,
    "mixture_log_softmax_backward": 16,
    "mixture_mean_log_prob": 16,
    "mixture_mean_log_prob_backward": 16,
    "jsd": 16,
    "jsd_backward": 16,
    "mixture_kl": 8,
    "mixture_kl_backward": 8,
}
LEAVES = (
    "float64 logits; comparisons of more than "
    f"{_MAX_EXPERTS['jsd']} experts (mixture_kl: {_MAX_EXPERTS['mixture_kl']})"
)


@cache
def why_not_installed() -> str | None:
    """Return why Triton cannot be used in this process, or None if it can; imports it."""
    try:
        # Its distribution has other names on ROCm and XPU: only the module knows its version.
        version: str = import_module("triton").__version__
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST))}"
    if not any(map(shutil.which, ("gcc", "clang"))) and "CC" not in os.environ:
        return "Triton finds no C compiler for its launchers: install gcc or clang, or set CC"
    return None


@cache
def why_unusable(device: int = 0, device_type: str = "cuda") -> str | None:
    """Return why the Triton kernels cannot run on a device, or None if they can."""
    if (reason := why_not_installed()) is not None:
        return reason
    module = torch.get_device_module(device_type)
    if not module.is_available():
        return f"torch sees no {device_type} device"
    # Only Intel's devices say so: some have no float64.
    if not getattr(module.get_device_properties(device), "has_fp64", True):
        return "the device has no float64 arithmetic, which the log-sum-exps take"
    return None


def _unserved(op: str) -> Callable[[Sequence[Tensor]], bool]:
    """Return the question whether eager torch serves an op on these logits."""
    most = _MAX_EXPERTS.get(op)

    def ask(logits: Sequence[Tensor]) -> bool:
        too_many = most is not None and len(logits) > most
        return too_many or logits[0].dtype == torch.float64

    return ask


def _launcher(op: str, module: str, function: str) -> Kernel:
    """Return the launcher, whose module is imported when it is first called."""

    def run(*args: Any) -> Any:
        return getattr(import_module(f"robustgate.ops.triton.{module}"), function)(*args)

    run.__name__ = op
    return run


def _linear_expert_log_prob(*args: Any) -> tuple[Tensor, Tensor]:
    """Call the fused kernel, which needs no workspace, the op's last argument."""
    module = import_module("robustgate.ops.triton.linear_mixture_nll")
    result: tuple[Tensor, Tensor] = module.forward(*args[:-1])
    return result


def _takes_heads(hidden: Sequence[Tensor], *_: Any) -> bool:
    return hidden[0].dtype != torch.float64


_on_cpu = os.environ.get("TRITON_INTERPRET") == "1" and native.import_error is None
for _op, _where in _LAUNCHERS.items():
    _kernel = eager_where(_unserved(_op), _launcher(_op, *_where))
    for _type in ("cuda", "xpu"):
        _reason = partial(why_unusable, device_type=_type)
        register_kernel(_op, _type, "triton", _kernel, _reason)
    if _on_cpu:
        register_kernel(_op, "cpu", "triton", _kernel)
# Whether the fused kernel is faster than tiles through memory has not been measured: "auto" does
# not choose it.
for _type in ("cuda", "xpu", *(["cpu"] if _on_cpu else [])):
    register_whole("linear_expert_log_prob", _type, "triton", _linear_expert_log_prob, _takes_heads)

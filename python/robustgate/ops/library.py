"""Schemas of the raw ops, and the table that says which backend serves which op on which device.

``torch.ops.robustgate.*`` is private: functional schemas without autograd, on checked arguments.
The public functions (``robustgate.ops.*``) validate, differentiate and document. torch's dispatcher
picks the device; within a device the backend is picked here, at run time, so that
:func:`backend` also acts on compiled graphs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "eager", "native", "triton")

_library = torch.library.Library("robustgate", "DEF")
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}
_EVERY_DEVICE = "CompositeExplicitAutograd"

Kernel = Callable[..., Any]
WhyUnusable = Callable[[int], str | None]

# (op, device type) -> backend name -> kernel; "auto" and "eager" are among the names.
_kernels: dict[tuple[str, str], dict[str, Kernel]] = {}
# The same as registered, in order of preference.
_served: dict[tuple[str, str], dict[str, tuple[Kernel, WhyUnusable | None]]] = {}
_defaults: dict[str, Kernel] = {}
# Composed op -> (backend name, device type) -> (kernel of the whole op, whether it takes a call).
_whole: dict[str, dict[tuple[str, str], tuple[Kernel, Callable[..., bool]]]] = {}


def _check_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_requested = _check_backend(os.environ.get("ROBUSTGATE_BACKEND") or "auto", "ROBUSTGATE_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the ops inside the block on one backend.

    Args:
        name: ``"auto"`` (the fastest that serves the device), ``"eager"`` (plain torch),
            ``"native"`` (compiled C++ or CUDA) or ``"triton"``. The environment variable
            ``ROBUSTGATE_BACKEND`` sets the choice outside any block.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: (from the op) the backend has no kernel for the op on that device.

    The choice belongs to the process, like :func:`torch.set_num_threads`, because a backward pass
    may run on another thread. ``robustgate env`` shows what serves what.

    Example:
        >>> import robustgate as rg, torch
        >>> with rg.backend("eager"):
        ...     rg.mixture_log_prob(torch.zeros(2), torch.zeros(2))
        tensor(0.)
    """
    global _requested
    previous, _requested = _requested, _check_backend(name, "backend name")
    try:
        yield
    finally:
        _requested = previous


def requested_backend() -> str:
    """Return the backend asked for by :func:`backend` or ``ROBUSTGATE_BACKEND``."""
    return _requested


def define(schema: str, fake: Kernel, eager: Kernel) -> Kernel:
    """Declare a raw op with its fake kernel (shapes only) and its eager kernel (every device).

    Returns the op, ``torch.ops.robustgate.<name>.default``.
    """
    name = schema.partition("(")[0]
    _defaults[name] = eager
    return _declare(schema, fake, _choosing(name, {"auto": eager, "eager": eager}))


def eager_kernel(name: str) -> Kernel:
    """Return the eager kernel of a raw op."""
    return _defaults[name]


def define_composed(schema: str, fake: Kernel, kernel: Kernel) -> Kernel:
    """Declare a raw op made of matrix products and other raw ops, whose backends it runs on."""
    whole = _whole.setdefault(schema.partition("(")[0], {})

    def run(*args: Any) -> Any:
        fused, takes = whole.get((_requested, _device(args).type), (kernel, None))
        return (kernel if takes is not None and not takes(*args) else fused)(*args)

    return _declare(schema, fake, run)


def register_whole(
    name: str, device_type: str, backend_name: str, kernel: Kernel, takes: Callable[..., bool]
) -> None:
    """Register one kernel for all of a composed op, used where its backend is asked for by name.

    ``takes(*args)`` says whether it serves a call; the composition serves the others.
    """
    _whole.setdefault(name, {})[backend_name, device_type] = kernel, takes


def _declare(schema: str, fake: Kernel, kernel: Kernel) -> Kernel:
    name = schema.partition("(")[0]
    _library.define(schema)
    torch.library.register_fake(f"robustgate::{name}", fake, lib=_library)
    _library.impl(name, kernel, _EVERY_DEVICE)
    op: Kernel = getattr(torch.ops.robustgate, name).default
    return op


def register_kernel(
    name: str,
    device_type: str,
    backend_name: str,
    kernel: Kernel,
    why_unusable: WhyUnusable | None = None,
) -> None:
    """Register a kernel of a raw op for one device type.

    ``why_unusable(device_index)`` returns why the kernel cannot run on a device, or None if it can.
    ``"auto"`` runs the first registered kernel that can, else eager torch.
    """
    served = _served.setdefault((name, device_type), {})
    served[backend_name] = kernel, why_unusable
    table = _kernels.get((name, device_type))
    if table is None:
        table = _kernels[name, device_type] = {"eager": _defaults[name]}
        _library.impl(name, _choosing(name, table), _DISPATCH_KEYS[device_type])
    table[backend_name] = _insisting(name, backend_name, kernel, why_unusable)
    table["auto"] = _first_usable(served, _defaults[name])


def eager_where(unserved: Callable[[Sequence[Tensor]], bool], kernel: Kernel) -> Kernel:
    """Return the kernel, with eager torch in its place where ``unserved(logits)`` is true."""
    eager = _defaults[kernel.__name__]

    def run(*args: Any) -> Any:
        logits = next((arg for arg in args if isinstance(arg, (list, tuple))), None)
        return (eager if logits is not None and unserved(logits) else kernel)(*args)

    return run


def _device(args: Sequence[Any]) -> torch.device:
    """Return the device the first argument is on: a tensor or a list of them."""
    tensor: Tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
    return tensor.device


def _first_usable(served: dict[str, tuple[Kernel, WhyUnusable | None]], eager: Kernel) -> Kernel:
    """Return the kernel that runs the first registered one its device can run."""
    first, why_first_unusable = next(iter(served.values()))
    if why_first_unusable is None:
        return first

    def run(*args: Any) -> Any:
        device = _device(args).index or 0
        for kernel, why_unusable in served.values():
            if why_unusable is None or why_unusable(device) is None:
                return kernel(*args)
        return eager(*args)

    return run


def _insisting(
    name: str, backend_name: str, kernel: Kernel, why_unusable: WhyUnusable | None
) -> Kernel:
    """Return the kernel that raises, with the reason, where it cannot run."""
    if why_unusable is None:
        return kernel

    def run(*args: Any) -> Any:
        device = _device(args).index or 0
        if (reason := why_unusable(device)) is not None:
            raise RuntimeError(
                f"robustgate.{name}: backend {backend_name!r} cannot run on device {device}: "
                f"{reason}"
            )
        return kernel(*args)

    return run


def _choosing(name: str, table: dict[str, Kernel]) -> Kernel:
    """Return the kernel that looks up the requested backend when it is called."""

    def run(*args: Any) -> Any:
        chosen = table.get(_requested)
        if chosen is None:
            raise RuntimeError(
                f"robustgate.{name}: backend {_requested!r} has no kernel for these tensors "
                f"(available: {', '.join(table)}); `robustgate env` says why"
            )
        return chosen(*args)

    return run


def serving(device_type: str, device_index: int = 0) -> dict[str, list[str]]:
    """Return, for each raw op, the backends that serve a device, the preferred one first."""
    return {
        name: [
            *(
                backend
                for backend, (_, why_unusable) in _served.get((name, device_type), {}).items()
                if why_unusable is None or why_unusable(device_index) is None
            ),
            "eager",
        ]
        for name in _defaults
    }

"""Peak memory of a call beyond its inputs and its result."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from robustgate.bench.measure import Call, Result

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """Return the most memory a call holds at a time, less what it starts with and what it returns.

    On a CPU this is the process's own peak, which counts every library's allocations (Linux:
    ``VmHWM``, set back through ``/proc/self/clear_refs``); on a GPU torch's allocator counts.

    Returns:
        Bytes, or None where the system does not tell.
    """
    state = call.prepare()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call.run(state)
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before - _size(result))
    try:
        _return_free_memory()
        _CLEAR_REFS.write_text("5")
        before = _status("VmRSS")
        result = call.run(state)
        return max(0, _status("VmHWM") - before - _size(result))
    except (OSError, AttributeError):
        return None


def _size(result: Result) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in result)


def _return_free_memory() -> None:
    """Give freed memory back to the system: a call that reuses it would seem to need none."""
    ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    """Return a field of the process's status, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10

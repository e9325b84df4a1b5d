"""Where the time of an op goes, as torch's profiler sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from robustgate.bench.case import make_case
from robustgate.bench.measure import threads
from robustgate.bench.plan import Task

_WARM_UP, _CALLS = 2, 5


@dataclass(frozen=True)
class Entry:
    """One op of torch's dispatcher; the raw ops of this package are ``robustgate::...``.

    Attributes:
        name: as the profiler shows it, also in users' own profiles.
        calls: in one call of the public op.
        self_us: time in the op itself, without the ops it calls, per call of the public op.
        total_us: with them.
        share: of ``self_us`` in the sum over all ops.
    """

    name: str
    calls: float
    self_us: float
    total_us: float
    share: float


def profile(task: Task, device: torch.device, limit: int = 15) -> list[Entry]:
    """Profile a few calls of this package's op; the largest entries first."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    case = make_case(task.benchmark, task.shape, task.dtype, task.mode, device)
    call = case.call(task.benchmark.ours)
    with threads(task.threads):
        for _ in range(_WARM_UP):
            call.once()
        states = [call.prepare() for _ in range(_CALLS)]
        with profiler(activities=activities) as recorded:
            for state in states:
                call.run(state)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    where = "device" if device.type == "cuda" else "cpu"
    found = [
        (
            event.key,
            event.count / _CALLS,
            getattr(event, f"self_{where}_time_total") / _CALLS,
            getattr(event, f"{where}_time_total") / _CALLS,
        )
        for event in recorded.key_averages()
    ]
    whole = sum(entry[2] for entry in found) or 1.0
    found.sort(key=lambda entry: -entry[2])
    return [Entry(*entry, share=entry[2] / whole) for entry in found[:limit]]


def view(task: Task, entries: list[Entry]) -> Table:
    """Return a profile as a table."""
    sizes = ", ".join(f"{letter} = {size}" for letter, size in task.shape.letters().items() if size)
    table = Table(title=f"{task}: {sizes}; per call", title_justify="left")
    table.add_column("op of torch's dispatcher")
    for name in ("calls", "self ms", "share", "total ms"):
        table.add_column(name, justify="right")
    for entry in entries:
        table.add_row(
            entry.name,
            f"{entry.calls:g}",
            f"{entry.self_us / 1e3:.3f}",
            f"{entry.share:.1%}",
            f"{entry.total_us / 1e3:.3f}",
            style="bold green" if entry.name.startswith("robustgate::") else "",
        )
    return table

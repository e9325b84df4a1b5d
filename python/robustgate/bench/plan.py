"""Which measurements an invocation of ``robustgate bench`` makes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from robustgate.bench.benchmark import MODES, Benchmark, Shape
from robustgate.bench.ops import BENCHMARKS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SWEEPS = {
    "rows": (16, 64, 256, 1024),
    "experts": (2, 4, 8, 16),
    "vocab": (2000, 8000, 32000, 128000),
    "threads": tuple(2**n for n in range((os.cpu_count() or 1).bit_length())),
}
"""Values of a scaling study, by the size that varies."""

_LETTERS = {"rows": "N", "experts": "K", "vocab": "V", "hidden": "H"}


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        sweep: the size that a scaling study varies, else empty.
    """

    benchmark: Benchmark
    shape: Shape
    dtype: torch.dtype
    mode: str
    threads: int
    sweep: str = ""

    def __str__(self) -> str:
        """Return it in words, for a progress bar."""
        plural = "s" * (self.threads > 1)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.benchmark.op} {self.mode} {dtype}, {self.threads} thread{plural}"


def select(names: Sequence[str] | None) -> list[Benchmark]:
    """Return the benchmarks of some ops, all by default.

    Raises:
        ValueError: an unknown op.
    """
    known = {benchmark.op: benchmark for benchmark in BENCHMARKS}
    return [known[name] for name in _check("--op", names or list(known), known)]


def plan(
    ops: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    sizes: Mapping[str, int | None] | None = None,
    sweeps: Sequence[str] | None = None,
) -> list[Task]:
    """Return every combination that exists.

    Args:
        ops: names; None for all.
        modes: names; None for all that an op has. With a sweep: ``forward``.
        dtypes: names; None for those an op is measured in. With a sweep: float32.
        threads: thread counts; None for 1.
        sizes: rows, experts, vocab and hidden; None for an op's own. What is no size of an op is
            left as it is.
        sweeps: sizes to vary, one at a time, instead of one shape.

    Raises:
        ValueError: an unknown name, or nothing to measure.
    """
    chosen_modes = _check("--mode", modes or (["forward"] if sweeps else list(MODES)), MODES)
    chosen_dtypes = _check("--dtype", dtypes or (["float32"] if sweeps else []), DTYPES)
    counts = list(threads or [1])
    sweeps = _check("--sweep", sweeps or [], SWEEPS)
    tasks = []
    for count, benchmark in product(counts, select(ops)):
        own = [DTYPES[name] for name in chosen_dtypes] or benchmark.dtypes
        shape = _resized(benchmark, sizes or {})
        for dtype, mode in product(own, chosen_modes):
            if mode not in benchmark.modes:
                continue
            task = Task(benchmark, shape, dtype, mode, count)
            tasks += [point for name in sweeps for point in _points(task, name)] or [task] * (
                not sweeps
            )
    if not tasks:
        raise ValueError("nothing to measure: no chosen op has a chosen mode or size")
    return tasks


def _points(task: Task, sweep: str) -> Iterable[Task]:
    """Yield a task for each value of one size."""
    for value in SWEEPS[sweep]:
        if sweep == "threads":
            yield replace(task, threads=value, sweep=sweep)
        elif task.benchmark.has(_LETTERS[sweep]):
            yield replace(task, shape=replace(task.shape, **{sweep: value}), sweep=sweep)


def _resized(benchmark: Benchmark, sizes: Mapping[str, int | None]) -> Shape:
    given = {
        name: value
        for name, value in sizes.items()
        if value is not None and benchmark.has(_LETTERS[name])
    }
    return replace(benchmark.shape, **given)


def _check(option: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: expected some of {', '.join(known)}, got {name!r}")
    return list(names)

"""Timing, the machine's copy and GEMM rates, and the canary that hears a busy neighbour."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """What is timed: ``run`` on what ``prepare`` makes, which is not timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Result]

    def once(self) -> Result:
        """Return the result of one call."""
        return self.run(self.prepare())


def without_preparation(function: Callable[[], Result]) -> Call:
    """Return the call that times all of a function."""
    return Call(lambda: None, lambda _: function())


@dataclass(frozen=True)
class Effort:
    """How much time goes into a measurement.

    Attributes:
        seconds: about how long each variant is timed, if it is not slower.
        rounds: into which that time is split; a variant has at least so many samples.
        copy_bytes: size of the copy that gives the memory's rate.
        gemm_size: rows and columns of the product that gives the arithmetic's rate, on a CPU.
        canary_calls: length of the canary's loop.
    """

    seconds: float = 1.0
    rounds: int = 5
    copy_bytes: int = 256 << 20
    gemm_size: int = 2048
    canary_calls: int = 200


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median with the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Contention:
    """How much of the processor this process got while it asked for ``threads`` cores.

    Attributes:
        utilisation: processor time / (wall time x threads) of a compute-bound parallel loop.
        barrier_p99: 99th percentile of a small parallel call, us; a waiting barrier shows here.
    """

    threads: int
    utilisation: float
    barrier_p99: float

    @property
    def contended(self) -> bool:
        """Whether a ratio taken now would be worth nothing."""
        return self.utilisation < 0.85 or self.barrier_p99 > 2000.0


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def contention(calls: int = 200) -> Contention:
    """Spin on every thread torch uses, and time a small parallel call many times."""
    threads = torch.get_num_threads()
    work = torch.rand(1 << 20)
    work.exp()
    start, used = time.perf_counter(), time.process_time()
    for _ in range(calls):
        work.exp()
    wall, used = time.perf_counter() - start, time.process_time() - used
    small = torch.rand(1 << 16)
    barriers = []
    for _ in range(calls + calls // 2):
        begin = time.perf_counter()
        small.exp()
        barriers.append((time.perf_counter() - begin) * 1e6)
    return Contention(threads, used / (wall * threads), _percentile(sorted(barriers), 0.99))


class Clock:
    """Times one call, on the host or, for a GPU, by events on its stream."""

    def __init__(self, device: torch.device) -> None:
        """Allocate what empties a GPU's cache between calls."""
        self._device = device
        self._flush = (
            torch.zeros(256 << 20, dtype=torch.uint8, device=device)
            if device.type == "cuda"
            else None
        )

    def microseconds(self, call: Call) -> float:
        """Return how long ``call.run`` takes; its result is freed after the clock has stopped."""
        state = call.prepare()
        if self._flush is None:
            begin = time.perf_counter()
            result = call.run(state)
            elapsed = (time.perf_counter() - begin) * 1e6
            del result
            return elapsed
        # While the device fills this buffer, the host queues the call: no launch is waited for.
        self._flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device):
            start.record()
            result = call.run(state)
            end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) * 1e3


def interleaved(calls: Mapping[str, Call], clock: Clock, effort: Effort) -> dict[str, Timing]:
    """Time calls in turn, A A A B C A A A B C ..., so that drift of the machine hits all alike.

    Each has an equal share of every round; one that is slower than that is called once.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    share = effort.seconds / effort.rounds
    for _ in range(effort.rounds):
        for name, call in calls.items():
            end = time.perf_counter() + share
            samples[name].append(clock.microseconds(call))
            while time.perf_counter() < end:
                samples[name].append(clock.microseconds(call))
    return {name: _timing(sorted(values)) for name, values in samples.items()}


def _timing(ordered: list[float]) -> Timing:
    return Timing(*(_percentile(ordered, share) for share in (0.5, 0.2, 0.8)))


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def copy_call(device: torch.device, size: int) -> tuple[Call, int]:
    """Return a large copy and the bytes that it reads and writes.

    Source and destination are initialised (an untouched allocation reads the zero page) and reused,
    so no page is faulted in while the clock runs.
    """
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return without_preparation(lambda: (target.copy_(source),)), 2 * size


def gemm_call(device: torch.device, dtype: torch.dtype, size: int) -> tuple[Call, int]:
    """Return a large square product and its floating-point operations.

    On a CPU it is float32, the arithmetic of the linear ops there; elsewhere of the inputs' dtype.
    """
    on_cpu = device.type == "cpu"
    n, dtype = (size, torch.float32) if on_cpu else (8192, dtype)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return without_preparation(lambda: (torch.mm(a, b, out=out),)), 2 * n**3

"""Timing, the machine's copy rate, and the canary that says whether a neighbour was busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


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


def contention() -> Contention:
    """Spin on every thread torch uses, and time a small parallel call many times."""
    threads = torch.get_num_threads()
    work = torch.rand(1 << 20)
    work.exp()
    start, used = time.perf_counter(), time.process_time()
    for _ in range(200):
        work.exp()
    wall, used = time.perf_counter() - start, time.process_time() - used
    small = torch.rand(1 << 16)
    barriers = []
    for _ in range(300):
        begin = time.perf_counter()
        small.exp()
        barriers.append((time.perf_counter() - begin) * 1e6)
    return Contention(threads, used / (wall * threads), sorted(barriers)[296])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 2.0,
    warmup: int = 2,
) -> dict[str, Timing]:
    """Time variants in turn, A B C A B C ..., so that drift of the machine hits all alike.

    Args:
        variants: name -> function of no argument.
        device: waited for after every call.
        seconds: about how long each variant is timed; at least 7 rounds.
        warmup: untimed calls of each.
    """
    for function in variants.values():
        for _ in range(warmup):
            function()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    deadline = time.perf_counter() + seconds * len(variants)
    while len(next(iter(samples.values()))) < 7 or time.perf_counter() < deadline:
        for name, function in variants.items():
            _synchronise(device)
            begin = time.perf_counter()
            function()
            _synchronise(device)
            samples[name].append((time.perf_counter() - begin) * 1e6)
        if len(next(iter(samples.values()))) >= 200:
            break
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    ordered = sorted(values)
    last = len(ordered) - 1
    return Timing(ordered[last // 2], ordered[round(0.2 * last)], ordered[round(0.8 * last)])


def copy_rate(device: torch.device, size: int = 256 << 20) -> float:
    """Return the rate of a large copy, GB/s, counting bytes read and written.

    Source and destination are initialised (an untouched allocation reads the zero page) and reused,
    so no page is faulted in while the clock runs.
    """
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=1.0)["copy"]
    return 2 * size / timing.median / 1e3

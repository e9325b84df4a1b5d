"""One measurement: check every variant, time them in turn, measure their memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from robustgate.bench.benchmark import Function, count
from robustgate.bench.case import Case, make_case
from robustgate.bench.measure import (
    Call,
    Clock,
    Effort,
    Result,
    Timing,
    contention,
    copy_call,
    gemm_call,
    interleaved,
    threads,
)
from robustgate.bench.memory import peak_extra_bytes
from robustgate.bench.plan import Task
from robustgate.bench.results import Row, kind_of, provenance
from robustgate.ops.library import backend, serving

Compiler = Callable[[Function], Function]

INDUCTOR: Compiler = partial(torch.compile, dynamic=False)

# Relative L2. A gradient rounded to bfloat16 is off by 2^-9 = 0.2 % by itself.
_FLOAT32_TOLERANCE = 1e-4
_HALF_TOLERANCE = 2e-2

_TOO_SLOW = 50.0  # times the fastest: not worth the time
_ATTEMPTS = 3  # at a measurement without a busy neighbour


@dataclass(frozen=True)
class Skipped:
    """A variant that was not timed, and why."""

    op: str
    mode: str
    dtype: str
    variant: str
    reason: str


@dataclass(frozen=True)
class Results:
    """What was measured, and what was not."""

    rows: list[Row]
    skipped: list[Skipped]


def measure(
    task: Task,
    device: torch.device,
    *,
    effort: Effort,
    compiler: Compiler | None = INDUCTOR,
    peers: bool = False,
) -> Results:
    """Measure every variant of one op on one shape.

    Each is checked against float64 first, and one that is wrong is never timed. The canary runs
    before and after the clock; what was timed beside a busy neighbour is timed again, and marked
    ``contended`` if that does not help.

    Args:
        task: what to measure; torch's thread count is its own for that time.
        device: where.
        effort: how much time goes into it.
        compiler: makes the compiled variants; None leaves them out.
        peers: whether other packages are measured too.

    Raises:
        RuntimeError: a variant of this package or in eager torch is wrong.
    """
    torch._dynamo.reset()  # no measurement hits the recompile limit
    with threads(task.threads):
        return _measure(task, device, effort, compiler, peers)


def _measure(
    task: Task, device: torch.device, effort: Effort, compiler: Compiler | None, peers: bool
) -> Results:
    case = make_case(task.benchmark, task.shape, task.dtype, task.mode, device)
    skipped: dict[str, str] = {}
    functions = task.benchmark.variants(compiler)
    if peers:
        functions |= _load_peers(task, device, skipped)
    clock = Clock(device)
    calls = {name: case.call(function) for name, function in functions.items()}
    calls |= {
        f"robustgate {name}": on_backend(name, calls["robustgate"])
        for name in other_backends(device)
    }
    errors = _check(calls, case, task.dtype, skipped)
    warm = {name: clock.microseconds(calls[name]) for name in errors}
    for name in _too_slow(warm):  # once more: the first time may have been an accident
        warm[name] = min(warm[name], clock.microseconds(calls[name]))
    for name in _too_slow(warm):
        skipped[name] = f"{warm[name] / min(warm.values()):.0f} times slower than the fastest"
    calls = {name: calls[name] for name in errors if name not in skipped}
    timings, contended, roof = _time(calls, task, device, clock, effort)
    extra = {name: peak_extra_bytes(call, device) for name, call in calls.items()}
    return Results(
        _rows(task, timings, roof, errors, extra, contended, device),
        [
            Skipped(task.benchmark.op, task.mode, dtype_name(task.dtype), *item)
            for item in skipped.items()
        ],
    )


def other_backends(device: torch.device) -> list[str]:
    """Return the compiled backends that serve a GPU besides the one that ``"auto"`` takes."""
    if device.type == "cpu":
        return []
    usable = dict.fromkeys(
        name for names in serving(device.type, device.index or 0).values() for name in names[1:]
    )
    return [name for name in usable if name != "eager"]


def on_backend(name: str, call: Call) -> Call:
    """Return the call with its ops on one backend, a backward pass included."""

    def prepare() -> Any:
        with backend(name):
            return call.prepare()

    def run(state: Any) -> Result:
        with backend(name):
            return call.run(state)

    return Call(prepare, run)


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _load_peers(task: Task, device: torch.device, skipped: dict[str, str]) -> dict[str, Function]:
    """Return the peers that can take part; ``skipped`` receives why the others cannot."""
    loaded: dict[str, Function] = {}
    for peer in task.benchmark.peers:
        refusal = peer.refusal(task.shape, task.dtype, task.mode, device)
        if refusal:
            skipped[peer.name] = refusal
            continue
        try:
            loaded[peer.name] = peer.load()
        except ImportError as error:
            skipped[peer.name] = f"needs pip install {peer.package} ({_first_line(error)})"
    return loaded


def _check(
    calls: dict[str, Call], case: Case, dtype: torch.dtype, skipped: dict[str, str]
) -> dict[str, float]:
    """Return the error of each variant that is right; this is its first call, which may compile.

    Raises:
        RuntimeError: a variant of this package or in eager torch is wrong. A compiler or a peer may
            fail: that is its own business, and ``skipped`` receives why.
    """
    tolerance = _FLOAT32_TOLERANCE if dtype == torch.float32 else _HALF_TOLERANCE
    errors: dict[str, float] = {}
    for name, call in calls.items():
        foreign = kind_of(name) == "peer"
        try:
            error = case.error(call.once())
        except Exception as failure:
            if not foreign and kind_of(name) != "compiled":
                raise
            skipped[name] = f"failed: {type(failure).__name__}: {_first_line(failure)}"
            continue
        if error <= tolerance:
            errors[name] = error
        elif foreign:
            skipped[name] = f"wrong: relative error {error:.1e}, above {tolerance:.0e}"
        else:
            raise RuntimeError(f"{name} is wrong: relative error {error:.1e} above {tolerance:.0e}")
    return errors


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _too_slow(times: dict[str, float]) -> list[str]:
    """Return the variants whose timing would take too long; never ours or the best of a kind."""
    best = {_fastest(times, kind) for kind in ("robustgate", "eager", "compiled")}
    limit = _TOO_SLOW * min(times.values())
    return [name for name, time in times.items() if time > limit and time not in best]


def _fastest(times: dict[str, float], kind: str) -> float | None:
    return min((t for name, t in times.items() if kind_of(name) == kind), default=None)


def _time(
    calls: dict[str, Call], task: Task, device: torch.device, clock: Clock, effort: Effort
) -> tuple[dict[str, Timing], bool, float]:
    """Return timings, whether a neighbour was busy, and the machine's rate (per us).

    What gives the rate, a copy or a product, is timed in the same rounds as the variants.
    """
    if task.benchmark.flops:
        roof, work = gemm_call(device, task.dtype, effort.gemm_size)
    else:
        roof, work = copy_call(device, effort.copy_bytes)
    everything = {**calls, "": roof}
    for _ in range(_ATTEMPTS):
        before = contention(effort.canary_calls)
        timings = interleaved(everything, clock, effort)
        after = contention(effort.canary_calls)
        contended = device.type == "cpu" and (before.contended or after.contended)
        if not contended:
            break
    return timings, contended, work / timings.pop("").median


def _rows(
    task: Task,
    timings: dict[str, Timing],
    roof: float,
    errors: dict[str, float],
    extra: dict[str, int | None],
    contended: bool,
    device: torch.device,
) -> list[Row]:
    benchmark, shape = task.benchmark, task.shape
    itemsize = task.dtype.itemsize
    moved = count(benchmark.bytes[task.mode], shape, itemsize)
    flops = count(benchmark.flops[task.mode], shape, itemsize) if benchmark.flops else None
    medians = {name: timing.median for name, timing in timings.items()}
    eager, compiled = _fastest(medians, "eager"), _fastest(medians, "compiled")
    common: dict[str, Any] = {
        "op": benchmark.op,
        "mode": task.mode,
        "dtype": dtype_name(task.dtype),
        "rows": shape.rows,
        "experts": shape.experts,
        "vocab": shape.vocab,
        "hidden": shape.hidden,
        "threads": task.threads,
        "contended": contended,
        "sweep": task.sweep,
        **provenance(device),
    }
    rows = []
    for name, timing in timings.items():
        median, held = timing.median, extra[name]
        rows.append(
            Row(
                variant=name,
                median_us=round(median, 1),
                p20_us=round(timing.p20, 1),
                p80_us=round(timing.p80, 1),
                gigabytes_per_second=round(moved / median / 1e3, 2),
                gigaflops_per_second=None if flops is None else round(flops / median / 1e3, 2),
                share_of_roof=round((moved if flops is None else flops) / median / roof, 3),
                speedup_eager=None if eager is None else round(eager / median, 2),
                speedup_compiled=None if compiled is None else round(compiled / median, 2),
                extra_mib=None if held is None else round(held / 2**20, 1),
                error=float(f"{errors[name]:.1e}"),
                **common,
            )
        )
    return rows

"""Measure: correctness gate, interleaved variants, ratios in one run, CSV."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch

from robustgate import __version__
from robustgate.bench import mixture_nll
from robustgate.bench.measure import Timing, contention, copy_rate, interleaved
from robustgate.bench.mixture_nll import MODES, Shape

_GATE_TOLERANCE = 2e-2  # relative L2; float32 is held to 1e-4 below
_FLOAT32_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """One line of the CSV. ``speedup_*``: time of the fastest such variant / time of this one."""

    op: str
    mode: str
    variant: str
    dtype: str
    rows: int
    experts: int
    vocab: int
    threads: int
    median_us: float
    p20_us: float
    p80_us: float
    gigabytes_per_second: float
    share_of_copy: float
    speedup_eager: float
    speedup_compiled: float
    error: float
    contended: bool
    device: str
    torch: str
    robustgate: str
    commit: str
    date: str


def device_name(device: torch.device) -> str:
    """Return the name of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from robustgate import env

    return f"{env.collect()['cpu']['name']} ({platform.machine()})"


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _error(got: Iterable[torch.Tensor], want: Iterable[torch.Tensor]) -> float:
    errors = [
        float((a.detach().double() - b).norm() / b.norm().clamp_min(1e-300))
        for a, b in zip(got, want, strict=True)
    ]
    return max(errors)


def _fastest(timings: dict[str, Timing], kind: str) -> float:
    return min(t.median for name, t in timings.items() if name.startswith(kind))


def measure(
    shape: Shape, dtype: torch.dtype, mode: str, device: torch.device, *, seconds: float = 2.0
) -> list[Row]:
    """Measure every variant of ``mixture_nll`` on one shape.

    A variant whose result is wrong is an error, before anything is timed. The canary runs before
    and after; a row taken while a neighbour was busy is marked ``contended``.
    """
    torch._dynamo.reset()  # one compilation per measurement, none hits the recompile limit
    functions = mixture_nll.variants()
    small = Shape(min(shape.rows, 16), shape.experts, shape.vocab)
    tensors = mixture_nll.inputs(small, dtype, device, logits_grad=mode == "backward")
    want = mixture_nll.truth(mode, *tensors)
    errors = {
        name: _error(mixture_nll.call(loss, mode, *tensors)(), want)
        for name, loss in functions.items()
    }
    tolerance = _FLOAT32_TOLERANCE if dtype == torch.float32 else _GATE_TOLERANCE
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        raise RuntimeError(f"wrong results, relative error above {tolerance}: {wrong}")

    tensors = mixture_nll.inputs(shape, dtype, device, logits_grad=mode == "backward")
    calls: dict[str, Callable[[], object]] = {
        name: mixture_nll.call(loss, mode, *tensors) for name, loss in functions.items()
    }
    before = contention()
    timings = interleaved(calls, device, seconds=seconds)
    copy = copy_rate(device)
    contended = device.type == "cpu" and (before.contended or contention().contended)
    moved = MODES[mode] * shape.experts * shape.rows * shape.vocab * dtype.itemsize
    eager, compiled = _fastest(timings, "eager"), _fastest(timings, "compiled")
    common: dict[str, Any] = {
        "op": "mixture_nll",
        "mode": mode,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": shape.rows,
        "experts": shape.experts,
        "vocab": shape.vocab,
        "threads": torch.get_num_threads(),
        "contended": contended,
        "device": device_name(device),
        "torch": torch.__version__,
        "robustgate": __version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
    }
    return [
        Row(
            variant=name,
            median_us=round(t.median, 1),
            p20_us=round(t.p20, 1),
            p80_us=round(t.p80, 1),
            gigabytes_per_second=round(moved / t.median / 1e3, 2),
            share_of_copy=round(moved / t.median / 1e3 / copy, 3),
            speedup_eager=round(eager / t.median, 2),
            speedup_compiled=round(compiled / t.median, 2),
            error=float(f"{errors[name]:.1e}"),
            **common,
        )
        for name, t in timings.items()
    ]


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write the rows, header first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def measure_all(
    shapes: Iterable[Shape],
    dtypes: Iterable[torch.dtype],
    threads: Iterable[int],
    device: torch.device,
    *,
    modes: Iterable[str] = tuple(MODES),
    seconds: float = 2.0,
    on_step: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure every combination; ``on_step`` hears what is next. Restores torch's thread count."""
    rows: list[Row] = []
    before = torch.get_num_threads()
    try:
        for count, shape, dtype, mode in product(threads, shapes, dtypes, modes):
            torch.set_num_threads(count)
            on_step(f"{mode} {dtype} on {count} thread{'s' * (count > 1)}")
            rows += measure(shape, dtype, mode, device, seconds=seconds)
    finally:
        torch.set_num_threads(before)
    return rows

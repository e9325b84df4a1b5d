"""What ``robustgate bench`` runs and shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import torch
from rich.console import RenderableType
from rich.table import Table

from robustgate.bench import profile
from robustgate.bench.measure import Effort
from robustgate.bench.plan import Task
from robustgate.bench.results import Row, write_csv
from robustgate.bench.run import INDUCTOR, Results, measure
from robustgate.console import Answer
from robustgate.lm.progress import ProgressBar

QUICK_SIZES = {"rows": 32, "experts": 2, "vocab": 500, "hidden": 32}
"""Of ``--quick``, unless others are given."""

_LEGEND = (
    "\nof roof: share of the machine's copy rate (GB/s) or GEMM rate (GFLOP/s)\n"
    "x ours: time / time of robustgate\n"
    "extra: peak MiB beyond inputs and results\nerror: relative L2, against float64\n"
    "!: taken beside a busy neighbour, the ratios are worth nothing"
)

_QUICK = Effort(seconds=0.0, copy_bytes=1 << 22, gemm_size=128, canary_calls=10)


def run_bench(
    tasks: Sequence[Task],
    device: torch.device,
    *,
    seconds: float = 1.0,
    quick: bool = False,
    peers: bool = False,
    out: Path | None = None,
) -> Answer:
    """Measure, with a progress bar; the CSV file holds every measurement that is done.

    Args:
        tasks: what to measure.
        device: where.
        seconds: timing of each variant.
        quick: a few calls of each and no compiled variants: shows that everything runs.
        peers: whether other packages are measured too.
        out: CSV file to write.
    """
    effort = _QUICK if quick else Effort(seconds=seconds)
    results = Results([], [])
    with ProgressBar("bench", len(tasks)) as bar:
        for task in bar.over(tasks):
            if out is not None:  # before the first, too: a folder that is missing is said at once
                write_csv(results.rows, out)
            bar.describe(str(task))
            compiler = None if quick else INDUCTOR
            measured = measure(task, device, effort=effort, compiler=compiler, peers=peers)
            results.rows.extend(measured.rows)
            results.skipped.extend(measured.skipped)
    if out is not None:
        write_csv(results.rows, out)
    return Answer(
        {
            "rows": [asdict(row) for row in results.rows],
            "skipped": [asdict(skipped) for skipped in results.skipped],
        },
        view(results),
    )


def run_profile(tasks: Iterable[Task], device: torch.device) -> Answer:
    """Profile this package's op in each task."""
    profiles = [(task, profile.profile(task, device)) for task in tasks]
    return Answer(
        {"profiles": {str(task): [asdict(entry) for entry in found] for task, found in profiles}},
        tuple(profile.view(task, found) for task, found in profiles),
    )


def view(results: Results) -> tuple[RenderableType, ...]:
    """Return a table for each measurement, a legend, and what was not timed and why."""
    tables = [_table(list(rows)) for _, rows in groupby(results.rows, key=_title)]
    where: dict[tuple[str, str, str], list[str]] = {}
    for skipped in results.skipped:
        key = (skipped.op, skipped.variant, skipped.reason)
        where.setdefault(key, []).append(f"{skipped.mode} {skipped.dtype}")
    lines = [
        f"not timed: {op}, {variant}: {reason} ({', '.join(dict.fromkeys(places))})"
        for (op, variant, reason), places in where.items()
    ]
    return (*tables, _LEGEND, *lines)


def _title(row: Row) -> str:
    sizes = {"N": row.rows, "K": row.experts, "V": row.vocab, "H": row.hidden}
    shape = ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if size)
    threads = f"{row.threads} thread{'s' * (row.threads > 1)}{'!' * row.contended}"
    return f"{row.op} {row.mode} {row.dtype}, {threads}: {shape}"


def _table(rows: list[Row]) -> Table:
    table = Table(
        title=f"\n{_title(rows[0])}", title_justify="left", box=None, pad_edge=False, padding=(0, 1)
    )
    arithmetic = rows[0].gigaflops_per_second is not None
    table.add_column("variant", no_wrap=True)
    for name in ("ms", "p20", "p80", "GFLOP/s" if arithmetic else "GB/s"):
        table.add_column(name, justify="right")
    for name in ("of roof", "x ours", "extra", "error"):
        table.add_column(name, justify="right")
    ours = next(row.median_us for row in rows if row.kind == "robustgate")
    for row in rows:
        rate = row.gigaflops_per_second if arithmetic else row.gigabytes_per_second
        table.add_row(
            row.variant,
            *(f"{value / 1e3:.2f}" for value in (row.median_us, row.p20_us, row.p80_us)),
            f"{rate:.1f}",
            f"{row.share_of_roof:.0%}",
            f"{row.median_us / ours:.2f}",
            "" if row.extra_mib is None else f"{row.extra_mib:.0f}",
            f"{row.error:.0e}",
            style="bold green" if row.kind == "robustgate" else "",
        )
    return table

"""What ``robustgate bench`` runs and shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.table import Table

from robustgate.bench.mixture_nll import MODES, Shape
from robustgate.bench.run import Row, measure_all
from robustgate.lm.progress import ProgressBar

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_bench(
    rows: int,
    experts: int,
    vocab: int,
    dtypes: Sequence[str] | None,
    threads: Sequence[int] | None,
    device: str,
    seconds: float,
) -> list[Row]:
    """Measure every mode of ``mixture_nll``, with a progress bar.

    Raises:
        ValueError: an unknown dtype.
        RuntimeError: a variant is wrong, or the device is not there.
    """
    names = dtypes or ["float32", "bfloat16"]
    for name in names:
        if name not in _DTYPES:
            raise ValueError(f"--dtype: expected some of {', '.join(_DTYPES)}, got {name!r}")
    where = torch.device(device)
    default = [1] if where.type == "cuda" else sorted({1, torch.get_num_threads()})
    counts = list(threads or default)
    with ProgressBar("bench", len(names) * len(counts) * len(MODES)) as bar:
        started = False

        def step(what: str) -> None:
            nonlocal started
            bar.advance(int(started))
            bar.describe(what)
            started = True

        measured = measure_all(
            [Shape(rows, experts, vocab)],
            [_DTYPES[name] for name in names],
            counts,
            where,
            seconds=seconds,
            on_step=step,
        )
        bar.advance()
    return measured


def view(rows: Sequence[Row]) -> Table:
    """Return the measurements as a table; a row taken beside a busy neighbour is marked."""
    shape = rows[0]
    table = Table(
        title=f"mixture_nll, N = {shape.rows}, K = {shape.experts}, V = {shape.vocab}",
        caption="! taken beside a busy neighbour: the ratios are worth nothing",
        caption_justify="left",
        title_justify="left",
    )
    for name in ("threads", "logits", "pass", "variant"):
        table.add_column(name)
    for name in ("ms", "p20", "p80", "GB/s", "of copy", "x compiled", "x eager", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.threads}{'!' * row.contended}",
            row.dtype,
            row.mode,
            row.variant,
            *(f"{value / 1e3:.2f}" for value in (row.median_us, row.p20_us, row.p80_us)),
            f"{row.gigabytes_per_second:.1f}",
            f"{row.share_of_copy:.0%}",
            f"{row.speedup_compiled:.2f}",
            f"{row.speedup_eager:.2f}",
            f"{row.error:.0e}",
            style="bold green" if row.variant == "robustgate" else "",
        )
    return table

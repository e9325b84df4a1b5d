"""``bench`` and ``env``: this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from robustgate.cli.app import Json, app
from robustgate.console import Answer, Command, flatten


@app.command(cls=Command)
def bench(
    op: Annotated[list[str] | None, typer.Option(metavar="OP...", help="Default: all.")] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(metavar="MODE...", help="forward frozen backward forward_backward."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rows: Annotated[int | None, typer.Option(help="N, tokens.", min=1)] = None,
    experts: Annotated[int | None, typer.Option(help="K.", min=1)] = None,
    vocab: Annotated[int | None, typer.Option(help="V.", min=1)] = None,
    hidden: Annotated[int | None, typer.Option(help="H, of linear ops.", min=1)] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Default: float32 bfloat16.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Default: 1.", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="Timing of each variant.", min=0)] = 1.0,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE...", help="Scaling: rows experts vocab threads."),
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Measure other packages too.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where time goes.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny, nothing compiled.")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file to write.")] = None,
    as_json: Json = False,
) -> Answer:
    """Time the ops against eager and compiled torch: checked first, interleaved, in one run."""
    import torch

    from robustgate.bench.command import QUICK_SIZES, run_bench, run_profile
    from robustgate.bench.plan import plan

    given = {"rows": rows, "experts": experts, "vocab": vocab, "hidden": hidden}
    sizes = {name: size or QUICK_SIZES[name] for name, size in given.items()} if quick else given
    tasks = plan(op, mode, dtype, threads, sizes, sweep)
    where = torch.device(device)
    if profile:
        return run_profile(tasks, where)
    return run_bench(tasks, where, seconds=seconds, quick=quick, peers=peers, out=out)


@app.command(cls=Command)
def env(as_json: Json = False) -> Answer:
    """Show versions, devices, and which backend serves which op and why."""
    from robustgate.env import collect

    data = collect()
    table = Table("", "", show_header=False, box=None)
    for name, value in flatten(data):
        table.add_row(name, value)
    return Answer(data, (table,))

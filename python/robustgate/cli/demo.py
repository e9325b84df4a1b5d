"""``robustgate demo``: everything on a small scale."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustgate.cli.app import Json, app
from robustgate.console import Answer, Command, evaluation_tables

NEXT_STEPS = """\
  robustgate score    --experts experts/* --domain a=a/valid.txt b=b/valid.txt --store store
  robustgate fit      --store store --experts experts/* --out modular
  robustgate evaluate --model modular --domain a=a/test.txt b=b/test.txt
  robustgate report   --run modular --out report"""


@app.command(cls=Command)
def demo(
    out: Annotated[Path, typer.Option(help="Folder to work in.")] = Path("robustgate-demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the work.")] = False,
    as_json: Json = False,
) -> Answer:
    """Train small experts on text found in every Python installation, and combine them.

    Needs no argument and no download, and about three minutes on two cores. A run that was
    stopped continues.
    """
    from robustgate.demo import QUICK, STANDARD, run_demo

    result = run_demo(out, budget=QUICK if quick else STANDARD, seed=seed)
    return Answer(
        result.to_json(),
        (
            *evaluation_tables(result.evaluation),
            f"\n[bold green]Certificate.[/] {result.model.sentence()}",
            f"\nReport: {result.report}\n\nWith your own checkpoints:\n{NEXT_STEPS}",
        ),
    )

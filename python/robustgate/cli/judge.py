"""``evaluate`` and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from robustgate.cli.app import Domains, Json, app, parse_domains
from robustgate.console import Answer, Command, evaluation_tables


@app.command(cls=Command)
def evaluate(
    model: Annotated[Path, typer.Option(help="Modular model.")],
    domain: Domains,
    store: Annotated[
        Path | None, typer.Option(help="Log-prob store to use and fill; default: in the model.")
    ] = None,
    baselines: Annotated[
        str, typer.Option(help="all, none, or some of experts,oracle,static,uniform.")
    ] = "all",
    monolith: Annotated[
        Path | None, typer.Option(help="Checkpoint of one model trained on everything.")
    ] = None,
    as_json: Json = False,
) -> Answer:
    """Evaluate a modular model on held-out documents of every domain."""
    from robustgate.lm.evaluate import BASELINES, evaluate_model
    from robustgate.lm.modular import ModularModel

    chosen = {"all": list(BASELINES), "none": []}.get(baselines, baselines.split(","))
    evaluation = evaluate_model(
        ModularModel.load(model),
        parse_domains(domain),
        store=store,
        baselines=chosen,
        monolith=monolith,
    )
    return Answer(evaluation.to_json(), evaluation_tables(evaluation))


@app.command(cls=Command)
def report(
    run: Annotated[Path, typer.Option(help="Modular model, after evaluate.")],
    out: Annotated[Path, typer.Option(help="Folder of the report, made if needed.")],
    as_json: Json = False,
) -> Answer:
    """Write one self-contained HTML file with figures, and its tables as Markdown."""
    from robustgate.lm.report import write_report

    index = write_report(run, out)
    files = {"html": str(index), "markdown": str(index.with_name("report.md"))}
    return Answer(files, (f"{files['html']}\n{files['markdown']}",))

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
        str,
        typer.Option(
            help="all, none, or some of experts, oracle, bounds, static, previous, uniform, "
            "cached, updating, share, soup, with commas."
        ),
    ] = "all",
    monolith: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER...",
            help="Checkpoints of single models trained on everything, to compare with.",
        ),
    ] = None,
    development: Annotated[
        Path | None,
        typer.Option(help="Scores of other documents, such as those of the fit: cached prior."),
    ] = None,
    share: Annotated[float, typer.Option(help="Of the fixed-share mixture.")] = 0.01,
    divergence_tokens: Annotated[
        int, typer.Option(help="Tokens a domain to measure the experts' divergence on; 0: don't.")
    ] = 256,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Measure the conflict of a monolith's gradients.")
    ] = False,
    as_json: Json = False,
) -> Answer:
    """Evaluate a modular model on held-out documents of every domain."""
    from robustgate.lm import ModularModel, evaluate_model
    from robustgate.lm.evaluation.systems import BASELINES

    named = [name.strip() for name in baselines.split(",")]
    chosen = {"all": list(BASELINES), "none": []}.get(baselines, named)
    evaluation = evaluate_model(
        ModularModel.load(model),
        parse_domains(domain),
        store=store,
        monolith=parse_monoliths(monolith or []),
        baselines=chosen,
        development=development,
        divergence_tokens=divergence_tokens,
        gradients=gradients,
        share=share,
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


def parse_monoliths(given: list[str]) -> dict[str, Path]:
    """Read ``NAME=FOLDER`` or ``FOLDER``; one without a name is called ``monolith``.

    Raises:
        ValueError: A name comes twice, or a part is empty.
    """
    monoliths: dict[str, Path] = {}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not equals:
            name, path = "monolith", pair
        if not name or not path or name in monoliths:
            raise ValueError(f"--monolith: expected [NAME=]FOLDER, each name once, got {pair!r}")
        monoliths[name] = Path(path)
    return monoliths

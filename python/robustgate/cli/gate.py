"""``fit``: gates from a log-prob store."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from robustgate.cli.app import Json, app
from robustgate.console import Answer, Command


class Gate(str, Enum):
    """Gates that ``fit`` can make."""

    prior = "prior"


class Baseline(str, Enum):
    """What the robust prior's losses are compared with."""

    hindsight = "hindsight"
    excess = "excess"
    raw = "raw"


@app.command(cls=Command)
def fit(
    store: Annotated[Path, typer.Option(help="Log-prob store.")],
    out: Annotated[Path, typer.Option(help="Folder of the modular model, made or replaced.")],
    gate: Annotated[Gate, typer.Option(help="Kind of gate.")] = Gate.prior,
    experts: Annotated[
        list[Path] | None,
        typer.Option("--experts", metavar="DIR...", help="Checkpoints; default: all scored."),
    ] = None,
    baseline: Annotated[
        Baseline, typer.Option(help="From where losses are measured.")
    ] = Baseline.hindsight,
    delta: Annotated[float, typer.Option(help="Share of the uniform prior mixed in.")] = 0.01,
    tol: Annotated[float, typer.Option(help="Largest gap of the certificate, in nats.")] = 1e-6,
    as_json: Json = False,
) -> Answer:
    """Fit the robust gate to a log-prob store, with a certificate; no model is loaded."""
    from robustgate.lm import ExpertSet, LogProbStore
    from robustgate.lm.fit import fit as fit_prior

    del gate
    opened = ExpertSet.open(experts) if experts else None
    model = fit_prior(
        LogProbStore.open(store),
        out,
        experts=opened,
        baseline=baseline.value,
        delta=delta,
        tol=tol,
    )
    table = Table("expert", "prior weight")
    for name, weight in zip(model.names, model.prior.tolist(), strict=True):
        table.add_row(name, f"{weight:.4f}")
    return Answer(model.to_json(), (table, model.sentence()))

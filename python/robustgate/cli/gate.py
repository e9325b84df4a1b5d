"""``fit``, ``distill``, ``weights``: gates from a log-prob store, and what they are good for."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.table import Table

from robustgate.cli.app import Json, app, parse_domains
from robustgate.console import Answer, Command

if TYPE_CHECKING:
    from robustgate.lm import ModularModel


class Gate(str, Enum):
    """Gates that ``fit`` can make."""

    prior = "prior"
    token = "token"
    sequence = "sequence"


class Baseline(str, Enum):
    """What the robust prior's losses are compared with."""

    hindsight = "hindsight"
    excess = "excess"
    raw = "raw"


class NetworkKind(str, Enum):
    """Networks of a learned gate."""

    linear = "linear"
    mlp = "mlp"
    transformer = "transformer"


class Format(str, Enum):
    """How ``weights`` prints."""

    text = "text"
    csv = "csv"
    json = "json"


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
    network: Annotated[
        NetworkKind, typer.Option(help="Of a token or sequence gate.")
    ] = NetworkKind.mlp,
    width: Annotated[int, typer.Option(help="Of its layers.")] = 64,
    features: Annotated[
        str,
        typer.Option(help="Of a token gate: some of entropy,top,agreement,jsd,hidden=SIZE."),
    ] = "none",
    steps: Annotated[int, typer.Option(help="Of its training, at most.")] = 1000,
    span: Annotated[int, typer.Option(help="Tokens that a sequence gate looks at.")] = 64,
    seed: Annotated[int, typer.Option(help="Of its training.", min=0)] = 0,
    as_json: Json = False,
) -> Answer:
    """Fit the robust prior to a store, with a certificate, and a learned gate that starts there."""
    from robustgate.lm import ExpertSet, FeatureSpec, LogProbStore, Network
    from robustgate.lm import fit as fit_gate

    model = fit_gate(
        LogProbStore.open(store),
        out,
        gate=gate.value,
        experts=ExpertSet.open(experts) if experts else None,
        baseline=baseline.value,
        delta=delta,
        tol=tol,
        network=Network(network.value, width=width),
        features=FeatureSpec.parse(features),
        steps=steps,
        span=span,
        seed=seed,
    )
    return Answer(model.to_json(), _describe(model))


@app.command(cls=Command)
def distill(
    model: Annotated[Path, typer.Option(help="Modular model with a sequence gate.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model, made or replaced.")],
    network: Annotated[NetworkKind, typer.Option(help="Of the token gate.")] = NetworkKind.mlp,
    width: Annotated[int, typer.Option(help="Of its layers.")] = 64,
    documents: Annotated[int, typer.Option(help="Drawn from the teacher to train on.")] = 500,
    held_out: Annotated[int, typer.Option(help="Drawn to measure the gap on.")] = 500,
    steps: Annotated[int, typer.Option(help="Of training.")] = 300,
    seed: Annotated[int, typer.Option(help="Of samples and training.", min=0)] = 0,
    as_json: Json = False,
) -> Answer:
    """Teach a causal token gate to imitate a sequence gate, and measure what that loses."""
    from robustgate.lm import ModularModel, Network
    from robustgate.lm import distill as distill_model

    made = distill_model(
        ModularModel.load(model),
        out,
        network=Network(network.value, width=width),
        documents=documents,
        held_out=held_out,
        steps=steps,
        seed=seed,
    )
    assert made.training is not None
    return Answer(made.to_json(), (made.training.sentence(),))


@app.command(cls=Command)
def weights(
    model: Annotated[Path, typer.Option(help="Modular model.")],
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain",
            metavar="NAME=FILE...",
            help="What to draw from; default: that of the fit.",
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print.")] = Format.text,
    as_json: Json = False,
) -> Answer:
    """Print the least favourable mixture of the domains, as weights for a data loader."""
    from robustgate.lm import ModularModel, data_weights

    counts = None
    if domain:
        counts = {corpus.name: len(corpus.documents) for corpus in parse_domains(domain)}
    found = data_weights(ModularModel.load(model), counts)
    table = Table("domain", "weight", "documents", "weight per document")
    for name, weight in found.mixture.items():
        each = found.per_document[name]
        table.add_row(name, f"{weight:.6f}", f"{found.documents[name]:,}", f"{each:.4g}")
    views: dict[Format, RenderableType] = {
        Format.text: table,
        Format.csv: found.to_csv(),
        Format.json: json.dumps(found.to_json(), indent=2),
    }
    return Answer(found.to_json(), (views[format],))


def _describe(model: ModularModel) -> tuple[RenderableType, ...]:
    """Return the prior, what training found, and both in words."""
    table = Table("expert", "prior weight")
    for name, weight in zip(model.names, model.prior.tolist(), strict=True):
        table.add_row(name, f"{weight:.4f}")
    found = model.training
    if found is None:
        return table, model.sentence()
    losses = Table(
        f"held-out excess, nats per {found.unit}", "Bayes gate of the prior", f"{model.kind} gate"
    )
    for name, before, after in zip(found.domains, found.before, found.after, strict=True):
        losses.add_row(name, f"{before:+.4f}", f"{after:+.4f}")
    losses.add_row("worst domain", f"{found.worst_before:+.4f}", f"{found.worst_after:+.4f}")
    return table, f"The prior: {model.sentence()}", losses, f"The gate: {found.sentence()}"

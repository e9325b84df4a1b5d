"""``train`` and ``score``: what touches the weights of experts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from robustgate.cli.app import Domains, Json, app, parse_domains
from robustgate.console import Answer, Command


@app.command(cls=Command)
def train(
    data: Annotated[list[Path], typer.Option("--data", metavar="FILE...", help="Documents.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to make.")],
    init: Annotated[Path | None, typer.Option(help="Seed checkpoint to start from.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the shared tokenizer.")] = None,
    config: Annotated[Path | None, typer.Option(help="config.json of the model.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Of a tokenizer trained here.")] = 4096,
    context: Annotated[int, typer.Option(help="Tokens in a row.")] = 256,
    tokens: Annotated[int | None, typer.Option(help="Tokens to read; default: one pass.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.", min=0)] = 0,
    as_json: Json = False,
) -> Answer:
    """Train an expert, from a configuration or from a seed checkpoint."""
    from robustgate.lm import train as train_expert

    result = train_expert(
        data,
        out,
        init=init,
        tokenizer=tokenizer,
        config=config,
        vocab_size=vocab_size,
        context=context,
        tokens=tokens,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    return Answer(
        {**asdict(result), "path": str(result.path)},
        (
            f"{result.path}: {result.parameters:,} parameters, {result.tokens:,} tokens in "
            f"{result.seconds:.0f} s, last loss {result.loss:.3f} nats per token",
        ),
    )


@app.command(cls=Command)
def score(
    experts: Annotated[
        list[Path],
        typer.Option("--experts", metavar="DIR...", help="Checkpoints, or their folder."),
    ],
    domain: Domains,
    store: Annotated[Path, typer.Option(help="Log-prob store, made if needed.")],
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch.")] = 4096,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    as_json: Json = False,
) -> Answer:
    """Score documents with every expert and keep the log-probability of every token."""
    from robustgate.lm import ExpertSet
    from robustgate.lm import score as score_experts

    corpora = parse_domains(domain)
    opened = ExpertSet.open(experts)
    filled = score_experts(opened, corpora, store, batch_tokens=batch_tokens, device=device)
    table = Table("nats per token", *(corpus.name for corpus in corpora))
    nll: dict[str, dict[str, float]] = {name: {} for name in opened.names}
    for corpus in corpora:
        mean = -filled.token_log_probs(corpus.name, opened.names).double().mean(dim=0)  # [K]
        for name, value in zip(opened.names, mean.tolist(), strict=True):
            nll[name][corpus.name] = value
    for name, row in nll.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    return Answer({"store": str(store), "nll_per_token": nll}, (table,))

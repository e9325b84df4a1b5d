"""``train``, ``score`` and ``expert``: what touches the weights of experts."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from robustgate.cli.app import Domains, Json, app, parse_domains
from robustgate.console import Answer, Command

if TYPE_CHECKING:
    from robustgate.lm.lifecycle.members import ExpertInfo

Experts = Annotated[
    list[Path],
    typer.Option("--experts", metavar="DIR...", help="Checkpoints, or their folder."),
]


class Schedule(str, Enum):
    """What the learning rate does after its rise."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


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
    schedule: Annotated[Schedule, typer.Option(help="After the rise.")] = Schedule.cosine,
    bf16: Annotated[bool, typer.Option("--bf16", help="Multiply matrices in bfloat16.")] = False,
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
        schedule=schedule.value,
        bf16=bf16,
        seed=seed,
    )
    text = (
        f"{result.path}: {result.parameters:,} parameters, {result.tokens:,} tokens in "
        f"{result.seconds:.0f} s, last loss {result.loss:.3f} nats per token"
    )
    return Answer({**asdict(result), "path": str(result.path)}, (escape(text),))


class Dtype(str, Enum):
    """Types that weights can be converted to."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command(cls=Command)
def score(
    experts: Experts,
    domain: Domains,
    store: Annotated[Path, typer.Option(help="Log-prob store, made if needed.")],
    features: Annotated[
        str, typer.Option(help="For learned gates: some of entropy,top,agreement,jsd,hidden=SIZE.")
    ] = "none",
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Do part I of N, beside other processes.")
    ] = "1/1",
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch.")] = 4096,
    window: Annotated[
        int | None, typer.Option(help="Tokens read at once; default: the shortest context.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="By how much the window moves; default: half of it.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights; default: that of each checkpoint.")
    ] = None,
    as_json: Json = False,
) -> Answer:
    """Score documents with every expert and keep the log-probability of every token."""
    import torch

    from robustgate.lm import ExpertSet, FeatureSpec, list_experts
    from robustgate.lm import score as score_experts

    wanted, part = FeatureSpec.parse(features), parse_shard(shard)
    corpora = parse_domains(domain)
    opened = ExpertSet.open(experts)
    filled = score_experts(
        opened,
        corpora,
        store,
        features=wanted,
        shard=part,
        batch_tokens=batch_tokens,
        window=window,
        stride=stride,
        device=device,
        dtype=None if dtype is None else getattr(torch, dtype.value),
    )
    table = Table("nats per token", *(corpus.name for corpus in corpora))
    infos = {info.name: info for info in list_experts(store=filled)}
    nll: dict[str, dict[str, float | None]] = {name: {} for name in opened.names}
    for name, row in nll.items():
        cells = []
        for corpus in corpora:
            there, slices = infos[name].scored[corpus.name]
            row[corpus.name] = None
            if there == slices:
                total = -float(filled.document_log_probs(corpus.name, [name]).sum())
                row[corpus.name] = total / filled.corpus(corpus.name).tokens
            mean = row[corpus.name]
            cells.append(f"{there} of {slices} slices" if mean is None else f"{mean:.3f}")
        table.add_row(name, *cells)
    scored = {name: dict(infos[name].scored) for name in nll}
    return Answer({"store": str(store), "nll_per_token": nll, "scored": scored}, (table,))


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``I/N``, such as ``2/4``.

    Raises:
        ValueError: It is something else.
    """
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise ValueError(f"--shard: expected I/N, such as 2/4, got {text!r}")
    return int(part), int(parts)


expert = typer.Typer(no_args_is_help=True, help="List, add and remove experts.")
app.add_typer(expert, name="expert")


@expert.command("list", cls=Command)
def list_(
    experts: Annotated[
        list[Path] | None,
        typer.Option("--experts", metavar="DIR...", help="Checkpoints, or their folder."),
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Log-prob store.")] = None,
    model: Annotated[Path | None, typer.Option(help="Modular model.")] = None,
    as_json: Json = False,
) -> Answer:
    """Show experts: hash, context, size, what they have scored, their weight."""
    from robustgate.lm import ExpertSet, LogProbStore, ModularModel, list_experts

    if not (experts or store or model):
        raise ValueError("give --experts, --store or --model")
    infos = list_experts(
        experts=ExpertSet.open(experts) if experts else None,
        store=LogProbStore.open(store) if store else None,
        model=ModularModel.load(model) if model else None,
    )
    return Answer({"experts": [info.to_json() for info in infos]}, (expert_table(infos),))


@expert.command(cls=Command)
def add(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    store: Annotated[Path, typer.Option(help="Log-prob store to register it in.")],
    model: Annotated[
        Path | None, typer.Option(help="Modular model whose experts it will join.")
    ] = None,
    as_json: Json = False,
) -> Answer:
    """Check that a checkpoint can join a store's experts, and register it by its folder's name."""
    from robustgate.lm import LogProbStore, ModularModel
    from robustgate.lm.lifecycle.members import add_expert, tidy

    opened = LogProbStore.open(store)
    loaded = ModularModel.load(model) if model else None
    info = add_expert(checkpoint, opened, model=loaded)
    known = [entry.path for entry in loaded.experts if entry.path] if loaded else []
    others = [str(tidy(path)) for path in known] or ["..."]
    everyone = " ".join([*others, str(checkpoint)])
    domains = " ".join(f"{corpus}=FILE" for corpus in opened.corpora) or "NAME=FILE"
    steps = [
        f"robustgate score --experts {checkpoint} --domain {domains} --store {store}",
        f"robustgate fit --store {store} --experts {everyone} --out {model or 'modular'}",
    ]
    text = f"registered in {store}; nothing is scored yet. Next:\n  " + "\n  ".join(steps)
    return Answer({**info.to_json(), "next": steps}, (expert_table([info]), escape(text)))


@expert.command(cls=Command)
def remove(
    name: Annotated[str, typer.Argument(help="The expert.")],
    model: Annotated[Path, typer.Option(help="Modular model that has it.")],
    store: Annotated[Path, typer.Option(help="Log-prob store that the model was fitted on.")],
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Leave the checkpoint where it is.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> Answer:
    """Take an expert out: weights, scores and weight; and name what still carries its data.

    A removal that was stopped is finished by the same command.
    """
    from robustgate.lm import LogProbStore, ModularModel
    from robustgate.lm.lifecycle.optout import manifest_path
    from robustgate.lm.lifecycle.removal import plan_removal, remove_expert

    loaded, opened = ModularModel.load(model), LogProbStore.open(store)
    plan = plan_removal(name, loaded, opened, keep_weights=keep_weights)
    fate = f"deletes {plan.path}" if plan.weights == "deleted" else f"weights: {plan.weights}"
    question = f"Removing {name!r} from {model} and {store} ({fate}) cannot be undone. Go on?"
    if not (yes or confirmed(question)):
        raise ValueError("not confirmed, so nothing was removed; --yes goes on without asking")
    done = remove_expert(name, loaded, opened, plan=plan)
    weights = Table("expert", "before", "renormalised", "solved again")
    for other, before in done.prior["before"].items():
        after = (done.prior[kind].get(other) for kind in ("renormalised", "solved"))
        cells = ("-" if weight is None else f"{weight:.4f}" for weight in (before, *after))
        weights.add_row(other, *cells)
    carriers = Table("what", "status", "why, and what to do", title=f"The data of {name}")
    for one in done.carriers:
        why = f"{one.reason}; {one.remedy}" if one.remedy else one.reason
        carriers.add_row(*map(escape, (f"{one.kind} {one.name}", one.status, why)))
    file = str(manifest_path(loaded, name, done.sha256))
    text = escape("Bitwise equal: " + "; ".join(done.verified) + f".\n{file}")
    view = (weights, carriers, text)
    return Answer({**asdict(done), "manifest": file}, view)


def confirmed(question: str) -> bool:
    """Ask; no answer is a no."""
    try:
        return typer.confirm(question)
    except typer.Abort:
        return False


def expert_table(infos: list[ExpertInfo]) -> Table:
    """Return a table with one row for each expert, and columns for what is known of any."""
    columns: dict[str, list[str | None]] = {
        "expert": [info.name for info in infos],
        "sha256": [info.sha256[:8] for info in infos],
        "context": [str(info.context) if info.context else None for info in infos],
        "parameters": [f"{info.parameters:,}" if info.parameters else None for info in infos],
        "scored": [", ".join(map(_scored, info.scored.items())) or None for info in infos],
        "prior": [None if info.prior is None else f"{info.prior:.4f}" for info in infos],
        "checkpoint": [str(info.path) if info.path else None for info in infos],
    }
    known = {title: cells for title, cells in columns.items() if any(cells)}
    table = Table()
    for title in known:
        table.add_column(title, no_wrap=title in ("expert", "sha256"), overflow="fold")
    for row in zip(*known.values(), strict=True):
        table.add_row(*(escape(cell or "-") for cell in row))
    return table


def _scored(corpus: tuple[str, tuple[int, int]]) -> str:
    name, (there, slices) = corpus
    return name if there == slices else f"{name} ({there} of {slices} slices)"

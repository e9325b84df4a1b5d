"""The command ``robustgate``. Commands import what they need when they run."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from robustgate.console import Answer, Command, evaluation_tables, flatten

if TYPE_CHECKING:
    from robustgate.lm.corpus import Corpus

app = typer.Typer(
    name="robustgate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


NEXT_STEPS = """\
  robustgate score    --experts experts/* --domain a=a/valid.txt b=b/valid.txt --store store
  robustgate fit      --store store --experts experts/* --out modular
  robustgate evaluate --model modular --domain a=a/test.txt b=b/test.txt
  robustgate report   --run modular --out report"""


class Gate(str, Enum):
    """Gates that ``fit`` can make."""

    prior = "prior"


class Baseline(str, Enum):
    """What the robust prior's losses are compared with."""

    hindsight = "hindsight"
    excess = "excess"
    raw = "raw"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
Domains = Annotated[
    list[str],
    typer.Option("--domain", metavar="NAME=FILE...", help="Domain and its documents."),
]


@app.callback(invoke_without_command=True)
def robustgate(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Combine frozen expert language models into one that is good on every mixture of domains."""
    if version:
        from robustgate import __version__

        typer.echo(__version__)
        raise typer.Exit


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


def parse_domains(pairs: list[str]) -> list[Corpus]:
    """Read ``NAME=FILE`` pairs.

    Raises:
        ValueError: A pair has no ``=``, or a name comes twice.
    """
    from robustgate.lm import read_corpus

    corpora: dict[str, Corpus] = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise ValueError(f"--domain: expected NAME=FILE, got {pair!r}")
        if name in corpora:
            raise ValueError(f"--domain: {name!r} is given twice")
        corpora[name] = read_corpus(path, name)
    return list(corpora.values())


def main() -> None:
    """Run the command line."""
    app()

"""The demo: from raw text to a certified modular model, with the functions a user would call."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from robustgate.demo.budget import EXPERT_CONFIG, STANDARD, Budget, monolith_config
from robustgate.demo.corpora import SHARES, read_domains
from robustgate.lm import (
    Corpus,
    Evaluation,
    ExpertSet,
    ModularModel,
    TrainResult,
    evaluate_model,
    fit,
    read_corpus,
    score,
    train,
    train_tokenizer,
    write_corpus,
)
from robustgate.lm.files import read_json, write_json
from robustgate.lm.report import write_report
from robustgate.lm.report.page import Section, Table

Split = Mapping[str, Mapping[str, Corpus]]
"""Split (``train``, ``valid``, ``test``) to domain to documents."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        model: The modular model.
        evaluation: Every system on held-out documents.
        report: Path of the HTML report.
        seconds: Time spent by this call.
    """

    model: ModularModel
    evaluation: Evaluation
    report: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "model": self.model.to_json(),
            "evaluation": self.evaluation.to_json(),
            "report": str(self.report),
            "seconds": self.seconds,
        }


def run_demo(
    out: str | os.PathLike[str] = "robustgate-demo",
    *,
    budget: Budget = STANDARD,
    seed: int = 0,
    progress: bool = True,
) -> DemoResult:
    """Train experts on text that every Python installation carries, combine them, and report.

    Args:
        out: Folder to work in. A run that was stopped continues there; a finished one is only
            read again.
        budget: How much to do.
        seed: Seed of everything random; the same seed gives the same numbers on one machine.
        progress: Say on standard error what is going on.

    Returns:
        The result.

    Raises:
        ValueError: ``out`` holds a demo with another seed or budget.
        RuntimeError: The installation carries text of fewer than three domains.
        OSError: A file could not be written; what was complete stays.
    """
    began = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small train twice as fast on one thread as on two
    try:
        model, evaluation, report = _run(Path(out), budget, seed, progress)
    finally:
        torch.set_num_threads(threads)
    return DemoResult(model, evaluation, report, time.monotonic() - began)


def _run(
    folder: Path, budget: Budget, seed: int, progress: bool
) -> tuple[ModularModel, Evaluation, Path]:
    """Do the seven steps."""
    say = _Steps(7, progress)
    _claim(folder, budget, seed)

    say("read text that this Python installation carries")
    corpora = _corpora(folder / "data", budget, seed)
    union = balanced(list(corpora["train"].values()))

    say("train the tokenizer and the seed model")
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        train_tokenizer(union.documents, budget.vocab_size, tokenizer)
    settings: dict[str, Any] = {
        "context": budget.context,
        "batch_size": budget.batch_size,
        "seed": seed,
        "progress": progress,
    }
    common = train(
        union,
        folder / "seed",
        config=EXPERT_CONFIG,
        tokenizer=tokenizer,
        tokens=budget.seed_tokens,
        learning_rate=budget.learning_rate,
        **settings,
    )

    say(f"train one expert per domain, from the seed model: {', '.join(corpora['train'])}")
    branches = {
        name: train(
            corpus,
            folder / "experts" / name,
            init=folder / "seed",
            tokens=budget.branch_tokens,
            learning_rate=budget.learning_rate,
            **settings,
        )
        for name, corpus in corpora["train"].items()
    }

    say("train the monolith for comparison")
    monolith = train(
        union,
        folder / "monolith",
        config=monolith_config(len(branches), budget.vocab_size),
        tokenizer=tokenizer,
        tokens=common.tokens + sum(branch.tokens for branch in branches.values()),
        learning_rate=budget.monolith_learning_rate,
        **settings,
    )

    say("score the validation documents and fit the robust prior")
    experts = ExpertSet.open([branch.path for branch in branches.values()])
    valid = list(corpora["valid"].values())
    store = score(experts, valid, folder / "scores" / "valid", progress=progress)
    model = fit(store, folder / "modular", experts=experts)

    say("evaluate on held-out documents")
    evaluation = evaluate_model(
        model,
        list(corpora["test"].values()),
        store=folder / "scores" / "test",
        monolith=monolith.path,
        development=store,
        progress=progress,
    )

    say("write the report")
    report = write_report(
        model.path,
        folder / "report",
        title="robustgate demo",
        appendix=[_training(common, branches, monolith, budget)],
    )
    return model, evaluation, report


def balanced(corpora: Sequence[Corpus]) -> Corpus:
    """Return the union in which every corpus has the same length, shorter ones being repeated."""
    largest = max(sum(map(len, corpus.documents)) for corpus in corpora)
    documents: list[str] = []
    for corpus in corpora:
        length, index = 0, 0
        while length < largest:
            documents.append(corpus.documents[index % len(corpus)])
            length, index = length + len(documents[-1]), index + 1
    return Corpus.of("union", documents)


def _claim(folder: Path, budget: Budget, seed: int) -> None:
    """Make the folder this demo's, or check that it is."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "demo.json"
    wanted = json.loads(json.dumps({"seed": seed, "budget": asdict(budget)}))
    if not file.exists():
        if any(folder.iterdir()):
            raise ValueError(f"{folder}: holds other files; choose another folder")
        write_json(file, wanted)
    elif read_json(file) != wanted:
        raise ValueError(
            f"{folder}: holds a demo with another seed or budget; delete it, or choose another "
            "folder"
        )


def _corpora(folder: Path, budget: Budget, seed: int) -> Split:
    """Write the corpora as files, unless they are there, and read them."""
    index = folder / "sources.json"
    if not index.exists():
        sources = {}
        held_out = budget.held_out_characters
        wanted = {"train": budget.train_characters, "valid": held_out, "test": held_out}
        for domain in read_domains(wanted, seed=seed):
            for split, documents in domain.documents.items():
                write_corpus(folder / domain.name / f"{split}.txt", documents)
            sources[domain.name] = {s: sorted(domain.sources[s]) for s in SHARES}
        write_json(index, sources)
    return {
        split: {
            name: read_corpus(folder / name / f"{split}.txt", name) for name in read_json(index)
        }
        for split in SHARES
    }


def _training(
    seed: TrainResult, branches: Mapping[str, TrainResult], monolith: TrainResult, budget: Budget
) -> Section:
    """Describe how the models were trained, and what was equal."""
    rows = [("seed", seed, budget.learning_rate)]
    rows += [(f"expert {name}", branch, budget.learning_rate) for name, branch in branches.items()]
    rows += [("monolith", monolith, budget.monolith_learning_rate)]
    total = sum(branch.parameters for branch in branches.values())
    return Section(
        "How the models were trained",
        (
            "A seed model reads all domains; each expert goes on from it on one domain. The "
            f"monolith has as many weights as the experts together ({monolith.parameters:,} "
            f"against {total:,}) and reads as many tokens as the seed model and the experts "
            f"together ({monolith.tokens:,}), every domain in equal shares. Text, tokenizer, "
            "batches, schedule and context are equal; each kind of model has the learning rate "
            "that was best for it in runs of the demo's full length.",
            f"Not equal is the arithmetic: the monolith does about {len(branches)} times as much "
            "per token as an expert, and in training about as many times as much in all. Where it "
            "has the lower loss, that is what it was bought with.",
        ),
        tables=(
            Table.of(
                ("model", "weights", "tokens read", "learning rate", "last training loss"),
                [
                    (name, f"{r.parameters:,}", f"{r.tokens:,}", f"{rate:g}", f"{r.loss:.3f}")
                    for name, r, rate in rows
                ],
                "AdamW, cosine schedule; the loss is that of the last step, in nats per token. An "
                "expert's tokens come on top of its seed's.",
            ),
        ),
    )


class _Steps:
    """Print numbered steps on standard error."""

    def __init__(self, total: int, show: bool) -> None:
        self._console = Console(stderr=True, quiet=not show)
        self._total = total
        self._done = 0

    def __call__(self, what: str) -> None:
        self._done += 1
        self._console.print(f"[bold]\\[{self._done}/{self._total}][/] {what}", highlight=False)

"""Three experts, their store and their model, from which tests take one out."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from robustgate.lm.corpus import Corpus
from robustgate.lm.experts import ExpertSet
from robustgate.lm.gates.fit import fit
from robustgate.lm.lifecycle.optout import OptOut
from robustgate.lm.lifecycle.removal import remove_expert
from robustgate.lm.modular import ModularModel
from robustgate.lm.scoring.score import score
from robustgate.lm.store.features import FeatureSpec
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.lm.training.lineage import MANIFEST, Data

from .conftest import make_documents, tree

SPEC = FeatureSpec(entropy=True, agreement=True, jsd=True, hidden=2)
NAMES = ("code", "prose", "third")
TRAINING = {
    name: Corpus.of(name, make_documents("code", 30, seed=n)) for n, name in enumerate(NAMES)
}


def record(
    folder: Path, data: list[Corpus], *, init: str | None = None, ancestor: object = None
) -> dict[str, object]:
    """Write the training record of a checkpoint, and return it."""
    content = {
        "settings": {"init": init},
        "data": [Data.of(corpus).to_json() for corpus in data],
        "tokenizer_data": [Data.of(corpus).to_json() for corpus in TRAINING.values()],
        "ancestor": ancestor,
    }
    (folder / MANIFEST).write_text(json.dumps(content))
    return content


def make_life(
    folder: Path, make_checkpoint: Callable[..., Path], corpora: tuple[Corpus, Corpus]
) -> Path:
    """Three experts, two stores (with and without ``third``), a model of all and one of two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for seed, name in enumerate(NAMES):
        record(make_checkpoint(folder / "experts" / name, seed=seed), [TRAINING[name]])
    read = partial(score, corpora=corpora, slice_tokens=300, device="cpu", progress=False)
    experts = folder / "experts"
    store = read(ExpertSet.open(experts), store=folder / "store", features=SPEC)
    fit(store, folder / "modular", experts=ExpertSet.open(experts))
    others = ExpertSet.open([experts / "code", experts / "prose"])
    without = read(others, store=folder / "without", features=SPEC)
    fit(without, folder / "model-without", experts=others)
    torch.set_num_threads(threads)
    return folder


def remove(folder: Path, name: str = "third", **options: bool) -> OptOut:
    return remove_expert(
        name, ModularModel.load(folder / "modular"), LogProbStore.open(folder / "store"), **options
    )


def opt_out(folder: Path, name: str = "third") -> Path:
    """Return the only opt-out manifest of an expert; a file that is not there, if it has none."""
    found = list((folder / "modular").glob(f"opt-out-{name}-????????.json"))
    assert len(found) < 2
    return found[0] if found else folder / "modular" / "none"


def same_as_without(folder: Path) -> None:
    """Check the model against the one that never knew the third expert."""
    model, other = (
        ModularModel.load(folder / "modular"),
        ModularModel.load(folder / "model-without"),
    )
    ours, theirs = (
        {name: content for name, content in tree(path).items() if not name.startswith("opt-out-")}
        for path in (model.path, other.path)
    )
    assert ours == theirs  # gate, prior and certificate, and the paths relative to the model
    assert model.names == ("code", "prose")

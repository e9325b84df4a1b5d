"""Soups and monoliths in a store: compared with the experts, and none of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from robustgate.lm.corpus import Corpus
from robustgate.lm.evaluation import evaluate as evaluation
from robustgate.lm.evaluation.evaluate import evaluate_model
from robustgate.lm.evaluation.results import Evaluation
from robustgate.lm.evaluation.soup import average_weights, remove_averages
from robustgate.lm.evaluation.systems import SOUP
from robustgate.lm.experts import ExpertSet
from robustgate.lm.gates.fit import fit
from robustgate.lm.modular import ModularModel
from robustgate.lm.scoring.score import score
from robustgate.lm.store.log_probs import LogProbStore

from .conftest import fork

pytestmark = pytest.mark.usefixtures("one_thread")
Corpora = tuple[Corpus, Corpus]


@pytest.fixture
def model(tmp_path: Path, experts_path: Path, corpora: Corpora) -> ModularModel:
    """A model of two experts, fitted to ``store`` beside it."""
    experts = ExpertSet.open(experts_path)
    store = score(experts, corpora, tmp_path / "store", progress=False)
    return fit(store, tmp_path / "modular", experts=experts)


def judge(model: ModularModel, corpora: Corpora, **options: object) -> Evaluation:
    settings = {"baselines": ("soup",), "divergence_tokens": 0, "progress": False}
    return evaluate_model(model, corpora, **(settings | options))  # type: ignore[arg-type]


def test_what_was_compared_does_not_join_a_later_fit(
    model: ModularModel, corpora: Corpora, make_checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    large = make_checkpoint(tmp_path / "large", seed=3)
    judge(model, corpora, store=path, monolith={"large": large})
    store = LogProbStore.open(path)
    assert store.experts == ("code", "large", "prose", "soup")
    members = {name: store.expert_sha256(name) for name in ("code", "prose")}
    assert store.compared == {"large": {}, "soup": members}
    assert fit(store, tmp_path / "again").names == ("code", "prose")
    copy = LogProbStore.create(tmp_path / "copy", store.tokenizer_sha256)
    store.copy_to(copy)
    assert (copy.path / "manifest.json").read_bytes() == (path / "manifest.json").read_bytes()

    score(ExpertSet.open(large), corpora, path, progress=False)  # now as an expert
    assert "large" not in store.compared
    judge(model, corpora, store=path, monolith={"large": large})
    assert fit(store, tmp_path / "again").names == ("code", "large", "prose")

    store.remove_expert("soup")
    assert store.compared == {}
    assert "compared" not in json.loads((path / "manifest.json").read_text())
    with pytest.raises(ValueError, match=r"'soup' was made from another checkpoint than .*'code'"):
        store.add_expert("soup", sha256="S", compared={"code": "another"})
    with pytest.raises(ValueError, match="no expert 'gone' in this store"):
        store.add_expert("soup", sha256="S", compared={"gone": "G"})
    assert store.experts == ("code", "large", "prose")


def test_an_expert_of_the_store_called_soup_is_not_touched(
    model: ModularModel, corpora: Corpora, tmp_path: Path
) -> None:
    path = tmp_path / "scores"
    given = average_weights(
        model.open_experts(), tmp_path / "soup", weights=torch.tensor([0.7, 0.3])
    )
    store = score(ExpertSet.open(given), corpora, path, progress=False)
    before = store.token_log_probs("code", ["soup"])
    found = judge(model, corpora, store=path)
    assert torch.equal(store.token_log_probs("code", ["soup"]), before)
    assert SOUP not in {system.name for system in found.systems}
    assert any("left out: " in note and "expert called 'soup'" in note for note in found.notes)


def test_a_killed_evaluation_leaves_no_average_for_long(
    model: ModularModel, corpora: Corpora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork

    def dying(experts: ExpertSet, *arguments: object, **options: object) -> LogProbStore:
        if "soup" in experts.names:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(experts, *arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as killed:
        killed.setattr(evaluation, "score", dying)
        child = fork(lambda: judge(model, corpora))
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert list(model.path.glob(".soup*/soup/model.safetensors"))
    judge(model, corpora, baselines=())
    assert not list(model.path.glob(".soup*"))

    for name in (".soup-x1y2z3_", ".soup~another-machine~1~1~.tmp"):
        (model.path / name / "soup").mkdir(parents=True)
        (model.path / name / "soup" / "model.safetensors").write_bytes(b"weights")
    judge(model, corpora, baselines=())
    assert len(list(model.path.glob(".soup*"))) == 2  # perhaps at work
    remove_averages(model.path)
    assert not list(model.path.glob(".soup*"))

"""The modular model's folder: what fit writes, what load refuses, what a kill leaves."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from threading import Thread

import pytest
import torch
from scored import make_store, random_corpora

from robustgate.game import robust_prior
from robustgate.lm import publish
from robustgate.lm.experts import ExpertSet
from robustgate.lm.gates.fit import fit
from robustgate.lm.modular import ModularModel
from robustgate.lm.scoring.score import score
from robustgate.lm.store.log_probs import LogProbStore

from .conftest import tree

EXPERTS = ("a", "b", "c")


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store", random_corpora(("x", "y"), experts=3), EXPERTS)


@pytest.fixture
def model(tmp_path, store):
    return fit(store, tmp_path / "modular")


def baseline_of(kind, log_probs):
    """What losses are measured from on one domain, in plain words."""
    if kind == "hindsight":
        return float(-log_probs.max(dim=1).values.mean())
    return float((-log_probs).mean(dim=0).min()) if kind == "excess" else 0.0


@pytest.mark.parametrize("kind", ["hindsight", "excess", "raw"])
def test_holds_the_floored_robust_prior_and_its_certificate(tmp_path, store, kind):
    model = fit(store, tmp_path / "modular", baseline=kind)
    log_probs = {name: store.document_log_probs(name) for name in ("x", "y")}
    base = {name: baseline_of(kind, part) for name, part in log_probs.items()}
    solution = robust_prior(log_probs, baseline=base)
    assert model.names == EXPERTS
    assert model.domains == ("x", "y")
    # The baselines may differ by the order of their sums, about 1e-14, and the solver by its gap.
    assert model.baseline.tolist() == pytest.approx(list(base.values()), rel=1e-12)
    assert model.certificate.upper_bound == pytest.approx(solution.upper_bound, abs=1e-6)
    worst = max(
        float(-torch.logsumexp(part + model.prior.log(), dim=-1).mean()) - base[name]
        for name, part in log_probs.items()
    )
    proven = model.certificate
    assert proven.baseline == kind
    assert proven.worst_case == pytest.approx(worst, rel=1e-12)
    assert proven.lower_bound <= proven.upper_bound <= proven.lower_bound + 1e-6
    assert proven.worst_case <= proven.upper_bound - math.log1p(-0.01)
    assert float(model.prior.min()) >= 0.01 / 3
    assert proven.guarantee == pytest.approx(-math.log(float(model.prior.min())), rel=1e-15)
    assert proven.documents == 24
    assert len(model.trajectory["upper_bound"]) == len(model.trajectory["mixtures"]) > 1


def test_default_certificate_bounds_the_excess_over_the_best_expert_of_each_domain(store, model):
    for name in ("x", "y"):
        log_probs = store.document_log_probs(name)
        loss = float(-torch.logsumexp(log_probs + model.prior.log(), dim=-1).mean())
        assert model.certificate.baseline == "hindsight"
        assert loss - baseline_of("excess", log_probs) <= model.certificate.worst_case


def test_one_odd_document_does_not_talk_the_prior_out_of_an_expert(tmp_path):
    # Expert b is 4 nats better on all documents of y but one, which a explains better by 80.
    likes = torch.tensor([[-1.0, -5.0]]).repeat(30, 1)
    dislikes = likes.flip(1)
    odd = torch.cat([dislikes[:-1], torch.tensor([[-1.0, -81.0]])])
    store = make_store(tmp_path / "s", {"x": ([1] * 30, likes), "y": ([1] * 30, odd)}, ("a", "b"))
    hindsight = fit(store, tmp_path / "h").prior[1]
    excess = fit(store, tmp_path / "e", baseline="excess").prior[1]
    assert hindsight > 0.4
    assert excess < 0.2


def test_sentence_names_the_numbers(model):
    sentence = model.sentence()
    for number in (model.certificate.worst_case, model.certificate.lower_bound):
        assert f"{number:.3f}" in sentence
    assert sentence.count(". ") == 0  # one sentence
    assert model.to_json()["certificate"]["sentence"] == sentence
    assert json.loads(json.dumps(model.to_json()))["prior"].keys() == set(EXPERTS)


def test_two_fits_write_the_same_bytes(tmp_path, store, model):
    fit(store, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(model.path)
    fit(store, model.path)
    assert tree(tmp_path / "again") == tree(model.path)


def test_another_fit_replaces_model_and_evaluation(tmp_path, store, model):
    (model.path / "evaluation.json").write_text("{}")
    fit(store, model.path, delta=0.5)
    assert not (model.path / "evaluation.json").exists()
    assert len(list(model.path.glob("gate-*"))) == 1
    assert ModularModel.load(model.path).certificate.delta == 0.5


def test_a_killed_fit_leaves_the_old_model_or_the_new_one(tmp_path, store, model, killed):
    old, new = model.prior, fit(store, tmp_path / "new", delta=0.5).prior
    outcomes = set()
    for at in range(8):  # two atomic writes, each with two fsyncs and a rename
        fit(store, model.path)
        was_killed = killed(lambda: fit(store, model.path, delta=0.5), at=at)
        found = ModularModel.load(model.path).prior
        assert torch.equal(found, old) or torch.equal(found, new)
        outcomes.add((was_killed, torch.equal(found, new)))
    assert {(True, False), (False, True)} <= outcomes


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), FileNotFoundError, "not a modular model"),
        (lambda f: (f / "manifest.json").write_text("{"), ValueError, "not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), ValueError, "not the manifest"),
        (lambda f: _edit(f, version=3), ValueError, "version 3"),
        (lambda f: _edit(f, certificate={}), ValueError, "damaged"),
        (lambda f: _edit(f, training={"unit": "token"}), ValueError, "damaged"),
        (lambda f: _edit_gate(f, kind="token"), ValueError, "a token gate with None"),
        (lambda f: _edit_gate(f, kind="word"), ValueError, "got 'word'"),
        (lambda f: _edit_gate(f, bayes={"shares": 1}), ValueError, "damaged .*shares"),
        (lambda f: _edit_gate(f, kind="token", network={"kind": "mlp"}), ValueError, "damaged"),
        (lambda f: _edit(f, gate={"file": "no.safetensors", "sha256": ""}), OSError, "missing"),
        (lambda f: next(f.glob("gate-*")).write_bytes(b"x"), ValueError, "truncated or altered"),
    ],
)
def test_load_refuses_what_is_damaged(model, damage, error, message):
    damage(model.path)
    with pytest.raises(error, match=message):
        ModularModel.load(model.path)


def _edit(folder: Path, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def _edit_gate(folder: Path, **changes):
    gate = json.loads((folder / "manifest.json").read_text())["gate"]
    _edit(folder, gate={**gate, "spec": {**gate["spec"], **changes}})


def test_fit_refuses_what_does_not_fit(tmp_path, store):
    with pytest.raises(
        ValueError, match="baseline: expected one of hindsight, excess, raw, got 'best'"
    ):
        fit(store, tmp_path / "m", baseline="best")
    with pytest.raises(ValueError, match="delta"):
        fit(store, tmp_path / "m", delta=0.0)
    with pytest.raises(ValueError, match="holds no scored experts and corpora"):
        fit(LogProbStore.create(tmp_path / "empty", "T" * 64), tmp_path / "m")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="full: holds other files"):
        fit(store, tmp_path / "full")
    assert not (tmp_path / "m").exists()


def test_experts_are_remembered_and_checked(tmp_path, experts_path, corpora, make_checkpoint):
    folder = tmp_path / "experts"
    make_checkpoint(folder / "code", seed=1)
    make_checkpoint(folder / "prose", seed=2)
    experts = ExpertSet.open(folder)
    store = score(experts, corpora, tmp_path / "store", progress=False)
    model = fit(store, tmp_path / "runs" / "modular", experts=experts)
    assert model.open_experts().names == ("code", "prose")
    assert [expert.path.resolve() for expert in model.experts] == [
        (folder / name).resolve() for name in ("code", "prose")
    ]
    (tmp_path / "runs").rename(tmp_path / "archive")  # the model moves, its experts do not
    moved = ModularModel.load(tmp_path / "archive" / "modular")
    assert moved.open_experts().names == ("code", "prose")
    make_checkpoint(folder / "prose", seed=3)
    with pytest.raises(ValueError, match="expert 'prose' has changed since the fit"):
        moved.open_experts()
    with pytest.raises(ValueError, match="'prose' is another checkpoint"):
        fit(store, tmp_path / "other", experts=ExpertSet.open(folder))


def test_a_model_without_paths_says_how_to_get_them(model):
    with pytest.raises(FileNotFoundError, match="fit again with --experts"):
        model.open_experts()


def test_two_fits_at_once_leave_one_whole_model(tmp_path, store, monkeypatch):
    """A second fit that begins while the first writes waits for it."""
    model, threads, write = tmp_path / "modular", [], publish.write_json

    def interrupted(path, content):
        if not threads:
            threads.append(Thread(target=fit, args=(store, model), kwargs={"delta": 0.2}))
            threads[0].start()
            threads[0].join(timeout=1)  # without a lock it would be through by now
        write(path, content)

    monkeypatch.setattr(publish, "write_json", interrupted)
    fit(store, model, delta=0.3)
    threads[0].join()
    assert ModularModel.load(model).certificate.delta == 0.2
    assert len(list(model.glob("gate-*.safetensors"))) == 1


def test_a_linked_folder_keeps_the_way_to_its_experts(tmp_path, experts_path, corpora):
    experts = ExpertSet.open(shutil.copytree(experts_path, tmp_path / "real" / "experts"))
    store = score(experts, corpora, tmp_path / "store", device="cpu", progress=False)
    (tmp_path / "big" / "deep").mkdir(parents=True)
    (tmp_path / "modular").symlink_to(tmp_path / "big" / "deep", target_is_directory=True)
    assert fit(store, tmp_path / "modular", experts=experts).open_experts().names == experts.names
    (tmp_path / "experts").symlink_to(tmp_path / "real" / "experts", target_is_directory=True)
    linked = ExpertSet.open(tmp_path / "experts")
    assert fit(store, tmp_path / "other", experts=linked).open_experts().names == experts.names
    (tmp_path / "code").symlink_to(tmp_path / "experts" / "code", target_is_directory=True)
    alone = fit(store, tmp_path / "alone", experts=ExpertSet.open({"code": tmp_path / "code"}))
    assert alone.experts[0].path.is_symlink()

"""Distillation of a model with a sequence gate into one with a token gate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from robustgate import cli
from robustgate.game import SequenceGate, TokenGate
from robustgate.lm.experts import ExpertSet
from robustgate.lm.gates.distill import distill
from robustgate.lm.gates.fit import fit
from robustgate.lm.gates.records import GateFit, TrainingRecord
from robustgate.lm.gates.samplers import ExpertSamplers
from robustgate.lm.gates.spec import GateSpec, Network, standardise
from robustgate.lm.modular import ModularModel
from robustgate.lm.publish import publish
from robustgate.lm.scoring.score import score

SPEC = GateSpec("sequence", network=Network("linear"), span=6)
RECORD = TrainingRecord(
    unit="document",
    domains=("code", "prose"),
    documents=(9, 7),
    held_out=(3, 2),
    kept="trained",
    steps=10,
    best_step=5,
    before=(0.5, 0.6),
    after=(0.4, 0.3),
    train_before=(0.5, 0.6),
    train_after=(0.4, 0.3),
    mixture=(0.4, 0.6),
    seed=0,
    normaliser=(1.0, 0.01),
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, experts_path, corpora):
    """A prior over the two experts."""
    folder = tmp_path_factory.mktemp("distill")
    experts = ExpertSet.open(experts_path)
    store = score(experts, corpora, folder / "store", progress=False)
    return fit(store, folder / "prior", experts=experts)


def teacher(fitted, path, strength):
    """A model whose sequence gate prefers one expert for documents that some expert expects."""
    gate = SPEC.build(fitted.prior)
    assert isinstance(gate, SequenceGate)
    samplers = ExpertSamplers(fitted.open_experts(), 6).samplers()
    drawn = [draw(100, torch.Generator().manual_seed(0)).inputs for draw in samplers]
    standardise(gate, torch.cat(drawn))
    with torch.no_grad():
        gate.head.weight[:, 6] = torch.tensor([strength, -strength])  # 6 is the level
    return publish(replace(fitted.with_gate(GateFit(SPEC, gate, RECORD)), path=path))


def test_a_constant_teacher_is_matched_without_training(tmp_path, fitted):
    model = teacher(fitted, tmp_path / "constant", strength=0.0)
    found = distill(model, tmp_path / "out", documents=50, held_out=200, steps=0, progress=False)
    gap, error = found.training.gap
    # The student is the teacher; the gap's one error is that of Z from the acceptance rate.
    assert abs(gap) < 4 * error
    assert error < 0.15


def test_training_closes_some_of_the_gap_to_a_teacher_that_looks_ahead(tmp_path, fitted):
    model = teacher(fitted, tmp_path / "ahead", strength=3.0)
    options = {"documents": 300, "held_out": 300, "progress": False}
    untrained = distill(model, tmp_path / "untrained", steps=0, **options)
    trained = distill(model, tmp_path / "trained", steps=80, **options)
    (before, error), (after, _) = untrained.training.gap, trained.training.gap
    assert before > 4 * error  # the Bayes gate is not this teacher
    assert after < before  # on the same held-out documents
    low = after - 4 * trained.training.gap[1]
    assert low > -0.2  # a divergence: what is below 0 is sampling error

    again = ModularModel.load(tmp_path / "trained")
    assert again.kind == "token"
    assert isinstance(again.gate(), TokenGate)
    assert again.certificate == fitted.certificate
    assert torch.equal(again.prior, fitted.prior)
    assert again.training == replace(RECORD, gap=trained.training.gap)
    assert f"{after:.4f} nats per document" in again.training.sentence()
    assert again.open_experts().names == fitted.names  # paths hold from the new folder


def test_the_command_says_the_gap(tmp_path, fitted):
    teacher(fitted, tmp_path / "model", strength=1.0)
    arguments = ["distill", "--model", tmp_path / "model", "--out", tmp_path / "out"]
    arguments += ["--documents", 20, "--held-out", 20, "--steps", 2, "--network", "linear"]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    made = ModularModel.load(tmp_path / "out")
    assert made.training.sentence() in result.stdout
    assert made.spec.network.kind == "linear"


def test_refuses_other_gates_and_other_folders(tmp_path, fitted):
    with pytest.raises(ValueError, match="expected a sequence gate, got a prior gate"):
        distill(fitted, tmp_path / "out")
    model = teacher(fitted, tmp_path / "model", strength=0.0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="full: holds other files"):
        distill(model, tmp_path / "full")

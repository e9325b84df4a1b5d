"""The token gate of ``fit``: what it reads, that it learns what can be learned, when it is kept."""

from __future__ import annotations

import math

import pytest
import torch
from scored import make_store, random_corpora
from typer.testing import CliRunner

from robustgate import cli
from robustgate.game import BayesGate, TokenGate
from robustgate.lm.gates.fit import fit
from robustgate.lm.gates.inputs import GateInputs, Packed, batches
from robustgate.lm.gates.spec import GateSpec, Network
from robustgate.lm.gates.token_fit import _runs, bayes_losses, choose_share, fit_token_gate
from robustgate.lm.modular import ModularModel
from robustgate.lm.store.features import FeatureSpec

from .conftest import tree

DOMAINS = ("x", "y")


def packed(seed, told=True, documents=40):
    """Two experts that are good at every other token, in an order that the context tells."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 30, (documents,), generator=draw)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    first = torch.rand(int(offsets[-1]), generator=draw) < 0.5  # which expert is good
    log_probs = torch.where(torch.stack([first, ~first], dim=1), math.log(0.9), math.log(0.1))
    context = torch.stack([first.float(), torch.rand(len(first), generator=draw)], dim=1)
    return Packed(log_probs, context if told else context[:, :0], offsets)


@pytest.fixture
def domains():
    return {"x": packed(0), "y": packed(1)}


class Told(FeatureSpec):
    """Two features, whatever the number of experts."""

    def width(self, experts):
        return 2


PRIOR = torch.tensor([0.5, 0.5], dtype=torch.float64)
TOLD = GateSpec("token", network=Network("mlp", width=8), features=Told())


@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer"])
def test_inputs_worked_out_once_give_the_gate_itself(domains, kind):
    torch.manual_seed(0)
    gate = GateSpec("token", network=Network(kind, width=8), features=Told()).build(PRIOR)
    assert isinstance(gate, TokenGate)
    torch.nn.init.normal_(gate.head.weight)
    for documents in domains.values():
        inputs = GateInputs.of(gate, documents)
        total = 0.0
        for start, end in zip(documents.offsets, documents.offsets[1:], strict=False):
            rows = slice(int(start), int(end))
            own = gate.log_prob(documents.log_probs[rows], context=documents.context[rows])
            total -= float(own.detach().sum())
        # The network's float32 sums, over documents alone and padded together.
        assert inputs.loss(gate) == pytest.approx(total / len(documents.log_probs), abs=1e-5)


def test_learns_from_features_what_no_bayes_gate_can_know(domains):
    found = fit_token_gate(domains, PRIOR, TOLD, steps=300, progress=False)
    assert found.record.kept == "trained"
    # A perfect gate has loss -log .9 = .105; the best single expert about (log .9 + log .1) / -2.
    excess = -math.log(0.9) + (math.log(0.9) + math.log(0.1)) / 2
    assert found.record.worst_after < 0.8 * excess < found.record.worst_before
    fresh = packed(2)
    assert GateInputs.of(found.gate, fresh).loss(found.gate) < -math.log(0.5) / 2


@pytest.mark.parametrize("every", [2, 14])  # documents 0 and 1 of every so many
def test_a_domain_that_every_expert_finds_impossible_is_refused(domains, every):
    log_probs = domains["y"].log_probs.clone()
    starts = domains["y"].offsets[:-1]
    log_probs[starts[::every], 0] = -math.inf
    log_probs[starts[1::every], 1] = -math.inf
    domains["y"] = Packed(log_probs, domains["y"].context, domains["y"].offsets)
    with pytest.raises(ValueError, match="every expert gives some document of domain 'y'"):
        fit_token_gate(domains, PRIOR, TOLD, steps=2, progress=False)


def test_is_deterministic_for_a_seed(domains):
    one, two, other = (
        fit_token_gate(domains, PRIOR, TOLD, steps=20, seed=seed, progress=False)
        for seed in (1, 1, 2)
    )
    assert one.record == two.record
    for left, right in zip(one.gate.parameters(), two.gate.parameters(), strict=True):
        assert torch.equal(left, right)
    assert one.record != other.record


def test_what_cannot_be_learned_leaves_the_bayes_gate():
    # Experts that are the same: every gate has the same loss, and no better one is found.
    same = {name: Packed(part.log_probs[:, :1].expand(-1, 2), part.context[:, :0], part.offsets)
            for name, part in (("x", packed(0)), ("y", packed(1)))}  # fmt: skip
    spec = GateSpec("token", network=Network("linear"))
    found = fit_token_gate(same, PRIOR, spec, steps=10, progress=False)
    assert found.record.kept == "start"
    assert found.record.after == found.record.before
    assert found.spec.bayes.share == 0.0
    log_probs = -torch.rand(5, 2)
    assert torch.allclose(found.gate(log_probs), BayesGate(PRIOR)(log_probs), atol=1e-12)


def test_a_domain_keeps_documents_of_both_kinds(domains):
    for documents in domains.values():
        training, held_out = documents.split(seed=3)
        counts = [len(part.offsets) - 1 for part in (training, held_out)]
        assert counts == [30, 10]
        rows = torch.cat([training.log_probs, held_out.log_probs])
        assert torch.equal(rows[:, 0].sort().values, documents.log_probs[:, 0].sort().values)
    with pytest.raises(ValueError, match="at least 2 documents of each, got 1"):
        domains["x"].choose(torch.tensor([4]), 9).split(seed=0)


def test_reads_some_documents_and_the_start_of_each(store):
    whole = store.token_log_probs("x", ("c", "a"))
    offsets = store.offsets("x")
    options = {"corpus": "x", "experts": ("c", "a"), "features": FeatureSpec()}
    found = Packed.read(store, tokens=1000, longest=1000, **options)
    assert torch.equal(found.log_probs, whole)
    assert torch.equal(found.offsets, offsets)
    short = Packed.read(store, tokens=1000, longest=2, **options)
    assert torch.equal(short.offsets.diff(), offsets.diff().clamp(max=2))
    for document, start in enumerate(offsets[:-1].tolist()):
        row = int(short.offsets[document])
        assert torch.equal(short.log_probs[row], whole[start])
    few = Packed.read(store, tokens=20, longest=1000, **options)
    assert 2 <= len(few.offsets) - 1 < len(offsets) - 1
    assert len(few.log_probs) <= 20
    assert len(Packed.read(store, tokens=0, longest=1000, **options).offsets) == 3


def test_bayes_losses_are_means_per_domain(domains):
    gate = BayesGate(torch.tensor([0.2, 0.8]), share=0.1)
    expected = [
        -gate.log_prob(part.log_probs, offsets=part.offsets).mean() for part in domains.values()
    ]
    assert torch.allclose(bayes_losses(gate, domains), torch.stack(expected), rtol=1e-12)


def test_the_share_is_the_one_with_the_least_worst_domain():
    # The expert changes every 5 tokens: a large share follows, a small one does not.
    good = (torch.arange(200) // 5) % 2 == 0
    log_probs = torch.where(torch.stack([good, ~good], 1), -0.1, -3.0)
    documents = Packed(log_probs, log_probs[:, :0], torch.tensor([0, 100, 200]))
    baseline = torch.zeros(1, dtype=torch.float64)
    assert choose_share({"x": documents}, PRIOR, baseline) == 0.1
    still = Packed(log_probs[:1].expand(200, 2), log_probs[:, :0], torch.tensor([0, 100, 200]))
    assert choose_share({"x": still}, PRIOR, baseline) == 1e-4


def test_runs_cover_every_token_once():
    starts, lengths = _runs(torch.tensor([0, 5, 5, 9, 17]), 4)
    assert starts.tolist() == [0, 4, 5, 9, 13]
    assert lengths.tolist() == [4, 1, 4, 4, 4]


def test_padded_batches_hold_every_document_once_and_stay_small():
    lengths = torch.randint(1, 5000, (300,), generator=torch.Generator().manual_seed(0))
    for pairs, most in ((False, 1 << 18), (True, 1 << 25)):
        found = list(batches(lengths, pairs=pairs))
        assert sorted(torch.cat(found).tolist()) == list(range(300))
        for batch in found:
            longest = int(lengths[batch].max())
            assert len(batch) == 1 or len(batch) * longest * (longest if pairs else 1) <= most


@pytest.fixture
def store(tmp_path):
    corpora = random_corpora(DOMAINS, experts=3, documents=20)
    return make_store(tmp_path / "store", corpora, ("a", "b", "c"))


def test_fit_writes_a_token_model_that_reads_back(tmp_path, store):
    options = {"gate": "token", "network": Network("mlp", width=4), "steps": 20, "progress": False}
    model = fit(store, tmp_path / "token", **options)
    prior = fit(store, tmp_path / "prior")
    assert model.kind == "token"
    assert torch.equal(model.prior, prior.prior)
    assert model.certificate == prior.certificate
    again = ModularModel.load(tmp_path / "token")
    assert again.spec == model.spec
    assert again.training == model.training
    assert again.training.domains == DOMAINS
    assert [*again.training.documents, *again.training.held_out] == [15, 15, 5, 5]
    gate = again.gate()
    assert isinstance(gate, TokenGate)
    assert not gate.training
    assert not any(parameter.requires_grad for parameter in gate.parameters())
    assert again.to_json()["gate"]["kind"] == "token"
    before = torch.get_rng_state()
    again.gate()
    assert torch.equal(torch.get_rng_state(), before)
    fit(store, tmp_path / "twice", **options)
    assert tree(tmp_path / "twice") == tree(tmp_path / "token")
    assert len(again.parameters) > 0
    fit(store, tmp_path / "token")  # a prior in its place
    assert ModularModel.load(tmp_path / "token").parameters == {}


def test_the_command_says_what_the_gate_does(tmp_path, store):
    arguments = ["fit", "--store", store.path, "--gate", "token", "--network", "linear"]
    arguments += ["--steps", 5, "--out", tmp_path / "model"]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    model = ModularModel.load(tmp_path / "model")
    assert model.spec.network.kind == "linear"
    for value in (model.training.worst_before, model.training.worst_after):
        assert f"{value:+.4f}" in result.stdout
    assert model.sentence() in result.stdout
    arguments += ["--features", "entropy"]
    refused = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert refused.exit_code == 2
    assert "entropy" in refused.stderr  # the store does not hold it
    assert ModularModel.load(tmp_path / "model").training == model.training


def test_fit_refuses_what_does_not_fit(tmp_path, store):
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        fit(store, tmp_path / "m", gate="token", steps=0)
    with pytest.raises(ValueError, match="gate: expected prior, token or sequence, got 'best'"):
        fit(store, tmp_path / "m", gate="best")
    with pytest.raises(ValueError, match="experts: a sequence gate"):
        fit(store, tmp_path / "m", gate="sequence")
    assert not (tmp_path / "m").exists()

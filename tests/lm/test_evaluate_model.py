"""Evaluating modular models with gates of every kind, with what needs the checkpoints."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from robustgate.cli.judge import parse_monoliths
from robustgate.game import BayesGate
from robustgate.lm.evaluation.conflict import expert_divergence, monolith_conflict
from robustgate.lm.evaluation.evaluate import evaluate_model
from robustgate.lm.evaluation.results import Evaluation
from robustgate.lm.evaluation.soup import average_weights
from robustgate.lm.evaluation.systems import ROBUST, SOUP, gate_name
from robustgate.lm.evaluation.trace import Trace
from robustgate.lm.experts import ExpertSet
from robustgate.lm.gates.fit import fit
from robustgate.lm.gates.records import TrainingRecord
from robustgate.lm.gates.spec import BayesOptions, GateSpec, Network, document_features
from robustgate.lm.modular import ModularModel
from robustgate.lm.scoring.score import score
from robustgate.lm.store.batches import first_documents
from robustgate.lm.store.features import FeatureSpec
from robustgate.lm.store.log_probs import LogProbStore
from robustgate.lm.tokenizer import encode

# Sums of a few hundred double-precision terms of size ten in two orders: 1e-13.
CLOSE = 1e-11


@pytest.fixture(scope="module")
def model(tmp_path_factory, experts_path, corpora):
    """A model of two experts with the prior's gate."""
    folder = tmp_path_factory.mktemp("judged")
    experts = ExpertSet.open(experts_path)
    store = score(experts, corpora, folder / "valid", progress=False)
    fit(store, folder / "m", experts=experts)
    return ModularModel.load(folder / "m")


def with_gate(model, spec):
    """Return the model with a gate of random parameters."""
    gate = spec.build(model.prior)
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: value
        if "log_prior" in name or not value.is_floating_point()
        else value + 0.3 * torch.rand(value.shape, generator=generator)
        for name, value in gate.state_dict().items()
    }
    return replace(model, spec=spec, parameters=parameters)


def quick(model, corpora, tmp_path, **options):
    """Evaluate without what other tests are about."""
    settings = {"soup": False, "divergence_tokens": 0, "progress": False, "baselines": ()}
    return evaluate_model(model, corpora, store=tmp_path / "scores", **(settings | options))


@pytest.mark.parametrize("network", ["linear", "mlp", "transformer"])
def test_a_token_gate_is_judged_document_by_document(model, corpora, tmp_path, network):
    features = FeatureSpec(entropy=True, agreement=True, jsd=True)
    judged = with_gate(model, GateSpec("token", network=Network(network), features=features))
    evaluation = quick(judged, corpora, tmp_path)
    assert [system.name for system in evaluation.systems] == [ROBUST, "token gate"]
    assert evaluation.ours == "token gate"
    store, gate = LogProbStore.open(tmp_path / "scores"), judged.gate()
    for result in evaluation.system("token gate").domains:
        log_probs = store.token_log_probs(result.domain, judged.names)
        context = store.context_features(result.domain, features, judged.names)
        bounds = store.offsets(result.domain).tolist()
        total = sum(
            float(gate.log_prob(log_probs[a:b], context=context[a:b]).sum())
            for a, b in pairwise(bounds)
        )
        # The network works in float32: its rounding depends on the batch, by 1e-6 of a loss.
        assert result.nll_per_token == pytest.approx(-total / result.tokens, rel=1e-5)
    assert evaluation.system(ROBUST).domains != evaluation.system("token gate").domains
    trace = Trace.load(judged.path)
    assert torch.tensor(trace.weights).sum(dim=1) == pytest.approx(1.0, abs=1e-6)
    assert {result.system for result in evaluation.switch.systems} == {ROBUST, "token gate"}


def test_an_untrained_token_gate_is_the_certified_mixture(model, corpora, tmp_path):
    spec = GateSpec("token", network=Network("mlp"))
    judged = replace(model, spec=spec, parameters=spec.build(model.prior).state_dict())
    evaluation = quick(judged, corpora, tmp_path)
    pairs = zip(
        evaluation.system(ROBUST).domains, evaluation.system("token gate").domains, strict=True
    )
    for own, other in pairs:
        assert own.nll_per_token == pytest.approx(other.nll_per_token, rel=CLOSE)


def test_a_sequence_gate_is_divided_by_its_normaliser(model, corpora, tmp_path):
    spec = GateSpec("sequence", network=Network("linear"), span=16)
    record = TrainingRecord(
        *("document", ("code",), (1,), (1,), "last", 1, 1, (0.0,), (0.0,), (0.0,), (0.0,)),
        *((1.0,), 0),
        normaliser=(1.25, 0.01),
    )
    judged = replace(with_gate(model, spec), training=record)
    evaluation = quick(judged, corpora, tmp_path)
    name = gate_name(spec)
    assert evaluation.ours == name
    assert any("not" in note or "causal" in note for note in evaluation.notes)
    assert any("Z = 1.2500" in note for note in evaluation.notes)
    store, gate = LogProbStore.open(tmp_path / "scores"), judged.gate()
    for result in evaluation.system(name).domains:
        batch = first_documents(store, result.domain, judged.names, 99)
        total = 0.0
        for a, b in pairwise(batch.offsets.tolist()):
            own = batch.log_probs[a:b].unsqueeze(0)
            weights = gate(document_features(own, torch.ones(1, b - a), 16)).double()
            mixture = torch.logsumexp(weights + own.double().sum(dim=1), dim=1)
            total += float(mixture) - math.log(1.25)
        assert result.nll_per_token == pytest.approx(-total / result.tokens, rel=1e-5)
    assert evaluation.switch is not None
    assert name not in {result.system for result in evaluation.switch.systems}


def test_options_of_the_prior_gate_are_a_system_of_their_own(model, corpora, tmp_path):
    judged = replace(model, spec=GateSpec(bayes=BayesOptions(share=0.05)))
    evaluation = quick(judged, corpora, tmp_path)
    assert [system.name for system in evaluation.systems] == [ROBUST, "robust gate (share 0.05)"]
    store = LogProbStore.open(tmp_path / "scores")
    gate = BayesGate(model.prior, share=0.05)
    for result in evaluation.system(evaluation.ours).domains:
        loss = -gate.log_prob(
            store.token_log_probs(result.domain, model.names), offsets=store.offsets(result.domain)
        )
        assert result.nll_per_token == pytest.approx(float(loss.mean()), rel=CLOSE)


def test_names_of_gates():
    assert gate_name(GateSpec()) == ROBUST
    assert gate_name(GateSpec(bayes=BayesOptions(top_k=1))) == "robust gate (top_k 1)"
    assert gate_name(GateSpec(bayes=BayesOptions(top_k=2))) == "robust gate (top_k 2)"
    assert gate_name(GateSpec(bayes=BayesOptions(top_k=3))) == "robust gate (top_k 3)"
    assert gate_name(GateSpec(bayes=BayesOptions(power=0.5))) == "robust gate (power 0.5)"
    token = GateSpec("token", network=Network())
    assert gate_name(token) == "token gate"
    assert gate_name(token, distilled=True) == "distilled token gate"


def test_soup_and_monoliths_are_scored_as_models(model, corpora, experts_path, tmp_path):
    rivals = {"one": experts_path / "code", "two": experts_path / "prose"}
    evaluation = quick(
        model, corpora, tmp_path, soup=True, baselines=("experts", "soup"), monolith=rivals
    )
    names = [system.name for system in evaluation.systems]
    assert names == ["code", "prose", "one", "two", SOUP, ROBUST]
    assert evaluation.system("one").domains == evaluation.system("code").domains
    assert any("no opt-out guarantee" in note for note in evaluation.notes)
    average = average_weights(model.open_experts(), tmp_path / "soup")
    alone = score(ExpertSet.open(average), corpora, tmp_path / "alone", progress=False)
    for result in evaluation.system(SOUP).domains:
        loss = -float(alone.document_log_probs(result.domain).sum()) / result.tokens
        assert result.nll_per_token == loss
    assert not list(model.path.glob(".soup*"))
    assert Evaluation.load(model.path) == evaluation


def test_a_soup_of_other_experts_in_the_store_is_replaced(model, corpora, experts_path, tmp_path):
    store = score(
        ExpertSet.open({"soup": experts_path / "code"}),
        corpora,
        tmp_path / "scores",
        compared={},
        progress=False,
    )
    before = store.expert_sha256("soup")
    quick(model, corpora, tmp_path, soup=True, baselines=("soup",))
    assert store.expert_sha256("soup") != before


def test_an_expert_called_soup_keeps_its_scores(corpora, experts_path, tmp_path):
    experts = ExpertSet.open({"code": experts_path / "code", "soup": experts_path / "prose"})
    store = score(experts, corpora, tmp_path / "scores", progress=False)
    before = store.token_log_probs(corpora[0].name)
    fit(store, tmp_path / "m", experts=experts)
    model = ModularModel.load(tmp_path / "m")
    evaluation = quick(model, corpora, tmp_path, soup=True, baselines=("soup",))
    assert torch.equal(store.token_log_probs(corpora[0].name), before)
    assert SOUP not in {system.name for system in evaluation.systems}
    assert any("left out: an expert is called 'soup'" in note for note in evaluation.notes)


def test_soup_of_other_architectures_is_left_out_with_the_reason(
    corpora, make_checkpoint, tmp_path
):
    make_checkpoint(tmp_path / "experts" / "a", seed=1)
    make_checkpoint(tmp_path / "experts" / "b", seed=2, hidden_size=16)
    experts = ExpertSet.open(tmp_path / "experts")
    store = score(experts, corpora, tmp_path / "valid", progress=False)
    fit(store, tmp_path / "m", experts=experts)
    model = ModularModel.load(tmp_path / "m")
    evaluation = quick(model, corpora, tmp_path, soup=True, baselines=("soup",))
    assert SOUP not in {system.name for system in evaluation.systems}
    (note,) = evaluation.notes
    assert re.search(r"is left out: \w+ is \d+ for 'a' and \d+ for 'b'", note)
    with pytest.raises(ValueError, match="cannot be averaged, "):
        average_weights(experts, tmp_path / "soup")


def test_parameter_average(experts_path, tmp_path):
    experts = ExpertSet.open(experts_path)
    mean = load_file(average_weights(experts, tmp_path / "mean") / "model.safetensors")
    parts = [load_file(experts.path(name) / "model.safetensors") for name in experts.names]
    assert mean.keys() == parts[0].keys()
    for key, value in mean.items():
        expected = sum(part[key].double() for part in parts) / 2
        # Rounded once to float32: half a unit in the last place.
        assert torch.allclose(value.double(), expected, rtol=2**-24, atol=0)
    one_hot = average_weights(experts, tmp_path / "one", weights=torch.tensor([0.0, 1.0]))
    first = average_weights(experts, tmp_path / "first", weights=torch.tensor([1.0, 0.0]))
    assert ExpertSet.open(one_hot).sha256("one") == experts.sha256(experts.names[1])
    assert ExpertSet.open(first).sha256("first") == experts.sha256(experts.names[0])
    with pytest.raises(FileExistsError):
        average_weights(experts, tmp_path / "mean")
    with pytest.raises(ValueError, match="weights: expected 2 numbers"):
        average_weights(experts, tmp_path / "x", weights=torch.tensor([0.5, 0.4]))


def test_divergence_is_that_of_the_logits(experts_path, corpora, tmp_path):
    experts = ExpertSet.open(experts_path)
    found = expert_divergence(experts, corpora, tokens=40)
    for d, corpus in enumerate(corpora):
        tokens = encode(experts.tokenizer, corpus.documents)
        rows, missing = [], 40
        for start, end in pairwise(tokens.offsets.tolist()):
            take = min(end - start - 1, 5, missing)  # 40 / 8 predictions of a document
            if take > 0:
                rows.append(tokens.ids[start : start + take])
                missing -= take
        probs = []
        for name in experts.names:
            model = experts.load(name)
            with torch.no_grad():
                logits = torch.cat([model(ids.unsqueeze(0)).logits[0] for ids in rows])
            probs.append(logits[:, : experts.vocab_size].double().softmax(dim=-1))
        middle = (probs[0] + probs[1]) / 2
        expected = sum((p * (p / middle).log()).sum(dim=-1).mean() / 2 for p in probs)
        # float32 logits: a relative error of 1e-5 of the divergence, see rg.jsd.
        assert found.together[d] == pytest.approx(float(expected), rel=1e-4)
        assert found.pairwise[d][0][1] == pytest.approx(float(expected), rel=1e-4)
        assert found.pairwise[d][0][0] == found.pairwise[d][1][1] == 0
    assert found.tokens == 40


def test_conflict_of_a_model_with_itself_on_the_same_text_is_none(experts_path, corpora):
    code = ExpertSet.open({"monolith": experts_path / "code"})
    twice = (corpora[0], replace(corpora[0], name="again"), corpora[1])
    found = monolith_conflict(code, twice, tokens=40)
    assert found.model == "monolith"
    assert found.cosine[0][1] == pytest.approx(1.0, abs=1e-6)
    assert abs(found.cosine[0][2]) < 1.0 - 1e-3
    assert found.cosine[0][2] == pytest.approx(found.cosine[2][0])


def test_diagnostics_are_kept_with_the_evaluation(model, corpora, experts_path, tmp_path):
    evaluation = quick(
        *(model, corpora, tmp_path),
        divergence_tokens=16,
        gradients=True,
        monolith=experts_path / "code",
    )
    loaded = Evaluation.load(model.path)
    assert loaded == evaluation
    assert loaded.divergence.tokens == 16
    assert loaded.conflict.model == "monolith"


def test_a_monolith_with_the_name_of_an_expert_is_refused(model, corpora, experts_path, tmp_path):
    for name in ("code", "soup"):
        with pytest.raises(ValueError, match=f"monolith: '{name}' is the name of another model"):
            quick(model, corpora, tmp_path, monolith={name: experts_path / "code"})


def test_an_unknown_baseline_is_refused_before_anything_is_scored(model, corpora, tmp_path):
    with pytest.raises(ValueError, match=r"baselines: expected any of .* got 'magic'"):
        quick(model, corpora, tmp_path, baselines=("magic",))
    assert not (tmp_path / "scores").exists()


def test_cached_prior_from_a_store_on_disk(model, corpora, tmp_path):
    valid = model.path.parent / "valid"
    evaluation = quick(model, corpora, tmp_path, baselines=("cached",), development=valid)
    assert "cached-prior Bayes mixture" in {system.name for system in evaluation.systems}
    assert all(result.bits_per_byte > 0 for result in evaluation.systems[0].domains)


def test_monoliths_of_a_command_line():
    assert parse_monoliths(["one", "big=two/b"]) == {"monolith": Path("one"), "big": Path("two/b")}
    for given in (["one", "two"], ["=one"], ["big="], ["a=1", "a=2"]):
        with pytest.raises(ValueError, match=r"--monolith: expected \[NAME=\]FOLDER"):
            parse_monoliths(given)

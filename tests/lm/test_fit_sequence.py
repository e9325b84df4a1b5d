"""The sequence gate of ``fit``, and the documents of experts that it is trained on."""

from __future__ import annotations

import math

import pytest
import torch

from robustgate.game import Documents, SequenceGate, finite_samplers
from robustgate.lm.experts import ExpertSet
from robustgate.lm.gates.fit import fit
from robustgate.lm.gates.inputs import Packed
from robustgate.lm.gates.samplers import ExpertSamplers, _choose
from robustgate.lm.gates.sequence_fit import fit_sequence_gate
from robustgate.lm.gates.spec import GateSpec, Network, document_features
from robustgate.lm.modular import ModularModel
from robustgate.lm.scoring.score import score
from robustgate.lm.tokenizer import encode, special_ids

PRIOR = torch.tensor([0.5, 0.5], dtype=torch.float64)
SPEC = GateSpec("sequence", network=Network("mlp", width=8), span=1)

# Four documents of one token. Each expert has two of them, and each domain the same two, evenly.
EXPERTS = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.0, 0.4, 0.6]])


def points(rows):
    """Return the documents of a finite space that stand for a domain."""
    log_probs = EXPERTS.log().T[torch.tensor(rows)]  # [n, K]
    return Packed(log_probs, log_probs[:, :0], torch.arange(len(rows) + 1))


@pytest.fixture
def game():
    tokens = EXPERTS.log().T.unsqueeze(1)  # [X, 1, K]
    space = Documents(document_features(tokens, torch.ones(4, 1), 1), EXPERTS.log().T)
    return {"x": points([0, 1] * 40), "y": points([2, 3] * 40)}, finite_samplers(space), space


def test_gets_what_the_constant_gate_leaves(game):
    domains, samplers, space = game
    found = fit_sequence_gate(domains, PRIOR, SPEC, samplers, steps=100, progress=False)
    record = found.record
    # Even halves cost log 2 more than each domain's own expert. Spread evenly within a domain the
    # same mass costs less, and at equal excess of both domains the best gate of Z = 1 has 0.640.
    assert record.before == pytest.approx((math.log(2), math.log(2)), abs=1e-6)
    assert record.kept == "trained"
    assert record.unit == "document"
    assert record.worst_after < math.log(2) - 0.02
    assert max(record.train_after) == pytest.approx(0.640, abs=0.05)
    # The space is finite, so that Z is known.
    total = torch.logsumexp(found.gate(space.inputs) + space.log_probs, dim=1).exp().sum()
    value, error = record.normaliser
    assert abs(value - float(total)) < 4 * error < 0.1


def test_is_deterministic_for_a_seed(game):
    one, two = (
        fit_sequence_gate(game[0], PRIOR, SPEC, game[1], samples=64, steps=20, progress=False)
        for _ in range(2)
    )
    assert one.record == two.record
    for left, right in zip(one.gate.parameters(), two.gate.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_domain_that_every_expert_finds_impossible_is_refused(game):
    domains = {"x": game[0]["x"], "y": points([0, 2] * 40)}
    with pytest.raises(ValueError, match="every expert gives some document of domain 'y'"):
        fit_sequence_gate(domains, PRIOR, SPEC, game[1], samples=64, steps=2, progress=False)


def test_refuses_what_does_not_fit(game):
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        fit_sequence_gate(game[0], PRIOR, SPEC, game[1], steps=0)
    token = GateSpec("token", network=Network())
    with pytest.raises(ValueError, match="which has a span, got None"):
        fit_sequence_gate(game[0], PRIOR, token, game[1])


def test_drawn_documents_are_scored_as_the_store_scores_them(tmp_path, experts_path, corpora):
    experts = ExpertSet.open(experts_path)
    store = score(experts, corpora, tmp_path / "store", progress=False)
    samplers = ExpertSamplers(experts, 16)
    for corpus in corpora:
        tokens = encode(experts.tokenizer, corpus.documents)
        ids = torch.full((len(corpus.documents), 16), -1)
        for row, (start, end) in enumerate(zip(tokens.offsets, tokens.offsets[1:], strict=False)):
            document = tokens.ids[start + 1 : end][:16]
            ids[row, : len(document)] = document
        found = samplers.documents(ids)
        cut = Packed.read(
            store, corpus.name, experts.names, GateSpec().features, tokens=10_000, longest=16
        )
        assert found.tokens is not None
        # The same model on other batches: float32 sums in another order, logits of about 10.
        assert torch.allclose(found.tokens.log_probs[ids >= 0], cut.log_probs, atol=2e-5)
        assert torch.equal(found.tokens.mask, ids >= 0)


def test_documents_are_drawn_from_the_expert_they_are_said_to_be_drawn_from(experts_path):
    experts = ExpertSet.open(experts_path)
    samplers = ExpertSamplers(experts, 4).samplers()
    generator = torch.Generator().manual_seed(0)
    drawn = [draw(500, generator) for draw in samplers]
    log_probs = torch.stack([part.log_probs for part in drawn])  # [from, 500, under]
    log_q = torch.logsumexp(log_probs, dim=-1) - math.log(2)
    for k in range(2):
        # E_q[pi_k / q] = 1 with a ratio in [0, 2], so of variance 1 at most: 4 standard errors.
        mean = (log_probs[..., k] - log_q).exp().mean()
        assert abs(float(mean) - 1) < 4 / math.sqrt(1000)
        # An expert finds its own documents likelier than the other one does.
        assert log_probs[k, :, k].mean() > log_probs[k, :, 1 - k].mean() + 0.5


def test_a_token_is_drawn_as_often_as_it_is_likely_and_never_where_it_cannot_be():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = _choose(probs.expand(40_000, -1), torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn[:, 0], minlength=6) / len(drawn)
    assert drawn.shape == (40_000, 1)
    assert shares[probs == 0].tolist() == [0, 0, 0]
    torch.testing.assert_close(shares, probs, atol=0.01, rtol=0)


def test_documents_end_with_the_eos_or_at_the_span(experts_path):
    experts = ExpertSet.open(experts_path)
    samplers = ExpertSamplers(experts, 32)
    ids = samplers._draw(samplers._models[0], 200, torch.Generator().manual_seed(0))
    _, eos = special_ids(experts.tokenizer)
    for document in ids:
        real = document[document >= 0]
        assert torch.equal(document[: len(real)], real)  # padding behind, never between
        assert not bool((real[:-1] == eos).any())
        assert len(real) == 32 or int(real[-1]) == eos
    assert 0 < int((ids == eos).sum()) < 200  # both happen
    assert int(ids.max()) < experts.vocab_size


def test_the_span_is_what_every_expert_can_read(experts_path):
    experts = ExpertSet.open(experts_path)
    with pytest.raises(ValueError, match="span: expected 1 to 32, the experts' context, got 33"):
        ExpertSamplers(experts, 33)


def test_fit_writes_a_sequence_model_that_reads_back(tmp_path, experts_path, corpora):
    experts = ExpertSet.open(experts_path)
    store = score(experts, corpora, tmp_path / "store", progress=False)
    model = fit(
        store,
        tmp_path / "model",
        gate="sequence",
        experts=experts,
        network=Network("linear"),
        span=4,
        steps=10,
        progress=False,
    )
    again = ModularModel.load(tmp_path / "model")
    assert again.kind == "sequence"
    assert again.spec.span == 4
    assert again.training == model.training
    assert isinstance(again.gate(), SequenceGate)
    assert again.training.normaliser is not None
    assert "nats per document" in again.training.sentence() or again.training.kept == "start"

"""Descriptions of gates: what they build, that JSON keeps them, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from robustgate.game import BayesGate, SequenceGate, TokenGate
from robustgate.lm.gates.spec import (
    BayesOptions,
    GateSpec,
    Network,
    Standardise,
    document_feature_count,
    document_features,
    standardise,
)
from robustgate.lm.store.features import FeatureSpec

PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SPECS = {
    "prior": GateSpec(),
    "options": GateSpec(bayes=BayesOptions(power=0.5, window=4, top_k=2)),
    "linear": GateSpec("token", BayesOptions(share=0.01), Network("linear")),
    "mlp": GateSpec("token", network=Network("mlp", width=5, layers=2)),
    "features": GateSpec("token", network=Network(), features=FeatureSpec(entropy=True, hidden=2)),
    "transformer": GateSpec("token", network=Network("transformer", width=8, hidden=6, layers=2)),
    "sequence": GateSpec("sequence", network=Network("mlp", width=4), span=7),
    "flat": GateSpec("sequence", network=Network("linear"), span=7),
}
log_probs = -3 * torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_json_keeps_everything(spec):
    assert GateSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_an_untrained_gate_is_the_bayes_gate_or_the_constant_gate_of_the_prior(spec):
    gate = spec.build(PRIOR)
    if spec.kind == "sequence":
        assert isinstance(gate, SequenceGate)
        weights = gate(torch.randn(4, document_feature_count(3)))
        # A float32 bias and log-softmax: 2^-24 relative to logarithms of about 1.
        assert torch.allclose(weights.double(), PRIOR.log().expand(4, 3), atol=1e-6)
        return
    options = spec.bayes
    bayes = BayesGate(PRIOR, share=options.share, power=options.power, window=options.window,
                      top_k=options.top_k)  # fmt: skip
    context = {}
    if spec.features.width(3):
        context = {"context": torch.randn(2, 9, spec.features.width(3))}
    assert torch.allclose(gate(log_probs, **context), bayes(log_probs), atol=1e-12)
    assert isinstance(gate, BayesGate if spec.kind == "prior" else TokenGate)
    if isinstance(gate, TokenGate):
        assert gate.context == spec.features.width(3)


@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer"])
def test_a_token_gate_decodes_step_by_step_as_it_reads_whole_documents(kind):
    torch.manual_seed(0)
    gate = GateSpec("token", network=Network(kind, width=8)).build(PRIOR)
    assert isinstance(gate, TokenGate)
    torch.nn.init.normal_(gate.head.weight)
    standardise(gate, torch.rand(50, 12) * torch.arange(1, 13))
    weights, state = gate.start((2,))
    expected = gate(log_probs)
    for t in range(9):
        # float32 networks, once on all tokens and once on each: sums in another order.
        assert torch.allclose(weights, expected[:, t], atol=2e-5)
        weights, state = gate.step(state, log_probs[:, t])


def test_standardise_brings_features_to_mean_0_and_variance_1():
    layer = Standardise(3)
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    x[:, 2] = 7.0  # does not vary
    assert torch.equal(layer(x), x)
    layer.measure(x)
    out = layer(x).double()
    # Mean and scale are rounded to float32, 6e-8 of values of about 10 / 5.
    assert out.mean(dim=0).abs().max() < 1e-6
    assert torch.allclose(out.std(dim=0, correction=0), torch.tensor([1.0, 1.0, 0.0]).double(),
                          atol=1e-6)  # fmt: skip


def test_document_features_by_hand():
    tokens = torch.tensor([[[-1.0, -3.0], [-2.0, -1.0], [-30.0, -math.inf], [0.0, 0.0]]])
    found = document_features(tokens, torch.tensor([[1, 1, 1, 0]]), span=2)
    # sums -3 and -4; relative (0, -2) and (-1, 0), means over two tokens; best -1 and -1
    expected = torch.tensor([[0.0, -1.0, -0.5, -1.0, -0.5, -1.0, -1.0, math.log(2)]])
    assert torch.allclose(found, expected, atol=1e-6)
    whole = document_features(tokens, torch.tensor([[1, 1, 1, 0]]), span=9)
    assert bool(whole.isfinite().all())
    assert whole[0, 1] == -20.0


def test_document_features_know_nothing_behind_the_span():
    changed = log_probs.clone()
    changed[:, 5:] = -9.0
    mask = torch.ones(2, 9)
    assert torch.equal(document_features(log_probs, mask, 5), document_features(changed, mask, 5))
    assert not torch.equal(
        document_features(log_probs, mask, 6), document_features(changed, mask, 6)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Network("wide"), "network: expected linear, mlp or transformer, got 'wide'"),
        (lambda: Network(width=0), "network: expected width >= 1, got 0"),
        (lambda: GateSpec("word"), "gate: expected prior, token or sequence, got 'word'"),
        (lambda: GateSpec("token"), "network: a token gate with None"),
        (lambda: GateSpec("prior", network=Network()), "network: a prior gate with"),
        (lambda: GateSpec("sequence", network=Network()), "span: a sequence gate with None"),
        (lambda: GateSpec("token", network=Network(), span=3), "span: a token gate with 3"),
        (
            lambda: GateSpec("sequence", network=Network("transformer"), span=3),
            "a sequence gate is linear or mlp, got transformer",
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

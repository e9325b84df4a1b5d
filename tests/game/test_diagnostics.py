"""Gradient conflict, divergence between experts, the generalisation bound, token training."""

import math

import pytest
import torch
from finite_games import GAMES, drawn

import robustgate as rg
from robustgate.game import (
    BayesGate,
    Documents,
    TokenDocuments,
    TokenGate,
    capacity,
    expert_capacity,
    generalisation_gap,
    gradient_conflict,
    interference,
    train_token_gate,
)

# ---------------------------------------------------------------- gradient conflict


def test_cosines_of_a_model_by_hand():
    model = torch.nn.Linear(3, 2).double()
    inputs = torch.randn(4, 5, 3, dtype=torch.float64)
    losses = {f"d{d}": model(x).square().mean() for d, x in enumerate(inputs)}
    found = gradient_conflict(losses, model.parameters())
    flat = []
    for x in inputs:
        model.zero_grad()
        model(x).square().mean().backward()
        flat.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    expected = torch.nn.functional.cosine_similarity(
        torch.stack(flat)[:, None], torch.stack(flat)[None], dim=-1
    )
    torch.testing.assert_close(found.cosine, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.norm, torch.stack(flat).norm(dim=1), rtol=1e-14, atol=0)
    above = [float(expected[i, j]) for i in range(4) for j in range(i)]
    assert found.negative_share == pytest.approx(sum(c < 0 for c in above) / 6)
    assert found.domains == ("d0", "d1", "d2", "d3")


def test_opposite_and_vanishing_gradients():
    w = torch.ones(3, requires_grad=True)
    found = gradient_conflict({"up": w.sum(), "down": -2 * w.sum(), "flat": 0 * w.sum()}, [w])
    assert found.cosine.tolist() == [
        pytest.approx([1, -1, 0]), pytest.approx([-1, 1, 0]), pytest.approx([0, 0, 0])
    ]  # fmt: skip
    assert found.negative_share == pytest.approx(1 / 3)
    assert w.grad is None
    assert gradient_conflict({"one": w.sum()}, [w]).negative_share == 0.0


@pytest.mark.parametrize(
    ("losses", "trainable", "message"),
    [
        ({}, True, "losses: expected at least one domain"),
        ({"a": "vector"}, True, r"losses\['a'\]: expected a scalar, got \(3,\)"),
        ({"a": "constant"}, True, r"losses\['a'\]: expected a loss with its graph"),
        ({"a": "nan"}, True, r"losses\['a'\]: expected a finite gradient"),
        ({"a": "scalar"}, False, "parameters: expected some that need a gradient"),
    ],
)
def test_gradient_conflict_refuses(losses, trainable, message):
    w = torch.ones(3, requires_grad=True)
    kinds = {"vector": w, "scalar": w.sum(), "constant": torch.ones(()), "nan": math.nan * w.sum()}
    values = {name: kinds[kind] for name, kind in losses.items()}
    with pytest.raises(ValueError, match=message):
        gradient_conflict(values, [w if trainable else w.detach()])


# ---------------------------------------------------------------- divergence between experts


def test_divergences_are_those_of_the_op():
    logits = {d: [torch.randn(6, 11) for _ in range(3)] for d in ("a", "b")}
    found = interference(logits)
    for d, experts in logits.items():
        assert found.together[d] == float(rg.jsd(experts))
        assert float(found.pairwise[d][2, 0]) == float(rg.jsd([experts[2], experts[0]]))
        assert torch.equal(found.pairwise[d], found.pairwise[d].T)
        assert torch.equal(found.pairwise[d].diagonal(), torch.zeros(3).double())
        assert 0 < found.together[d] < math.log(3)
        assert bool((found.pairwise[d] < math.log(2)).all())
    assert found.capacity is None
    assert found.bounds is None


def test_a_finite_space_brings_its_bounds():
    domains, experts, value, _, _ = GAMES["clipped at one domain"]
    space = torch.tensor(domains), torch.tensor(experts)
    found = interference({"a": [torch.zeros(1, 2)] * 2}, space=space)
    assert found.bounds.floor - 1e-9 <= value <= found.bounds.ceiling + 1e-6
    assert found.bounds.floor == pytest.approx(math.log(2), abs=1e-5)


def test_expert_capacity_is_that_of_the_channel():
    experts = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]).double()
    exact = capacity(experts)
    generator = torch.Generator().manual_seed(0)
    samples = [drawn(pi, experts.log().T, 20_000, generator) for pi in experts]
    found = interference({"a": [torch.zeros(1, 2)] * 3}, samples=samples).capacity
    # Means of 20,000 log-ratios of standard deviation below 1: 0.007 each, four of them.
    assert found.value == pytest.approx(exact.value, abs=0.03)
    torch.testing.assert_close(found.prior, exact.mixture, rtol=0, atol=0.05)
    assert found.converged


def test_divergences_refuse():
    with pytest.raises(ValueError, match="logits: expected at least one domain"):
        interference({})
    with pytest.raises(ValueError, match="samples: expected one set per expert, got 1 for 2"):
        expert_capacity([Documents(torch.zeros(1, 1), torch.zeros(1, 2))])


# ---------------------------------------------------------------- generalisation


def test_the_bound_is_its_formula_and_scales():
    bound = generalisation_gap(2.0, 3.0, experts=4, documents=100, domains=5, confidence=0.9)
    expected = 2 * 3 / 10 * (4 * 2 + 2 * math.sqrt(math.log(2 * 5 / 0.1)))
    assert bound == pytest.approx(expected, rel=1e-12)
    quadrupled = generalisation_gap(2.0, 3.0, experts=4, documents=400, domains=5, confidence=0.9)
    assert quadrupled == pytest.approx(bound / 2, rel=1e-12)
    assert generalisation_gap(0.0, 3.0, experts=4, documents=1) == 0.0  # a constant gate


def test_what_the_bound_rests_on():
    # |loss| <= sqrt(2) B R, and the loss is sqrt(2)-Lipschitz in the gate's logits.
    prior = torch.softmax(torch.randn(4, dtype=torch.float64), dim=0)
    logits = torch.randn(2000, 4, dtype=torch.float64)  # W phi with |W phi| <= B R
    log_probs = 5 * torch.randn(2000, 4, dtype=torch.float64)
    logits.requires_grad_()
    loss = rg.mixture_log_prob(log_probs, prior.log()) - rg.mixture_log_prob(
        log_probs, logits + prior.log()
    )
    assert bool((loss.abs() <= math.sqrt(2) * logits.norm(dim=1)).all())
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert bool((gradient.norm(dim=1) <= math.sqrt(2)).all())
    assert float(gradient.norm(dim=1).amax()) > 1.0  # not far from it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_norm": -1.0}, "norms: expected numbers >= 0"),
        ({"documents": 0}, "counts: expected at least 1"),
        ({"confidence": 1.0}, r"confidence: expected a number in \(0, 1\), got 1.0"),
    ],
)
def test_the_bound_refuses(options, message):
    arguments = {"weight_norm": 1.0, "feature_norm": 1.0, "experts": 2, "documents": 9, **options}
    with pytest.raises(ValueError, match=message):
        generalisation_gap(**arguments)


# ---------------------------------------------------------------- token training


def switching(seed, count=12, length=40):
    """Documents in which the good expert changes every ten tokens: Bayes follows too late."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, length, 2, dtype=torch.float64, generator=generator)
    first = torch.randint(2, (count, 1), generator=generator)
    good = (torch.arange(length) // 10 + first) % 2  # [n, T]
    return {
        "a": TokenDocuments(0.3 * noise - 3 + 1.5 * torch.nn.functional.one_hot(good, 2)),
        "b": TokenDocuments(0.3 * noise.flip(0) - 3 + torch.nn.functional.one_hot(good, 2)),
    }


def test_a_learned_gate_is_kept_where_it_helps():
    gate = TokenGate.mlp(BayesGate(torch.tensor([0.5, 0.5])))
    before = [p.clone() for p in gate.parameters()]
    found = train_token_gate(gate, switching, switching(10_000), 80)
    assert found.kept in ("last", "ema")
    assert found.validation["start"].upper_bound == pytest.approx(0.0, abs=1e-12)
    # Half of the tokens cost Bayes up to 1.5 nats; a gate that looks at recent tokens saves most.
    assert found.validation[found.kept].upper_bound < -0.2
    assert isinstance(found.gate, TokenGate)
    assert all(torch.equal(a, b) for a, b in zip(before, gate.parameters(), strict=True))
    record = found.validation[found.kept]
    losses = [float(part.loss(found.gate).detach()) for part in switching(10_000).values()]
    start = [float(part.loss(gate).detach()) for part in switching(10_000).values()]
    gains = [a - b for a, b in zip(losses, start, strict=True)]
    assert record.losses.tolist() == pytest.approx(gains, abs=1e-12)


def test_a_gate_that_learned_nothing_of_use_is_not_kept():
    # Trained on documents of which the experts' roles are exchanged in validation.
    def swapped(step):
        flipped = {d: p.log_probs.flip(-1) for d, p in skewed(step).items()}
        return {d: TokenDocuments(log_probs) for d, log_probs in flipped.items()}

    def skewed(step):
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(8, 6, 2, dtype=torch.float64, generator=generator) - 3
        return {"a": TokenDocuments(noise + torch.tensor([2.0, 0.0]))}

    gate = TokenGate.linear(BayesGate(torch.tensor([0.5, 0.5])))
    found = train_token_gate(gate, swapped, skewed(10_000), 30)
    assert found.kept == "start"
    log_probs = skewed(1)["a"].log_probs
    assert torch.equal(found.gate(log_probs), gate(log_probs))

"""Fixed-share, tempered, windowed and top-k Bayes gates, the constant gate, published priors."""

import math

import pytest
import torch

from robustgate.game import (
    BayesGate,
    ConstantGate,
    cached_prior,
    uniform_prior,
    updating_prior,
)

PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
VARIANTS = {
    "share": {"share": 0.05},
    "power": {"power": 0.5},
    "window": {"window": 7},
    "top_k": {"top_k": 2},
    "share, power, top_k": {"share": 0.01, "power": 2.0, "top_k": 1},
}


def tokens(*shape, scale=1.0, mean=-3.0):
    return scale * torch.randn(*shape, dtype=torch.float64) + mean


def by_hand(log_probs, share=0.0, power=1.0, window=None, top_k=3):
    """The weights before each token from their definition, by probabilities."""
    out, state = [], PRIOR
    for t in range(len(log_probs)):
        if window is not None:
            state = PRIOR * (power * log_probs[max(0, t - window) : t].sum(dim=0)).exp()
            state = state / state.sum()
        kept = state.topk(top_k)
        out.append(torch.zeros(3, dtype=torch.float64).scatter(0, kept.indices, kept.values))
        posterior = state * (power * log_probs[t]).exp()
        state = (1 - share) * posterior / posterior.sum() + share * PRIOR
    weights = torch.stack(out)
    return weights / weights.sum(dim=1, keepdim=True)


# ---------------------------------------------------------------- definitions


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_weights_are_those_of_the_definition(options):
    log_probs = tokens(60, 3)
    weights = BayesGate(PRIOR, **options)(log_probs).exp()
    # 60 products and sums of probabilities of size 1: 60 * 2e-16, with room.
    torch.testing.assert_close(weights, by_hand(log_probs, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_weights_sum_to_one_and_ignore_the_future(options):
    log_probs = tokens(2, 50, 3, scale=3.0)
    gate = BayesGate(PRIOR, **options)
    weights = gate(log_probs)
    torch.testing.assert_close(
        weights.logsumexp(dim=-1), torch.zeros(2, 50, dtype=torch.float64), rtol=0, atol=1e-13
    )
    changed = log_probs.clone()
    changed[:, 20:] = tokens(2, 30, 3)
    assert torch.equal(weights[:, :21], gate(changed)[:, :21])


@pytest.mark.parametrize(
    "options",
    [{"share": 0.0}, {"power": 1.0}, {"window": 300}, {"window": 10_000}, {"top_k": 3}],
    ids=str,
)
def test_neutral_options_are_bayes_bitwise(options):
    log_probs = tokens(4, 300, 3)
    assert torch.equal(BayesGate(PRIOR, **options)(log_probs), BayesGate(PRIOR)(log_probs))


def test_a_small_share_tends_to_bayes():
    log_probs = tokens(100, 3)
    shared = BayesGate(PRIOR, share=1e-15)(log_probs).exp()
    # 100 steps that each move the weights by at most 1e-15 times the odds of a token, e^6.
    torch.testing.assert_close(shared, BayesGate(PRIOR)(log_probs).exp(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_packed_and_padded_documents_equal_each_alone(options):
    gate = BayesGate(PRIOR, **options)
    lengths = [5, 0, 1, 70, 16, 17, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(dim=0)
    log_probs = tokens(int(offsets[-1]), 3)
    packed = gate(log_probs, offsets=offsets)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone = gate(log_probs[start:end])
        torch.testing.assert_close(packed[start:end], alone, rtol=0, atol=1e-13)
        padded = torch.cat([log_probs[start:end], tokens(6, 3)])
        mask = torch.arange(len(padded)) < end - start
        masked = gate(padded, mask=mask)[: end - start]
        torch.testing.assert_close(masked, alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["share", "power", "top_k", "share, power, top_k"])
def test_stepping_equals_the_whole_sequence(name):
    gate, log_probs = BayesGate(PRIOR, **VARIANTS[name]), tokens(2, 40, 3)
    weights, state = gate(log_probs), gate.log_prior
    for t in range(40):
        expected = gate.weights(state).expand(2, 3)
        torch.testing.assert_close(weights[:, t], expected, rtol=1e-13, atol=1e-12)
        state = gate.step(state, log_probs[:, t])


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 5, 3), (1, 3)])
def test_empty_and_single_token_sequences(options, shape):
    assert BayesGate(PRIOR, **options)(torch.zeros(shape)).shape == shape


# ---------------------------------------------------------------- what each is for


def test_regret_is_within_the_bound():
    log_probs = tokens(40, 60, 3, scale=2.0)
    for share in (0.0, 0.02):
        gate = BayesGate(PRIOR, share=share)
        regret = log_probs.sum(dim=1) - gate.log_prob(log_probs).sum(dim=-1, keepdim=True)
        assert bool((regret <= gate.regret_bound(60) + 1e-11).all())  # sums near 200 nats


def test_the_fixed_share_bound_is_attained():
    # Every expert but the first gives probability 0: each share of weight they get is lost.
    log_probs = torch.full((30, 3), -torch.inf, dtype=torch.float64)
    log_probs[:, 0] = -1.0
    gate = BayesGate(torch.tensor([0.25, 0.25, 0.5]), share=0.1)
    regret = float(-30.0 - gate.log_prob(log_probs).sum())
    # The share that comes back to expert 0 itself makes the bound 1 - share + share * prior.
    assert regret == pytest.approx(math.log(4) - 29 * math.log(0.9 + 0.1 * 0.25), abs=1e-12)
    assert regret < float(gate.regret_bound(30)[0])


@pytest.mark.parametrize("options", [{"power": 2.0}, {"window": 3}, {"top_k": 2}], ids=str)
def test_no_bound_is_claimed_without_one(options):
    with pytest.raises(ValueError, match="regret_bound: holds for Bayes and fixed-share"):
        BayesGate(PRIOR, **options).regret_bound(10)


def test_fixed_share_and_windows_recover_from_a_change_of_topic():
    # 400 tokens where expert 0 is better by 1 nat, then 100 where expert 1 is.
    log_probs = torch.full((500, 2), -3.0, dtype=torch.float64)
    log_probs[:400, 0] = log_probs[400:, 1] = -2.0
    prior = torch.tensor([0.5, 0.5])
    loss = {
        name: -float(BayesGate(prior, **options).log_prob(log_probs)[400:].sum())
        for name, options in {
            "bayes": {},
            "share": {"share": 0.01},
            "window": {"window": 20},
        }.items()
    }
    # Bayes has 400 nats of odds to unwind and never does; the others need a few tokens.
    assert loss["bayes"] == pytest.approx(300.0, abs=1e-6)
    assert loss["share"] < 210
    assert loss["window"] < 215


def test_an_expert_ruled_out_returns_when_the_token_leaves_the_window():
    log_probs = tokens(40, 3)
    log_probs[9, 1] = -math.inf
    weights = BayesGate(PRIOR, window=5)(log_probs)
    dead = (weights[:, 1] == -math.inf).nonzero().flatten().tolist()
    assert dead == list(range(10, 15))
    clean = log_probs.clone()
    clean[9, 1] = -3.0
    torch.testing.assert_close(
        weights[15:], BayesGate(PRIOR, window=5)(clean)[15:], rtol=0, atol=1e-13
    )


def test_a_window_over_everything_is_bayes_with_experts_ruled_out():
    log_probs = tokens(100, 3)
    log_probs[30, 1] = log_probs[60] = -math.inf
    torch.testing.assert_close(
        BayesGate(PRIOR, window=100)(log_probs), BayesGate(PRIOR)(log_probs), rtol=0, atol=1e-12
    )


def test_top_one_of_a_settled_posterior_is_that_expert():
    log_probs = tokens(50, 3)
    log_probs[:, 2] += 20.0
    out = BayesGate(PRIOR, top_k=1).log_prob(log_probs)
    torch.testing.assert_close(out[1:], log_probs[1:, 2], rtol=0, atol=1e-14)
    assert float(out[0]) == pytest.approx(float(log_probs[0, 0]), abs=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, r"share: expected a number in \[0, 1\), got 1.0"),
        ({"share": math.nan}, "share: expected"),
        ({"power": 0.0}, "power: expected a positive number, got 0.0"),
        ({"window": 0}, "window: expected at least 1"),
        ({"window": 3, "share": 0.1}, "window: .* no share"),
        ({"top_k": 4}, "top_k: expected 1 to 3, got 4"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BayesGate(PRIOR, **options)


def test_a_window_has_no_step():
    gate = BayesGate(PRIOR, window=3)
    with pytest.raises(ValueError, match="step: a gate with a window"):
        gate.step(gate.log_prior, torch.zeros(3))


# ---------------------------------------------------------------- constant gate


def test_the_constant_gate_is_its_prior_everywhere():
    gate = ConstantGate(PRIOR)
    for inputs in (torch.zeros(4, 2, 7), torch.zeros(4, 2, 0), torch.zeros(4, 2, 3).long()):
        weights = gate(inputs)
        assert weights.shape == (4, 2, 3)
        torch.testing.assert_close(weights.exp(), PRIOR.expand(4, 2, 3), rtol=0, atol=1e-15)
    assert not gate.logits.requires_grad
    assert ConstantGate(PRIOR, trainable=True).logits.requires_grad
    with pytest.raises(ValueError, match="prior: expected non-negative"):
        ConstantGate(torch.tensor([0.5, 0.6]))


# ---------------------------------------------------------------- priors


def test_updating_prior_by_hand():
    log_probs = tokens(20, 3)
    priors = updating_prior(log_probs, rate=0.3)
    assert torch.equal(priors[0], uniform_prior(3))
    current = torch.softmax(log_probs[0], dim=0)  # ewm(adjust=False) starts at its first value
    for i in range(1, 20):
        torch.testing.assert_close(priors[i], current, rtol=0, atol=1e-14)
        posterior = current * log_probs[i].exp() / (current @ log_probs[i].exp())
        current = 0.7 * current + 0.3 * posterior
    torch.testing.assert_close(priors[20], current, rtol=0, atol=1e-14)
    assert torch.equal(updating_prior(log_probs, prior=PRIOR)[0], PRIOR)


def test_cached_prior_reads_a_hundred_documents():
    log_probs = tokens(150, 3)
    cached = cached_prior(log_probs)
    assert torch.equal(cached, updating_prior(log_probs[:100])[-1])
    assert not torch.equal(cached, updating_prior(log_probs[:101])[-1])
    assert torch.equal(cached_prior(log_probs[:7]), updating_prior(log_probs[:7])[-1])


def test_powers_are_the_formula():
    log_probs = tokens(5, 3)
    powers = torch.tensor([0.3**i for i in range(1, 6)], dtype=torch.float64)
    expected = powers @ torch.softmax(log_probs, dim=1) / powers.sum()
    torch.testing.assert_close(
        cached_prior(log_probs, average="powers"), expected, rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cached_prior(torch.zeros(0, 3)), "documents: expected at least 1"),
        (lambda: cached_prior(torch.zeros(3)), r"log_probs: expected shape \[n, K\], got \(3,\)"),
        (lambda: cached_prior(torch.zeros(2, 3), average="mean"), 'average: expected "moving"'),
        (lambda: updating_prior(torch.zeros(2, 3), rate=0.0), r"rate: expected a number in \(0, 1"),
        (
            lambda: updating_prior(torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])),
            r"log_probs, document 1: expected a positive probability .* under \[1.0, 0.0\]",
        ),
        (
            lambda: cached_prior(torch.full((2, 2), -torch.inf), average="powers"),
            "log_probs, document 0: expected a positive probability",
        ),
        (lambda: uniform_prior(0), "experts: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""The Bayes gate: exact posteriors, the sequence-mixture identity, layouts, edge cases."""

import itertools
import math

import pytest
import torch

import robustgate as rg
from robustgate.game import BayesGate

PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def tokens(*shape, scale=1.0, mean=-3.0):
    """Log-probabilities of observed tokens; negative for the scales used here."""
    return scale * torch.randn(*shape, dtype=torch.float64) + mean


def exact_posterior(prior, log_probs):
    """Log-weights before each token, from exactly rounded sums of log-odds to expert 0."""
    history = [[] for _ in prior]
    out = []
    for row in log_probs.tolist():
        odds = [math.fsum(past) for past in history]
        out.append(odds)
        for past, value in zip(history, row, strict=True):
            past += [value, -row[0]]
    return torch.log_softmax(torch.tensor(out, dtype=torch.float64) + prior.log(), dim=-1)


def by_recursion(gate, log_probs):
    state, out = gate.log_prior, []
    for token in log_probs:
        out.append(state)
        state = gate.step(state, token)
    return torch.stack(out)


# ---------------------------------------------------------------- exactness


def test_markov_experts_by_hand():
    # Two Markov chains on {0, 1}: expert 0 repeats with .9, expert 1 with .2; both start at 1/2.
    repeat = torch.tensor([0.9, 0.2], dtype=torch.float64)
    text = [0, 0, 1, 1, 1, 0]
    first = torch.tensor([0.5, 0.5], dtype=torch.float64)
    stays = [None] + [a == b for a, b in itertools.pairwise(text)]
    probs = torch.stack([first if s is None else (repeat if s else 1 - repeat) for s in stays])
    prior = torch.tensor([0.25, 0.75], dtype=torch.float64)
    weights = BayesGate(prior)(probs.log()).exp()
    expected, posterior = [], prior
    for token in probs:
        expected.append(posterior)
        posterior = posterior * token / (posterior @ token)
    torch.testing.assert_close(weights, torch.stack(expected), rtol=0, atol=1e-12)


def test_the_first_token_is_weighed_by_the_prior():
    log_probs = tokens(4, 3)
    gate = BayesGate(PRIOR)
    torch.testing.assert_close(gate(log_probs)[0].exp(), PRIOR, rtol=0, atol=1e-15)
    first = (PRIOR * log_probs[0].exp()).sum().log()
    torch.testing.assert_close(gate.log_prob(log_probs)[0], first, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [0.02, 1.0, 8.0])
def test_agrees_with_exact_arithmetic_and_with_the_recursion(scale):
    # scale 0.02: the experts stay undecided over the whole document, the hardest case for sums.
    log_probs = tokens(2048, 5, scale=scale, mean=-40.0)
    prior = torch.full((5,), 0.2, dtype=torch.float64)
    gate = BayesGate(prior)
    weights = gate(log_probs)
    exact = exact_posterior(prior, log_probs)
    # A float64 sum of 2,048 terms near 40 rounds by 1e-11; the gate keeps log-odds instead. A
    # lost expert's log-weight is itself large, hence the relative part.
    torch.testing.assert_close(weights.exp(), exact.exp(), rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, exact, rtol=1e-13, atol=1e-12)
    # The recursion adds at the size of a token, 40 nats: 2,048 random roundings of 4e-15.
    torch.testing.assert_close(weights, by_recursion(gate, log_probs), rtol=1e-12, atol=2e-12)


def test_long_documents_stay_exact():
    # 1e5 tokens. The recursion takes a second; exactly rounded sums every 10,000 tokens do not.
    log_probs = tokens(100_000, 3, scale=0.05, mean=-10.0)
    gate = BayesGate(PRIOR)
    weights = gate(log_probs)
    odds = (log_probs - log_probs[:, :1]).T.tolist()  # differences round by 1e-15, 1e5 of them
    for t in range(10_000, 100_000, 10_000):
        sums = torch.tensor([math.fsum(column[:t]) for column in odds], dtype=torch.float64)
        exact = torch.log_softmax(sums + PRIOR.log(), dim=0)
        # Random rounding of the differences alone: 1e-15 * sqrt(1e5) = 3e-13.
        torch.testing.assert_close(weights[t], exact, rtol=1e-12, atol=1e-11)


def test_experts_that_take_turns_stay_exact():
    # Each token is lost by 8 nats by one of two experts, in turn: sums reach 4e5 nats, log-odds 8.
    log_probs = tokens(100_000, 2, scale=1e-3)
    log_probs[::2, 0] -= 8.1
    log_probs[1::2, 1] -= 8.1
    weights = BayesGate(torch.tensor([0.5, 0.5]))(log_probs)
    history = [log_probs[:-1, 0].tolist(), (-log_probs[:-1, 1]).tolist()]
    odds = math.fsum(history[0] + history[1])
    exact = torch.log_softmax(torch.tensor([odds, 0.0], dtype=torch.float64), dim=0)
    # Plain sums of 4e5 round by 1e-10 and more; 2e-12 leaves room for 1e5 roundings of 8.
    torch.testing.assert_close(weights[-1], exact, rtol=0, atol=2e-12)


def test_token_log_probs_sum_to_the_sequence_mixture():
    log_probs = tokens(2048, 3)
    total = BayesGate(PRIOR).log_prob(log_probs).sum()
    sequence = rg.mixture_log_prob(log_probs.sum(dim=0), PRIOR.log())
    # Totals near 6,000 nats: each side rounds by about 2048 * 1e-12 / 10.
    torch.testing.assert_close(total, sequence, rtol=0, atol=1e-9)


def test_float32_scores_keep_the_identity_to_a_thousandth():
    # What a store holds: 2,048 float32 token scores near -3. Plain float32 sums lose 1e-2 nats.
    log_probs = tokens(2048, 3).float()
    total = BayesGate(PRIOR).log_prob(log_probs).sum()
    sequence = rg.mixture_log_prob(log_probs.double().sum(dim=0), PRIOR.log())
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, sequence, rtol=0, atol=1e-9)


def test_regret_to_every_expert_is_at_most_its_log_weight():
    log_probs = tokens(50, 100, 3, scale=2.0)
    mixture = BayesGate(PRIOR).log_prob(log_probs).sum(dim=-1)
    regret = log_probs.sum(dim=1) - mixture.unsqueeze(1)
    # Totals near 300 nats round below 1e-11.
    assert bool((regret <= -PRIOR.log() + 1e-11).all())


def test_uniform_prior_costs_at_most_a_factor_k_per_document():
    log_probs = tokens(50, 100, 3, scale=2.0)
    uniform = BayesGate(torch.full((3,), 1 / 3))
    mixture = uniform.log_prob(log_probs).sum(dim=-1)
    best = log_probs.sum(dim=1).amax(dim=-1)
    perplexity_ratio = ((best - mixture) / 100).exp()
    assert bool((perplexity_ratio <= 3 ** (1 / 100) + 1e-12).all())


# ---------------------------------------------------------------- symmetries


def test_one_expert_and_one_hot_priors_are_that_expert():
    log_probs = tokens(20, 3)
    alone = BayesGate(torch.ones(1)).log_prob(log_probs[:, :1])
    torch.testing.assert_close(alone, log_probs[:, 0], rtol=0, atol=1e-15)
    for k in range(3):
        one_hot = torch.nn.functional.one_hot(torch.tensor(k), 3).double()
        gate = BayesGate(one_hot)
        torch.testing.assert_close(gate.log_prob(log_probs), log_probs[:, k], rtol=0, atol=1e-14)
        assert torch.equal(gate(log_probs).exp(), one_hot.expand(20, 3))


def test_permuting_experts_permutes_weights():
    log_probs, order = tokens(60, 3), [2, 0, 1]
    weights = BayesGate(PRIOR)(log_probs)
    permuted = BayesGate(PRIOR[order])(log_probs[:, order])
    # The order of additions over experts in the normaliser changes.
    torch.testing.assert_close(permuted, weights[:, order], rtol=1e-14, atol=1e-14)


def test_a_duplicate_with_its_prior_split_changes_nothing():
    log_probs = tokens(60, 3)
    split = torch.cat([PRIOR[:2], PRIOR[2:] / 4, 3 * PRIOR[2:] / 4])
    whole = BayesGate(PRIOR).log_prob(log_probs)
    torch.testing.assert_close(
        BayesGate(split).log_prob(log_probs[:, [0, 1, 2, 2]]), whole, rtol=0, atol=1e-13
    )


def test_the_future_changes_nothing_bitwise():
    log_probs = tokens(300, 3)
    changed = log_probs.clone()
    changed[100:] = tokens(200, 3)
    gate = BayesGate(PRIOR)
    assert torch.equal(gate(log_probs)[:101], gate(changed)[:101])
    assert torch.equal(gate.log_prob(log_probs)[:100], gate.log_prob(changed)[:100])
    assert torch.equal(gate(log_probs)[:100], gate(log_probs[:100]))


def test_removing_an_expert_renormalises_the_survivors():
    log_probs = tokens(200, 3)
    kept = [0, 2]
    full = BayesGate(PRIOR)(log_probs)
    survivors = torch.log_softmax(full[:, kept], dim=-1)
    smaller = BayesGate(PRIOR[kept] / PRIOR[kept].sum())(log_probs[:, kept])
    torch.testing.assert_close(smaller, survivors, rtol=1e-13, atol=1e-12)


# ---------------------------------------------------------------- layouts


def documents():
    lengths = [5, 0, 1, 700, 16, 17, 0, 33, 49, 100, 0]
    offsets = torch.tensor([0, *lengths]).cumsum(dim=0)
    return tokens(int(offsets[-1]), 3), offsets


def test_packed_documents_equal_each_alone_bitwise():
    log_probs, offsets = documents()
    gate = BayesGate(PRIOR)
    weights = gate(log_probs, offsets=offsets)
    token_log_probs = gate.log_prob(log_probs, offsets=offsets)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert torch.equal(weights[start:end], gate(log_probs[start:end]))
        assert torch.equal(token_log_probs[start:end], gate.log_prob(log_probs[start:end]))


def test_batches_equal_each_alone_bitwise():
    log_probs = tokens(2, 4, 70, 3)
    gate = BayesGate(PRIOR)
    weights = gate(log_probs)
    assert weights.shape == (2, 4, 70, 3)
    for i in range(2):
        for j in range(4):
            assert torch.equal(weights[i, j], gate(log_probs[i, j]))
    assert gate.log_prob(log_probs).shape == (2, 4, 70)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(side):
    gate = BayesGate(PRIOR)
    text, padding = tokens(20, 3), tokens(7, 3)
    order = (padding, text) if side == "left" else (text, padding)
    mask = torch.cat([torch.full((len(part),), int(part is text)) for part in order])
    padded = torch.cat(order)
    real = mask.bool()
    weights = gate(padded.unsqueeze(0), mask=mask.unsqueeze(0))[0]
    out = gate.log_prob(padded.unsqueeze(0), mask=mask.unsqueeze(0))[0]
    # On the left the chunks of the sum shift by the padding: rounding, nothing else.
    torch.testing.assert_close(weights[real], gate(text), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out[real], gate.log_prob(text), rtol=0, atol=1e-13)
    assert torch.equal(out[~real], torch.zeros(7, dtype=torch.float64))


def test_masked_nan_and_inf_do_not_leak():
    log_probs = tokens(6, 3)
    broken = log_probs.clone()
    broken[2], broken[4] = math.nan, -math.inf
    mask = torch.tensor([1, 1, 0, 1, 0, 1])
    out = BayesGate(PRIOR).log_prob(broken, mask=mask)
    expected = BayesGate(PRIOR).log_prob(log_probs[mask.bool()])
    torch.testing.assert_close(out[mask.bool()], expected, rtol=0, atol=1e-13)


def test_nan_stays_in_its_document():
    log_probs, offsets = documents()
    log_probs[10, 1] = math.nan  # inside the document of 700 tokens, tokens 6 to 705
    weights = BayesGate(PRIOR)(log_probs, offsets=offsets)
    bad = weights.isnan().any(dim=-1)
    assert bad.nonzero().flatten().tolist() == list(range(11, 706))


def test_stepping_equals_the_whole_sequence():
    log_probs = tokens(4, 40, 3)
    gate = BayesGate(PRIOR)
    weights = gate(log_probs)
    state = gate.log_prior
    for t in range(40):
        torch.testing.assert_close(state.expand(4, 3), weights[:, t], rtol=1e-13, atol=1e-13)
        state = gate.step(state, log_probs[:, t])
    assert state.shape == (4, 3)
    assert state.dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 5, 3), (1, 3)])
def test_empty_and_single_token_sequences(shape):
    gate = BayesGate(PRIOR)
    assert gate(torch.zeros(shape)).shape == shape
    assert gate.log_prob(torch.zeros(shape)).shape == shape[:-1]


# ---------------------------------------------------------------- zeros


def test_an_expert_ruled_out_stays_out():
    log_probs = tokens(40, 3)
    log_probs[9, 1] = -math.inf
    weights = BayesGate(PRIOR)(log_probs)
    assert bool((weights[:10, 1] > -math.inf).all())
    assert bool((weights[10:, 1] == -math.inf).all())
    rest = torch.log_softmax(BayesGate(PRIOR)(log_probs)[10:, [0, 2]], dim=-1)
    alone = BayesGate(PRIOR[[0, 2]] / 0.7)(log_probs[:, [0, 2]])[10:]
    torch.testing.assert_close(rest, alone, rtol=1e-13, atol=1e-13)


def test_a_prior_of_zero_is_never_revived():
    gate = BayesGate(torch.tensor([0.5, 0.5, 0.0]))
    log_probs = tokens(50, 3)
    log_probs[:, 2] = 0.0  # by far the best expert
    assert bool((gate(log_probs)[:, 2] == -math.inf).all())


@pytest.mark.parametrize("where", ["one token", "piece by piece", "twice"])
def test_an_impossible_document_starts_again_from_the_prior(where):
    log_probs = tokens(60, 3)
    gate = BayesGate(PRIOR)
    deaths = [20]
    if where == "piece by piece":
        log_probs[5, 0] = log_probs[12, 1] = log_probs[20, 2] = -math.inf
    else:
        log_probs[20] = -math.inf
    if where == "twice":
        log_probs[41] = -math.inf
        deaths = [20, 41]
    out = gate.log_prob(log_probs)
    assert (out == -math.inf).nonzero().flatten().tolist() == deaths
    weights = gate(log_probs)
    torch.testing.assert_close(weights, by_recursion(gate, log_probs), rtol=1e-13, atol=1e-13)
    after = deaths[-1] + 1
    torch.testing.assert_close(weights[after:], gate(log_probs[after:]), rtol=0, atol=0)


def test_an_impossible_document_leaves_its_neighbours_alone():
    log_probs, offsets = documents()
    dead = log_probs.clone()
    dead[100] = -math.inf
    gate = BayesGate(PRIOR)
    before, after = gate(log_probs, offsets=offsets), gate(dead, offsets=offsets)
    outside = torch.tensor([*range(6), *range(706, len(log_probs))])
    assert torch.equal(before[outside], after[outside])


# ---------------------------------------------------------------- module


def test_the_prior_stays_float64_through_module_casts():
    gate = BayesGate(PRIOR)
    exact = gate.log_prior.clone()
    wrapped = torch.nn.Sequential(gate).to(torch.bfloat16)
    assert torch.equal(wrapped[0].log_prior, exact)
    gate.half()
    assert gate.log_prior.dtype == torch.float64


def test_state_dict_round_trip():
    gate, other = BayesGate(PRIOR), BayesGate(torch.full((3,), 1 / 3))
    other.load_state_dict(gate.state_dict())
    assert list(gate.state_dict()) == ["log_prior"]
    log_probs = tokens(10, 3)
    assert torch.equal(gate(log_probs), other(log_probs))


def test_nothing_is_trainable():
    assert list(BayesGate(PRIOR).parameters()) == []


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        ([0.5, 0.5], TypeError, "prior: expected a tensor, got list"),
        (torch.ones(2, 2) / 4, ValueError, r"prior: expected shape \[4\], got \(2, 2\)"),
        (torch.ones(0), ValueError, r"prior: expected non-negative .* got \[\]"),
        (
            torch.tensor([0.7, 0.7]),
            ValueError,
            "prior: expected non-negative weights that sum to 1",
        ),
        (torch.tensor([1.5, -0.5]), ValueError, "prior: expected non-negative"),
    ],
)
def test_bad_priors_are_refused(prior, error, message):
    with pytest.raises(error, match=message):
        BayesGate(prior)


@pytest.mark.parametrize(
    ("log_probs", "options", "error", "message"),
    [
        (torch.zeros(5, 3, dtype=torch.long), {}, TypeError, "log_probs: .* got torch.int64"),
        ([[0.0, 0.0, 0.0]], {}, TypeError, "log_probs: .* got list"),
        (torch.zeros(3), {}, ValueError, r"log_probs: expected shape \[..., T, 3\], got \(3,\)"),
        (torch.zeros(5, 2), {}, ValueError, r"log_probs: expected shape .* got \(5, 2\)"),
        (torch.zeros(5, 3), {"mask": torch.ones(4)}, ValueError, r"mask: expected shape \(5,\)"),
        (torch.zeros(5, 3), {"offsets": torch.tensor([0, 4])}, ValueError, "offsets: .* to 5"),
        (torch.zeros(5, 3), {"offsets": torch.tensor([1, 5])}, ValueError, "offsets: expected"),
        (torch.zeros(5, 3), {"offsets": torch.tensor([0, 4, 3, 5])}, ValueError, "non-decreasing"),
        (torch.zeros(5, 3), {"offsets": torch.zeros(0)}, ValueError, "offsets: expected"),
        (
            torch.zeros(2, 5, 3),
            {"offsets": torch.tensor([0, 10])},
            ValueError,
            r"log_probs: expected shape \[T, K\] with offsets",
        ),
    ],
)
def test_bad_tokens_are_refused(log_probs, options, error, message):
    with pytest.raises(error, match=message):
        BayesGate(PRIOR)(log_probs, **options)

"""Learned gates: their start, normalisation, causality, decoding, layouts, gradients."""

import math

import pytest
import torch

from robustgate.game import BayesGate, SequenceGate, TokenGate, transformer

PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
NETWORKS = {
    "linear": TokenGate.linear,
    "mlp": TokenGate.mlp,
    "transformer": lambda bayes, **options: TokenGate.transformer(
        bayes, width=8, hidden=8, layers=2, **options
    ),
}
CONTEXT = 2


def tokens(*shape, scale=1.0, mean=-3.0):
    return scale * torch.randn(*shape, dtype=torch.float64) + mean


def trained(gate):
    """The gate in float64 with random weights everywhere, as after training."""
    gate = gate.double()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return gate


@pytest.fixture(params=NETWORKS)
def gate(request):
    return trained(NETWORKS[request.param](BayesGate(PRIOR, share=0.01), context=CONTEXT))


# ---------------------------------------------------------------- token gates


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("options", [{}, {"share": 0.05}, {"power": 0.5}, {"top_k": 2}], ids=str)
def test_it_starts_at_the_bayes_gate(network, options):
    bayes, log_probs = BayesGate(PRIOR, **options), tokens(2, 40, 3)
    gate = NETWORKS[network](bayes)  # float32 parameters; the weights stay float64
    # The head is 0: what remains is one more normalisation.
    torch.testing.assert_close(gate(log_probs), bayes(log_probs), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        gate.log_prob(log_probs), bayes.log_prob(log_probs), rtol=0, atol=1e-13
    )


def test_weights_are_normalised_and_not_those_of_bayes(gate):
    log_probs, context = tokens(2, 40, 3), tokens(2, 40, CONTEXT)
    weights = gate(log_probs, context=context)
    assert weights.dtype == torch.float64
    total = weights.logsumexp(dim=-1)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-13)
    assert bool(((weights - gate.bayes(log_probs)).abs() > 0.1).any())


def test_the_future_changes_nothing(gate):
    log_probs, context = tokens(2, 50, 3), tokens(2, 50, CONTEXT)
    weights = gate(log_probs, context=context)
    future, future_context = log_probs.clone(), context.clone()
    future[:, 20:], future_context[:, 21:] = tokens(2, 30, 3), tokens(2, 29, CONTEXT)
    # Row 20 knows tokens 0 to 19 and the caller's features of row 20.
    changed = gate(future, context=future_context)
    # Attention over a longer row may add in another order.
    torch.testing.assert_close(weights[:, :21], changed[:, :21], rtol=0, atol=1e-12)
    assert bool(((weights - changed)[:, 21].abs() > 1e-3).any())


def test_each_past_token_and_its_own_context_matter(gate):
    log_probs, context = tokens(10, 3), tokens(10, CONTEXT)
    reference = gate(log_probs, context=context)[9]
    nearer = log_probs.clone()
    nearer[8, 0] += 1.0
    assert not torch.allclose(gate(nearer, context=context)[9], reference, atol=1e-4)
    own = context.clone()
    own[9] += 1.0
    assert not torch.allclose(gate(log_probs, context=own)[9], reference, atol=1e-4)


def test_decoding_equals_the_whole_sequence(gate):
    log_probs, context = tokens(2, 30, 3), tokens(2, 30, CONTEXT)
    expected = gate(log_probs, context=context)
    weights, state = gate.start((2,), context=context[:, 0])
    for t in range(30):
        # Averages by doubling or one by one, sums by chunks or one by one: 30 roundings each.
        torch.testing.assert_close(weights, expected[:, t], rtol=0, atol=1e-11)
        if t < 29:
            weights, state = gate.step(state, log_probs[:, t], context=context[:, t + 1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing(gate, side):
    text, padding = tokens(20, 3), torch.full((7, 3), math.nan, dtype=torch.float64)
    context, other = tokens(20, CONTEXT), tokens(7, CONTEXT)
    parts = (
        ((padding, other), (text, context))
        if side == "left"
        else ((text, context), (padding, other))
    )
    padded, padded_context = (torch.cat(part) for part in zip(*parts, strict=True))
    mask = ~padded.isnan().any(dim=1)
    alone = gate(text, context=context)
    inside = gate(padded, context=padded_context, mask=mask)[mask]
    torch.testing.assert_close(inside, alone, rtol=0, atol=1e-12)
    out = gate.log_prob(padded, context=padded_context, mask=mask)
    assert torch.equal(out[~mask], torch.zeros(7, dtype=torch.float64))


def test_batches_equal_each_alone(gate):
    log_probs, context = tokens(2, 3, 12, 3), tokens(2, 3, 12, CONTEXT)
    weights = gate(log_probs, context=context)
    assert weights.shape == (2, 3, 12, 3)
    alone = gate(log_probs[1, 2], context=context[1, 2])
    torch.testing.assert_close(weights[1, 2], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 5, 3), (1, 3)])
def test_empty_and_single_token_sequences(gate, shape):
    context = torch.zeros(*shape[:-1], CONTEXT)
    assert gate(torch.zeros(shape), context=context).shape == shape


def test_lost_experts_and_impossible_tokens_stay_finite_elsewhere(gate):
    log_probs, context = tokens(30, 3), tokens(30, CONTEXT)
    log_probs[5, 1] = log_probs[12] = -math.inf
    weights = gate(log_probs, context=context)
    assert bool(weights.isfinite().all())  # fixed-share brings every expert back
    assert (gate.log_prob(log_probs, context=context) == -math.inf).nonzero().tolist() == [[12]]


def test_gradients_reach_the_parameters(gate):
    names, values = zip(*gate.named_parameters(), strict=True)
    log_probs, context = tokens(1, 6, 3), tokens(1, 6, CONTEXT)

    def loss(*parameters):
        state = dict(zip(names, parameters, strict=True))
        weights = torch.func.functional_call(gate, state, (log_probs,), {"context": context})
        return weights.exp()

    leaves = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    gate.log_prob(log_probs, context=context).sum().backward()
    # A key's bias moves all attention logits of a row alike: its gradient alone may vanish.
    assert all(value.grad is not None and bool(value.grad.any()) for value in values)


def test_parameters_are_those_of_the_network_alone():
    gate = TokenGate.linear(BayesGate(PRIOR))
    assert {name for name, _ in gate.named_parameters()} == {"head.weight", "head.bias"}
    assert gate.to(torch.bfloat16).bayes.log_prior.dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenGate.linear(BayesGate(PRIOR, window=3)), "bayes: .* without a window, got 3"),
        (
            lambda: TokenGate.linear(BayesGate(PRIOR), context=2)(tokens(4, 3)),
            r"context: expected shape \(4, 2\), got None",
        ),
        (
            lambda: TokenGate.linear(BayesGate(PRIOR))(tokens(4, 3), context=tokens(4, 1)),
            r"context: expected shape \(4, 0\), got \(4, 1\)",
        ),
        (
            lambda: TokenGate.linear(BayesGate(PRIOR))(tokens(4, 2)),
            r"log_probs: expected shape .* got \(4, 2\)",
        ),
        (
            lambda: TokenGate.transformer(BayesGate(PRIOR), width=7),
            "heads: expected a divisor of width = 7, got 2",
        ),
    ],
)
def test_token_gates_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- sequence gates


def make_sequence_gates(prior):
    return {
        "linear": (SequenceGate.linear(5, prior), torch.randn(2, 4, 5)),
        "mlp": (SequenceGate.mlp(5, prior, hidden=6), torch.randn(2, 4, 5)),
        "transformer": (
            SequenceGate.transformer(11, prior, context=9, width=8, hidden=8),
            torch.randint(11, (2, 4, 9)),
        ),
    }


@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer"])
def test_sequence_gates_start_constant_and_are_normalised(kind):
    gate, inputs = make_sequence_gates(PRIOR)[kind]
    torch.testing.assert_close(gate(inputs).exp(), PRIOR.float().expand(2, 4, 3), rtol=0, atol=1e-6)
    gate = trained(gate)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    weights = gate(inputs)
    total = weights.logsumexp(dim=-1)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-14)
    assert bool((weights.std(dim=(0, 1)) > 1e-3).all())  # documents differ
    torch.testing.assert_close(gate(inputs[1, 2]), weights[1, 2], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer"])
def test_sequence_gates_have_true_gradients(kind):
    gate, inputs = make_sequence_gates(2)[kind]
    gate = trained(gate)
    inputs = inputs[0, :2].double() if inputs.is_floating_point() else inputs[0, :2]
    names, values = zip(*gate.named_parameters(), strict=True)

    def weights(*parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(gate, state, (inputs,)).exp()

    leaves = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(weights, leaves, fast_mode=True)


@pytest.mark.parametrize("pairs", [1, 40, 100])
def test_long_documents_look_back_in_runs_that_change_nothing(pairs, monkeypatch):
    """With a token's row at a time, runs of several, and some that do not divide the length."""
    gate = trained(NETWORKS["transformer"](BayesGate(PRIOR), context=0))
    encoder = trained(make_sequence_gates(PRIOR)["transformer"][0])
    scores, ids = tokens(2, 9, 3), torch.randint(11, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :2] = mask[1, 7:] = False
    ids[0, 6:] = -1

    whole = gate(scores, mask=mask), encoder(ids)
    built, allowed = [], transformer._allowed

    def recorded(*args, **options):
        built.append(allowed(*args, **options))
        return built[-1]

    monkeypatch.setattr(transformer, "_PAIRS", pairs)
    monkeypatch.setattr(transformer, "_allowed", recorded)
    for expected, found in zip(whole, (gate(scores, mask=mask), encoder(ids)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert len(built) > 3
    assert max(mask.numel() for mask in built) <= max(pairs, 2 * 9)


def test_padding_of_token_ids_counts_for_nothing():
    gate = trained(make_sequence_gates(PRIOR)["transformer"][0])
    ids = torch.randint(11, (5,))
    padding = torch.full((4,), -1)
    alone = gate(ids)
    for padded in (torch.cat([ids, padding]), torch.cat([padding, ids])):
        torch.testing.assert_close(gate(padded), alone, rtol=0, atol=1e-13)
    assert bool(gate(torch.full((2, 9), -1)).isfinite().all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SequenceGate.linear(3, torch.tensor([1.0, 0.0])), "prior: expected positive"),
        (
            lambda: SequenceGate.transformer(5, 2, context=4)(torch.zeros(2, 6).long()),
            r"ids: expected integers \[..., T\] with T <= 4, got torch.int64 \(2, 6\)",
        ),
        (lambda: SequenceGate.transformer(5, 2, context=4)(torch.zeros(2, 3)), "ids: expected int"),
    ],
)
def test_sequence_gates_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()

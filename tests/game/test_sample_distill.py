"""Sampling from a gated mixture, and teaching its gate to decode, against exact enumeration."""

import pytest
import torch
from finite_games import markov_space

from robustgate.game import (
    BayesGate,
    ConstantGate,
    Documents,
    SequenceGate,
    TokenDocuments,
    TokenGate,
    distill,
    finite_samplers,
    sample,
)

LENGTH = 4


def space_of(starts=(0.3, 0.6), stays=(0.85, 0.25)):
    """All 16 binary sequences, one feature for each, under two Markov experts.

    Before each token the caller knows the tokens before it: +1 or -1, 0 for those to come.
    """
    ids, tokens = markov_space(starts, stays, LENGTH)
    known = torch.ones(LENGTH, LENGTH).tril(diagonal=-1)  # row t knows s < t
    context = (2.0 * ids - 1).unsqueeze(1) * known  # [X, T, T]
    return Documents(
        torch.eye(2**LENGTH, dtype=torch.float64),
        tokens.sum(dim=1),
        tokens=TokenDocuments(tokens, context=context),
    )


def random_teacher(scale=1.5, seed=4):
    gate = SequenceGate.linear(2**LENGTH, 2).double()
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(2, 2**LENGTH, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        gate.head.weight.copy_(weight)
    return gate.requires_grad_(False)


def exact(gate, space):
    """``pi_g / Z_g`` over the space, and ``Z_g``."""
    density = space.log_prob(gate).exp()
    return density / density.sum(), float(density.sum())


def chi_square(rows, probs):
    observed = torch.bincount(rows, minlength=len(probs)).double()
    expected = probs * len(rows)
    return float(((observed - expected) ** 2 / expected).sum())


# 15 degrees of freedom: mean 15, standard deviation sqrt(30) = 5.5; 43.8 has probability 1e-4.
CHI_SQUARE_15 = 43.8


# ---------------------------------------------------------------- sampling


def test_rejection_is_exact():
    space, gate = space_of(), random_teacher()
    probs, total = exact(gate, space)
    assert abs(total - 1) > 0.05  # the gate is none of G_1
    drawn = sample(gate, finite_samplers(space), 20_000)
    assert len(drawn.documents) == 20_000
    assert drawn.effective_sample_size == 20_000
    assert chi_square(drawn.documents.inputs.argmax(dim=1), probs) < CHI_SQUARE_15
    # Z / K of the candidates are accepted: binomial, four standard deviations.
    rate = total / 2
    error = (rate * (1 - rate) / drawn.candidates) ** 0.5
    assert abs(drawn.acceptance_rate - rate) < 4 * error


def test_experts_of_accepted_documents_have_their_share():
    space, gate = space_of(), random_teacher()
    drawn = sample(gate, finite_samplers(space), 20_000)
    shares = (gate(space.inputs).exp() * space.log_probs.exp()).sum(dim=0)
    share = float(shares[1] / shares.sum())
    observed = float((drawn.experts == 1).double().mean())
    assert abs(observed - share) < 4 * (share * (1 - share) / 20_000) ** 0.5


def test_a_constant_gate_accepts_everything():
    space, gate = space_of(), ConstantGate(torch.tensor([0.25, 0.75]))
    drawn = sample(gate, finite_samplers(space), 20_000)
    assert drawn.acceptance_rate == 1.0
    assert drawn.candidates == 20_000
    probs, total = exact(gate, space)
    assert total == pytest.approx(1.0, abs=1e-12)
    assert chi_square(drawn.documents.inputs.argmax(dim=1), probs) < CHI_SQUARE_15
    assert float((drawn.experts == 1).double().mean()) == pytest.approx(0.75, abs=0.013)


def test_resampling_comes_near_and_knows_its_worth():
    space, gate = space_of(), random_teacher()
    probs, total = exact(gate, space)
    drawn = sample(gate, finite_samplers(space), 20_000, method="sir", candidates=60_001)
    assert drawn.candidates == 60_002  # the next multiple of K
    frequencies = torch.bincount(drawn.documents.inputs.argmax(dim=1), minlength=16) / 20_000
    # Resampling adds the candidates' error to its own: 1/20,000 + 1/ESS, four deviations.
    error = (probs * (1 - probs) * (1 / 20_000 + 1 / drawn.effective_sample_size)).sqrt()
    assert bool(((frequencies - probs).abs() < 4 * error).all())
    # ESS / n = E[w]^2 / E[w^2] under q, here by enumeration.
    q = space.log_probs.exp().mean(dim=1)
    share = total**2 / float(((probs * total) ** 2 / q).sum())
    assert drawn.effective_sample_size / drawn.candidates == pytest.approx(share, rel=0.02)
    assert share < 0.95


def test_tokens_come_with_their_documents():
    space = space_of()
    drawn = sample(random_teacher(), finite_samplers(space), 50).documents
    torch.testing.assert_close(
        drawn.tokens.log_probs.sum(dim=1), drawn.log_probs, rtol=0, atol=1e-14
    )
    rows = drawn.inputs.argmax(dim=1)
    assert torch.equal(drawn.log_probs, space.log_probs[rows])


def test_samplers_of_any_kind_with_tokens_of_different_lengths():
    def sampler(k):
        def draw(count, generator):
            tokens = torch.rand(count, 3 + k, 2, generator=generator) - 2
            return Documents(
                torch.full((count, 1), float(k)),
                tokens.sum(dim=1),
                tokens=TokenDocuments(tokens),
            )

        return draw

    drawn = sample(SequenceGate.linear(1, 2), [sampler(0), sampler(1)], 40)
    documents = drawn.documents
    assert torch.equal(documents.inputs[:, 0], drawn.experts.float())
    lengths = documents.tokens.mask.sum(dim=1)
    assert torch.equal(lengths, 3 + drawn.experts)
    out = (documents.tokens.log_probs * documents.tokens.mask.unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close(out, documents.log_probs)


def test_samples_are_deterministic_for_a_seed():
    space, gate = space_of(), random_teacher()
    for method in ("rejection", "sir"):
        first, same, other = (
            sample(gate, finite_samplers(space), 50, method=method, seed=seed).documents.inputs
            for seed in (1, 1, 2)
        )
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"method": "mcmc"}, 'method: expected "rejection" or "sir", got \'mcmc\''),
        ({"method": "sir", "candidates": 0}, "candidates: expected at least 1, got 0"),
        ({"samplers": []}, "samplers: expected one per expert, got none"),
        (
            {"samplers": [lambda count, generator: space_of()] * 2},
            r"samplers\[0\]: asked for \d+ documents, got 16",
        ),
    ],
)
def test_bad_requests_are_refused(options, message):
    arguments = {"samplers": finite_samplers(space_of()), "count": 40, **options}
    with pytest.raises(ValueError, match=message):
        sample(random_teacher(), **arguments)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("experts", [2, 3])
def test_gate_samplers_and_documents_have_the_same_experts(constant, experts):
    # Two of three samplers: a draw of the third expert would be lost, or never made.
    probs = torch.full((3, 4), 0.25)
    samplers = finite_samplers(Documents(torch.eye(4), probs.log().T))
    weights = torch.full((experts,), 1.0 / experts)
    gate = ConstantGate(weights) if constant else SequenceGate.linear(4, weights)
    given = samplers[:2] if experts == 3 else samplers
    with pytest.raises(ValueError, match="samplers"):
        sample(gate, given, 100)


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_gate_that_accepts_no_more_is_given_up(rounds):
    class Closing(torch.nn.Module):
        calls = 0

        def forward(self, inputs):  # [n, F] -> [n, K]
            self.calls += 1
            # The first of the two documents is accepted in so many rounds, and nothing after.
            shut = torch.tensor([self.calls > rounds, True]).unsqueeze(1).expand(2, 2)
            return torch.zeros(2, 2).masked_fill(shut, -torch.inf)

    samplers = [lambda count, draw: Documents(torch.zeros(count, 1), torch.zeros(count, 2))] * 2
    with pytest.raises(RuntimeError, match=f"sample: {rounds} documents accepted among"):
        sample(Closing(), samplers, 2)


def test_a_finite_space_is_checked():
    with pytest.raises(ValueError, match="space: expected columns that sum to 1"):
        finite_samplers(Documents(torch.eye(2), torch.zeros(2, 2)))


# ---------------------------------------------------------------- distillation


def student_log_prob(student, space):
    context = {} if isinstance(student, BayesGate) else {"context": space.tokens.context}
    return student.log_prob(space.tokens.log_probs, **context).sum(dim=1)


def make_student():
    return TokenGate.mlp(BayesGate(torch.tensor([0.5, 0.5])), context=LENGTH)


def divergence(probs, log_student):
    return float((probs * (probs.log() - log_student)).sum())


def least_gap(probs, ids, tokens):
    """KL from the teacher to the best causal gate, by enumeration of all prefixes.

    With two tokens and two experts a gate reaches every next-token probability between the
    experts', so the best one clips the teacher's.
    """
    gap = 0.0
    for t in range(LENGTH):
        for prefix in {tuple(sequence) for sequence in ids[:, :t].tolist()}:
            inside = (ids[:, :t] == torch.tensor(prefix)).all(dim=1)
            ones = inside & (ids[:, t] == 1)
            mass = probs[inside].sum()
            teacher = probs[ones].sum() / mass
            experts = tokens[ones, t].exp()[0]  # the same in all of them
            student = teacher.clamp(experts.amin(), experts.amax())
            pair = torch.stack([teacher, 1 - teacher])
            reached = torch.stack([student, 1 - student])
            gap += float(mass * (pair * (pair / reached).log()).sum())
    return gap


def test_a_constant_teacher_is_a_bayes_gate_exactly():
    space = space_of()
    teacher = ConstantGate(torch.tensor([0.35, 0.65]))
    student = TokenGate.linear(BayesGate(torch.tensor([0.5, 0.5])))
    found = distill(teacher, student, finite_samplers(space))
    assert (found.gap, found.standard_error, found.interval()) == (0.0, 0.0, (0.0, 0.0))
    probs, _ = exact(teacher, space)
    # 16 products of 4 probabilities each, by two ways of adding logarithms.
    assert divergence(probs, student_log_prob(found.student, space)) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_the_measured_gap_is_the_enumerated_one(scale):
    space, teacher = space_of(), random_teacher(scale)
    student = make_student()
    found = distill(
        teacher, student, finite_samplers(space), documents=6000, held_out=6000, steps=300
    )
    probs, total = exact(teacher, space)
    true_gap = divergence(probs, student_log_prob(student.requires_grad_(False), space))
    assert abs(found.gap - true_gap) < 4 * found.standard_error
    assert found.standard_error < 0.02
    assert abs(found.normaliser.value - total) < 4 * found.normaliser.standard_error
    low, high = found.interval(0.95)
    assert low < found.gap < high
    # No causal gate does better than the enumerated optimum, and training comes near it.
    ids, tokens = markov_space((0.3, 0.6), (0.85, 0.25), LENGTH)
    structural = least_gap(probs, ids, tokens)
    assert structural > 0.002  # this teacher has one
    assert structural - 1e-12 <= true_gap < structural + 0.02
    start = make_student().requires_grad_(False)
    assert true_gap < divergence(probs, student_log_prob(start, space))


def test_distillation_is_deterministic_for_a_seed():
    def run(seed):
        torch.manual_seed(0)
        student = make_student()
        samplers = finite_samplers(space_of())
        options = {"documents": 50, "held_out": 50, "steps": 5, "seed": seed}
        return distill(random_teacher(), student, samplers, **options)

    first, same, other = run(1), run(1), run(2)
    assert first.gap == same.gap != other.gap
    assert first.losses == same.losses
    assert len(first.losses) == 5


def test_distillation_refuses():
    student = TokenGate.linear(BayesGate(torch.tensor([0.5, 0.5])))
    space = space_of()
    bare = Documents(space.inputs, space.log_probs)
    with pytest.raises(ValueError, match="samplers: expected documents with tokens, got none"):
        distill(random_teacher(), student, finite_samplers(bare))
    with pytest.raises(ValueError, match="held_out: expected at least 2, got 1"):
        distill(random_teacher(), student, finite_samplers(space), held_out=1)

"""Primal-dual training: known values, the normaliser, absent domains, resuming, averages."""

import io
import math

import pytest
import torch
from finite_games import GAMES, drawn, enumerated

from robustgate.game import (
    AveragedGate,
    BayesGate,
    ConstantGate,
    Documents,
    Floor,
    PrimalDual,
    SequenceGate,
    TokenDocuments,
    TokenGate,
    Vertices,
    normaliser,
    robust_prior,
)

METHODS = ("plain", "optimistic", "extragradient")


def tabular(game):
    """A gate with weights of its own for each of the X points."""
    return SequenceGate.linear(len(game[0][0]), len(game[1])).double()


def solved(name, steps=600, **options):
    game = GAMES[name]
    batch, samples, baseline = enumerated(game[0], game[1])
    trainer = PrimalDual(tabular(game), baseline, learning_rate=0.05, **options)
    trainer.fit(lambda step: batch, steps, samples=lambda step: samples)
    return trainer, batch, samples


# ---------------------------------------------------------------- known values


@pytest.mark.parametrize("name", GAMES)
def test_known_values(name):
    _, _, value, mixture, multiplier = GAMES[name]
    trainer, batch, samples = solved(name)
    found = trainer.evaluate(batch, samples)
    # 1.5e-4 at most was seen after 600 steps: gates at the edge of the simplex are reached in the
    # limit alone. The game is deterministic, so that 1e-3 leaves room for other machines' rounding.
    assert found.upper_bound == pytest.approx(value, abs=1e-3)
    assert found.lower_bound <= value + 1e-6
    assert found.normaliser.value <= 1 + 1e-3
    assert found.normaliser.standard_error == 0.0
    assert trainer.mixture.tolist() == pytest.approx(mixture, abs=5e-3)
    assert trainer.multiplier == pytest.approx(multiplier, abs=2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_every_average_gets_there(method):
    name = "more domains than experts"
    trainer, batch, samples = solved(name, steps=400, method=method)
    for gate in (trainer.gate, trainer.ema_gate(), trainer.averaged_gate()):
        found = trainer.evaluate(batch, samples, gate=gate)
        assert found.upper_bound == pytest.approx(GAMES[name][2], abs=5e-3)
        assert found.normaliser.value == pytest.approx(1.0, abs=5e-3)
    assert trainer.averaged_mixture().tolist() == pytest.approx([0, 0, 1], abs=2e-2)


def test_a_constant_gate_finds_the_robust_prior():
    # Documents in place of an enumeration, so that both solve the same sampled game.
    log_probs = {d: 2 * torch.randn(40, 3, dtype=torch.float64) for d in ("a", "b")}
    for d, matrix in log_probs.items():
        matrix[:, "ab".index(d)] += 1.0
    exact = robust_prior(log_probs)
    baseline = dict(zip(exact.domains, exact.baseline.tolist(), strict=True))
    batch = {d: Documents(matrix[:, :1], matrix) for d, matrix in log_probs.items()}
    gate = ConstantGate(torch.full((3,), 1 / 3), trainable=True)
    trainer = PrimalDual(gate, baseline, learning_rate=0.02, mixture_step=0.5)
    same = [Documents(torch.zeros(2, 1), torch.zeros(2, 3)) for _ in range(3)]  # Z = 1, always
    trainer.fit(lambda step: batch, 400, samples=lambda step: same)
    found = trainer.evaluate(batch, same)
    assert found.upper_bound == pytest.approx(exact.value, abs=1e-5)
    assert trainer.mixture.tolist() == pytest.approx(exact.mixture.tolist(), abs=1e-4)
    assert exact.lower_bound - 1e-9 <= found.upper_bound
    assert found.lower_bound <= exact.value


@pytest.mark.parametrize(
    "mixtures",
    [Floor(0.3), Vertices([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]])],
    ids=["floor", "vertices"],
)
def test_the_adversary_keeps_to_its_set(mixtures):
    game = GAMES["more domains than experts"]
    batch, samples, baseline = enumerated(game[0], game[1])
    trainer = PrimalDual(tabular(game), baseline, mixtures=mixtures, learning_rate=0.05)
    for found in trainer.fit(lambda step: batch, 100, samples=lambda step: samples):
        assert mixtures.contains(found.mixture)
        surplus = math.log(max(found.normaliser.value, 1.0))
        assert found.upper_bound == pytest.approx(
            mixtures.support(found.losses)[0] + surplus, abs=1e-12
        )
    assert mixtures.contains(trainer.averaged_mixture())
    assert found.upper_bound < GAMES["more domains than experts"][2]  # an easier game


# ---------------------------------------------------------------- the normaliser


def random_experts(experts=3, points=12):
    generator = torch.Generator().manual_seed(7)
    logits = 2 * torch.randn(experts, points, dtype=torch.float64, generator=generator)
    probs = torch.softmax(logits, dim=1)  # [K, X]
    gate = SequenceGate.linear(points, experts).double()
    with torch.no_grad():
        gate.head.weight.copy_(
            2 * torch.randn(experts, points, dtype=torch.float64, generator=generator)
        )
    return probs, gate


def test_the_normaliser_of_an_enumeration_is_exact():
    probs, gate = random_experts()
    inputs = torch.eye(12, dtype=torch.float64)
    samples = [Documents(inputs, probs.log().T, pi) for pi in probs]
    direct = float((gate(inputs).exp() * probs.T).sum().detach())
    found = normaliser(gate, samples)
    assert found.value == pytest.approx(direct, abs=1e-14)
    assert abs(direct - 1) > 0.05  # the gate is none of G_1
    assert found.interval() == (found.value, found.value)


def test_responsibilities_are_not_normalised():
    # g(x, k) = pi_k(x) / sum_j pi_j(x) has Z = 1 + (1/K) sum_k chi2(pi_k || mean).
    probs, _ = random_experts()
    mean = probs.mean(dim=0)
    gate = SequenceGate.linear(12, 3).double()
    with torch.no_grad():
        gate.head.weight.copy_(probs.log())
    inputs = torch.eye(12, dtype=torch.float64)
    samples = [Documents(inputs, probs.log().T, pi) for pi in probs]
    chi2 = ((probs - mean) ** 2 / mean).sum(dim=1)
    assert normaliser(gate, samples).value == pytest.approx(1 + float(chi2.mean()), abs=1e-12)


def test_the_interval_covers_the_normaliser():
    probs, gate = random_experts()
    inputs = torch.eye(12, dtype=torch.float64)
    exact = float((gate(inputs).exp() * probs.T).sum().detach())
    generator = torch.Generator().manual_seed(0)
    covered = 0
    with torch.no_grad():
        for _ in range(300):
            samples = [drawn(pi, probs.log().T, 100, generator) for pi in probs]
            low, high = normaliser(gate, samples).interval(0.9)
            covered += low <= exact <= high
    # 270 expected, standard deviation sqrt(300 * .9 * .1) = 5.2; four of them on either side.
    assert 249 <= covered <= 291


def test_training_documents_are_no_substitute():
    # The same sum over documents of the domains estimates something else.
    game = GAMES["clipped at one domain"]
    batch, samples, _ = enumerated(game[0], game[1])
    gate = tabular(game)
    with torch.no_grad():
        gate.head.weight.copy_(torch.randn(2, 4, dtype=torch.float64))
    wrong = normaliser(gate, list(batch.values())).value
    assert abs(wrong - normaliser(gate, samples).value) > 0.05


# ---------------------------------------------------------------- sampled batches


def sampled(step, absent=()):
    """A batch of sampled documents and expert samples, the same for the same step."""
    game = GAMES["clipped at one domain"]
    generator = torch.Generator().manual_seed(step)
    log_probs = torch.tensor(game[1], dtype=torch.float64).log().T
    batch = {f"d{d}": drawn(p, log_probs, 32, generator) for d, p in enumerate(game[0])}
    samples = [drawn(pi, log_probs, 32, generator) for pi in game[1]]
    return {d: documents for d, documents in batch.items() if d not in absent}, samples


def stochastic(**options):
    game = GAMES["clipped at one domain"]
    entropy = {"d0": math.log(2), "d1": math.log(2)}
    return PrimalDual(tabular(game), entropy, **options)


def test_noisy_steps_come_near_the_value():
    name = "clipped at one domain"
    trainer = stochastic(learning_rate=0.02, mixture_step=0.03, multiplier_step=0.03)
    trainer.fit(lambda step: sampled(step)[0], 800, samples=lambda step: sampled(step)[1])
    batch, samples, _ = enumerated(*GAMES[name][:2])
    averaged = trainer.evaluate(batch, samples, gate=trainer.averaged_gate())
    assert averaged.upper_bound == pytest.approx(GAMES[name][2], abs=0.03)
    assert averaged.normaliser.value == pytest.approx(1.0, abs=0.02)
    assert trainer.averaged_mixture().tolist() == pytest.approx(GAMES[name][3], abs=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(method):
    def run(trainer, steps):
        return trainer.fit(
            # Domain d1 is absent from every third batch, the first included.
            lambda step: sampled(step, absent=["d1"] if step % 3 == 0 else [])[0],
            steps,
            samples=lambda step: sampled(step)[1],
        )

    whole = stochastic(method=method, weight_decay=0.01, snapshots=4)
    tail = run(whole, 200)[100:]
    first = stochastic(method=method, weight_decay=0.01, snapshots=4)
    run(first, 100)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = stochastic(method=method, weight_decay=0.01, snapshots=4)
    second.load_state_dict(torch.load(file, weights_only=True))
    resumed = run(second, 200)
    assert [a.scalars() for a in resumed] == [b.scalars() for b in tail]
    for a, b in zip(whole.gate.parameters(), second.gate.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.mixture, second.mixture)
    assert whole.multiplier == second.multiplier
    inputs = torch.eye(4, dtype=torch.float64)
    assert torch.equal(whole.ema_gate()(inputs), second.ema_gate()(inputs))
    assert torch.equal(whole.averaged_gate()(inputs), second.averaged_gate()(inputs))
    assert torch.equal(whole.averaged_mixture(), second.averaged_mixture())


def test_saving_changes_nothing_and_later_steps_change_no_saved_state():
    trainer = stochastic()
    trainer.step(*sampled(0))
    state = trainer.state_dict()
    kept = state["players"][0]["values"][0].clone()
    trainer.step(*sampled(1))
    assert torch.equal(state["players"][0]["values"][0], kept)


def test_an_absent_domain_keeps_its_last_loss():
    trainer = stochastic(mixture_step=0.5)
    first = trainer.step(*sampled(0))
    weight = float(trainer.mixture[1])
    second = trainer.step(*sampled(1, absent=["d1"]))
    assert float(second.losses[1]) == float(first.losses[1])
    assert float(second.losses[0]) != float(first.losses[0])
    # Its weight moves by that loss, not by a loss of 0, which would all but remove it.
    odds = math.log(float(trainer.mixture[1]) / float(trainer.mixture[0]))
    before = math.log(weight / (1 - weight))
    step = 0.5 * float(second.losses[1] - second.losses[0])
    assert odds == pytest.approx(before + step, abs=1e-12)


def test_a_domain_never_seen_keeps_its_weight():
    trainer = stochastic(mixture_step=0.5)
    found = trainer.step(*sampled(0, absent=["d1"]))
    assert math.isnan(float(found.losses[1]))
    assert (found.lower_bound, found.upper_bound) == (-math.inf, math.inf)
    assert trainer.mixture.tolist() == pytest.approx([0.5, 0.5], abs=1e-15)


def test_losses_are_means_per_domain():
    batch, samples = sampled(0)
    larger = {**batch, "d1": batch["d1"][torch.arange(32).repeat(5)]}  # the same mean
    trainer, other = stochastic(), stochastic()
    found, same = trainer.step(batch, samples), other.step(larger, samples)
    torch.testing.assert_close(found.losses, same.losses, rtol=0, atol=1e-14)
    for a, b in zip(trainer.gate.parameters(), other.gate.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)  # AdamW divides by gradients' size


def test_scalars_go_to_the_callback():
    trainer, logged = stochastic(), []
    found = trainer.fit(
        lambda step: sampled(step)[0],
        3,
        samples=lambda step: sampled(step)[1],
        log=lambda tag, value, step: logged.append((tag, value, step)),
    )
    assert {step for _, _, step in logged} == {0, 1, 2}
    last = {tag: value for tag, value, step in logged if step == 2}
    assert last == found[2].scalars()
    assert set(last) == {
        "bound/lower", "bound/upper", "loss/d0", "loss/d1", "mixture/d0", "mixture/d1",
        "multiplier", "normaliser/value", "normaliser/lower", "normaliser/upper",
    }  # fmt: skip
    assert last["normaliser/lower"] < last["normaliser/value"] < last["normaliser/upper"]


def test_the_gate_of_a_step_is_the_one_before_it():
    trainer = stochastic()
    batch, samples = sampled(0)
    before = trainer.evaluate(batch, samples)
    found = trainer.step(batch, samples)
    assert torch.equal(found.losses, before.losses)
    assert torch.equal(found.mixture, before.mixture)
    assert not torch.equal(trainer.evaluate(batch, samples).losses, before.losses)


def test_other_gradients_are_left_alone():
    trainer = stochastic()
    free = torch.nn.Parameter(torch.ones(2))
    free.grad = torch.ones(2)
    trainer.step(*sampled(0))
    assert torch.equal(free.grad, torch.ones(2))
    assert all(p.grad is None for p in trainer.gate.parameters())


# ---------------------------------------------------------------- averages


def test_an_average_of_outputs_is_the_mean_of_weights():
    gates = [ConstantGate(torch.tensor(w)) for w in ([0.2, 0.8], [0.6, 0.4])]
    mean = AveragedGate(list(gates))(torch.zeros(3, 1)).exp()
    torch.testing.assert_close(mean, torch.tensor([[0.4, 0.6]] * 3).double(), rtol=0, atol=1e-7)


def test_snapshots_stay_few_and_spread_over_the_latter_half():
    trainer = stochastic(snapshots=4)
    batch, samples = sampled(0)
    for _ in range(100):
        trainer.step(batch, samples)
    steps = [step for step, _, _ in trainer.averages.state_dict()["kept"]]
    assert len(steps) <= 8
    assert steps == list(range(steps[0], 101, steps[0]))  # evenly spaced
    assert len(trainer.averaged_gate().gates) == sum(2 * s >= steps[-1] for s in steps) >= 3


# ---------------------------------------------------------------- token documents


def token_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for d in range(2):
        log_probs = torch.randn(8, 20, 2, dtype=torch.float64, generator=generator) - 3
        log_probs[..., d] += 1.0
        lengths = torch.randint(5, 21, (8, 1), generator=generator)
        out[f"d{d}"] = TokenDocuments(log_probs, torch.arange(20) < lengths)
    return out


def test_token_documents_need_no_multiplier():
    gate = TokenGate.mlp(BayesGate(torch.tensor([0.5, 0.5])))
    trainer = PrimalDual(gate, {"d0": 0.0, "d1": 0.0})
    start = trainer.evaluate(token_batch(1))
    bayes = gate.bayes.log_prob(token_batch(1)["d0"].log_probs, mask=token_batch(1)["d0"].mask)
    mean = -bayes.sum() / token_batch(1)["d0"].mask.sum()
    assert float(start.losses[0]) == pytest.approx(float(mean), abs=1e-12)
    trainer.fit(lambda step: token_batch(2), 60)
    found = trainer.evaluate(token_batch(2))
    assert found.normaliser is None
    assert trainer.multiplier == 1.0
    assert found.lower_bound < found.upper_bound
    assert "multiplier" not in found.scalars()
    other = PrimalDual(TokenGate.mlp(BayesGate(torch.tensor([0.5, 0.5]))), {"d0": 0.0, "d1": 0.0})
    assert found.upper_bound < other.evaluate(token_batch(2)).upper_bound - 0.01  # it learned


def test_unpacked_documents_are_padded():
    log_probs = torch.randn(9, 2, dtype=torch.float64) - 3
    offsets = torch.tensor([0, 4, 4, 9])
    documents = TokenDocuments.unpack(log_probs, offsets)
    assert documents.log_probs.shape == (3, 5, 2)
    gate = BayesGate(torch.tensor([0.5, 0.5]))
    packed = -gate.log_prob(log_probs, offsets=offsets).mean()
    torch.testing.assert_close(documents.loss(gate), packed, rtol=0, atol=1e-13)
    hindsight = -log_probs.amax(dim=1).mean()
    torch.testing.assert_close(documents.loss_in_hindsight(), hindsight, rtol=0, atol=1e-13)


# ---------------------------------------------------------------- refusals


def test_bad_arguments_are_refused():
    gate, entropy = tabular(GAMES["one domain"]), {"d0": 0.0}
    with pytest.raises(ValueError, match="baseline: expected at least one domain"):
        PrimalDual(gate, {})
    with pytest.raises(ValueError, match="method: expected plain, optimistic or extragradient"):
        PrimalDual(gate, entropy, method="adam")
    with pytest.raises(ValueError, match="gate: expected trainable parameters, got none"):
        PrimalDual(ConstantGate(torch.tensor([1.0])), entropy)
    with pytest.raises(ValueError, match="mixture_step: expected a number >= 0, got -1"):
        PrimalDual(gate, entropy, mixture_step=-1)
    with pytest.raises(ValueError, match=r"ema: expected a number in \[0, 1\), got 1.0"):
        PrimalDual(gate, entropy, ema=1.0)
    with pytest.raises(ValueError, match="snapshots: expected at least 2, got 1"):
        PrimalDual(gate, entropy, snapshots=1)
    with pytest.raises(ValueError, match="averages: no step has been made"):
        PrimalDual(gate, entropy).averaged_gate()
    with pytest.raises(ValueError, match=r"state: expected the domains \['d0'\], got \['d0', 'd1'"):
        PrimalDual(gate, entropy).load_state_dict(stochastic().state_dict())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, s: ({"x": b["d0"]}, s), r"batch: expected domains among \['d0', 'd1'\]"),
        (lambda b, s: ({}, s), "batch: expected domains among"),
        (lambda b, s: (b, None), "samples: expected some of each expert, got None"),
        (lambda b, s: (b, s[:1]), r"samples: expected one set per expert, .* got sizes \[32\]"),
        (lambda b, s: (b, [s[0], s[1][:9]]), r"samples: .* got sizes \[32, 9\]"),
        (lambda b, s: (token_batch(0), s), "samples: expected none with token documents"),
        (
            lambda b, s: ({"d0": Documents(b["d0"].inputs, b["d0"].log_probs - math.inf)}, s),
            "batch: expected finite losses",
        ),
    ],
)
def test_bad_batches_are_refused_and_change_nothing(change, message, method):
    trainer = stochastic(method=method)
    batch, samples = sampled(0)
    trainer.step(batch, samples)
    multiplier, mixture = trainer.multiplier, trainer.mixture
    samples = [Documents(drawn.inputs, drawn.log_probs) for drawn in samples]
    before = [p.clone() for p in trainer.gate.parameters()]
    with pytest.raises(ValueError, match=message):
        trainer.step(*change(batch, samples))
    assert trainer.steps == 1
    assert trainer.multiplier == multiplier
    assert torch.equal(trainer.mixture, mixture)
    for old, new in zip(before, trainer.gate.parameters(), strict=True):
        assert torch.equal(old, new)


def test_evaluation_needs_every_domain():
    with pytest.raises(
        ValueError, match=r"batch: expected the domains \['d0', 'd1'\], got \['d0'\]"
    ):
        stochastic().evaluate(*sampled(0, absent=["d1"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Documents(torch.zeros(2, 1), torch.zeros(2)), r"log_probs: expected shape \[n, K"),
        (lambda: Documents(torch.zeros(3, 1), torch.zeros(2, 2)), r"inputs: expected \[2, ...\]"),
        (
            lambda: Documents(torch.zeros(2, 1), torch.zeros(2, 2), torch.ones(3)),
            r"weights: expected \[2\], got \(3,\)",
        ),
        (lambda: TokenDocuments(torch.zeros(2, 2)), r"log_probs: expected shape \[n, T, K\]"),
        (
            lambda: TokenDocuments(torch.zeros(2, 3, 2), torch.ones(2, 2)),
            r"mask: expected shape \(2, 3\), got \(2, 2\)",
        ),
        (
            lambda: TokenDocuments(torch.zeros(2, 3, 2), context=torch.ones(2, 4, 5)),
            r"context: expected shape \(2, 3, 'F'\), got \(2, 4, 5\)",
        ),
        (
            lambda: Documents(
                torch.zeros(1, 1), torch.zeros(1, 2), tokens=TokenDocuments(torch.zeros(2, 3, 2))
            ),
            "tokens: expected 1, got 2",
        ),
    ],
)
def test_documents_refuse_shapes_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()

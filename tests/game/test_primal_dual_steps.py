"""Primal-dual training on samples: resuming, absent domains, what a step leaves alone, refusals."""

import io
import math

import pytest
import torch
from finite_games import GAMES, drawn, enumerated, tabular

from robustgate.game import (
    Box,
    ConstantGate,
    Documents,
    PrimalDual,
    SequenceGate,
    TokenDocuments,
)

METHODS = ("plain", "optimistic", "extragradient")


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


# ---------------------------------------------------------------- domains


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


def test_a_domain_without_a_place_in_the_set_may_come_first():
    # Of the domains seen in the first batch none has weight: the others' mean loss is then 0 / 0.
    trainer = stochastic(mixtures=Box([0.0, 1.0], [0.0, 1.0]))
    trainer.step(*sampled(0, absent=["d1"]))
    assert trainer.mixture.tolist() == [0.0, 1.0]
    assert trainer.step(*sampled(1)).upper_bound < math.inf


def test_a_domain_that_lost_its_weight_comes_back():
    # A thousand nats a step for d1: after one step the weight of d0 is e^-1000, 0 in float64.
    trainer = stochastic(mixture_step=1000.0)
    easy, samples = sampled(0)
    hard = {d: Documents(part.inputs, part.log_probs - 9.0) for d, part in easy.items()}
    trainer.step({"d0": easy["d0"], "d1": hard["d1"]}, samples)
    assert 0.0 < float(trainer.mixture[0]) < 1e-200
    trainer.step({"d0": hard["d0"], "d1": easy["d1"]}, samples)
    assert float(trainer.mixture[0]) == pytest.approx(1.0, abs=1e-12)


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


def test_snapshots_stay_few_and_spread_over_the_latter_half():
    trainer = stochastic(snapshots=4)
    batch, samples = sampled(0)
    for _ in range(100):
        trainer.step(batch, samples)
    steps = [step for step, _, _ in trainer.averages.state_dict()["kept"]]
    assert len(steps) <= 8
    assert steps == list(range(steps[0], 101, steps[0]))  # evenly spaced
    assert len(trainer.averaged_gate().gates) == sum(2 * s >= steps[-1] for s in steps) >= 3


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
    with pytest.raises(ValueError, match="multiplier_step: expected a number >= 0, got inf"):
        PrimalDual(gate, entropy, multiplier_step=math.inf)
    with pytest.raises(ValueError, match=r"baseline: expected finite numbers, got \{'d0': nan\}"):
        PrimalDual(gate, {"d0": math.nan})
    with pytest.raises(ValueError, match=r"ema: expected a number in \[0, 1\), got 1.0"):
        PrimalDual(gate, entropy, ema=1.0)
    with pytest.raises(ValueError, match="snapshots: expected at least 2, got 1"):
        PrimalDual(gate, entropy, snapshots=1)
    with pytest.raises(ValueError, match="averages: no step has been made"):
        PrimalDual(gate, entropy).averaged_gate()
    with pytest.raises(ValueError, match=r"state: expected the domains \['d0'\], got \['d0', 'd1'"):
        PrimalDual(gate, entropy).load_state_dict(stochastic().state_dict())
    smaller = PrimalDual(SequenceGate.linear(4, 1), {"d0": 0.0, "d1": 0.0})
    with pytest.raises(ValueError, match="state: expected a gate's parameters"):
        stochastic().load_state_dict(smaller.state_dict())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, s: ({"x": b["d0"]}, s), r"batch: expected domains among \['d0', 'd1'\]"),
        (lambda b, s: ({}, s), "batch: expected domains among"),
        (
            lambda b, s: ({"d0": b["d0"][torch.arange(0)]}, s),
            r"batch\['d0'\]: expected at least one document, got none",
        ),
        (lambda b, s: (b, None), "samples: expected some of each expert, got None"),
        (lambda b, s: (b, s[:1]), r"samples: expected one set per expert, .* got sizes \[32\]"),
        (lambda b, s: (b, [s[0], s[1][:9]]), r"samples: .* got sizes \[32, 9\]"),
        (
            lambda b, s: ({"d0": TokenDocuments(torch.zeros(1, 2, 2))}, s),
            "samples: expected none with token documents",
        ),
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

"""Primal-dual training: known values, sets of mixtures, averages, token documents."""

import math

import pytest
import torch
from finite_games import GAMES, enumerated, tabular

from robustgate.game import (
    AveragedGate,
    BayesGate,
    ConstantGate,
    Documents,
    Floor,
    PrimalDual,
    TokenDocuments,
    TokenGate,
    Vertices,
    robust_prior,
)

METHODS = ("plain", "optimistic", "extragradient")


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


# ---------------------------------------------------------------- averages


def test_an_average_of_outputs_is_the_mean_of_weights():
    gates = [ConstantGate(torch.tensor(w)) for w in ([0.2, 0.8], [0.6, 0.4])]
    mean = AveragedGate(list(gates))(torch.zeros(3, 1)).exp()
    torch.testing.assert_close(mean, torch.tensor([[0.4, 0.6]] * 3).double(), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="gates: expected at least one"):
        AveragedGate([])


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

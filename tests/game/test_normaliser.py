"""The normaliser of a gate: exact by enumeration, covered by its interval from samples."""

import pytest
import torch
from finite_games import GAMES, drawn, enumerated, tabular

from robustgate.game import Documents, SequenceGate, normaliser


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

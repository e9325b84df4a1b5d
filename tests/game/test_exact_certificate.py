"""The certificate of the exact game: sound for whatever it is given, tight at the solution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustgate.game import Floor, KLBall, exact_certificate, solve_exact


def distributions(rows, points, seed, power):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(rows, points, generator=generator, dtype=torch.float64).pow(power) + 1e-4
    return weights / weights.sum(dim=1, keepdim=True)


@st.composite
def games(draw):
    points = draw(st.integers(2, 12))
    power = draw(st.sampled_from([0.2, 1.0, 4.0]))
    data = distributions(draw(st.integers(1, 5)), points, draw(st.integers(0, 2**31)), power)
    experts = distributions(draw(st.integers(1, 5)), points, draw(st.integers(0, 2**31)), power)
    return data, experts


@settings(max_examples=150, deadline=None)
@given(
    games(),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 1e-300, 1e-9, 0.1, 0.7, 1.0, 3.0, 1e9, 1e300]),
    st.sampled_from([0.05, 1.0, 20.0]),
)
def test_sound_for_any_mixture_any_multiplier_and_any_model(game, seed, mu, concentration):
    data, experts = game
    solution = solve_exact(data, experts, tol=1e-8)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(data), generator=generator, dtype=torch.float64).pow(1 / concentration)
    weights = noise / noise.sum()
    constant = torch.rand(len(experts), generator=generator, dtype=torch.float64)
    model = constant / constant.sum() @ experts
    proof = exact_certificate(data, experts, model, weights, mu)
    # Rounding of sums of terms of order log 1e4, and of mu (sum - 1).
    slack = 1e-12 * (1 + mu)
    assert float(proof.lower_bound) <= float(solution.upper_bound) + slack
    assert float(proof.upper_bound) >= float(solution.lower_bound) - slack
    assert float(proof.lower_bound) <= float(proof.upper_bound)
    # The best multiplier gives the best bound.
    best = exact_certificate(data, experts, model, weights)
    assert float(best.lower_bound) >= float(proof.lower_bound) - slack


@settings(max_examples=50, deadline=None)
@given(games(), st.sampled_from([Floor(0.15), KLBall(0.1)]), st.integers(0, 2**31))
def test_sound_over_strict_subsets(game, mixtures, seed):
    data, experts = game
    solution = solve_exact(data, experts, mixtures=mixtures, tol=1e-8)
    count = len(solution.vertices)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, generator=generator, dtype=torch.float64)
    weights = weights / weights.sum()
    if isinstance(mixtures, KLBall):
        weights = mixtures.mirror_step(torch.full_like(weights, 1 / count), weights, 1.0)
    proof = exact_certificate(data, experts, experts.mean(dim=0), weights, mixtures=mixtures)
    assert float(proof.lower_bound) <= float(solution.upper_bound) + 1e-12
    assert float(proof.upper_bound) >= float(solution.lower_bound) - 1e-12
    assert mixtures.contains(proof.mixture)


def test_the_solution_certifies_itself():
    data, experts = distributions(3, 9, 0, 1.0), distributions(4, 9, 1, 1.0)
    solution = solve_exact(data, experts)
    proof = exact_certificate(
        data, experts, solution.model, solution.weights, solution.mu, mixtures=Floor(0.0)
    )
    # Weights normalised once more may move the last bit.
    assert float(proof.lower_bound) == pytest.approx(float(solution.lower_bound), abs=1e-13)
    assert float(proof.upper_bound) == pytest.approx(float(solution.upper_bound), abs=1e-13)


def test_by_hand():
    # p = (1, 0), experts (.5, .5) and (.75, .25): lo = (.5, .25), hi = (.75, .5).
    data = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    experts = torch.tensor([[0.5, 0.5], [0.75, 0.25]], dtype=torch.float64)
    model = torch.tensor([0.6, 0.4], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    proof = exact_certificate(data, experts, model, one, 1.6)
    assert float(proof.upper_bound) == pytest.approx(-math.log(0.6), abs=1e-15)
    # c = (clip(1 / 1.6), .25) = (.625, .25): -log .625 + 1.6 (.875 - 1)
    assert float(proof.lower_bound) == pytest.approx(-math.log(0.625) - 0.2, abs=1e-15)
    free = exact_certificate(data, experts, model, one, 0.0)  # c = hi where p > 0
    assert float(free.lower_bound) == pytest.approx(-math.log(0.75), abs=1e-15)


def test_a_model_that_rules_a_point_out_has_an_infinite_worst_case():
    data = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    experts = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    proof = exact_certificate(data, experts, experts[0], torch.tensor([0.5, 0.5]))
    assert proof.losses.tolist() == [math.inf, 0.0]
    assert float(proof.upper_bound) == math.inf
    assert math.isfinite(float(proof.lower_bound))


def test_batches():
    data = torch.stack([distributions(3, 9, seed, 1.0) for seed in range(4)])
    experts = distributions(2, 9, 9, 1.0)
    model = experts.mean(dim=0).expand(4, 9)
    weights = torch.full((4, 3), 1 / 3)
    proof = exact_certificate(data, experts, model, weights)
    for i in range(4):
        one = exact_certificate(data[i], experts, model[i], weights[i])
        assert float(proof.lower_bound[i]) == pytest.approx(float(one.lower_bound), abs=1e-13)
        assert float(proof.upper_bound[i]) == pytest.approx(float(one.upper_bound), abs=1e-13)


HALF = torch.tensor([0.5, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": [0.5, 0.5]}, TypeError, r"model: expected a floating point tensor .*got list"),
        ({"model": torch.ones(3)}, ValueError, r"model: expected shape \(2,\), got \(3,\)"),
        (
            {"model": torch.tensor([0.9, 0.1])},
            ValueError,
            "model, x = 0: expected a number between the experts' extremes 0.4 and 0.6, got 0.9",
        ),
        ({"model": torch.tensor([0.5, math.nan])}, ValueError, "model, x = 1: .* got nan"),
        ({"model": torch.tensor([0.6, 0.6])}, ValueError, r"model: expected sum 1 .* Z = 1\.2"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: expected shape \(2,\)"),
        ({"weights": [1.0, 0.0]}, TypeError, "weights: expected a tensor, got list"),
        ({"weights": torch.tensor([0.7, 0.7])}, ValueError, "weights: expected non-negative"),
        ({"weights": torch.tensor([1.5, -0.5])}, ValueError, "weights: expected non-negative"),
        ({"mu": -1.0}, ValueError, "mu: expected finite numbers >= 0"),
        ({"mu": math.inf}, ValueError, "mu: expected finite numbers >= 0"),
        (
            {"mixtures": KLBall(0.01), "weights": torch.tensor([1.0, 0.0])},
            ValueError,
            "weights: expected an element of KLBall",
        ),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    experts = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    arguments = {"model": HALF, "weights": HALF} | change
    with pytest.raises(error, match=message):
        exact_certificate(experts, experts, **arguments)

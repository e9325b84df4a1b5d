"""Bounds on the exact game: their order, their definitions, and how the value moves."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustgate.game import Floor, KLBall, bounds, capacity, solve_exact

TOL = 1e-7


def rows(*entries):
    return torch.tensor(entries, dtype=torch.float64)


def divergence(p, q):
    return float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum())


@st.composite
def games(draw):
    """One to five domains and experts, D and K free, from near-equal to nearly disjoint."""
    points = draw(st.integers(2, 10))
    power = draw(st.sampled_from([0.1, 1.0, 6.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def distributions(count):
        weights = torch.rand(count, points, generator=generator, dtype=torch.float64).pow(power)
        weights = weights + 1e-4
        return weights / weights.sum(dim=1, keepdim=True)

    return distributions(draw(st.integers(1, 5))), distributions(draw(st.integers(1, 5)))


def assert_ordered(result, slack=2 * TOL):
    solution = result.solution
    chain = [
        result.floor,
        float(solution.lower_bound),
        float(solution.upper_bound),
        result.constant_gate,
        result.ceiling,
        result.misfit_bound,
    ]
    for left, right in itertools.pairwise(chain):
        assert left <= right + slack, chain
    assert float(solution.lower_bound) <= result.theorem3 + 1e-12
    assert result.theorem3 <= result.misfit_bound + 1e-12


@settings(max_examples=100, deadline=None)
@given(games())
def test_ordered(game):
    assert_ordered(bounds(*game, tol=TOL))


@pytest.mark.parametrize("mixtures", [Floor(0.2), KLBall(0.1)])
def test_ordered_over_a_smaller_set(mixtures):
    data = torch.distributions.Dirichlet(torch.ones(9, dtype=torch.float64)).sample((3,))
    experts = torch.distributions.Dirichlet(torch.ones(9, dtype=torch.float64)).sample((4,))
    result = bounds(data, experts, mixtures=mixtures, tol=TOL)
    assert_ordered(result)
    assert result.floor == pytest.approx(
        capacity(mixtures.vertices(3) @ data, tol=TOL).value
        if mixtures == Floor(0.2)
        else capacity(data, mixtures=mixtures, tol=TOL).value,
        abs=2 * TOL,
    )


@settings(max_examples=30, deadline=None)
@given(games(), st.randoms(use_true_random=False))
def test_order_and_repetition_of_domains_and_experts_do_not_matter(game, random):
    data, experts = game
    value = float(solve_exact(data, experts, tol=TOL).value)
    domains, names = list(range(len(data))), list(range(len(experts)))
    points = list(range(data.shape[1]))
    for order in (domains, names, points):
        random.shuffle(order)
    permuted = solve_exact(data[domains][:, points], experts[names][:, points], tol=TOL)
    assert float(permuted.value) == pytest.approx(value, abs=2 * TOL)
    again = solve_exact(torch.cat([data, data[:1]]), torch.cat([experts, experts]), tol=TOL)
    assert float(again.value) == pytest.approx(value, abs=2 * TOL)


@settings(max_examples=30, deadline=None)
@given(games(), st.integers(0, 2**31))
def test_another_expert_never_hurts_and_another_domain_never_helps(game, seed):
    data, experts = game
    value = float(solve_exact(data, experts, tol=TOL).value)
    generator = torch.Generator().manual_seed(seed)
    new = torch.rand(1, data.shape[1], generator=generator, dtype=torch.float64) + 1e-4
    new = new / new.sum()
    wider = solve_exact(data, torch.cat([experts, new]), tol=TOL)
    assert float(wider.value) <= value + 2 * TOL
    harder = solve_exact(torch.cat([data, new]), experts, tol=TOL)
    assert float(harder.value) >= value - 2 * TOL


@settings(max_examples=30, deadline=None)
@given(games())
def test_an_exact_expert_closes_its_misfit(game):
    data, experts = game
    before = bounds(data, experts, tol=TOL)
    after = bounds(data, torch.cat([experts, data[:1]]), tol=TOL)
    assert float(after.misfit[0]) <= 1e-14
    assert int(after.expert[0]) == len(experts) or float(before.misfit[0]) <= 1e-14
    assert after.ceiling <= before.ceiling + 2 * TOL
    # With an exact expert for every domain nothing but the capacity is left.
    closed = bounds(data, torch.cat([experts, data]), tol=TOL)
    assert float(closed.solution.value) == pytest.approx(closed.floor, abs=2 * TOL)
    assert closed.ceiling == pytest.approx(closed.floor, abs=3 * TOL)


def test_every_number_by_its_definition():
    data = rows([0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.1, 0.7])
    experts = rows([0.6, 0.2, 0.2], [0.15, 0.6, 0.25])
    result = bounds(data, experts, tol=1e-9)
    table = [[divergence(p, q) for q in experts] for p in data]
    assert result.misfit.tolist() == pytest.approx([min(row) for row in table], abs=1e-14)
    assert result.expert.tolist() == [row.index(min(row)) for row in table]
    assert result.floor == pytest.approx(capacity(data, tol=1e-9).value, abs=2e-9)
    union = math.log(sum(math.exp(min(row)) for row in table))
    assert result.misfit_bound == pytest.approx(union, abs=1e-14)
    # Theorem 3 is the payoff of the constant gate softmax(eps) against lambda*.
    sigma = torch.softmax(result.misfit, dim=0)
    model = sigma @ experts[result.expert]
    payoff = sum(
        weight * divergence(p, model)
        for weight, p in zip(result.solution.mixture.tolist(), data, strict=True)
    )
    assert result.theorem3 == pytest.approx(payoff, abs=1e-12)
    gate = result.prior @ experts
    assert result.constant_gate == pytest.approx(max(divergence(p, gate) for p in data), abs=1e-12)
    # The ceiling maximises a concave function of the mixture: no drawn mixture exceeds it.
    draws = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((500,))
    values = [
        float(mixture @ result.misfit)
        + sum(
            w * divergence(p, mixture @ data) for w, p in zip(mixture.tolist(), data, strict=True)
        )
        for mixture in draws
    ]
    assert result.ceiling - 0.01 <= max(values) <= result.ceiling + 1e-12


def test_a_gate_can_remove_misfit_that_a_constant_gate_pays():
    data = rows([0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5])
    result = bounds(data, rows([0.7, 0.3, 0, 0], [0, 0, 0.4, 0.6]), tol=1e-9)
    assert result.misfit.tolist() == pytest.approx([0.0872, 0.0204], abs=5e-5)
    assert float(result.solution.value) == pytest.approx(math.log(2), abs=1e-9)
    assert result.constant_gate == pytest.approx(0.7474981, abs=5e-8)


def test_a_domain_that_no_single_expert_covers():
    data = rows([0.5, 0.5])
    result = bounds(data, torch.eye(2))
    assert result.misfit.tolist() == [math.inf]
    assert result.ceiling == result.theorem3 == result.misfit_bound == math.inf
    assert float(result.solution.value) == pytest.approx(0.0, abs=1e-12)
    assert result.constant_gate == pytest.approx(0.0, abs=1e-12)  # uniform weights fit


@pytest.mark.parametrize("power", [100, 200, 300])
def test_misfits_of_hundreds_of_nats(power):
    # sigma of the second domain is 10^-power, and its share of the last point 10^-(power + 30).
    data = rows([1, 0, 0], [0, 1 - 1e-30, 1e-30])
    experts = rows([10.0**-power, 1 - 10.0**-power, 0], [0, 1 - 1e-30, 1e-30])
    result = bounds(data, experts)
    misfit = power * math.log(10)
    assert result.misfit.tolist() == pytest.approx([misfit, 0.0], rel=1e-12)
    assert float(result.solution.value) == pytest.approx(misfit, abs=1e-6)
    for bound in (result.theorem3, result.ceiling, result.misfit_bound):
        assert bound == pytest.approx(misfit, abs=1e-6)


def test_batches_are_refused():
    with pytest.raises(ValueError, match=r"data_probs: expected two dimensions, got shape \(2, 1"):
        bounds(torch.ones(2, 1, 1), torch.ones(1, 1))

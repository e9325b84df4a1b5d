"""The exact game against a general-purpose convex solver, which is given the primal problem.

    min t   subject to   KL(p_j || m) <= t,   lo <= m <= hi,   sum m = 1

by an interior-point method for exponential cones (Clarabel, through cvxpy): no mixture, no
multiplier, no clipping.
"""

import cvxpy as cp
import numpy as np
import pytest
import torch

from robustgate.game import Box, KLBall, capacity, exact_certificate, solve_exact

KINDS = ["many experts", "one expert", "near-equal experts", "sparse data", "near-equal domains"]


def instance(seed):
    """One to five domains and experts on two to twelve points, no expert below about 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    kind = KINDS[seed % len(KINDS)]
    domains, experts = torch.randint(1, 6, (2,), generator=generator).tolist()
    points = int(torch.randint(2, 13, (1,), generator=generator))
    data = torch.rand(domains, points, generator=generator, dtype=torch.float64).pow(3) + 1e-4
    pi = torch.rand(experts, points, generator=generator, dtype=torch.float64).pow(2) + 1e-3
    if kind == "one expert":
        pi = pi[:1]
    elif kind == "near-equal experts":
        pi = pi[:1] + 1e-3 * pi
    elif kind == "sparse data":
        data = torch.where(data < data.median(), 0.0, data)
        data[:, 0] += 1e-3
    elif kind == "near-equal domains":
        data = data[:1] + 1e-2 * data
    return data / data.sum(dim=1, keepdim=True), pi / pi.sum(dim=1, keepdim=True)


def primal(data, experts, worst_case):
    """min over feasible m of ``worst_case`` of the vector of divergences."""
    lower, upper = experts.amin(dim=0).numpy(), experts.amax(dim=0).numpy()
    model = cp.Variable(len(lower))
    losses = []
    for p in data.numpy():
        seen = np.flatnonzero(p)
        losses.append(p[seen] @ np.log(p[seen]) - p[seen] @ cp.log(model[seen]))
    objective, limits = worst_case(losses)
    problem = cp.Problem(
        cp.Minimize(objective),
        [model >= lower, model <= upper, cp.sum(model) == 1, *limits],
    )
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return problem.value


def largest(losses):
    level = cp.Variable()
    return level, [loss <= level for loss in losses]


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_a_convex_solver(seed):
    data, experts = instance(seed)
    solution = solve_exact(data, experts, tol=1e-8)
    assert float(solution.value) == pytest.approx(primal(data, experts, largest), abs=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_every_mixtures_lower_bound_is_the_value_of_its_own_program(seed):
    data, experts = instance(seed)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(data), generator=generator, dtype=torch.float64)
    weights = weights / weights.sum()
    feasible = solve_exact(data, experts).model
    proof = exact_certificate(data, experts, feasible, weights)
    fixed = primal(
        data, experts, lambda losses: (sum(w * x for w, x in zip(weights, losses, strict=True)), [])
    )
    assert float(proof.lower_bound) == pytest.approx(fixed, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_game_over_a_box(seed):
    # KL(p_lambda || m) is convex in lambda: its maximum over the box is at a vertex.
    data, experts = instance(seed + 100)
    domains = len(data)
    low, high = [0.5 / domains] * domains, [min(1.0, 1.4 / domains)] * domains
    box = Box(low, high)
    solution = solve_exact(data, experts, mixtures=box, tol=1e-8)
    assert not solution.linearised
    expected = primal(box.vertices(domains) @ data, experts, largest)
    assert float(solution.value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_the_linearised_game_over_a_ball(seed):
    # sigma(l) = min_tau tau log sum c e^{l / tau} + tau radius, with tau a variable of the cone
    # program: sum_d c_d exp((l_d - level) / tau) <= 1, value level + tau radius.
    data, experts = instance(seed + 200)
    domains, radius = len(data), 0.07

    def ball(losses):
        level, tau, shares = cp.Variable(), cp.Variable(nonneg=True), cp.Variable(domains)
        above = cp.Variable(domains)
        limits = [loss - level <= part for loss, part in zip(losses, above, strict=True)]
        cones = [cp.ExpCone(above[d], tau, shares[d]) for d in range(domains)]
        return level + tau * radius, [*limits, *cones, cp.sum(shares) <= tau * domains]

    solution = solve_exact(data, experts, mixtures=KLBall(radius), tol=1e-8)
    assert solution.linearised
    assert KLBall(radius).contains(solution.mixture)
    assert float(solution.value) == pytest.approx(primal(data, experts, ball), abs=1e-6)


def test_capacity_is_an_exact_game_without_bounds():
    # Experts that put everything on one point each leave m free: lo = 0, hi = 1.
    data, _ = instance(7)
    solution = solve_exact(data, torch.eye(data.shape[1], dtype=torch.float64), tol=1e-9)
    assert float(solution.value) == pytest.approx(capacity(data, tol=1e-9).value, abs=2e-9)
    assert float(solution.mu) == pytest.approx(1.0, abs=1e-12)

"""The robust prior against solvers that share no code with it.

Kelley's cutting planes on the epigraph: tangents of the domain losses, written in numpy, and
linear programs solved by HiGHS. The optimum of the linear program is a lower bound, the best prior
seen an upper bound; both are proofs of their own.
"""

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from scipy.special import logsumexp

from robustgate.game import (
    Box,
    CVaR,
    Floor,
    KLBall,
    MixtureSet,
    Simplex,
    Vertices,
    certificate,
    robust_prior,
)


def loss_and_gradient(matrix, prior):
    """Mean NLL of the mixture on one domain and its gradient, in numpy."""
    with np.errstate(divide="ignore"):
        log_mix = logsumexp(matrix + np.log(prior), axis=1)
    return -log_mix.mean(), -np.exp(matrix - log_mix[:, None]).mean(axis=0)


def cutting_planes(log_probs, baseline, vertices, tol=1e-8, rounds=400):
    """Return (lower, upper) on min_w max_j vertices[j] . (l(w) - baseline)."""
    matrices = [matrix.numpy() for matrix in log_probs.values()]
    experts = matrices[0].shape[1]
    prior, upper, lower = np.full(experts, 1 / experts), math.inf, -math.inf
    rows, right = [], []
    for _ in range(rounds):
        losses, gradients = zip(*(loss_and_gradient(m, prior) for m in matrices), strict=True)
        values = vertices @ (np.array(losses) - baseline)
        upper = min(upper, values.max())
        if upper - lower <= tol:
            break
        slopes = vertices @ np.array(gradients)
        for value, slope in zip(values, slopes, strict=True):  # value + slope.(v - prior) <= t
            rows.append(np.append(slope, -1.0))
            right.append(slope @ prior - value)
        answer = linprog(
            np.append(np.zeros(experts), 1.0),
            A_ub=np.array(rows),
            b_ub=np.array(right),
            A_eq=[np.append(np.ones(experts), 0.0)],
            b_eq=[1.0],
            bounds=[(0, 1)] * experts + [(None, None)],
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        assert answer.status == 0
        lower = max(lower, answer.fun)
        # Tangents exist only inside the simplex; half-way steps keep the method from bouncing.
        prior = 0.5 * prior + 0.5 * np.clip(answer.x[:-1], 0.0, 1.0)
        prior = prior / prior.sum()
    return lower, upper


def instance(seed):
    """Two to four domains and experts of random competence, at one of three scales."""
    generator = torch.Generator().manual_seed(seed)
    domains, experts = torch.randint(2, 5, (2,), generator=generator).tolist()
    scale = (0.3, 2.0, 10.0)[seed % 3]
    log_probs = {}
    for d in range(domains):
        documents = int(torch.randint(1, 40, (1,), generator=generator))
        skill = torch.randn(experts, generator=generator, dtype=torch.float64)
        noise = torch.randn(documents, experts, generator=generator, dtype=torch.float64)
        log_probs[f"d{d}"] = scale * (skill + noise) - 200
    return log_probs


@pytest.mark.parametrize("seed", range(24))
def test_agrees_with_cutting_planes(seed):
    log_probs = instance(seed)
    solution = robust_prior(log_probs, tol=1e-8)
    lower, upper = cutting_planes(
        log_probs, solution.baseline.numpy(), np.eye(len(log_probs)), tol=1e-7
    )
    assert upper - lower <= 1e-6, "the independent solver did not converge"
    # Two valid brackets of one number overlap; 1e-9 is HiGHS' feasibility tolerance times scale.
    assert solution.lower_bound <= upper + 1e-9
    assert solution.upper_bound >= lower - 1e-9
    assert abs(solution.value - upper) <= 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_sequential_quadratic_programming(seed):
    log_probs = instance(seed)
    solution = robust_prior(log_probs)
    matrices = [matrix.numpy() for matrix in log_probs.values()]
    baseline = solution.baseline.numpy()
    experts = matrices[0].shape[1]

    def slack(x):
        return x[-1] - np.array([loss_and_gradient(m, x[:-1])[0] for m in matrices]) + baseline

    answer = minimize(
        lambda x: x[-1],
        np.append(np.full(experts, 1 / experts), 20.0),
        jac=lambda x: np.append(np.zeros(experts), 1.0),
        bounds=[(1e-9, 1)] * experts + [(None, None)],
        constraints=[
            {"type": "eq", "fun": lambda x: x[:-1].sum() - 1},
            {"type": "ineq", "fun": slack},
        ],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert answer.success
    # SLSQP's point is feasible to about 1e-8 and optimal to its ftol: 1e-6 leaves room for both.
    assert solution.value == pytest.approx(answer.fun, abs=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_exponentiated_gradient_and_em(seed):
    log_probs = instance(seed)
    newton = robust_prior(log_probs)
    simple = robust_prior(log_probs, method="first-order", tol=1e-3)
    assert simple.converged
    assert simple.lower_bound <= newton.upper_bound
    assert simple.upper_bound >= newton.lower_bound
    assert abs(simple.value - newton.value) <= 1e-3


class ExpectedShortfall(MixtureSet):
    """CVaR once more, one domain after the other: a set a user might write."""

    def __init__(self, alpha, domains):
        self.cap = 1 / (alpha * domains)

    def worst_case(self, losses):
        mixture, left = torch.zeros_like(losses), 1.0
        for d in losses.argsort(descending=True).tolist():
            mixture[d] = min(self.cap, left)
            left -= float(mixture[d])
        return mixture @ losses, mixture

    def mirror_step(self, mixture, losses, step):
        weights = torch.softmax(mixture.log() + step * losses, dim=0)
        for _ in range(len(losses)):  # cap, and give the excess to the others in proportion
            capped = weights >= self.cap
            free = weights[~capped].sum()
            room = 1.0 - self.cap * int(capped.sum())
            weights = torch.where(capped, self.cap, weights * room / free)
        return weights

    def contains(self, mixture, tolerance=1e-9):
        return Simplex().contains(mixture, tolerance) and bool(
            (mixture <= self.cap + tolerance).all()
        )

    def vertices(self, domains):
        """Every vertex, by support functions of random directions: enough for four domains."""
        directions = torch.randn(400, domains, dtype=torch.float64)
        return torch.stack([self.support(x)[1] for x in directions]).unique(dim=0)


def four_domains():
    return {
        f"d{d}": 2 * torch.randn(25, 3, dtype=torch.float64) + torch.randn(3) * 2 - 50
        for d in range(4)
    }


@pytest.mark.parametrize("alpha", [0.4, 0.6, 0.8])
def test_another_mixture_set_needs_no_change_of_the_solver(alpha):
    log_probs = four_domains()
    mixtures = ExpectedShortfall(alpha, 4)
    solution = robust_prior(log_probs, mixtures=mixtures)
    assert solution.converged
    assert mixtures.contains(solution.mixture)
    lower, upper = cutting_planes(
        log_probs, solution.baseline.numpy(), mixtures.vertices(4).numpy(), tol=1e-7
    )
    assert upper - lower <= 1e-6
    assert solution.value == pytest.approx(upper, abs=2e-6)
    simple = robust_prior(log_probs, mixtures=mixtures, method="first-order", tol=1e-3)
    assert abs(simple.value - solution.value) <= 1e-3
    assert robust_prior(log_probs, mixtures=CVaR(alpha)).value == pytest.approx(
        solution.value, abs=2e-6
    )


def test_expected_shortfall_runs_from_the_pooled_mean_to_the_worst_case():
    log_probs = four_domains()
    full = robust_prior(log_probs)
    narrow = robust_prior(log_probs, mixtures=CVaR(0.25))  # cap 1: the simplex
    assert narrow.value == pytest.approx(full.value, abs=1e-6)
    wide = robust_prior(log_probs, mixtures=CVaR(1.0))  # only the uniform mixture
    pooled = robust_prior({"all": torch.cat(list(log_probs.values()))}, baseline="raw")
    assert wide.value == pytest.approx(pooled.value - float(full.baseline.mean()), abs=2e-6)


SETS = {
    "floor": Floor(0.1),
    "box": Box([0.1, 0.0, 0.0, 0.2], [0.5, 0.4, 1.0, 0.6]),
    "cvar": CVaR(0.6),
    "vertices": Vertices([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.8, 0.0], [0.0, 0.0, 0.5, 0.5]]),
}


@pytest.mark.parametrize("name", SETS)
def test_every_polytope_agrees_with_cutting_planes(name):
    log_probs, mixtures = four_domains(), SETS[name]
    solution = robust_prior(log_probs, mixtures=mixtures, tol=1e-8)
    assert mixtures.contains(solution.mixture)
    lower, upper = cutting_planes(
        log_probs, solution.baseline.numpy(), mixtures.vertices(4).numpy(), tol=1e-7
    )
    assert upper - lower <= 1e-6
    assert solution.value == pytest.approx(upper, abs=2e-6)
    proof = certificate(log_probs, solution.prior, solution.mixture, mixtures=mixtures)
    assert proof.upper_bound == pytest.approx(solution.upper_bound, abs=1e-12)
    assert proof.gap <= 1e-8 + 1e-12


@pytest.mark.parametrize("radius", [0.01, 0.05, 0.3])
def test_a_ball_agrees_with_a_convex_program(radius):
    # sigma(l) = min_tau tau log mean e^{l / tau} + tau radius, tau a variable; the losses are
    # concave functions of the prior, so this is one convex program.
    log_probs = four_domains()
    solution = robust_prior(log_probs, mixtures=KLBall(radius), tol=1e-8)
    assert solution.converged
    assert KLBall(radius).contains(solution.mixture)
    prior, level, tau = cp.Variable(3, nonneg=True), cp.Variable(), cp.Variable(nonneg=True)
    above, shares = cp.Variable(4), cp.Variable(4)
    limits = [cp.sum(prior) == 1, cp.sum(shares) <= 4 * tau]
    for d, (matrix, offset) in enumerate(
        zip(log_probs.values(), solution.baseline.tolist(), strict=True)
    ):
        top = matrix.amax(dim=1, keepdim=True)
        scaled = (matrix - top).exp().numpy()
        loss = -cp.sum(cp.log(scaled @ prior)) / len(matrix) - float(top.mean()) - offset
        limits += [loss - level <= above[d], cp.ExpCone(above[d], tau, shares[d])]
    problem = cp.Problem(cp.Minimize(level + tau * radius), limits)
    problem.solve(solver=cp.CLARABEL)
    assert solution.value == pytest.approx(problem.value, abs=1e-6)

"""The exact game: values known in closed form, options, batches, bad input."""

import math

import pytest
import torch

from robustgate.game import (
    Box,
    CVaR,
    Floor,
    KLBall,
    Simplex,
    Vertices,
    capacity,
    exact_certificate,
    solve_exact,
)

TOL = 1e-10


def rows(*entries):
    return torch.tensor(entries, dtype=torch.float64)


def divergence(p, q):
    return float((torch.xlogy(p, p) - torch.xlogy(p, q)).sum())


def random_rows(*shape, seed=0, least=1e-3):
    """Distributions without very small entries."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(*shape, generator=generator, dtype=torch.float64).pow(2) + least
    return weights / weights.sum(dim=-1, keepdim=True)


HALVES = ([0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5])


# ---------------------------------------------------------------- known answers


def test_exact_experts_reach_the_capacity_with_a_constant_gate():
    data = random_rows(3, 8)
    solution = solve_exact(data, data, tol=TOL)
    channel = capacity(data, tol=TOL)
    assert float(solution.value) == pytest.approx(channel.value, abs=2 * TOL)
    # Constant weights, those of Blahut-Arimoto: the model is their mixture of the experts.
    # The value is flat to second order at its optimum: sqrt(1e-10) in the model.
    torch.testing.assert_close(solution.model, channel.mixture @ data, rtol=0, atol=1e-5)
    constant = exact_certificate(data, data, channel.mixture @ data, channel.mixture)
    assert float(constant.upper_bound) == pytest.approx(channel.value, abs=2 * TOL)


@pytest.mark.parametrize("domains", [1, 2, 5])
def test_disjoint_exact_domains(domains):
    data = torch.eye(domains, dtype=torch.float64)
    solution = solve_exact(data, data, tol=TOL)
    assert float(solution.value) == pytest.approx(math.log(domains), abs=TOL)
    assert solution.mixture.tolist() == pytest.approx([1 / domains] * domains, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_never_above_the_misfit_bound(seed):
    data, experts = random_rows(4, 6, seed=seed), random_rows(3, 6, seed=seed + 100)
    misfit = [min(divergence(p, q) for q in experts) for p in data]
    bound = math.log(sum(math.exp(epsilon) for epsilon in misfit))
    assert float(solve_exact(data, experts).lower_bound) <= bound


def test_disjoint_domains_covered_to_a_factor_d_cost_no_more_than_log_d():
    # p_d <= 3 pi_d pointwise, on three disjoint supports of two points.
    experts = torch.zeros(3, 6, dtype=torch.float64)
    data = torch.zeros(3, 6, dtype=torch.float64)
    for d, (share, skew) in enumerate([(0.5, 0.9), (0.2, 0.45), (0.75, 0.75)]):
        experts[d, 2 * d : 2 * d + 2] = rows(share, 1 - share)
        data[d, 2 * d : 2 * d + 2] = rows(skew, 1 - skew)
    assert bool((data <= 3 * experts).all())
    assert float(solve_exact(data, experts, tol=TOL).value) == pytest.approx(math.log(3), abs=TOL)


def test_identical_experts_leave_no_choice():
    data, expert = random_rows(3, 7, seed=1), random_rows(1, 7, seed=2)
    solution = solve_exact(data, expert.expand(4, 7), tol=TOL)
    worst = max(divergence(p, expert[0]) for p in data)
    assert float(solution.value) == pytest.approx(worst, abs=TOL)
    torch.testing.assert_close(solution.model, expert[0], rtol=0, atol=1e-15)
    assert bool((solution.gate == 0.25).all())


def test_responsibilities_are_no_gate_of_mass_one():
    experts = random_rows(4, 9, seed=3)
    mean = experts.mean(dim=0)
    model = ((experts / experts.sum(dim=0)) * experts).sum(dim=0)
    chi2 = ((experts - mean).square() / mean).sum(dim=1)
    assert float(model.sum()) == pytest.approx(1 + float(chi2.mean()), abs=1e-14)
    with pytest.raises(ValueError, match=r"model: expected sum 1 .* got the mass Z = 1\."):
        exact_certificate(experts, experts, model, torch.full((4,), 0.25))


def test_a_misfit_the_gate_pays_for():
    solution = solve_exact(rows(*HALVES), rows([0.9, 0.1, 0, 0], [0, 0, 0.5, 0.5]), tol=TOL)
    root = math.sqrt(0.1)
    assert float(solution.value) == pytest.approx(math.log((1 + root) / (1.8 * root)), abs=TOL)
    assert float(solution.value) == pytest.approx(0.8382758, abs=5e-8)
    # A gap of 1e-10 leaves sqrt(1e-10) in the mixture and the multiplier.
    assert float(solution.mixture[0]) == pytest.approx(1 - root, abs=1e-5)
    assert float(solution.mu) == pytest.approx(0.7312376, abs=1e-5)


def test_a_misfit_the_gate_removes():
    # eps = (.0872, .0204), and yet the value is that of exact experts.
    solution = solve_exact(rows(*HALVES), rows([0.7, 0.3, 0, 0], [0, 0, 0.4, 0.6]), tol=TOL)
    assert float(solution.value) == pytest.approx(math.log(2), abs=TOL)
    assert float(solution.mu) == 1.0


def test_one_domain_with_a_multiplier_above_one():
    data, experts = rows([0.3, 0.3, 0.4]), rows([0.6, 0.1, 0.3], [0.5, 0.4, 0.1])
    solution = solve_exact(data, experts, tol=TOL)
    assert solution.model.tolist() == pytest.approx([0.5, 3 / 14, 2 / 7], abs=1e-12)
    assert float(solution.mu) == pytest.approx(1.4, abs=1e-12)
    assert float(solution.value) == pytest.approx(0.0822829, abs=5e-8)


def test_a_constraint_that_does_not_bind():
    solution = solve_exact(rows([1.0, 0, 0]), rows([0.5, 0.3, 0.2], [0.4, 0.2, 0.4]), tol=TOL)
    assert float(solution.mu) == 0.0
    assert float(solution.value) == pytest.approx(math.log(2), abs=1e-15)
    # .1 is missing beside .5 + .2 + .2, shared out like the widths .1 and .2.
    assert solution.model.tolist() == pytest.approx([0.5, 0.7 / 3, 0.8 / 3], abs=1e-15)
    assert float(solution.lower_bound) == pytest.approx(math.log(2), abs=1e-15)


def test_more_domains_than_experts():
    data = rows([0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.1, 0.7])
    solution = solve_exact(data, data[:2], tol=TOL)
    assert float(solution.value) == pytest.approx(0.5826853, abs=5e-8)
    assert float(solution.mu) == pytest.approx(0.375, abs=1e-6)
    assert solution.model.tolist() == pytest.approx([8 / 15, 4 / 15, 1 / 5], abs=1e-6)
    assert solution.mixture.tolist() == pytest.approx([0, 0, 1], abs=1e-6)


# ---------------------------------------------------------------- solution object


def test_solution_reports_itself():
    data, experts = random_rows(3, 8), random_rows(4, 8, seed=5)
    solution = solve_exact(data, experts, tol=1e-8)
    assert bool(solution.converged)
    assert float(solution.gap) <= 1e-8
    assert float(solution.value) == float(solution.upper_bound) == float(solution.losses.amax())
    assert not solution.linearised
    assert float(solution.model.sum()) == pytest.approx(1.0, abs=1e-14)
    assert bool((solution.model >= experts.amin(dim=0)).all())
    assert bool((solution.model <= experts.amax(dim=0)).all())
    losses = [divergence(p, solution.model) for p in data]
    assert solution.losses.tolist() == pytest.approx(losses, abs=1e-13)
    with pytest.raises(AttributeError):
        solution.model = data[0]


def test_gate_realises_the_model():
    data, experts = random_rows(3, 8), random_rows(4, 8, seed=5)
    solution = solve_exact(data, experts)
    assert solution.gate.shape == (4, 8)
    torch.testing.assert_close(
        (solution.gate * experts).sum(dim=0), solution.model, rtol=1e-12, atol=0
    )
    assert solution.gate is solution.gate  # computed once


def test_unreached_tolerance_warns_and_keeps_the_bounds():
    data, experts = random_rows(4, 8), random_rows(4, 8, seed=5)
    exact = solve_exact(data, experts, tol=TOL)
    with pytest.warns(RuntimeWarning, match="solve_exact: the certified gap .* after 1 iteration"):
        early = solve_exact(data, experts, tol=TOL, max_iterations=1)
    assert not bool(early.converged)
    assert float(early.lower_bound) <= float(exact.upper_bound)
    assert float(early.upper_bound) >= float(exact.lower_bound)
    assert float(early.gap) > TOL


def test_a_batch_is_its_members():
    # Experts of one game serve a whole row of the batch: leading dimensions broadcast.
    data, experts = random_rows(3, 2, 4, 6), random_rows(2, 3, 6, seed=7)
    batch = solve_exact(data, experts, tol=1e-9)
    assert batch.model.shape == (3, 2, 6)
    assert batch.mixture.shape == (3, 2, 4)
    assert batch.gate.shape == (3, 2, 3, 6)
    assert bool(batch.converged.all())
    for i in range(3):
        for j in range(2):
            one = solve_exact(data[i, j], experts[j], tol=1e-9)
            assert float(batch.value[i, j]) == pytest.approx(float(one.value), abs=1e-9)
            # Strictly convex in the model: KL >= |m - m'|^2 / 2, so 1e-9 leaves sqrt(2e-9).
            torch.testing.assert_close(batch.model[i, j], one.model, rtol=0, atol=5e-5)


def test_a_batch_with_and_without_a_binding_constraint():
    data = rows([[1.0, 0, 0]], [[0.3, 0.3, 0.4]])
    experts = rows(
        [[0.5, 0.3, 0.2], [0.4, 0.2, 0.4]],
        [[0.6, 0.1, 0.3], [0.5, 0.4, 0.1]],
    )
    solution = solve_exact(data, experts, tol=TOL)
    assert solution.mu.tolist() == pytest.approx([0.0, 1.4], abs=1e-12)
    assert solution.value.tolist() == pytest.approx([math.log(2), 0.0822829], abs=5e-8)


def test_float32_input_is_solved_in_float64():
    data = random_rows(3, 8).float()
    solution = solve_exact(data, data)
    assert bool(solution.converged)
    assert solution.model.dtype == solution.mixture.dtype == torch.float64


# ---------------------------------------------------------------- mixture sets


def test_a_floor_makes_domains_of_its_vertices():
    # BSC(.1) with weights in [.25, .75]: the extreme mixtures are BSC(.1 + .8 * .25).
    data = rows([0.9, 0.1], [0.1, 0.9])
    solution = solve_exact(data, data, mixtures=Floor(0.25), tol=TOL)
    entropy = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert float(solution.value) == pytest.approx(math.log(2) - entropy, abs=TOL)
    assert not solution.linearised
    assert solution.mixture.tolist() == pytest.approx([0.5, 0.5], abs=1e-6)


def test_a_ball_is_solved_linearised_and_says_so():
    # The least favourable mixture of BSC(.1), (.5, .5), is the centre of the ball: the linearised
    # value is the capacity, while the game itself is worth less.
    data = rows([0.9, 0.1], [0.1, 0.9])
    solution = solve_exact(data, data, mixtures=KLBall(0.05), tol=TOL)
    assert solution.linearised
    assert float(solution.value) == pytest.approx(0.3680642, abs=5e-8)
    assert KLBall(0.05).contains(solution.mixture)


@pytest.mark.parametrize(
    "mixtures",
    [
        Floor(0.1),
        Box([0.1, 0.0, 0.2], [0.5, 0.6, 0.4]),
        CVaR(0.6),
        Vertices([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 0.1, 0.9]]),
    ],
)
def test_the_value_over_a_polytope_is_that_of_its_vertices_as_domains(mixtures):
    data, experts = random_rows(3, 10), random_rows(2, 10, seed=4)
    solution = solve_exact(data, experts, mixtures=mixtures, tol=1e-9)
    corners = solve_exact(mixtures.vertices(3) @ data, experts, tol=1e-9)
    assert float(solution.value) == pytest.approx(float(corners.value), abs=1e-9)
    assert mixtures.contains(solution.mixture)
    assert float(solution.value) <= float(solve_exact(data, experts).value) + 1e-6
    # No mixture of the set does more harm to the model than the bound says.
    weights = torch.distributions.Dirichlet(torch.ones(len(solution.vertices)).double())
    for mixture in weights.sample((50,)) @ solution.vertices:
        assert divergence(mixture @ data, solution.model) <= float(solution.upper_bound) + 1e-12


def test_a_box_of_many_domains_is_linearised():
    data = random_rows(12, 6)
    box = Box([0.0] * 12, [0.2] * 12)
    solution = solve_exact(data, data, mixtures=box)
    assert solution.linearised
    assert bool(solution.converged)
    assert box.contains(solution.mixture)
    assert float(solution.value) <= float(solve_exact(data, data).value) + 1e-6


def test_the_simplex_given_by_its_vertices():
    data, experts = random_rows(3, 10), random_rows(2, 10, seed=4)
    corners = Vertices(torch.eye(3).tolist())
    full = solve_exact(data, experts, mixtures=Simplex())
    assert float(solve_exact(data, experts, mixtures=corners).value) == float(full.value)


# ---------------------------------------------------------------- bad input


def test_an_infinite_value_is_refused_with_domain_and_point():
    data, experts = rows([0.5, 0.5, 0.0], [0.2, 0.3, 0.5]), rows([0.5, 0.5, 0.0], [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"x = 2 probability 0, where domain 1 has 0\.5.*infinite"):
        solve_exact(data, experts)
    with pytest.raises(ValueError, match=r"expert_probs, game \[1\]: .* x = 2 .* domain 1"):
        solve_exact(data, torch.stack([torch.full((2, 3), 1 / 3).double(), experts]))


@pytest.mark.parametrize(
    ("data", "experts", "error", "message"),
    [
        ([[1.0]], torch.ones(1, 1), TypeError, "data_probs: expected a floating point tensor"),
        (torch.ones(1, 1), torch.ones(1, 1).long(), TypeError, "expert_probs: .* got torch.int64"),
        (torch.ones(1), torch.ones(1, 1), ValueError, r"data_probs: expected shape \[D, X\]"),
        (torch.ones(1, 1), torch.ones(0, 1), ValueError, r"expert_probs: expected shape \[K, X\]"),
        (rows([1.0]), rows([0.5, 0.5]), ValueError, "expert_probs: expected X = 1 points .* got 2"),
        (rows([0.6, 0.6]), rows([0.5, 0.5]), ValueError, "data_probs, row 0: .* got the sum 1.2"),
        (
            torch.full((2, 1, 2), 0.5),
            torch.full((3, 1, 2), 0.5),
            ValueError,
            r"expert_probs: expected leading dimensions that broadcast with \(2,\).* got \(3,\)",
        ),
        (
            rows([[0.5, 0.5]], [[0.9, 0.2]]),
            rows([0.5, 0.5]),
            ValueError,
            r"data_probs, game \[1\], row 0",
        ),
    ],
)
def test_bad_probabilities_are_refused(data, experts, error, message):
    with pytest.raises(error, match=message):
        solve_exact(data, experts)


@pytest.mark.parametrize("options", [{"tol": 0.0}, {"tol": math.nan}, {"max_iterations": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        solve_exact(torch.eye(2), torch.eye(2), **options)


def test_a_set_of_another_number_of_domains_is_refused():
    with pytest.raises(ValueError, match="expected 3 domains as in Box"):
        solve_exact(torch.eye(2), torch.eye(2), mixtures=Box([0.0] * 3, [1.0] * 3))

"""Newton's method for the exact game: curvature, few iterations, hard games."""

import pytest
import torch

from robustgate.game import Simplex, Vertices, solve_exact
from robustgate.game.barrier import Slope, barrier_newton
from robustgate.game.finite import FiniteGame


def distributions(*shape, seed, spread):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.softmax(spread * noise, dim=-1)


def best_response(game, weights):
    reach = torch.full(weights.shape[:-1], 2.0, dtype=torch.float64)  # no multiplier of 0 here
    model, _ = game.best_response(weights, reach, None)
    return model, game.losses(model)


@pytest.mark.parametrize("mixtures", [Simplex(), Vertices([[0.6, 0.2, 0.2], [0.1, 0.7, 0.2]])])
@pytest.mark.parametrize("seed", range(6))
def test_curvature_is_minus_the_derivative_of_the_losses(mixtures, seed):
    data = distributions(3, 12, seed=seed, spread=1.0)
    experts = distributions(2, 12, seed=seed + 50, spread=1.0)
    game = FiniteGame(data, experts, mixtures)
    count = len(game.vertices)
    weights = torch.softmax(torch.arange(count, dtype=torch.float64), dim=0)
    model, _ = best_response(game, weights)
    curvature = game.curvature(weights, model)
    assert float(torch.linalg.eigvalsh(curvature).amin()) >= -1e-12
    for j in range(count):
        step = torch.zeros(count, dtype=torch.float64)
        step[j], step[j - 1] = 1e-6, -1e-6  # along the simplex
        ahead, behind = (best_response(game, weights + sign * step)[1] for sign in (1, -1))
        slope = (ahead - behind) / 2e-6
        # Central differences at 1e-6: an error of 1e-12 from curvature, 1e-10 from rounding.
        torch.testing.assert_close(
            slope, -(curvature[:, j] - curvature[:, j - 1]), rtol=1e-6, atol=1e-8
        )


def test_it_maximises_a_function_it_knows_nothing_of():
    # phi = sum_j c_j q_j - q_j^2 / 2, whose maximum on the simplex is a projection of c.
    target = torch.tensor([[0.5, 0.4, 0.1, -0.3], [2.0, 0.0, 0.0, 0.0]], dtype=torch.float64)

    def evaluate(weights):
        losses = target - weights
        # As phi is no minimum over models, its tangent is what bounds it: l made so that q.l = phi.
        value = (target * weights - weights.square() / 2).sum(dim=-1)
        losses = losses + (value - (weights * losses).sum(dim=-1)).unsqueeze(-1)
        return Slope(losses, value, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))

    start = torch.full((2, 4), 0.25, dtype=torch.float64)
    weights, iterations = barrier_newton(evaluate, start, 1e-12, 200)
    expected = torch.tensor([[0.5, 0.4, 0.1, 0.0], [1.0, 0, 0, 0]], dtype=torch.float64)
    # A gap of 1e-12 is a squared distance of 2e-12.
    torch.testing.assert_close(weights, expected, rtol=0, atol=2e-6)
    assert int(iterations.amax()) < 60


def test_the_last_digits_cost_few_iterations():
    # Counted, not timed. Forty games of near-equal domains to 1e-10: Blahut-Arimoto alone tries
    # 3,300 mixtures on average; here it stops at 100, and Newton's method ends by 122.
    data = distributions(40, 6, 40, seed=0, spread=0.1)
    experts = distributions(40, 8, 40, seed=1, spread=0.1)
    solution = solve_exact(data, experts, tol=1e-10)
    assert bool(solution.converged.all())
    assert int(solution.iterations.amax()) > 100
    assert int(solution.iterations.amax()) <= 150


@pytest.mark.parametrize("power", [0.3, 3.0, 20.0])
@pytest.mark.parametrize("seed", range(4))
def test_sparse_and_extreme_games_converge(power, seed):
    # Twenty games each: probabilities down to 1e-60, holes in data and experts.
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, kept):
        mass = torch.rand(20, rows, 9, generator=generator, dtype=torch.float64).pow(power)
        return mass * (torch.rand(20, rows, 9, generator=generator) < kept)

    data, experts = draw(5, 0.6), draw(4, 0.7)
    data[..., 0] += 1e-3
    experts = experts + 1e-9 * (experts.amax(dim=1, keepdim=True) == 0)
    data, experts = (part / part.sum(dim=-1, keepdim=True) for part in (data, experts))
    solution = solve_exact(data, experts, tol=1e-7)
    assert bool(solution.converged.all())
    assert int(solution.iterations.amax()) <= 200
    realised = (solution.gate * experts).sum(dim=-2)
    torch.testing.assert_close(realised, solution.model, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:solve_exact. the certified gap:RuntimeWarning")
@pytest.mark.parametrize("seed", range(4))
def test_an_unreachable_tolerance_ends_at_rounding_level(seed):
    data, experts = (distributions(n, 12, seed=seed + n, spread=1.0) for n in (4, 3))
    solution = solve_exact(data, experts, tol=1e-300)
    assert int(solution.iterations) <= 400
    assert float(solution.lower_bound) <= float(solution.upper_bound)
    assert float(solution.gap) <= 1e-12  # sums of terms of order one, with three orders to spare


def test_a_point_of_a_domain_without_weight_is_not_lost_to_underflow():
    # The second domain is of no consequence beside the first and its weight falls to 4e-12. Of its
    # probability 1e-320 at the last point nothing is then left in p_lambda.
    data = torch.tensor([[0.0, 1.0, 0.0], [0.6, 0.4, 0.0]], dtype=torch.float64)
    data[1, 2] = 1e-320
    experts = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.1, 0.3]], dtype=torch.float64)
    solution = solve_exact(data, experts, tol=1e-9)
    assert float((solution.mixture @ data)[2]) == 0.0
    assert bool(solution.losses.isfinite().all())
    assert bool(solution.converged)

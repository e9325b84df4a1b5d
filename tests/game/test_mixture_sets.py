"""Mixture sets: support functions against linear and convex programs, mirror steps, membership."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from robustgate.game import Box, CVaR, Floor, KLBall, Simplex, Vertices

DOMAINS = 4
POINTS = [[0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25], [0, 0.2, 0.3, 0.5]]
POLYTOPES = {
    "simplex": Simplex(),
    "floor": Floor(0.1),
    "no floor": Floor(0.0),
    "highest floor": Floor(0.25),
    "box": Box([0.1, 0.0, 0.2, 0.0], [0.3, 0.5, 0.5, 0.9]),
    "box with a fixed weight": Box([0.1, 0.3, 0.0, 0.0], [0.6, 0.3, 1.0, 0.0]),
    "cvar": CVaR(0.6),
    "cvar of everything": CVaR(1.0),
    "cvar of one domain": CVaR(0.25),
    "vertices": Vertices(POINTS),
    "one vertex": Vertices(POINTS[:1]),
}
BALLS = {
    "ball": KLBall(0.1),
    "ball off centre": KLBall(0.3, [0.1, 0.2, 0.3, 0.4]),
    "ball with a hole": KLBall(0.2, [0.5, 0.0, 0.25, 0.25]),
    "large ball": KLBall(5.0),
    "point": KLBall(0.0, [0.1, 0.2, 0.3, 0.4]),
}
SETS = POLYTOPES | BALLS


def constraints(mixtures):
    """The set written down once more: the bounds of a linear program in lambda."""
    bounds = {
        Simplex: lambda s: (0, 1),
        Floor: lambda s: (s.delta, 1),
        Box: lambda s: (s.lower, s.upper),
        CVaR: lambda s: (0, min(1, 1 / (s.alpha * DOMAINS))),
    }[type(mixtures)](mixtures)
    lower, upper = (np.broadcast_to(bound, DOMAINS) for bound in bounds)
    return list(zip(lower, upper, strict=True))


def program(mixtures, losses):
    """max lambda . l by HiGHS; for a hull, over the weights of its points."""
    if isinstance(mixtures, Vertices):
        points = np.array(mixtures.points)
        answer = linprog(-points @ losses, A_eq=[np.ones(len(points))], b_eq=[1.0])
    else:
        box = constraints(mixtures)
        answer = linprog(-losses, A_eq=[np.ones(DOMAINS)], b_eq=[1.0], bounds=box)
    assert answer.status == 0
    return -answer.fun


def draws(count=20, scale=1.0):
    return scale * torch.randn(count, DOMAINS, dtype=torch.float64)


@pytest.mark.parametrize("name", POLYTOPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_support_is_the_value_of_a_linear_program(name, scale):
    mixtures = POLYTOPES[name]
    for losses in draws(scale=scale):
        value, mixture = mixtures.support(losses)
        # HiGHS works to absolute tolerances of 1e-7: it gets the problem at scale 1.
        expected = program(mixtures, losses.numpy() / scale)
        assert value / scale == pytest.approx(expected, abs=1e-12)
        assert value == pytest.approx(float(mixture @ losses), abs=1e-14 * scale)
        assert mixtures.contains(mixture, 1e-14)


@pytest.mark.parametrize("name", BALLS)
def test_support_of_a_ball_is_the_value_of_a_convex_program(name):
    ball = BALLS[name]
    center = np.array(ball.center or [1 / DOMAINS] * DOMAINS)
    inside = center > 0
    for losses in draws(5):
        value, mixture = ball.support(losses)
        variable = cp.Variable(int(inside.sum()), nonneg=True)
        limits = [
            cp.sum(variable) == 1,
            cp.sum(cp.rel_entr(variable, center[inside])) <= ball.radius,
        ]
        problem = cp.Problem(cp.Maximize(losses.numpy()[inside] @ variable), limits)
        if ball.radius > 0:
            problem.solve(solver=cp.CLARABEL)
            # Clarabel's default gap of 1e-8, relative to values of order 1.
            assert value == pytest.approx(problem.value, abs=2e-7)
        assert value == pytest.approx(float(mixture @ losses), abs=1e-12)
        assert ball.contains(mixture, 1e-12)


@pytest.mark.parametrize("radius", [1e-6, 0.01, 0.5, 1.3, 2.0])
def test_support_of_a_ball_by_its_dual_on_a_grid(radius):
    ball = KLBall(radius, [0.1, 0.2, 0.3, 0.4])
    losses = torch.tensor([1.0, -0.5, 0.3, 0.2], dtype=torch.float64)
    log_center = torch.tensor(ball.center, dtype=torch.float64).log()
    tau = torch.logspace(-4, 5, 20_001, dtype=torch.float64).unsqueeze(1)
    dual = tau.squeeze() * (torch.logsumexp(log_center + losses / tau, dim=1) + radius)
    value, _ = ball.support(losses)
    assert value <= float(dual.amin()) + 1e-12
    # Neighbours on the grid differ by a factor 1.001; the dual is flat to second order there.
    assert value == pytest.approx(float(dual.amin()), abs=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_mirror_step_stays_in_the_set_and_is_optimal_in_it(name):
    mixtures = SETS[name]
    start = torch.distributions.Dirichlet(torch.ones(DOMAINS, dtype=torch.float64)).sample()
    inner = mixtures.mirror_step(start, torch.zeros_like(start), 1.0)  # in the set
    assert mixtures.contains(inner)
    assert torch.allclose(mixtures.mirror_step(inner, torch.zeros_like(inner), 1.0), inner)
    for losses, step in zip(draws(6), [1e-3, 0.1, 1.0, 3.0, 10.0, 30.0], strict=True):
        stepped = mixtures.mirror_step(inner, losses, step)
        assert mixtures.contains(stepped, 1e-12)
        # First-order optimality of step l . lambda - KL(lambda || inner), where inner > 0: no
        # point of the set lies in an ascending direction. An objective exact to 1e-12 (Vertices)
        # leaves its square root, 1e-6, times the gradient's size, at most 10 here.
        positive = inner > 0
        ratio = torch.where(positive, stepped.clamp(min=1e-300) / inner, 1.0)
        gradient = torch.where(positive, step * losses - ratio.log(), -1e9)
        best, _ = mixtures.support(gradient)
        assert best - float(stepped @ gradient) <= 1e-5


@pytest.mark.parametrize("name", SETS)
def test_a_batch_is_its_members(name):
    mixtures = SETS[name]
    losses = draws(6).reshape(2, 3, DOMAINS)
    start = torch.distributions.Dirichlet(torch.ones(DOMAINS, dtype=torch.float64)).sample((2, 3))
    step = torch.rand(2, 3, dtype=torch.float64)
    value, mixture = mixtures.worst_case(losses)
    stepped = mixtures.mirror_step(start, losses, step)
    assert mixtures.contains(stepped)
    for i in range(2):
        for j in range(3):
            alone, worst = mixtures.support(losses[i, j])
            assert float(value[i, j]) == pytest.approx(alone, abs=1e-12)
            torch.testing.assert_close(mixture[i, j], worst, rtol=0, atol=1e-9)
            single = mixtures.mirror_step(start[i, j], losses[i, j], float(step[i, j]))
            torch.testing.assert_close(stepped[i, j], single, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", POLYTOPES)
def test_the_vertices_are_the_set(name):
    mixtures = POLYTOPES[name]
    vertices = mixtures.vertices(DOMAINS)
    assert mixtures.contains(vertices, 1e-12)
    losses = draws(50)
    value, _ = mixtures.worst_case(losses)
    torch.testing.assert_close((losses @ vertices.T).amax(dim=1), value, rtol=0, atol=1e-12)


def test_how_many_vertices():
    assert len(CVaR(0.5).vertices(4)) == 6  # pairs
    assert len(CVaR(0.4).vertices(5)) == 10
    assert len(CVaR(1.0).vertices(4)) == 1
    assert len(Box([0.0] * 3, [0.6] * 3).vertices(3)) == 6  # (.6, .4, 0) in every order
    assert Box([0.0] * 11, [1.0] * 11).vertices(11) is None
    assert KLBall(0.1).vertices(3) is None
    assert len(Floor(0.05).vertices(11)) == 11


def test_closed_forms():
    losses = torch.tensor([3.0, -1.0, 2.0, 0.0], dtype=torch.float64)
    assert Floor(0.1).support(losses)[0] == pytest.approx(0.1 * 4.0 + 0.6 * 3.0)
    assert CVaR(0.5).support(losses)[0] == pytest.approx(2.5)  # mean of the worst two
    assert CVaR(1.0).support(losses)[0] == pytest.approx(1.0)  # mean
    assert CVaR(0.1).support(losses)[0] == 3.0  # maximum
    assert KLBall(0.0).support(losses)[0] == pytest.approx(1.0)
    assert KLBall(2.0).support(losses)[0] == pytest.approx(3.0)  # 2 > log 4: the whole simplex


@pytest.mark.parametrize("name", SETS)
def test_an_infinite_loss_in_reach_is_infinite(name):
    mixtures = SETS[name]
    losses = torch.tensor([0.0, 1.0, torch.inf, 2.0], dtype=torch.float64)
    reachable = mixtures.support(torch.eye(DOMAINS, dtype=torch.float64)[2])[0] > 0
    value, mixture = mixtures.support(losses)
    assert value == torch.inf if reachable else value < torch.inf
    assert mixtures.contains(mixture)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e100])
@pytest.mark.parametrize("radius", [1e-300, 1e-30, 1e-20, 1e-12])
def test_support_of_a_ball_of_next_to_nothing_is_that_of_its_centre(radius, scale):
    # sigma - c . l is sqrt(2 radius var(l)) to first order: a difference of 1e-6 at most.
    center, losses = [0.1, 0.2, 0.3, 0.4], scale * torch.tensor([1.0, -3.0, 2.0, 0.5]).double()
    value, mixture = KLBall(radius, center).support(losses)
    unit, weights = np.array([1.0, -3.0, 2.0, 0.5]), np.array(center)
    mean = weights @ unit
    expected = mean + (2 * radius * (weights @ (unit - mean) ** 2)) ** 0.5
    assert value / scale == pytest.approx(expected, abs=1e-11)  # the next term: about radius
    assert float(mixture @ losses) / scale == pytest.approx(expected, abs=1e-11)


def test_support_of_a_ball_around_a_corner():
    # c = (1e-300, 1): all but the last of 690 nats keep lambda_1 with KL = .1 at 1.44e-4.
    value, mixture = KLBall(0.1, [1e-300, 1.0]).support(torch.tensor([1.0, 0.0]).double())
    weight = float(mixture[0])
    divergence = weight * (np.log(weight) - np.log(1e-300)) + (1 - weight) * np.log1p(-weight)
    assert divergence == pytest.approx(0.1, rel=1e-11)
    assert value == pytest.approx(weight, rel=1e-11)


@pytest.mark.parametrize("name", SETS)
def test_float32_is_computed_in_float64(name):
    mixtures, losses = SETS[name], torch.tensor([0.3, -2.0, 4.0, 1.0])
    start = torch.tensor([0.0, 0.5, 0.5, 0.0])  # weights of 0 that bounds may force up
    value, mixture = mixtures.support(losses)
    moved = mixtures.mirror_step(start, losses, 0.5)
    assert mixture.dtype == moved.dtype == torch.float32
    assert value == pytest.approx(mixtures.support(losses.double())[0], abs=1e-6)
    exact = mixtures.mirror_step(start.double(), losses.double(), 0.5)
    torch.testing.assert_close(moved.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_what_is_outside(name):
    mixtures = SETS[name]
    for outside in ([0.5, 0.5, 0.5, 0.5], [1.2, -0.2, 0.0, 0.0], [0.3, 0.3, 0.3, 0.0]):
        assert not mixtures.contains(torch.tensor(outside, dtype=torch.float64))
    if name not in ("simplex", "no floor", "cvar of one domain", "large ball"):
        corner = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
        assert not mixtures.contains(corner)
        inside = mixtures.mirror_step(torch.full((DOMAINS,), 0.25).double(), corner, 0.0)
        assert not mixtures.contains(torch.stack([inside, corner]))


def test_membership_of_a_hull_is_exact():
    hull = Vertices(POINTS)
    weights = torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((50,))
    inside = weights @ torch.tensor(POINTS, dtype=torch.float64)
    assert hull.contains(inside, 1e-12)
    # Beyond the first point, seen from the middle of all: a step of 1e-6 leaves the hull.
    away = torch.tensor(POINTS[0], dtype=torch.float64)
    away = away + 1e-6 * (away - torch.tensor(POINTS, dtype=torch.float64).mean(dim=0))
    assert not hull.contains(away)
    assert hull.contains(away, 1e-5)


def test_equal_sets_compare_equal():
    assert Box([0, 0.1], [1, 0.9]) == Box((0.0, 0.1), torch.tensor([1.0, 0.9], dtype=torch.float64))
    assert KLBall(0.1, [0.5, 0.5]) == KLBall(0.1, (0.5, 0.5)) != KLBall(0.1)
    assert Simplex() == Simplex()
    assert "0.25" in repr(Floor(0.25))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Floor(-0.1), "delta: expected a number in"),
        (lambda: Floor(1.5), "delta: expected a number in"),
        (lambda: Floor(0.3).support(torch.zeros(4)), "delta: expected at most 1 / D = 0.25"),
        (lambda: CVaR(0.0), "alpha: expected a number in"),
        (lambda: CVaR(1.1), "alpha: expected a number in"),
        (lambda: Box([0.0], [0.5, 0.5]), "lower, upper: expected one number each"),
        (lambda: Box([], []), "lower, upper: expected one number each"),
        (lambda: Box([0.5, 0.0], [0.4, 1.0]), "got 0.5 and 0.4 for domain 0"),
        (lambda: Box([0.6, 0.6], [1.0, 1.0]), r"expected sum\(lower\) <= 1 <= sum\(upper\)"),
        (lambda: Box([0.0, 0.0], [0.4, 0.4]), r"expected sum\(lower\) <= 1 <= sum\(upper\)"),
        (lambda: Box([0.0] * 2, [1.0] * 2).support(torch.zeros(3)), "expected 2 domains as in Box"),
        (lambda: KLBall(-1.0), "radius: expected a number >= 0"),
        (lambda: KLBall(float("nan")), "radius: expected a number >= 0"),
        (lambda: KLBall(0.1, [0.5, 0.4]), "center: expected non-negative weights that sum to 1"),
        (lambda: KLBall(0.1, [0.5, 0.5]).support(torch.zeros(3)), "center: expected 3 weights"),
        (lambda: Vertices([]), "points: expected at least one mixture"),
        (lambda: Vertices([[0.5, 0.5], [1.0]]), r"points\[1\]: expected 2 weights"),
        (lambda: Vertices([[0.5, 0.6]]), r"points\[0\]: expected non-negative weights"),
        (lambda: Vertices([[0.5, 0.5]]).support(torch.zeros(3)), "expected 2 domains as in"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

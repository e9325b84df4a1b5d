"""Capacity: closed forms, bounds, bad input."""

import math

import pytest
import torch

from robustgate.game import CVaR, Floor, KLBall, Vertices, capacity

TOL = 1e-9


def rows(*entries):
    return torch.tensor(entries, dtype=torch.float64)


def test_z_channel():
    result = capacity(rows([1, 0], [0.5, 0.5]), tol=TOL)
    assert result.value == pytest.approx(math.log(5 / 4), abs=TOL)
    # The value is flat to second order at its maximum: sqrt(1e-9) in the mixture.
    assert result.mixture.tolist() == pytest.approx([0.6, 0.4], abs=1e-4)
    assert result.converged


@pytest.mark.parametrize("symbols", [2, 5])
@pytest.mark.parametrize("erased", [0.0, 0.3, 0.9])
def test_erasure_channel(symbols, erased):
    kept = (1 - erased) * torch.eye(symbols, dtype=torch.float64)
    lost = torch.full((symbols, 1), erased, dtype=torch.float64)
    result = capacity(torch.cat([kept, lost], dim=1), tol=TOL)
    assert result.value == pytest.approx((1 - erased) * math.log(symbols), abs=TOL)


def test_binary_symmetric_channel():
    flip = 0.1
    entropy = -flip * math.log(flip) - (1 - flip) * math.log(1 - flip)
    result = capacity(rows([1 - flip, flip], [flip, 1 - flip]), tol=TOL)
    assert result.value == pytest.approx(math.log(2) - entropy, abs=TOL)
    assert result.value == pytest.approx(0.3680642, abs=5e-8)


def test_disjoint_domains_reach_log_d():
    result = capacity(torch.eye(7), tol=TOL)
    assert result.value == pytest.approx(math.log(7), abs=TOL)
    assert result.mixture.tolist() == pytest.approx([1 / 7] * 7, abs=1e-9)


def test_equal_domains_have_none():
    result = capacity(torch.full((4, 10), 0.1), tol=TOL)
    assert result.value == pytest.approx(0.0, abs=1e-15)
    assert result.gap == pytest.approx(0.0, abs=1e-15)


def test_one_domain_has_none():
    result = capacity(rows([0.2, 0.8]))
    assert (result.value, result.mixture.tolist(), result.iterations) == (0.0, [1.0], 0)


def test_a_domain_between_two_others_gets_no_weight():
    result = capacity(rows([0.9, 0.1], [0.1, 0.9], [0.5, 0.5]), tol=TOL)
    assert float(result.mixture[2]) < 1e-3
    pair = capacity(rows([0.9, 0.1], [0.1, 0.9]), tol=TOL)
    assert result.value == pytest.approx(pair.value, abs=2 * TOL)


def test_bounds_hold_for_every_mixture_and_every_model():
    probs = torch.distributions.Dirichlet(torch.ones(20, dtype=torch.float64)).sample((4,))
    result = capacity(probs, tol=TOL)
    for mixture in torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((50,)):
        kl = (probs * (probs / (mixture @ probs)).log()).sum(dim=1)
        assert float(mixture @ kl) <= result.upper_bound + 1e-15
        assert float(kl.amax()) >= result.lower_bound - 1e-15


@pytest.mark.parametrize(
    "mixtures",
    [Floor(0.1), CVaR(0.5), KLBall(0.1), Vertices([[0.7, 0.1, 0.1, 0.1], [0, 0.5, 0, 0.5]])],
)
def test_over_a_smaller_set_of_mixtures(mixtures):
    probs = torch.distributions.Dirichlet(torch.ones(9, dtype=torch.float64)).sample((4,))
    result = capacity(probs, mixtures=mixtures, tol=1e-7)
    assert result.converged
    assert mixtures.contains(result.mixture)
    assert result.value <= capacity(probs).upper_bound
    best = 0.0
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    for losses in 3 * torch.randn(300, 4, dtype=torch.float64):
        mixture = mixtures.mirror_step(uniform, losses, 1.0)
        mixed = mixture @ probs
        best = max(best, float(mixture @ (probs * (probs / mixed).log()).sum(dim=1)))
    assert best <= result.upper_bound + 1e-12
    assert best >= result.lower_bound - 0.02  # 300 draws come near


def test_only_the_uniform_mixture():
    result = capacity(torch.eye(3), mixtures=CVaR(1.0), tol=TOL)
    assert result.value == pytest.approx(math.log(3), abs=TOL)


def test_a_weight_that_would_underflow_keeps_the_bounds_finite():
    # The fourth domain, nearly the mean of the others, loses its weight over hundreds of updates,
    # yet it alone uses the last symbol: at weight exactly 0 its divergence would be infinite.
    others = rows([0.55, 0.4, 0.05], [0.2, 0.55, 0.25], [0.6, 0.0, 0.4])
    probs = torch.zeros(4, 4, dtype=torch.float64)
    probs[:3, :3] = others
    probs[3, :3] = others.mean(dim=0) * (1 - 1e-6)
    probs[3, 3] = 1e-6
    result = capacity(probs, tol=TOL)
    assert result.converged
    assert result.value == pytest.approx(capacity(others, tol=TOL).value, abs=2 * TOL)


@pytest.mark.parametrize(("rare", "tol"), [(1e-40, 1e-9), (1e-200, 1e-6), (1e-308, 1e-6)])
def test_a_rare_symbol_of_a_domain_without_weight_keeps_the_bounds_finite(rare, tol):
    # As above with a rarer symbol: its share of p_lambda underflows before the weight does.
    others = rows([0.55, 0.4, 0.05], [0.2, 0.55, 0.25], [0.6, 0.0, 0.4])
    probs = torch.zeros(4, 4, dtype=torch.float64)
    probs[:3, :3], probs[3, :3] = others, others.mean(dim=0)
    probs[3, 3] = rare
    result = capacity(probs, tol=tol)
    assert result.converged
    assert result.value == pytest.approx(capacity(others, tol=tol).value, abs=2 * tol)


def test_growing_steps_save_updates():
    # Counted, not timed: 3,879 updates with steps of 1, 575 with growing ones.
    result = capacity(rows([0.55, 0.4, 0.05], [0.2, 0.55, 0.25], [0.6, 0.0, 0.4]), tol=TOL)
    assert result.converged
    assert result.iterations < 700


def test_an_exhausted_budget_warns_and_keeps_the_bounds():
    probs = rows([1, 0], [0.5, 0.5])
    with pytest.warns(RuntimeWarning, match="capacity: the gap is .* after 1 iterations"):
        early = capacity(probs, tol=1e-12, max_iterations=1)
    assert not early.converged
    assert early.lower_bound <= math.log(5 / 4) <= early.upper_bound


@pytest.mark.parametrize(
    ("probs", "error", "message"),
    [
        ([[1.0]], TypeError, r"data_probs: expected a floating point tensor \[D, X\], got list"),
        (torch.ones(1, 1, dtype=torch.long), TypeError, "got torch.int64"),
        (torch.ones(3), ValueError, r"data_probs: expected shape \[D, X\].*got \(3,\)"),
        (torch.ones(0, 3), ValueError, r"data_probs: expected shape \[D, X\].*got \(0, 3\)"),
        (rows([1.0, 0.0], [0.5, 0.6]), ValueError, "data_probs, row 1: .* got the sum 1.1"),
        (rows([1.5, -0.5]), ValueError, "data_probs, row 0: .* smallest entry -0.5"),
        (rows([0.5, 0.5], [math.nan, 1.0]), ValueError, "data_probs, row 1"),
    ],
)
def test_bad_probabilities_are_refused(probs, error, message):
    with pytest.raises(error, match=message):
        capacity(probs)


@pytest.mark.parametrize("options", [{"tol": -1.0}, {"tol": math.inf}, {"max_iterations": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        capacity(torch.eye(2), **options)

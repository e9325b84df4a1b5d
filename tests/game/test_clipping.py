"""Clipping to bounds and scaling to sum 1: against root finding, and the cases at the edges."""

import pytest
import torch
from scipy.optimize import brentq

from robustgate.game.clipping import clip_to_one, fill_to_one


def rows(*entries):
    return torch.tensor(entries, dtype=torch.float64)


def instance(seed, points=9, games=()):
    """Weights that sum to 1, with holes, between the extremes of two distributions."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(*games, points, generator=generator, dtype=torch.float64).pow(4)
    weights[..., seed % points] = 0.0
    pair = torch.rand(2, *games, points, generator=generator, dtype=torch.float64).pow(2)
    pair = pair / pair.sum(dim=-1, keepdim=True)
    return weights / weights.sum(dim=-1, keepdim=True), pair.amin(dim=0), pair.amax(dim=0)


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_root_finding(seed):
    weights, lower, upper = instance(seed)
    clipped, mu = clip_to_one(weights, lower, upper)

    def excess(scale):
        return float(torch.clamp(weights * scale, lower, upper).sum()) - 1.0

    assert excess(0.0) < 0 < excess(1e9)
    expected = brentq(excess, 0.0, 1e9, xtol=1e-13, rtol=1e-14)
    torch.testing.assert_close(
        clipped, torch.clamp(weights * expected, lower, upper), rtol=0, atol=1e-11
    )
    assert float(mu) == pytest.approx(1 / expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_mu_in_closed_form(seed):
    # sum clip(p, mu lo, mu hi) = mu: what is cut off above, and what is added below.
    weights, lower, upper = instance(seed)
    _, mu = clip_to_one(weights, lower, upper)
    cut = (weights - mu * upper).clamp(min=0).sum()
    added = (mu * lower - weights).clamp(min=0).sum()
    assert float(mu) == pytest.approx(float(1 - cut + added), abs=1e-12)


@pytest.mark.parametrize("guess", [1e-200, 1e-6, 0.5, 1.0, 40.0, 1e200, 0.0])
def test_any_start_ends_at_the_same_point(guess):
    weights, lower, upper = instance(3)
    expected, mu = clip_to_one(weights, lower, upper)
    clipped, again = clip_to_one(weights, lower, upper, torch.tensor(guess, dtype=torch.float64))
    torch.testing.assert_close(clipped, expected, rtol=0, atol=1e-12)
    assert float(again) == pytest.approx(float(mu), rel=1e-10)


def test_a_batch_is_its_members():
    weights, lower, upper = instance(5, games=(3, 2))
    clipped, mu = clip_to_one(weights, lower, upper)
    for i in range(3):
        for j in range(2):
            one, level = clip_to_one(weights[i, j], lower[i, j], upper[i, j])
            torch.testing.assert_close(clipped[i, j], one, rtol=0, atol=1e-13)
            assert float(mu[i, j]) == pytest.approx(float(level), rel=1e-12)


def test_when_the_upper_bounds_do_not_suffice_mu_is_zero():
    weights, lower, upper = rows(1, 0, 0), rows(0.4, 0.2, 0.2), rows(0.5, 0.3, 0.4)
    clipped, mu = clip_to_one(weights, lower, upper)
    assert float(mu) == 0.0
    # 0.1 is missing beside .5 + .2 + .2, shared out like the widths .1 and .2.
    assert clipped.tolist() == pytest.approx([0.5, 0.2 + 0.1 / 3, 0.2 + 0.2 / 3], abs=1e-15)


def test_of_an_interval_the_point_nearest_one():
    # .4 + .6 = 1: the first is at its upper bound for mu <= 5/4, the second at its lower bound for
    # mu >= 5/6.
    _, mu = clip_to_one(rows(0.5, 0.5), rows(0.1, 0.6), rows(0.4, 0.9))
    assert float(mu) == 1.0
    # Twice the weights: mu in [5/3, 5/2]. Half of them: mu in [5/12, 5/8].
    _, mu = clip_to_one(rows(1.0, 1.0), rows(0.1, 0.6), rows(0.4, 0.9))
    assert float(mu) == pytest.approx(5 / 3, rel=1e-15)
    _, mu = clip_to_one(rows(0.25, 0.25), rows(0.1, 0.6), rows(0.4, 0.9))
    assert float(mu) == pytest.approx(5 / 8, rel=1e-15)


def test_equal_bounds_leave_no_choice():
    fixed = rows(0.2, 0.3, 0.5)
    clipped, mu = clip_to_one(rows(0.9, 0.1, 0.0), fixed, fixed)
    assert clipped.tolist() == fixed.tolist()
    assert float(mu) == 1.0


def test_weights_of_very_different_size():
    weights = rows(1e-250, 1e-120, 1.0)
    clipped, mu = clip_to_one(weights, rows(0, 0, 0), rows(0.5, 0.3, 0.4))
    # 1 = .4 + .3 + c with c between its bounds: scaled by 3e249.
    assert clipped.tolist() == pytest.approx([0.3, 0.3, 0.4], abs=1e-12)
    assert float(mu) == pytest.approx(1e-250 / 0.3, rel=1e-12)


def test_a_multiplier_near_the_smallest_number():
    # The second is at its upper bound, so that the first has to become .3.
    lower, upper = rows(0.2, 0.3), rows(0.5, 0.7)
    clipped, mu = clip_to_one(rows(1e-300, 1), lower, upper)
    assert clipped.tolist() == pytest.approx([0.3, 0.7], abs=1e-12)
    assert float(mu) == pytest.approx(1e-300 / 0.3, rel=1e-12)
    # mu itself underflows: what is missing is shared out all the same.
    clipped, mu = clip_to_one(rows(1e-320, 1), lower, upper)
    assert clipped.tolist() == pytest.approx([0.3, 0.7], abs=1e-12)
    assert 0.0 <= float(mu) < 1e-300


def test_filling_moves_only_towards_the_bounds():
    lower, upper = rows(0.0, 0.2, 0.1), rows(0.5, 0.6, 0.1)
    filled = fill_to_one(rows(0.1, 0.3, 0.1), lower, upper)
    assert float(filled.sum()) == pytest.approx(1.0, abs=1e-15)
    assert filled.tolist() == pytest.approx([0.1 + 0.4 * 5 / 7, 0.3 + 0.3 * 5 / 7, 0.1], abs=1e-15)
    emptied = fill_to_one(rows(0.5, 0.6, 0.1), lower, upper)
    assert emptied.tolist() == pytest.approx([0.5 - 0.5 * 2 / 9, 0.6 - 0.4 * 2 / 9, 0.1], abs=1e-15)

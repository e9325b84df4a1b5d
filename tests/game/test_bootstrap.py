"""Confidence intervals for a worst case over mixtures."""

import math

import pytest
import torch

from robustgate.game import bootstrap_worst_case


def test_one_domain_is_the_interval_of_a_mean():
    loss = torch.randn(400, dtype=torch.float64) + 3
    lower, upper = bootstrap_worst_case({"only": loss}, samples=4000)
    half = 1.96 * float(loss.std()) / 20
    # The bootstrap quantile of 4,000 resamples varies by about 2 %, the t correction is below 1 %.
    assert (upper - lower) / 2 == pytest.approx(half, rel=0.1)
    assert (upper + lower) / 2 == pytest.approx(float(loss.mean()), abs=1e-12)


def test_same_seed_same_interval():
    losses = {"a": torch.randn(30), "b": torch.randn(50)}
    first = bootstrap_worst_case(losses, seed=7)
    assert bootstrap_worst_case(losses, seed=7) == first
    assert bootstrap_worst_case(losses, seed=8) != first


def test_higher_confidence_is_wider():
    losses = {"a": torch.randn(30), "b": torch.randn(50)}
    narrow = bootstrap_worst_case(losses, level=0.5)
    wide = bootstrap_worst_case(losses, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_each_domain_gets_a_margin_of_its_own_standard_error():
    # Normal theory: P(max of two independent |Z| <= c) = 0.95 at c = 2.236.
    small, large = torch.randn(200, dtype=torch.float64), torch.randn(5000, dtype=torch.float64)
    for shift, worst in ((10.0, small), (-10.0, large)):
        losses = {"small": small + shift, "large": large}
        lower, upper = bootstrap_worst_case(losses, samples=2000)
        error = float(worst.std()) / len(worst) ** 0.5
        # The quantile of 2,000 resamples varies by 3 %.
        assert (upper - lower) / 2 == pytest.approx(2.236 * error, rel=0.12)


def test_chunks_of_resamples_match_the_definition():
    # 2^22 // 5000 = 838 resamples a chunk: two chunks here.
    losses = {"a": torch.randn(5000, dtype=torch.float64)}
    lower, upper = bootstrap_worst_case(losses, samples=1000)
    assert lower < float(losses["a"].mean()) < upper


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_covers_the_true_worst_case(gap):
    # Five domains of 40 documents, true means 0 or (gap, 0, 0, 0, 0): the worst case is gap. Tied
    # means are what a robust prior produces. 200 experiments at level 0.9: the interval is
    # conservative, so coverage is at least 0.9; 0.83 is 3.3 standard errors below.
    shift = torch.tensor([gap, 0.0, 0.0, 0.0, 0.0])
    covered = 0
    for experiment in range(200):
        data = torch.randn(5, 40, dtype=torch.float64) + shift[:, None]
        losses = {f"d{d}": row for d, row in enumerate(data)}
        lower, upper = bootstrap_worst_case(losses, level=0.9, samples=150, seed=experiment)
        covered += lower <= gap <= upper
    assert covered >= 0.83 * 200


def test_constant_losses_have_no_width():
    losses = {"a": torch.full((5,), 2.0), "b": torch.full((3,), 1.0)}
    assert bootstrap_worst_case(losses) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ({}, ValueError, "losses: expected at least one domain"),
        (torch.zeros(3), TypeError, "losses: expected a mapping"),
        (
            {"a": [1.0, 2.0]},
            TypeError,
            r"losses\['a'\]: expected a floating point tensor, got list",
        ),
        ({"a": torch.zeros(1)}, ValueError, r"losses\['a'\]: .* at least 2 documents, got \(1,\)"),
        ({"a": torch.zeros(2, 2)}, ValueError, r"losses\['a'\]: expected shape \[n_d\]"),
        ({"a": torch.tensor([0.0, math.nan])}, ValueError, r"losses\['a'\], document 1: .* nan"),
        ({"a": torch.tensor([math.inf, 0.0])}, ValueError, r"losses\['a'\], document 0: .* inf"),
    ],
)
def test_bad_losses_are_refused(losses, error, message):
    with pytest.raises(error, match=message):
        bootstrap_worst_case(losses)


@pytest.mark.parametrize("options", [{"level": 0.0}, {"level": 1.0}, {"samples": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        bootstrap_worst_case({"a": torch.zeros(2)}, **options)

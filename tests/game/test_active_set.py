"""Which experts and domains decide a robust prior."""

import pytest
import torch

from robustgate.game import active_set, certificate, robust_prior


def instance():
    """Three experts and three domains; the third of each is of no use, and harmless."""
    log_probs = {}
    for d, name in enumerate(["a", "b", "easy"]):
        matrix = torch.randn(40, 3, dtype=torch.float64)
        if d < 2:
            matrix[:, d] += 2
        matrix[:, 2] = matrix[:, :2].amin(dim=1) - 1
        log_probs[name] = matrix + (5 if name == "easy" else 0)
    return log_probs


def test_report():
    log_probs = instance()
    solution = robust_prior(log_probs, baseline="raw")
    report = active_set(solution)
    assert report.experts == (0, 1)
    assert report.domains == ("a", "b")
    # Complementary slackness, up to the gap of 1e-6 over weights of order one.
    assert report.prices[:2].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert float(report.prices[2]) < 0.9
    assert report.slacks[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    assert float(report.slacks[2]) > 1


def test_without_the_others_the_value_is_the_same():
    log_probs = instance()
    solution = robust_prior(log_probs, baseline="raw")
    report = active_set(solution)
    fewer = {name: log_probs[name][:, list(report.experts)] for name in report.domains}
    assert robust_prior(fewer, baseline="raw").value == pytest.approx(solution.value, abs=2e-6)


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_a_price_above_one_announces_a_useful_expert(shift):
    log_probs = instance()
    solution = robust_prior(log_probs, baseline="raw")
    wider = {
        name: torch.cat([matrix, matrix.amax(dim=1, keepdim=True) + shift], dim=1)
        for name, matrix in log_probs.items()
    }
    prior = torch.cat([solution.prior, torch.zeros(1, dtype=torch.float64)])
    price = float(certificate(wider, prior, solution.mixture, baseline="raw").prices[3])
    gain = solution.value - robust_prior(wider, baseline="raw").value
    assert (price > 1) == (gain > 1e-5)


def test_prices_are_certified():
    log_probs = instance()
    solution = robust_prior(log_probs)
    proof = certificate(log_probs, solution.prior, solution.mixture)
    torch.testing.assert_close(solution.prices, proof.prices, rtol=0, atol=1e-12)
    assert float(solution.prior @ solution.prices) == pytest.approx(1.0, abs=1e-12)


def test_the_threshold_decides():
    solution = robust_prior(instance(), baseline="raw")
    largest = float(solution.prior.amax())
    assert len(active_set(solution, largest).experts) == 1
    assert active_set(solution, 1e-300).experts == (0, 1, 2)


@pytest.mark.parametrize("threshold", [0.0, 1.5, float("nan")])
def test_bad_thresholds_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold: expected a number in"):
        active_set(robust_prior(instance()), threshold)


def test_a_threshold_above_every_weight_is_refused():
    with pytest.raises(ValueError, match="threshold: no expert has a weight of 1"):
        active_set(robust_prior(instance()), 1.0)

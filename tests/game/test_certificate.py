"""The certificate: valid for every prior and every mixture, whoever proposes them."""

import math

import pytest
import torch

from robustgate.game import certificate, robust_prior


def dirichlet(size, count):
    return torch.distributions.Dirichlet(torch.ones(size, dtype=torch.float64)).sample((count,))


def instance(domains=3, experts=4, documents=20):
    return {
        f"d{d}": 3 * torch.randn(documents, experts, dtype=torch.float64) - 50
        for d in range(domains)
    }


def test_by_hand():
    # e^L = [[1, 1/2], [1/5, 1]], w = lambda = (1/2, 1/2), raw: mixes 3/4 and 3/5,
    # l = (log 4/3, log 5/3), a = ((1/(3/4) + (1/5)/(3/5)) / 2, ((1/2)/(3/4) + 1/(3/5)) / 2).
    likelihoods = {"a": torch.tensor([[1.0, 0.5]]), "b": torch.tensor([[0.2, 1.0]])}
    log_probs = {name: matrix.double().log() for name, matrix in likelihoods.items()}
    half = torch.tensor([0.5, 0.5])
    proof = certificate(log_probs, half, half, baseline="raw")
    ratios = ((4 / 3 + 1 / 3) / 2, (2 / 3 + 5 / 3) / 2)
    lower = (math.log(4 / 3) + math.log(5 / 3)) / 2 - math.log(max(ratios))
    # 0.2 is a float32 number here: relative error 2^-25, hence 1e-7.
    assert proof.upper_bound == pytest.approx(math.log(5 / 3), abs=1e-7)
    assert proof.lower_bound == pytest.approx(lower, abs=1e-7)
    assert proof.losses.tolist() == pytest.approx([math.log(4 / 3), math.log(5 / 3)], abs=1e-7)


def test_any_prior_and_any_mixture_bracket_the_value():
    log_probs = instance()
    value = robust_prior(log_probs, tol=1e-9)
    for prior, mixture in zip(dirichlet(4, 50), dirichlet(3, 50), strict=True):
        proof = certificate(log_probs, prior, mixture)
        assert proof.lower_bound <= value.upper_bound
        assert proof.upper_bound >= value.lower_bound
        assert proof.lower_bound <= proof.upper_bound
        assert proof.gap == proof.upper_bound - proof.lower_bound
        assert proof.value == proof.upper_bound


def test_every_prior_is_at_least_the_lower_bound():
    log_probs = instance(domains=2, experts=3)
    lower = robust_prior(log_probs, tol=1e-8).lower_bound
    corner = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for prior in dirichlet(3, 100):
        assert certificate(log_probs, prior, corner).upper_bound >= lower


def test_upper_bound_is_the_worst_domain_loss():
    log_probs = instance()
    prior = dirichlet(4, 1)[0]
    proof = certificate(log_probs, prior, torch.full((3,), 1 / 3), baseline="raw")
    nll = [-(m + prior.log()).logsumexp(dim=1).mean() for m in log_probs.values()]
    # Two float64 evaluations of a loss near 50: a few ulp of 50.
    assert proof.losses.tolist() == pytest.approx([float(x) for x in nll], abs=1e-12)
    assert proof.upper_bound == pytest.approx(max(float(x) for x in nll), abs=1e-12)


def test_a_prior_that_excludes_a_document_has_infinite_upper_bound():
    log_probs = {
        "a": torch.tensor([[0.0, -torch.inf]]),
        "b": torch.tensor([[-1.0, -1.0]]),
    }
    second = torch.tensor([0.0, 1.0])
    on_both = certificate(log_probs, second, torch.tensor([0.5, 0.5]), baseline="raw")
    assert on_both.upper_bound == math.inf
    assert on_both.lower_bound == -math.inf
    on_b = certificate(log_probs, second, torch.tensor([0.0, 1.0]), baseline="raw")
    assert on_b.upper_bound == math.inf
    assert on_b.lower_bound == pytest.approx(1.0, abs=1e-15)


def test_blocks_of_rows_do_not_change_the_result():
    # 40,000 documents x 4 experts are more than one block; the mean of copies is the mean of one.
    one = instance(domains=2)
    many = {name: matrix.repeat(2000, 1) for name, matrix in one.items()}
    prior, mixture = dirichlet(4, 1)[0], dirichlet(2, 1)[0]
    few, lots = certificate(one, prior, mixture), certificate(many, prior, mixture)
    # Rounding of a mean of 40,000 terms near 50: below 1e-10 relative even summed in a row.
    assert few.lower_bound == pytest.approx(lots.lower_bound, abs=1e-9)
    assert few.upper_bound == pytest.approx(lots.upper_bound, abs=1e-9)


@pytest.mark.parametrize(
    ("prior", "mixture", "message"),
    [
        ([0.5, 0.5, 0.0], [0.5, 0.5], r"prior: expected shape \[2\], got \(3,\)"),
        ([0.5, 0.6], [0.5, 0.5], "prior: expected non-negative weights that sum to 1"),
        ([1.5, -0.5], [0.5, 0.5], "prior: expected non-negative"),
        ([math.nan, 1.0], [0.5, 0.5], "prior: expected non-negative"),
        ([0.5, 0.5], [1.0], r"mixture: expected shape \[2\], got \(1,\)"),
        ([0.5, 0.5], [0.9, 0.2], "mixture: expected non-negative weights"),
    ],
)
def test_bad_weights_are_refused(prior, mixture, message):
    log_probs = {"a": torch.zeros(3, 2), "b": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=message):
        certificate(log_probs, torch.tensor(prior), torch.tensor(mixture))

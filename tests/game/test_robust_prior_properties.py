"""The robust prior on random and on hostile instances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustgate.game import certificate, robust_prior

TOL = 1e-6


@st.composite
def instances(draw):
    """One to six domains and experts at scales from near-ties to 10,000 nats."""
    domains = draw(st.integers(1, 6))
    experts = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e4]))
    holes = draw(st.booleans())
    rounded = draw(st.booleans())
    log_probs = {}
    for d in range(domains):
        documents = draw(st.sampled_from([1, 2, 7, 60]))
        matrix = scale * torch.randn(documents, experts, generator=generator, dtype=torch.float64)
        matrix = matrix + scale * torch.randn(experts, generator=generator, dtype=torch.float64)
        if rounded:
            matrix = matrix.round()  # ties
        if holes:
            hole = torch.rand(documents, experts, generator=generator) < 0.3
            hole[:, d % experts] = False
            matrix = matrix.masked_fill(hole, -torch.inf)
        log_probs[f"d{d}"] = matrix - 10 * scale
    return log_probs


def floor_on_the_value(log_probs, baseline):
    """max_d E_d[-max_k L_k] - b_d: no mixture beats the best expert of every document."""
    best = [float(-matrix.amax(dim=1).mean()) for matrix in log_probs.values()]
    return max(loss - offset for loss, offset in zip(best, baseline, strict=True))


def ulps(log_probs):
    """Rounding of a mean of numbers of this size: a few units in the last place."""
    largest = max(float(m[m.isfinite()].abs().amax()) for m in log_probs.values())
    return 1e-14 * (1 + largest)


@settings(max_examples=150, deadline=None)
@given(instances(), st.sampled_from(["raw", "excess"]))
def test_reaches_the_tolerance_within_its_bounds(log_probs, baseline):
    holes = any(bool(matrix.isinf().any()) for matrix in log_probs.values())
    baseline = "raw" if holes else baseline
    solution = robust_prior(log_probs, baseline=baseline, tol=TOL)
    assert solution.converged
    assert solution.lower_bound <= solution.upper_bound <= solution.lower_bound + TOL
    slack = ulps(log_probs)
    assert floor_on_the_value(log_probs, solution.baseline.tolist()) <= solution.value + slack
    if baseline == "excess":
        experts = next(iter(log_probs.values())).shape[1]
        assert solution.value <= math.log(experts) + TOL


@settings(max_examples=40, deadline=None)
@given(instances(), st.randoms(use_true_random=False))
def test_order_of_experts_and_domains_does_not_matter(log_probs, random):
    solution = robust_prior(log_probs, baseline="raw", tol=TOL)
    names = list(log_probs)
    random.shuffle(names)
    experts = list(range(len(solution.prior)))
    random.shuffle(experts)
    permuted = robust_prior({n: log_probs[n][:, experts] for n in names}, baseline="raw", tol=TOL)
    assert permuted.value == pytest.approx(solution.value, abs=TOL + ulps(log_probs))
    # Permuted back, the weights prove the same thing.
    back = torch.empty_like(permuted.prior)
    back[experts] = permuted.prior
    proof = certificate(log_probs, back, solution.mixture, baseline="raw")
    assert proof.gap <= 2 * TOL + ulps(log_probs)


@settings(max_examples=40, deadline=None)
@given(instances())
def test_duplicate_experts_and_domains_change_nothing(log_probs):
    solution = robust_prior(log_probs, baseline="raw", tol=TOL)
    doubled = {name: torch.cat([matrix, matrix], dim=1) for name, matrix in log_probs.items()}
    doubled["again"] = doubled["d0"]
    again = robust_prior(doubled, baseline="raw", tol=TOL)
    assert again.value == pytest.approx(solution.value, abs=TOL + ulps(log_probs))


@settings(max_examples=40, deadline=None)
@given(instances(), st.integers(0, 2**31))
def test_another_expert_never_hurts_and_another_domain_never_helps(log_probs, seed):
    solution = robust_prior(log_probs, baseline="raw", tol=TOL)
    generator = torch.Generator().manual_seed(seed)
    wider = {}
    for name, matrix in log_probs.items():
        noise = torch.randn(len(matrix), 1, generator=generator, dtype=torch.float64)
        wider[name] = torch.cat([matrix, matrix.amax(dim=1, keepdim=True) + noise], dim=1)
    slack = TOL + ulps(log_probs)
    assert robust_prior(wider, baseline="raw", tol=TOL).value <= solution.value + slack
    fewer = {name: log_probs[name] for name in list(log_probs)[:-1]} or log_probs
    assert robust_prior(fewer, baseline="raw", tol=TOL).value <= solution.value + slack


def gaussian(documents, experts, scale=1.0, shift=0.0):
    return scale * torch.randn(documents, experts, dtype=torch.float64) + shift


HOSTILE = {
    "log-probs near -1e4 nats": lambda: {
        "a": gaussian(50, 4, 100, -1e4),
        "b": gaussian(50, 4, 100, -2e4),
    },
    "a document of 1e6 nats beside one of 1e-3": lambda: {
        "long": gaussian(20, 3, 1e3, -1e6),
        "short": gaussian(20, 3, 1e-4, -1e-3),
    },
    "experts useless everywhere": lambda: {
        f"d{d}": torch.cat([gaussian(30, 2), gaussian(30, 5, 1, -5e3)], dim=1) for d in range(3)
    },
    "all experts equal": lambda: {"a": torch.full((5, 6), -3.0), "b": torch.full((2, 6), -9.0)},
    "ties everywhere": lambda: {f"d{d}": torch.randint(-2, 0, (40, 5)).double() for d in range(4)},
    "more experts than documents": lambda: {"a": gaussian(3, 40), "b": gaussian(1, 40)},
    "more domains than documents each": lambda: {f"d{d}": gaussian(1, 3, 5) for d in range(50)},
    "one document, one domain": lambda: {"only": gaussian(1, 8, 10)},
    "one expert per document": lambda: {
        f"d{d}": torch.full((6, 6), -torch.inf).fill_diagonal_(-1.0 - d) for d in range(3)
    },
    "a domain that needs a weight near e^-40": lambda: {
        "near": torch.tensor([[-40.0, -0.5]]),
        "far": torch.tensor([[-1.0, -90.0]]),
    },
    "an expert needed by one document in ten thousand": lambda: {
        "a": torch.cat([torch.tensor([[-torch.inf, -1.0]]), torch.tensor([[-1.0, -9.0]] * 9999)]),
        "b": gaussian(10, 2),
    },
    "near-equal experts": lambda: {
        f"d{d}": gaussian(30, 1, 5, -100) + gaussian(30, 4, 1e-9) for d in range(3)
    },
    "scales that differ by expert": lambda: {
        f"d{d}": gaussian(30, 5) * torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4]) for d in range(4)
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_instances_reach_the_tolerance(name):
    solution = robust_prior(HOSTILE[name](), baseline="raw", tol=TOL)
    assert solution.converged
    assert 0 <= solution.gap <= TOL
    assert bool(solution.prior.isfinite().all())
    assert len(solution.trajectory) <= 30


def long_documents(seed):
    """Documents of 1e4 nats on which a single expert may decide everything; six experts."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = {}
    for d in range(5):
        documents = (1, 2, 40)[int(torch.randint(0, 3, (1,), generator=generator))]
        noise = torch.randn(documents, 6, generator=generator, dtype=torch.float64)
        skill = torch.randn(6, generator=generator, dtype=torch.float64)
        log_probs[f"d{d}"] = 50 * (noise + skill) - 1e4
    return log_probs


@pytest.mark.parametrize("seed", [90, 325, 1047])
def test_the_barrier_does_not_outrun_the_certificate(seed):
    # Instances found among 1,500: weights near 1e-10 matter, and a barrier parameter that falls far
    # below the tolerance never finds them again.
    assert robust_prior(long_documents(seed), baseline="raw", tol=TOL).converged


@pytest.mark.parametrize("seed", [1, 62])
def test_no_complementarity_product_is_left_behind(seed):
    # 40 experts, 20 domains: 10 passes with the neighbourhood of the central path, 40 without.
    generator = torch.Generator().manual_seed(seed)
    log_probs = {}
    for d in range(20):
        documents = int(torch.randint(1, 40, (1,), generator=generator))
        noise = torch.randn(documents, 40, generator=generator, dtype=torch.float64)
        skill = torch.randn(40, generator=generator, dtype=torch.float64)
        log_probs[f"d{d}"] = 300 * (noise + skill) - 300
    assert len(robust_prior(log_probs, baseline="raw", tol=TOL).trajectory) <= 20


def test_passes_stay_few():
    # Counted, not timed: 7.7 passes on average with the corrector's second-order term, 12 without.
    passes = [
        len(robust_prior(long_documents(seed), baseline="raw", tol=TOL).trajectory)
        for seed in range(40)
    ]
    assert sum(passes) / len(passes) <= 9.5


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.filterwarnings("ignore:robust_prior. the certified gap:RuntimeWarning")
def test_an_unreachable_tolerance_ends_at_rounding_level(seed):
    generator = torch.Generator().manual_seed(seed)
    log_probs = {
        f"d{d}": 3 * torch.randn(20, 4, generator=generator, dtype=torch.float64)[:, [0, 1, 1, 2]]
        for d in range(3)
    }
    solution = robust_prior(log_probs, tol=1e-300)
    assert solution.lower_bound <= solution.upper_bound
    # Losses of size 10, means of 20 terms: rounding near 1e-15, with two orders to spare.
    assert solution.gap <= 1e-12

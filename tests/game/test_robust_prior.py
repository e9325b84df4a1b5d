"""The robust prior: values known in closed form, options, guarantees and bad input."""

import itertools
import math

import pytest
import torch

from robustgate.game import capacity, certificate, maximum_likelihood_prior, robust_prior

TOL = 1e-9


def documents(rows):
    """Log-probabilities of documents given as rows of likelihoods."""
    return torch.tensor(rows, dtype=torch.float64).log()


def random_instance(domains=3, experts=4, count=30):
    return {
        f"d{d}": 2 * torch.randn(count, experts, dtype=torch.float64) - 100 for d in range(domains)
    }


# ---------------------------------------------------------------- known answers


def test_two_documents_in_closed_form():
    # e^L = [[1, a], [b, 1]]: at the optimum both losses agree, 1/value-factor = (2-a-b)/(1-ab).
    a, b = 0.5, 0.2
    solution = robust_prior(
        {"first": documents([[1, a]]), "second": documents([[b, 1]])}, baseline="raw", tol=1e-12
    )
    assert solution.value == pytest.approx(-math.log((1 - a * b) / (2 - a - b)), abs=1e-12)
    assert solution.value == pytest.approx(0.3677248, abs=5e-8)
    # An error e in the prior costs O(e) in the worst domain here: 1e-12 in value gives 1e-11.
    assert float(solution.prior[0]) == pytest.approx((1 - a) / (2 - a - b), abs=1e-10)
    assert float(solution.prior[0]) == pytest.approx(0.3846154, abs=5e-8)
    assert float(solution.mixture[0]) == pytest.approx(0.6153846, abs=1e-6)
    assert solution.domains == ("first", "second")


def test_disjoint_experts_weigh_by_their_loss():
    nll = [1.0, 2.0, 3.0]
    log_probs = {}
    for k, loss in enumerate(nll):
        row = torch.full((1, 3), -torch.inf, dtype=torch.float64)
        row[0, k] = -loss
        log_probs[f"d{k}"] = row
    raw = robust_prior(log_probs, baseline="raw", tol=1e-11)
    assert raw.value == pytest.approx(math.log(sum(math.exp(h) for h in nll)), abs=1e-11)
    assert raw.value == pytest.approx(3.4076060, abs=5e-8)
    expected = torch.softmax(torch.tensor(nll, dtype=torch.float64), dim=0)
    torch.testing.assert_close(raw.prior, expected, rtol=0, atol=1e-9)
    excess = robust_prior(log_probs, tol=1e-11)
    assert excess.value == pytest.approx(math.log(3), abs=1e-11)
    assert excess.baseline.tolist() == nll


def test_z_channel_as_documents():
    # Domain 1 always emits x = 0, domain 2 emits 0 or 1 with probability 1/2 each; the experts are
    # these distributions. Excess over the entropy = KL, and the value is the capacity, log(5/4).
    log_probs = {
        "clean": documents([[1, 0.5]]),
        "noisy": documents([[1, 0.5], [0, 0.5]]),
    }
    entropy = {"clean": 0.0, "noisy": math.log(2)}
    solution = robust_prior(log_probs, baseline=entropy, tol=1e-11)
    assert solution.value == pytest.approx(math.log(5 / 4), abs=1e-11)
    torch.testing.assert_close(
        solution.prior, torch.tensor([0.6, 0.4], dtype=torch.float64), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        solution.mixture, torch.tensor([0.6, 0.4], dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_exact_experts_reach_the_capacity():
    # Experts equal to the domains, every x as one document of weight p_d(x): with rational p this
    # is a list of repeated documents.
    counts = torch.tensor([[4, 3, 2, 1], [1, 1, 1, 7], [3, 3, 3, 1]])
    probs = counts.double() / 10
    log_probs = {
        f"d{d}": probs.T.log().repeat_interleave(counts[d], dim=0) for d in range(len(counts))
    }
    entropy = -(probs * probs.log()).sum(dim=1)
    solution = robust_prior(log_probs, baseline=entropy, tol=TOL)
    assert solution.value == pytest.approx(capacity(probs, tol=TOL).value, abs=2 * TOL)


def test_duplicating_an_expert_leaves_the_value():
    log_probs = random_instance()
    doubled = {name: matrix[:, [0, 1, 2, 3, 2]] for name, matrix in log_probs.items()}
    one, two = robust_prior(log_probs, tol=TOL), robust_prior(doubled, tol=TOL)
    assert one.value == pytest.approx(two.value, abs=TOL)


def test_one_expert_is_trivial():
    solution = robust_prior({"a": torch.randn(5, 1) - 9, "b": torch.randn(3, 1) - 9})
    assert solution.prior.tolist() == [1.0]
    assert solution.value == pytest.approx(0.0, abs=1e-12)
    assert solution.gap <= 1e-12


def test_one_domain_is_maximum_likelihood():
    matrix = random_instance()["d0"]
    robust = robust_prior({"only": matrix}, baseline="raw", tol=TOL)
    pooled = maximum_likelihood_prior(matrix, tol=TOL)
    assert robust.value == pytest.approx(pooled.value, abs=TOL)
    assert robust.mixture.tolist() == [1.0]
    assert pooled.domains == ("pooled",)


def test_maximum_likelihood_in_closed_form():
    # Two documents seen only by expert 1, one only by expert 2: w = (2/3, 1/3).
    inf = torch.inf
    matrix = torch.tensor([[-3.0, -inf], [-5.0, -inf], [-inf, -4.0]])
    solution = maximum_likelihood_prior(matrix, tol=1e-11)
    # The likelihood is flat to second order: a gap of 1e-11 leaves up to 5e-6 in the weights.
    assert solution.prior.tolist() == pytest.approx([2 / 3, 1 / 3], abs=5e-6)
    expected = (12 - 2 * math.log(2 / 3) - math.log(1 / 3)) / 3
    assert solution.value == pytest.approx(expected, abs=1e-10)


def test_expectation_maximisation_never_loses_likelihood():
    matrix = random_instance(count=200)["d0"]
    solution = maximum_likelihood_prior(matrix, method="first-order", tol=1e-4)
    nll = [float(iterate.losses[0]) for iterate in solution.trajectory]
    assert len(nll) > 3
    # Exactly non-increasing; 1e-12 is rounding of a mean near 100.
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(nll))


def test_first_order_steps_are_exponentiated_gradient_and_em_by_hand():
    log_probs = random_instance(domains=2, count=6)
    with pytest.warns(RuntimeWarning):
        solution = robust_prior(
            log_probs, baseline="raw", method="first-order", max_passes=3, tol=1e-9
        )
    prior = torch.full((4,), 0.25, dtype=torch.float64)
    mixture = torch.full((2,), 0.5, dtype=torch.float64)
    for iterate in solution.trajectory:
        joint = {name: matrix + prior.log() for name, matrix in log_probs.items()}
        losses = torch.stack([-j.logsumexp(dim=1).mean() for j in joint.values()])
        mixture = mixture * losses.exp() / (mixture * losses.exp()).sum()
        torch.testing.assert_close(iterate.prior, prior, rtol=0, atol=1e-12)
        torch.testing.assert_close(iterate.mixture, mixture, rtol=0, atol=1e-12)
        posterior = torch.stack([j.softmax(dim=1).mean(dim=0) for j in joint.values()])
        prior = mixture @ posterior


# ---------------------------------------------------------------- solution object


def test_solution_reports_itself():
    solution = robust_prior(random_instance(), tol=1e-7)
    assert solution.converged
    assert solution.gap == solution.upper_bound - solution.lower_bound <= 1e-7
    assert solution.value == solution.upper_bound == float(solution.losses.amax())
    assert solution.prior.dtype == solution.mixture.dtype == torch.float64
    assert float(solution.prior.sum()) == pytest.approx(1.0, abs=1e-14)
    assert float(solution.mixture.sum()) == pytest.approx(1.0, abs=1e-14)
    assert bool((solution.prior > 0).all())
    assert solution.guarantee == -math.log(float(solution.prior.amin()))
    assert len(solution.trajectory) >= 2
    assert all(step.lower_bound <= step.upper_bound for step in solution.trajectory)
    assert solution.trajectory[-1].gap < solution.trajectory[0].gap
    with pytest.raises(AttributeError):
        solution.prior = torch.ones(4)


def test_gap_is_the_independent_certificate():
    log_probs = random_instance()
    solution = robust_prior(log_probs)
    proof = certificate(log_probs, solution.prior, solution.mixture)
    # The stored weights were normalised already; normalising again may move the last bit.
    assert solution.lower_bound == pytest.approx(proof.lower_bound, abs=1e-13)
    assert solution.upper_bound == pytest.approx(proof.upper_bound, abs=1e-13)


def test_floor_costs_and_guarantees_what_it_says():
    log_probs = random_instance()
    solution = robust_prior(log_probs)
    delta = 0.05
    floored = solution.floor(delta)
    assert floored.cost == pytest.approx(-math.log(1 - delta), abs=1e-15)
    assert floored.guarantee <= math.log(4 / delta)
    after = certificate(log_probs, floored.prior, solution.mixture)
    assert bool((after.losses <= solution.losses + floored.cost + 1e-12).all())
    # Regret of the sequence mixture to every expert, on every document.
    for matrix in log_probs.values():
        regret = matrix - (matrix + floored.prior.log()).logsumexp(dim=1, keepdim=True)
        assert float(regret.amax()) <= floored.guarantee


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_floor_refuses_a_share_outside_the_unit_interval(delta):
    with pytest.raises(ValueError, match="delta: expected a number in"):
        robust_prior(random_instance()).floor(delta)


def test_guarantee_of_a_zero_weight_is_infinite():
    solution = robust_prior({"a": torch.zeros(2, 1)})
    assert solution.guarantee == 0.0


def test_no_worse_than_uniform_pooled_or_any_single_expert():
    log_probs = random_instance()
    solution = robust_prior(log_probs)
    pooled = maximum_likelihood_prior(torch.cat(list(log_probs.values())))
    others = [torch.full((4,), 0.25), pooled.prior, *torch.eye(4)]
    for other in others:
        assert solution.value <= certificate(log_probs, other, solution.mixture).value + 1e-6


def test_baselines():
    log_probs = random_instance(domains=2)
    best = [float((-matrix.mean(dim=0)).amin()) for matrix in log_probs.values()]
    excess = robust_prior(log_probs)
    # The same float64 numbers, summed in the same order.
    assert excess.baseline.tolist() == pytest.approx(best, abs=1e-12)
    by_name = robust_prior(log_probs, baseline={"d1": best[1], "d0": best[0]})
    by_tensor = robust_prior(log_probs, baseline=torch.tensor(best, dtype=torch.float64))
    assert excess.value == pytest.approx(by_name.value, abs=1e-12)
    assert excess.value == pytest.approx(by_tensor.value, abs=1e-12)
    assert robust_prior(log_probs, baseline="raw").baseline.tolist() == [0.0, 0.0]


def test_hindsight_is_the_best_expert_of_every_document():
    log_probs = random_instance()
    solution = robust_prior(log_probs, baseline="hindsight")
    expected = [float(-matrix.amax(dim=1).mean()) for matrix in log_probs.values()]
    assert solution.baseline.tolist() == pytest.approx(expected, abs=1e-12)
    # pi_w <= max_k pi_k everywhere, and uniform weights reach a K-th of it.
    assert 0 <= solution.value <= math.log(4) + 1e-6
    assert solution.value >= robust_prior(log_probs).value - 1e-6


def test_shifting_a_baseline_shifts_the_value():
    log_probs = random_instance()
    raw = robust_prior(log_probs, baseline="raw", tol=TOL)
    shifted = robust_prior(log_probs, baseline=torch.full((3,), 7.0), tol=TOL)
    assert raw.value - 7.0 == pytest.approx(shifted.value, abs=2 * TOL)


def test_unreached_tolerance_warns_and_keeps_the_bounds():
    log_probs = random_instance()
    exact = robust_prior(log_probs)
    with pytest.warns(RuntimeWarning, match="certified gap is .* after 2 passes"):
        early = robust_prior(log_probs, max_passes=2)
    assert not early.converged
    assert len(early.trajectory) == 2
    assert early.lower_bound <= exact.upper_bound
    assert early.upper_bound >= exact.lower_bound
    assert early.gap > 1e-6


def test_float32_input_is_solved_in_float64():
    log_probs = {name: matrix.float() for name, matrix in random_instance().items()}
    solution = robust_prior(log_probs)
    assert solution.converged
    assert solution.prior.dtype == torch.float64


def test_input_is_left_alone():
    log_probs = random_instance()
    before = {name: matrix.clone() for name, matrix in log_probs.items()}
    robust_prior(log_probs)
    assert all(torch.equal(before[name], log_probs[name]) for name in before)


# ---------------------------------------------------------------- bad input


def bad(entry):
    matrix = torch.zeros(3, 2)
    matrix[1, 0] = entry
    return {"good": torch.zeros(2, 2), "odd": matrix}


@pytest.mark.parametrize(
    ("log_probs", "error", "message"),
    [
        ({}, ValueError, "log_probs: expected at least one domain"),
        (torch.zeros(2, 2), TypeError, "log_probs: expected a mapping"),
        ({"a": torch.zeros(0, 2)}, ValueError, r"log_probs\['a'\]: expected shape .* got \(0, 2\)"),
        ({"a": torch.zeros(2, 0)}, ValueError, r"log_probs\['a'\]: expected shape .* got \(2, 0\)"),
        ({"a": torch.zeros(2)}, ValueError, r"log_probs\['a'\]: expected shape .* got \(2,\)"),
        ({"a": [[0.0]]}, TypeError, r"log_probs\['a'\]: expected a floating point tensor.*list"),
        ({"a": torch.zeros(2, 2, dtype=torch.long)}, TypeError, "got torch.int64"),
        ({0: torch.zeros(2, 2)}, TypeError, "domain names of type str, got 0"),
        (
            {"a": torch.zeros(2, 2), "b": torch.zeros(2, 3)},
            ValueError,
            r"log_probs\['b'\]: expected K = 2 experts as in 'a', got 3",
        ),
        (bad(math.nan), ValueError, r"log_probs\['odd'\], document 1: .* got NaN"),
        (bad(math.inf), ValueError, r"log_probs\['odd'\], document 1: .* got \+inf"),
        (
            {"a": torch.tensor([[0.0, 0.0], [-math.inf, -math.inf]])},
            ValueError,
            r"log_probs\['a'\], document 1: .* -inf from every expert",
        ),
    ],
)
def test_bad_log_probs_are_refused(log_probs, error, message):
    with pytest.raises(error, match=message):
        robust_prior(log_probs)


@pytest.mark.parametrize(
    ("baseline", "error", "message"),
    [
        ("best", ValueError, 'baseline: expected "excess", "hindsight", "raw" or .* \'best\''),
        ({"a": 0.0}, ValueError, r"baseline: expected the domains \['a', 'b'\], got \['a'\]"),
        (torch.zeros(3), ValueError, r"baseline: expected shape \[2\], got \(3,\)"),
        (torch.tensor([0.0, math.nan]), ValueError, "baseline: expected finite numbers"),
        ({"a": 0.0, "b": math.inf}, ValueError, "baseline: expected finite numbers"),
        (1.0, TypeError, "baseline: .* got float"),
    ],
)
def test_bad_baselines_are_refused(baseline, error, message):
    with pytest.raises(error, match=message):
        robust_prior({"a": torch.zeros(2, 2), "b": torch.zeros(1, 2)}, baseline=baseline)


def test_excess_without_any_finite_expert_is_refused():
    inf = math.inf
    log_probs = {"fine": torch.zeros(2, 2), "split": torch.tensor([[0.0, -inf], [-inf, 0.0]])}
    with pytest.raises(ValueError, match=r"baseline: every expert gives .* domain 'split'"):
        robust_prior(log_probs)
    assert robust_prior(log_probs, baseline="raw").value == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "tol: expected a positive number"),
        ({"tol": math.nan}, "tol: expected a positive number"),
        ({"method": "newton"}, "method: expected one of"),
        ({"max_passes": 0}, "max_passes: expected at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        robust_prior({"a": torch.zeros(2, 2)}, **options)

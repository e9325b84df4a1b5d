"""jsd at its extremes: exact zeros, infinities, large logits, rows whose roundings add up.

Values are right to 1e-5, gradients to 1e-5 in relative L2 and to the rounding of the log-ratios
that they are differences of. Near-equal experts have their own file.
"""

import math

import pytest
import torch
from op_cases import (
    assert_gradient,
    backend_fixture,
    gradients,
    leaves,
    make,
    simplex,
    true_jsd,
    true_kl,
)

import robustgate as rg

INF = float("inf")

backend = backend_fixture("jsd", "jsd_backward")


def check_against_truth(logits, weights):
    w, z = leaves([weights], torch.float32)[0], leaves(logits, torch.float32)
    value = rg.jsd(z, w, reduction="none")
    exact_w, exact = leaves([weights])[0], leaves(logits)
    want = true_jsd(exact, exact_w)
    torch.testing.assert_close(value.double(), want, atol=1e-12, rtol=1e-5)
    kl = true_kl(logits, weights)
    got_w, *got = gradients(value, [w, *z])
    torch.testing.assert_close(got_w.double(), kl, atol=1e-7, rtol=1e-5)
    for k, (grad, true) in enumerate(zip(got, gradients(want, exact), strict=True)):
        assert torch.isfinite(grad).all()
        scale = weights[..., k] * (1 + kl[..., k])  # a log-ratio of 60 nats has an ulp of 4e-6
        assert_gradient(grad, true, 1e-5, float(scale.nan_to_num(0, 0, 0).norm()))
        assert (grad[torch.isneginf(logits[k])] == 0).all()


@pytest.mark.parametrize("vocab", [40, 1300])
@pytest.mark.parametrize("excluding", [[0], [2], [0, 1], [0, 1, 2]])
def test_minus_infinity_logits(vocab, excluding):
    """Columns excluded by some experts, and by all: probability 0 adds w_k m(v), not NaN."""
    case = make((4,), 3, vocab)
    for k in excluding:
        case.logits[k][:, vocab // 3 : vocab // 2] = -INF
        case.logits[k][:, -1] = -INF
    check_against_truth(case.logits, simplex(4, 3))


@pytest.mark.parametrize("column", [0, 5, 1299])
def test_all_but_one_column_excluded(column):
    case = make((4,), 3, 1300)
    for k in (0, 1):
        case.logits[k][:, torch.arange(1300) != column] = -INF
    check_against_truth(case.logits, simplex(4, 3))
    case.logits[2][:, torch.arange(1300) != 7] = -INF
    check_against_truth(case.logits, simplex(4, 3))


@pytest.mark.parametrize("heaviest", [0, 1, 2])
@pytest.mark.parametrize("tiny", [0.0, 1e-30, 1e-6])
def test_weights_of_zero_and_almost(heaviest, tiny):
    """Also where the expert of weight 0 is the only sure one: the others decide, exactly."""
    case = make((4,), 3, 300)
    case.logits[heaviest][:, 17] = 60.0
    w = torch.full((4, 3), 0.5)
    w[:, heaviest] = tiny
    check_against_truth(case.logits, w)
    if tiny == 0:
        pair = [k for k in range(3) if k != heaviest]
        z = leaves(case.logits, torch.float32)
        value = rg.jsd(z, w, reduction="none")
        grads = gradients(value, z)
        assert (grads[heaviest] == 0).all()
        two = rg.jsd([z[k] for k in pair], torch.tensor([0.5, 0.5]), reduction="none")
        torch.testing.assert_close(value, two, atol=0, rtol=2e-6)


def test_weight_of_zero_alone_allows_a_column():
    """KL_k is +inf for an expert outside the mixture's support: value and other gradients are not.

    The gradient of its weight says so.
    """
    case = make((3,), 3, 50)
    for k in (0, 2):
        case.logits[k][:, 9] = -INF
    w = torch.tensor([0.25, 0.0, 0.75], requires_grad=True)
    z = leaves(case.logits, torch.float32)
    value = rg.jsd(z, w, reduction="none")
    want = true_jsd([case.logits[0], case.logits[2]], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(value.double(), want, atol=0, rtol=1e-5)
    (nothing,) = gradients(value, [w], torch.zeros(3), retain_graph=True)
    assert (nothing == 0).all()
    grad_w, *grads = gradients(value, [w, *z])
    assert grad_w[1] == INF
    assert torch.isfinite(grad_w[[0, 2]]).all()
    assert (grads[1] == 0).all()
    assert all(torch.isfinite(g).all() for g in grads)


def test_weight_of_one():
    """All the weight on one expert: 0, with the others' weights' gradients KL(p_k || p_0)."""
    case = make((3,), 3, 50)
    w = torch.tensor([1.0, 0.0, 0.0]).expand(3, 3).clone()
    check_against_truth(case.logits, w)
    assert (rg.jsd(case.logits, w, reduction="none") == 0).all()


@pytest.mark.parametrize("sizes", [(1e4, 0, 0), (-1e4, 0, 0), (1e4, -1e4, 1e4), (3e4, 3e4, 3e4)])
def test_large_logits(sizes):
    case = make((4,), 3, 700, scale=6.0)
    check_against_truth(
        [z + size for z, size in zip(case.logits, sizes, strict=True)], simplex(4, 3)
    )


@pytest.mark.parametrize("column", [0, 650])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_a_large_logit_in_one_expert(column, size):
    case = make((4,), 3, 700)
    case.logits[1][:, column] = size
    check_against_truth(case.logits, simplex(4, 3))


@pytest.mark.parametrize("gap", [25.0, 52.0, 110.0])
def test_experts_far_apart_in_some_columns(gap):
    """Log-probs that differ by 50 nats and more, both ways, in columns that matter."""
    case = make((4,), 3, 1000)
    case.logits[0][:, 100:200] -= gap
    case.logits[1][:, 150:250] -= gap
    case.logits[2][:, 600] += gap
    check_against_truth(case.logits, simplex(4, 3))


@pytest.mark.parametrize("vocab", [1104, 4100, 40000])
@pytest.mark.parametrize("gap", [0.1, 5.0, 15.0, INF])
def test_rows_of_equal_terms(vocab, gap):
    """A uniform expert and one that halves the vocabulary: every rounding has the same sign.

    What random rows average out adds up here, over as many columns as a float32 sum holds.
    """
    logits = [torch.zeros(2, vocab), torch.zeros(2, vocab)]
    logits[1][:, ::2] -= gap
    logits[1][1] += 1.3  # other roundings of the same
    check_against_truth(logits, torch.tensor([[0.75, 0.25], [0.625, 0.375]]))


def test_entropy_of_disjoint_experts_in_half_precision():
    z = [torch.full((2, 100), -INF, dtype=torch.float16) for _ in range(2)]
    z[0][:, :50], z[1][:, 50:] = 0, 0
    torch.testing.assert_close(
        rg.jsd(z, reduction="none"), torch.full((2,), math.log(2.0)), atol=2e-7, rtol=0
    )

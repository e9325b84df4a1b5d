"""jsd of experts that are nearly equal, as distillation makes them, and exactly equal.

A divergence is quadratic in the experts' distance d and its gradient linear: errors of 1e-7 in a
log-prob would swamp both where d is 1e-6. The logits' differences are exact in float32 (Sterbenz)
and so may be everything that comes after: values to 1e-5 down to 3e-9, then to the 3e-14 that this
is; gradients to 1e-4. In bfloat16 rounding the gradient costs 0.17 % in the mean; 0.03 % more is
allowed. Where p is near 1 the log-sum-exps' errors of 6.6e-7 do not average out: two of them make a
divergence of (1.3e-6)^2 / 8, ONE_SURE_COLUMN.
"""

import mpmath
import pytest
import torch
from op_cases import (
    backend_fixture,
    exact_jsd,
    gradients,
    leaves,
    make,
    relative_error,
    simplex,
    true_jsd,
)

import robustgate as rg

INF = float("inf")
ONE_SURE_COLUMN = 2.2e-13
DISTANCES = [1.0, 0.3, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]

backend = backend_fixture("jsd", "jsd_backward")


def near_equal(experts, distance, shape=(8,), vocab=3001):
    """Float32 logits of experts whose log-probs differ by about ``distance``."""
    base = 2 * torch.randn(*shape, vocab)
    return [base, *(base + distance * torch.randn(base.shape) for _ in range(experts - 1))]


def one_ulp_apart(columns, shape=(8,), vocab=3001):
    """Two bfloat16 experts that differ by one ulp in a few columns of every row."""
    base = (2 * torch.randn(*shape, vocab)).bfloat16()
    other = base.clone()
    other.view(torch.int16)[..., torch.randperm(vocab)[:columns]] += 1
    return [base, other]


def check_near_equal(logits, weights, floor=3e-14, relative=1e-5, **options):
    dtype = logits[0].dtype
    z = leaves(logits, dtype)
    value = rg.jsd(z, weights, reduction="none", **options)
    want = exact_jsd(logits, weights, **options)
    assert (value >= 0).all()
    torch.testing.assert_close(value.double(), want, atol=floor, rtol=relative)
    exact = leaves(logits)
    normalised = weights.double() / weights.double().sum(-1, keepdim=True)
    truth = gradients(true_jsd(exact, normalised, **options), exact)
    for got, true in zip(gradients(value, z), truth, strict=True):
        allowed = 1e-4 if dtype == torch.float32 else 3e-4 + relative_error(true.to(dtype), true)
        assert relative_error(got, true) <= allowed


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("experts", [2, 5])
def test_near_equal_experts(experts, distance):
    check_near_equal(near_equal(experts, distance), simplex(8, experts))


@pytest.mark.parametrize("distance", [0.4, 0.5, 0.7])
def test_between_near_and_far(distance):
    """Divergences of some per cent of an entropy of 8 nats, over a whole vocabulary."""
    check_near_equal(near_equal(2, distance, (4,), 32000), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_near_equal_experts_of_sure_rows(distance):
    """p near 1 somewhere in half of the rows."""
    logits = near_equal(3, distance)
    for z in logits:
        z[::2, 1700] += torch.tensor([10.0, 15.0, 20.0, 30.0])
    check_near_equal(logits, simplex(8, 3), ONE_SURE_COLUMN)


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-6])
def test_near_equal_experts_with_weights_that_float32_rounded(distance):
    """Weights from a softmax sum to 1 up to an ulp, which is no part of the divergence."""
    weights = torch.softmax(torch.randn(8, 3), -1)
    assert (weights.double().sum(-1) != 1).any()
    check_near_equal(near_equal(3, distance), weights)


@pytest.mark.parametrize("columns", [1, 10, 1000])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (1.3, None), (0.8, 6.0)])
def test_experts_one_ulp_of_bfloat16_apart(columns, temperature, softcap):
    # An ulp of bfloat16 is 2^-8 of a logit and, capped, 2^-10 or more of tanh's, known to 2^-24.
    relative = 1e-5 if softcap is None else 2.0**-13
    check_near_equal(
        one_ulp_apart(columns),
        simplex(2),
        relative=relative,
        temperature=temperature,
        softcap=softcap,
    )


@pytest.mark.parametrize("distance", [1e-2, 1e-6])
def test_near_equal_experts_with_impossible_columns(distance):
    """Columns without mass, however the experts exclude them, take no digit from the others."""
    a, b = near_equal(2, distance)
    for column, (x, y) in enumerate([(-INF, -INF), (-INF, -200.0), (-90.0, -130.0), (-1e4, -INF)]):
        a[:, 700 * column], b[:, 700 * column] = x, y
    check_near_equal([a, b], simplex(2))


def test_large_offsets_of_near_equal_experts():
    """Multiples of 2^-8 + 1024 or -2048: exact in float32, and so are the differences."""
    base = (make((8,), 1, 3001, scale=2.0).logits[0] * 256).round() / 256
    other = base + torch.randint(-1, 2, base.shape) / 256
    check_near_equal([base + 1024, other - 2048], simplex(2), ONE_SURE_COLUMN)


@pytest.mark.parametrize("offsets", [(5.0, 0.0), (0.0, 20.0), (-40.0, 30.0), (300.0, -900.0)])
@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_near_equal_experts_of_different_offsets(offsets, distance):
    """As two models have them: z_a - z_b is then no small number, and has to keep its digits.

    The offsets round the logits, and with them the experts' distance; the truth takes them so.
    """
    a, b = near_equal(2, distance)
    check_near_equal([a + offsets[0], b + offsets[1]], simplex(2), ONE_SURE_COLUMN)


def test_float64_near_equal_experts():
    a, b = near_equal(2, 1e-6)
    z, w = leaves([a, b]), simplex(2).double()
    value = rg.jsd(z, w, reduction="none")
    # Log-probs of 10 nats have rounding 2e-15, which is 2e-9 of their distance.
    torch.testing.assert_close(value, exact_jsd([a, b], w), atol=0, rtol=1e-8)


def test_fifty_digits():
    """A case small enough for mpmath: two experts at distances 1e-3 and 1e-6, K = 3, V = 4."""
    base = [0.5, -1.0, 2.0, 0.25]
    steps = [[0, 0, 0, 0], [1, -2, 1, 3], [0, 1, -1, 0]]
    for unit in (2.0**-10, 2.0**-20):  # exact in float32
        logits = [[b + unit * s for b, s in zip(base, step, strict=True)] for step in steps]
        with mpmath.workdps(50):
            probs = []
            for row in logits:
                e = [mpmath.exp(x) for x in row]
                probs.append([x / mpmath.fsum(e) for x in e])
            w = [mpmath.mpf(1) / 4, mpmath.mpf(1) / 4, mpmath.mpf(1) / 2]
            m = [mpmath.fdot(w, column) for column in zip(*probs, strict=True)]
            log_ratios = [[mpmath.log(p / q) for p, q in zip(row, m, strict=True)] for row in probs]
            kl = [mpmath.fdot(row, log) for row, log in zip(probs, log_ratios, strict=True)]
            want = mpmath.fdot(w, kl)
            dz = [
                [w[k] * probs[k][v] * (log_ratios[k][v] - kl[k]) for v in range(4)]
                for k in range(3)
            ]
        z = [torch.tensor([row], requires_grad=True) for row in logits]
        value = rg.jsd(z, torch.tensor([0.25, 0.25, 0.5]))
        assert float(value.detach()) == pytest.approx(float(want), rel=1e-5, abs=3e-14)
        for got, true in zip(gradients(value, z), dz, strict=True):
            assert relative_error(got[0], torch.tensor([float(x) for x in true])) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("experts", [2, 5])
def test_identical_experts(dtype, experts):
    """Exactly 0, and a gradient of exactly 0, whatever the weights."""
    z = leaves(make((4,), 1, 999, dtype).logits * experts, dtype)
    value = rg.jsd(z, torch.softmax(torch.randn(4, experts), -1), reduction="none")
    assert (value == 0).all()
    assert all((g == 0).all() for g in gradients(value, z))

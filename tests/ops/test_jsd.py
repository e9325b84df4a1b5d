"""jsd against the float64 truth: values, gradients, identities. Extremes have their own file.

Tolerances. The statistics are float32 and a divergence is a sum of non-negative terms, so that its
relative error is that of a term: rounding of log-probs relative to each other (a few 6e-8 for the
logits' differences, times |log-ratio| <= 30) and of the exponentials. The bound is 1e-5. Gradients
are products of the same values, rounded to the logits' dtype: half an ulp of that on top, in
relative L2. float64 is held to 1e-11: |l| <= 100 nats of eps 2.2e-16, and a sum of 1e4 terms.
"""

import math

import pytest
import torch
from op_cases import (
    DTYPES,
    assert_gradient,
    backend_fixture,
    exact_jsd,
    gradients,
    leaves,
    make,
    relative_error,
    rounding,
    simplex,
    true_jsd,
    true_kl,
    true_log_probs,
)

import robustgate as rg

# 1 and odd sizes; around one vector and the 512 reference columns; a multiple of nothing.
VOCABS = [1, 2, 15, 16, 17, 97, 511, 513, 1000, 4099]

backend = backend_fixture("jsd", "jsd_backward")


def tolerance(dtype):
    return 1e-11 if dtype == torch.float64 else 1e-5


def compare(logits, weights, dtype, upstream, **options):
    """Values, logits' gradients and weights' gradients against the truth."""
    z = leaves(logits, dtype)
    (w,) = leaves([weights], torch.float64 if dtype == torch.float64 else torch.float32)
    value = rg.jsd(z, w, reduction="none", **options)
    assert value.dtype == w.dtype
    grads = gradients(value, [w, *z], upstream)
    exact_w, *exact = leaves([weights, *logits])
    want = true_jsd(exact, exact_w, **options)
    exact_grads = gradients(want, [exact_w, *exact], upstream)
    # A log-prob wrong by 2e-7 gives a row of one column a divergence of 2e-14.
    torch.testing.assert_close(value.double(), want, atol=1e-13, rtol=tolerance(dtype))
    # A log-sum-exp wrong by e moves KL_k by at most e TV(p_k, m), and TV is below sqrt(KL_k / 2);
    # e is 1e-6, or 4e-6 where 16-bit logits allow shorter exponentials.
    kl = true_kl(logits, weights, **options)
    e = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 4e-6)
    bound = (tolerance(dtype) * kl + e * kl.clamp_min(1e-20).sqrt()) * upstream[..., None].abs()
    error = (grads[0].double() - exact_grads[0]).abs()
    assert (error <= (bound if weights.dim() > 1 else bound.sum(0))).all()
    # dz = w p (log(p/m) - KL): where p is near 1 the two nearly agree, and one of 8 nats has an
    # ulp of 1e-6.
    p = true_log_probs(logits, **options).exp().norm(dim=-2)
    scale = upstream[:, None] * weights * p * (1 + kl / 4) / options.get("temperature", 1.0)
    for k, (got, true) in enumerate(zip(grads[1:], exact_grads[1:], strict=True)):
        assert got.dtype == dtype
        assert got.shape == true.shape
        if vocab_size := options.get("vocab_size"):
            assert (got[..., vocab_size:] == 0).all()
        assert_gradient(got, true, tolerance(dtype), float(scale[:, k].norm()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_values_and_gradients(dtype, vocab):
    case = make((4,), 3, vocab, dtype, padding=3)
    compare(case.logits, simplex(4, 3), dtype, torch.randn(4), vocab_size=vocab)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocab", [17, 1000])
@pytest.mark.parametrize(("temperature", "softcap"), [(0.7, None), (1.3, 5.0), (1.0, 30.0)])
def test_temperature_and_softcap(dtype, vocab, temperature, softcap):
    case = make((4,), 3, vocab, dtype)
    compare(
        case.logits,
        simplex(4, 3),
        dtype,
        torch.randn(4),
        temperature=temperature,
        softcap=softcap,
    )


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("weights", ["per row", "shared", "none"])
def test_numbers_of_experts(experts, weights):
    case = make((3,), experts, 133)
    if experts == 1:  # exactly 0, in value and gradient
        z = case.clone(requires_grad=True).logits
        value = rg.jsd(z, None if weights == "none" else torch.ones(1), reduction="none")
        assert (value == 0).all()
        assert (gradients(value, z)[0] == 0).all()
    elif weights == "none":
        got = rg.jsd(case.logits, reduction="none")
        want = true_jsd(case.logits, torch.full((experts,), 1 / experts, dtype=torch.float64))
        torch.testing.assert_close(got.double(), want, atol=0, rtol=1e-5)
    else:
        w = simplex(*(() if weights == "shared" else (3,)), experts)
        compare(case.logits, w, torch.float32, torch.randn(3))


def test_one_tensor_and_a_batch_of_sequences():
    case = make((2, 3), 3, 41)
    w = simplex(3)
    stacked = torch.stack(case.logits).requires_grad_()
    value = rg.jsd(stacked, w, reduction="none")
    torch.testing.assert_close(value.double(), true_jsd(case.logits, w), atol=0, rtol=1e-5)
    (exact,) = leaves([stacked])
    want = gradients(true_jsd(list(exact), w), [exact])[0]
    assert relative_error(gradients(value, [stacked])[0], want) <= 1e-5


def test_half_precision_weights_receive_their_gradient():
    case = make((4,), 2, 40)
    w = torch.tensor([0.25, 0.75], dtype=torch.bfloat16, requires_grad=True)
    value = rg.jsd(case.logits, w, reduction="sum")
    (grad,) = gradients(value, [w])
    assert grad.dtype == torch.bfloat16
    want = true_kl(case.logits, w.detach()).sum(0)
    torch.testing.assert_close(grad.double(), want, atol=0, rtol=rounding(torch.bfloat16))


def test_bounds():
    """0 <= JSD <= H(w) <= log K, with equality for experts that share nothing."""
    for experts in (2, 3, 5):
        case = make((64,), experts, 30, scale=8.0)
        w = simplex(64, experts)
        entropy = -(w * w.log()).sum(-1)
        value = rg.jsd(case.logits, w, reduction="none")
        assert (value > 0).all()
        assert (value <= entropy * (1 + 1e-6)).all()
        assert (entropy <= math.log(experts) * (1 + 1e-6)).all()
        apart = [torch.full((64, experts), -200.0) for _ in range(experts)]
        for k, z in enumerate(apart):
            z[:, k] = 0
        torch.testing.assert_close(
            rg.jsd(apart, w, reduction="none"), entropy, atol=1e-7, rtol=1e-6
        )


def test_permuting_and_duplicating_experts():
    case = make((5,), 3, 640)
    w, order = simplex(5, 3), [2, 0, 1]
    value = rg.jsd(case.logits, w, reduction="none")
    # Float32 sums of the same terms in another order.
    torch.testing.assert_close(
        rg.jsd([case.logits[k] for k in order], w[:, order], reduction="none"),
        value,
        atol=0,
        rtol=2e-6,
    )
    # An expert listed twice with its weight split.
    split = torch.cat([w, w[:, :1] / 4], -1)
    split[:, 0] *= 0.75
    torch.testing.assert_close(
        rg.jsd([*case.logits, case.logits[0]], split, reduction="none"), value, atol=0, rtol=2e-6
    )


def test_offsets_change_nothing():
    """z_k + c_k is the same expert. The logits are multiples of 2^-6: the sums are exact."""
    case = make((6,), 3, 700)
    logits = [(z * 64).round() / 64 for z in case.logits]
    w = simplex(6, 3)
    shifted = [z + c for z, c in zip(logits, (512.0, -4096.0, 8192.0), strict=True)]
    x, y = leaves(logits, torch.float32), leaves(shifted, torch.float32)
    a, b = rg.jsd(x, w, reduction="none"), rg.jsd(y, w, reduction="none")
    torch.testing.assert_close(a, b, atol=0, rtol=1e-5)
    for k, (got, want) in enumerate(zip(gradients(b, y), gradients(a, x), strict=True)):
        assert_gradient(got, want.double(), 1e-5, 2 * float(w[:, k].norm()))


def test_frozen_experts_keep_no_logits():
    """With only the weights to train the graph holds [N, K] values."""
    case = make((6,), 2, 5000)
    w = simplex(6, 2).requires_grad_()
    value = rg.jsd(case.logits, w, reduction="none")
    assert max(t.numel() for t in value.grad_fn.saved_tensors if t is not None) == 12
    want = true_kl(case.logits, w.detach())
    for z in case.logits:
        z.fill_(torch.nan)  # would poison a backward pass that read them
    torch.testing.assert_close(gradients(value, [w])[0].double(), want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_truth_agrees_with_itself(dtype):
    """The two forms of the truth, which share no step but the log-probs."""
    case = make((5,), 4, 300, dtype, scale=1.0)
    w = simplex(5, 4)
    torch.testing.assert_close(
        exact_jsd(case.logits, w), true_jsd(case.logits, w), atol=0, rtol=1e-12
    )

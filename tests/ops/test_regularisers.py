"""Label smoothing, z-loss and num_items of mixture_nll.

Tolerances as in test_kernels.py: values two float32 ulps at 60 nats, 8e-6, gradients 2e-6 in
relative L2 and the rounding of the logits' dtype; the z-loss squares a log-sum-exp (1e-6 relative).
"""

import pytest
import torch
from op_cases import (
    DTYPES,
    assert_gradient,
    backend_fixture,
    gradients,
    leaves,
    make,
    rounding,
    true_mixture_log_softmax,
    true_mixture_nll,
)
from torch.nn import functional as F

import robustgate as rg

INF = float("inf")

backend = backend_fixture("mixture_mean_log_prob", "mixture_mean_log_prob_backward")


def true_loss(case, smoothing, z_loss, temperature=1.0, softcap=None):
    """-(1 - e) log m(y) - e mean_v log m(v) + z sum_k lse_k^2, by its definition."""
    nll = true_mixture_nll(case, temperature=temperature, softcap=softcap)
    options = {"temperature": temperature, "softcap": softcap}
    log_m = true_mixture_log_softmax(case.logits, case.gate, vocab_size=case.vocab_size, **options)
    total = (1 - smoothing) * nll - smoothing * log_m.mean(-1)
    for z in case.logits:
        z = z[..., : case.vocab_size].double()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        total = total + z_loss * torch.logsumexp(z / temperature, -1).square()
    return torch.where(case.target == -100, 0.0, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 17, 97, 513, 1000, 4099])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-3), (0.3, 1e-2)])
def test_values_and_gradients(dtype, vocab, smoothing, z_loss):
    check(make((4,), 3, vocab, dtype, padding=3), dtype, smoothing, z_loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("temperature", "softcap"), [(0.7, None), (1.3, 5.0)])
def test_temperature_and_softcap(dtype, temperature, softcap):
    check(make((4,), 3, 333, dtype), dtype, 0.2, 1e-3, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("experts", [1, 2, 5, 9])
@pytest.mark.parametrize("shared_gate", [True, False])
def test_numbers_of_experts(experts, shared_gate):
    case = make((2, 3), experts, 131)
    if shared_gate:
        case.gate = case.gate[0, 0]
    check(case, torch.float32, 0.2, 1e-3)


def check(case, dtype, smoothing, z_loss, **options):
    case.target[..., -1] = -100
    got, truth = case.clone(), case.double().clone(requires_grad=True)
    got.logits = leaves(got.logits, dtype)
    double = dtype == torch.float64
    (got.gate,) = leaves([got.gate], torch.float64 if double else torch.float32)
    value = rg.mixture_nll(
        got.logits,
        got.gate,
        got.target,
        reduction="none",
        label_smoothing=smoothing,
        z_loss=z_loss,
        vocab_size=case.vocab_size,
        **options,
    )
    want = true_loss(truth, smoothing, z_loss, **options)
    assert value.dtype == got.gate.dtype
    tolerance = 1e-12 if double else 8e-6
    torch.testing.assert_close(value.double(), want, atol=tolerance, rtol=tolerance / 8)
    upstream = torch.randn(want.shape)
    got_gate, *grads = gradients(value, [got.gate, *got.logits], upstream)
    true_gate, *true = gradients(want, [truth.gate, *truth.logits], upstream)
    torch.testing.assert_close(got_gate.double(), true_gate, atol=tolerance, rtol=1e-5)
    for grad, exact in zip(grads, true, strict=True):
        assert (grad[..., case.vocab_size :] == 0).all()
        # Responsibilities and probabilities near 1 are compared with each other.
        scale = float(upstream.norm()) * (1 + 60 * z_loss) / options.get("temperature", 1.0)
        # The likelihood's and the smoothing's gradients are rounded apart, and then their sum.
        assert_gradient(grad, exact, 2e-6 + 2 * rounding(dtype), scale)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_is_torchs_cross_entropy(smoothing, dtype):
    """torch.nn.functional.cross_entropy with label_smoothing and ignore_index, in float64."""
    case = make((9,), 1, 700, dtype)
    case.target[[2, 5]] = 3
    z, (exact,) = leaves(case.logits, dtype), leaves(case.logits)
    for ignored in (-100, 3):
        options = {"label_smoothing": smoothing, "ignore_index": ignored}
        got = rg.mixture_nll(z, torch.zeros(1), case.target, **options)
        want = F.cross_entropy(exact, case.target, **options)
        assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
        assert_gradient(*gradients(got, z), *gradients(want, [exact]), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_z_loss_of_one_expert(dtype):
    """The z-loss alone: what it adds is zeta lse^2, with gradient 2 zeta lse p."""
    case = make((9,), 1, 700, dtype)
    z, (exact,) = leaves(case.logits, dtype), leaves(case.logits)
    plain = rg.mixture_nll(z, torch.zeros(1), case.target, reduction="none")
    value = rg.mixture_nll(z, torch.zeros(1), case.target, reduction="none", z_loss=1.0)
    lse = torch.logsumexp(exact, -1)
    torch.testing.assert_close((value - plain).double(), lse**2, atol=1.6e-5, rtol=1e-6)
    # Gradients of two losses rounded to the dtype, then subtracted.
    (a,), (b,), (c,) = gradients(value, z), gradients(plain, z), gradients(lse**2, [exact])
    ulp = torch.finfo(dtype).eps
    bound = 2e-6 * c.norm() + ulp * (a.double().norm() + b.double().norm())
    assert (a.double() - b.double() - c).norm() <= bound


def test_zero_regularisers_change_no_bit():
    case = make((5,), 3, 200).clone(requires_grad=True)
    x = [case.gate, *case.logits]
    plain = rg.mixture_nll(case.logits, case.gate, case.target)
    zero = rg.mixture_nll(case.logits, case.gate, case.target, label_smoothing=0.0, z_loss=0.0)
    assert torch.equal(plain, zero)
    for a, b in zip(gradients(plain, x), gradients(zero, x), strict=True):
        assert torch.equal(a, b)


def test_frozen_experts_keep_no_logits():
    case = make((6,), 2, 5000)
    gate = case.gate.requires_grad_()
    truth = case.double().clone(requires_grad=True)
    (want,) = gradients(true_loss(truth, 0.1, 1e-3), [truth.gate])
    loss = rg.mixture_nll(
        case.logits, gate, case.target, reduction="none", label_smoothing=0.1, z_loss=1e-3
    )
    for z in case.logits:
        z.fill_(torch.nan)  # would poison a backward pass that read them
    (got,) = gradients(loss, [gate])
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("trainable", [0, 2])
def test_one_trainable_expert(trainable):
    case = make((4,), 3, 300)
    truth = case.double().clone(requires_grad=True)
    want = gradients(true_loss(truth, 0.1, 1e-3), truth.logits)[trainable]
    z = case.logits[trainable].requires_grad_()
    loss = rg.mixture_nll(
        case.logits, case.gate, case.target, reduction="none", label_smoothing=0.1, z_loss=1e-3
    )
    assert_gradient(*gradients(loss, [z]), want, 2e-6, scale=2.0)


def test_smoothing_over_a_column_that_no_expert_allows():
    """-log m(v) is +inf there, and so is the loss, as torch's; gradients are finite."""
    case = make((3,), 2, 50)
    for z in case.logits:
        z[1, 9] = -INF
    case.target[:] = 4
    case = case.clone(requires_grad=True)
    loss = rg.mixture_nll(
        case.logits, case.gate, case.target, reduction="none", label_smoothing=0.1
    )
    assert loss[1] == INF
    assert torch.isfinite(loss[[0, 2]]).all()
    for grad in gradients(loss, [case.gate, *case.logits]):
        assert torch.isfinite(grad).all()


def test_smoothing_with_gate_weight_of_zero():
    """A column that only an expert of weight 0 allows, and a sure expert of weight 0."""
    case = make((3,), 3, 50)
    case.gate[:, 1] = -INF
    case.logits[1][:, 17] = 60.0
    check(case, torch.float32, 0.2, 1e-3)


@pytest.mark.parametrize("vocab", [1104, 40000])
@pytest.mark.parametrize("gap", [0.1, 5.0])
def test_smoothing_over_rows_of_equal_terms(vocab, gap):
    """Every rounding has the same sign: what random rows average out adds up."""
    case = make((3,), 2, vocab)
    for z in case.logits:
        z.zero_()
    case.logits[1][:, ::2] -= gap
    check(case, torch.float32, 0.5, 0.0)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(offset):
    case = make((4,), 2, 700)
    case.logits = [z + offset for z in case.logits]
    check(case, torch.float32, 0.2, 0.0)
    # lse^2 = 1e8: float32 has it to 6e-8 of itself, and its gradient 2e4 p.
    case = case.clone(requires_grad=True)
    loss = rg.mixture_nll(case.logits, case.gate, case.target, reduction="none", z_loss=1.0)
    truth = case.double().clone(requires_grad=True)
    want = true_loss(truth, 0.0, 1.0)
    torch.testing.assert_close(loss.double(), want, atol=0, rtol=2e-7)
    for got, exact in zip(gradients(loss, case.logits), gradients(want, truth.logits), strict=True):
        assert_gradient(got, exact, 2e-6)


def test_num_items_as_tokens_of_a_whole_step():
    """Micro-batches that share a divisor add up to the loss of the whole batch, to rounding."""
    case = make((8,), 2, 50)
    case.target[[1, 6, 7]] = -100
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    want = rg.mixture_nll(case.logits, case.gate, case.target, **options)
    items = (case.target != -100).sum()
    parts = [
        rg.mixture_nll(
            [z[rows] for z in case.logits],
            case.gate[rows],
            case.target[rows],
            num_items=items,
            **options,
        )
        for rows in (slice(0, 3), slice(3, 8))
    ]
    torch.testing.assert_close(sum(parts), want, atol=0, rtol=1e-6)

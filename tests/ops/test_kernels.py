"""Values and gradients against the float64 truth, over dtypes, shapes and layouts.

Tolerances. Statistics are float32: for |l| <= 60 nats an ulp of l is 3.8e-6, and the log-sum-exp
errs by 6.6e-7 at most in its exponentials; VALUE_TOLERANCE is two ulps. A gradient is a product of
such values rounded to the logits' dtype: relative L2 error of half an ulp of that dtype, plus
GRADIENT_TOLERANCE for the float32 arithmetic before. float64 is held to 1e-12.
"""

import pytest
import torch
from op_cases import (
    BACKENDS,
    DTYPES,
    assert_same,
    make,
    relative_error,
    rounding,
    true_expert_log_prob,
    true_mixture_nll,
)

import robustgate as rg

VALUE_TOLERANCE = 8e-6
GRADIENT_TOLERANCE = 2e-6

# 0, 1 and odd sizes; around one vector (4, 8, 16, 32 lanes), one unrolled step (16 to 64), the 512
# reference columns and one partial sum (8192); a row that is no multiple of anything.
VOCABS = [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 511, 513, 1000, 8191, 8257, 32003]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with rg.backend(request.param):
        yield request.param


def value_tolerance(dtype):
    return 1e-12 if dtype == torch.float64 else VALUE_TOLERANCE


def gradient_tolerance(dtype):
    return 1e-12 if dtype == torch.float64 else rounding(dtype) + GRADIENT_TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_expert_log_prob_values(dtype, vocab):
    case = make((3,), 2, vocab, dtype)
    got = rg.expert_log_prob(case.logits, case.target)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        got.double(), true_expert_log_prob(case), atol=value_tolerance(dtype), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 17, 65, 1000])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 5.0)])
def test_gradients(dtype, vocab, temperature, softcap):
    case = make((4,), 3, vocab, dtype, padding=3).clone(requires_grad=True)
    upstream = torch.randn(4)
    options = {"temperature": temperature, "softcap": softcap}
    loss = rg.mixture_nll(
        case.logits, case.gate, case.target, reduction="none", vocab_size=vocab, **options
    )
    loss.backward(upstream.to(loss.dtype))
    truth = case.clone(requires_grad=True)
    true_mixture_nll(truth, **options).backward(upstream.double())
    torch.testing.assert_close(
        loss.double(), true_mixture_nll(case, **options), atol=value_tolerance(dtype), rtol=1e-6
    )
    # A gate that every expert ties (V = 1) has gradient 0 up to rounding.
    torch.testing.assert_close(case.gate.grad, truth.gate.grad, atol=1e-6, rtol=1e-5)
    for got, want in zip(case.logits, truth.logits, strict=True):
        assert got.grad.shape == got.shape
        assert (got.grad[..., vocab:] == 0).all()
        if vocab == 1:
            assert got.grad[..., :1].abs().max() < 1e-6
        else:
            # The truth's gradient was rounded to dtype too, by autograd: allow both roundings.
            assert relative_error(got.grad, want.grad) < 2 * gradient_tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_log_prob_gradient_of_each_expert(dtype):
    case = make((2, 3), 3, 70, dtype)
    case.logits[1].requires_grad_()
    upstream = torch.randn(2, 3, 3)
    out = rg.expert_log_prob(case.logits, case.target)
    out.backward(upstream.to(out.dtype))
    assert case.logits[0].grad is None
    truth = make((2, 3), 3, 70, dtype)
    truth.logits[1].requires_grad_()
    true_expert_log_prob(truth).backward(upstream.double())
    assert relative_error(case.logits[1].grad, truth.logits[1].grad) < 2 * gradient_tolerance(dtype)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("shared_gate", [True, False])
def test_leading_shapes(shape, shared_gate):
    case = make(shape, 2, 19)
    gate = torch.randn(2) if shared_gate else case.gate
    gate.requires_grad_()
    case.logits[0].requires_grad_()
    nll = rg.mixture_nll(case.logits, gate, case.target, reduction="none")
    assert nll.shape == shape
    assert rg.expert_log_prob(case.logits, case.target).shape == (*shape, 2)
    case.gate = gate.detach().expand(*shape, 2)
    torch.testing.assert_close(nll.double(), true_mixture_nll(case), atol=VALUE_TOLERANCE, rtol=0)
    nll.sum().backward()
    assert gate.grad.shape == gate.shape
    assert case.logits[0].grad.shape == case.logits[0].shape


def layouts():
    def strided(z):  # rows further apart than their width
        wide = torch.full((*z.shape[:-1], z.shape[-1] + 5), torch.nan, dtype=z.dtype)
        wide[..., : z.shape[-1]] = z
        return wide[..., : z.shape[-1]]

    def unaligned(z):  # base pointer off by one element
        flat = torch.empty(z.numel() + 1, dtype=z.dtype)[1:].view(z.shape)
        return flat.copy_(z)

    def column_major(z):
        return z.mT.contiguous().mT

    def every_other(z):
        wide = torch.full((*z.shape[:-1], 2 * z.shape[-1]), torch.nan, dtype=z.dtype)
        wide[..., ::2] = z
        return wide[..., ::2]

    def shifted_slice(z):  # [:, :-1] of one more token
        longer = torch.cat([z, torch.full_like(z[:, :1], torch.nan)], dim=1)
        return longer[:, :-1]

    def permuted(z):
        return z.transpose(0, 1).contiguous().transpose(0, 1)

    return [strided, unaligned, column_major, every_other, shifted_slice, permuted]


@pytest.mark.parametrize("layout", layouts(), ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype):
    case = make((3, 4), 2, 83, dtype)
    arranged = [layout(case.logits[0]), case.logits[1]]  # unequal strides in one list
    for z in arranged:
        z.requires_grad_()
    loss = rg.mixture_nll(arranged, case.gate, case.target, reduction="sum")
    loss.backward()
    plain = case.clone(requires_grad=True)
    want = rg.mixture_nll(plain.logits, case.gate, plain.target, reduction="sum")
    want.backward()
    assert_same(loss, want)
    for a, b in zip(arranged, plain.logits, strict=True):
        assert_same(a.grad, b.grad)


def test_expanded_rows_and_one_stacked_tensor():
    case = make((1, 1), 2, 40)
    expanded = [z.expand(3, 4, 40) for z in case.logits]
    target = torch.randint(0, 40, (3, 4))
    got = rg.expert_log_prob(expanded, target)
    assert_same(got, rg.expert_log_prob([z.contiguous() for z in expanded], target))

    stacked = torch.stack([z.contiguous() for z in expanded]).requires_grad_()
    rg.expert_log_prob(stacked, target).sum().backward()
    assert stacked.grad.shape == stacked.shape
    assert_same(rg.expert_log_prob(stacked, target), got)


def test_ignored_rows_are_zero_and_not_read():
    case = make((4,), 2, 50)
    case.target[1] = -100
    case.target[3] = 7
    case.logits[0][1] = torch.nan
    case = case.clone(requires_grad=True)
    for ignore_index, ignored in ((-100, 1), (7, 3)):
        if ignore_index == 7:
            case.target[1] = 0
            case.logits[0].data[1] = 0
        for tensor in (*case.logits, case.gate):
            tensor.grad = None
        nll = rg.mixture_nll(
            case.logits, case.gate, case.target, reduction="none", ignore_index=ignore_index
        )
        assert nll[ignored] == 0
        nll.sum().backward()
        assert (case.gate.grad[ignored] == 0).all()
        assert (case.logits[0].grad[ignored] == 0).all()
        assert torch.isfinite(case.logits[0].grad).all()


def test_reductions():
    case = make((6,), 2, 30)
    case.target[2] = -100
    options = (case.logits, case.gate, case.target)
    rows = rg.mixture_nll(*options, reduction="none")
    assert torch.equal(rg.mixture_nll(*options, reduction="sum"), rows.sum())
    assert torch.equal(rg.mixture_nll(*options), rows.sum() / 5)
    nothing = torch.full_like(case.target, -100)
    gate = case.gate.clone().requires_grad_()
    loss = rg.mixture_nll(case.logits, gate, nothing)
    loss.backward()
    assert loss == 0
    assert (gate.grad == 0).all()
    assert rg.mixture_nll(case.logits, case.gate, nothing, reduction="sum") == 0


def test_one_expert_is_cross_entropy():
    case = make((9,), 1, 1000)
    case.target[4] = -100
    want = torch.nn.functional.cross_entropy(case.logits[0].double(), case.target)
    got = rg.mixture_nll(case.logits, torch.zeros(1), case.target)
    assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_permuting_and_duplicating_experts():
    case = make((5,), 3, 64)
    order = [2, 0, 1]
    a = rg.mixture_nll(case.logits, case.gate, case.target, reduction="none")
    b = rg.mixture_nll(
        [case.logits[k] for k in order], case.gate[:, order], case.target, reduction="none"
    )
    torch.testing.assert_close(a, b, atol=2e-6, rtol=0)  # another order of one small sum
    # An expert listed twice with its weight split in half changes nothing.
    split = torch.cat([case.gate, case.gate[:, :1]], -1)
    split[:, [0, 3]] -= torch.log(torch.tensor(2.0))
    c = rg.mixture_nll([*case.logits, case.logits[0]], split, case.target, reduction="none")
    torch.testing.assert_close(a, c, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "experts"), [(1, 1), (3, 5), (2049, 3), (7, 2100)])
@pytest.mark.parametrize("shared_gate", [True, False])
def test_mixture_log_prob(dtype, rows, experts, shared_gate):
    log_prob = (torch.randn(rows, experts) * 20 - 50).to(dtype).requires_grad_()
    gate = torch.randn(experts if shared_gate else (rows, experts)).to(dtype).requires_grad_()
    got = rg.mixture_log_prob(log_prob, gate)
    upstream = torch.randn(rows, dtype=dtype)
    got.backward(upstream)
    exact = log_prob.detach().double().requires_grad_()
    exact_gate = gate.detach().double().requires_grad_()
    want = torch.logsumexp(torch.log_softmax(exact_gate, -1) + exact, -1)
    want.backward(upstream.double())
    # float32: an ulp at 100 nats is 7.6e-6, and the weights come from differences of such values.
    atol, grad_atol = (1e-12, 1e-12) if dtype == torch.float64 else (1.6e-5, 4e-5)
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=0)
    torch.testing.assert_close(log_prob.grad.double(), exact.grad, atol=grad_atol, rtol=1e-4)
    scale = rows**0.5 if shared_gate else 1  # a shared gate sums the rows' errors
    torch.testing.assert_close(
        gate.grad.double(), exact_gate.grad, atol=grad_atol * scale, rtol=1e-4
    )


def test_gate_of_another_dtype_receives_its_gradient():
    case = make((4,), 2, 40)
    gate = case.gate.bfloat16().requires_grad_()
    rg.mixture_nll(case.logits, gate, case.target).backward()
    assert gate.grad.dtype == torch.bfloat16
    assert gate.grad.abs().sum() > 0

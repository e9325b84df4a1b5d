"""Extreme values: exact zeros, infinities, NaN, large logits, near-equal experts."""

import math

import pytest
import torch
from op_cases import BACKENDS, make, relative_error, true_expert_log_prob, true_mixture_nll

import robustgate as rg

INF = float("inf")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with rg.backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [slice(0, 600), slice(600, None), slice(1, None)])
def test_minus_infinity_logits(dtype, masked):
    """-inf is a probability of 0, wherever it stands: also in all 512 reference columns."""
    case = make((3,), 2, 1300, dtype)
    case.logits[0][:, masked] = -INF
    kept = torch.arange(1300)[~torch.isneginf(case.logits[0][0])]
    case.target[:] = kept[0]
    case.logits[0].requires_grad_()
    got = rg.expert_log_prob(case.logits, case.target)
    torch.testing.assert_close(got.double(), true_expert_log_prob(case), atol=8e-6, rtol=1e-6)
    got.sum().backward()
    assert torch.isfinite(case.logits[0].grad).all()
    assert (case.logits[0].grad[:, masked] == 0).all()


def test_target_excluded_by_one_expert():
    case = make((2,), 2, 40)
    case.target[:] = 3
    case.logits[0][:, 3] = -INF
    case = case.clone(requires_grad=True)
    nll = rg.mixture_nll(case.logits, case.gate, case.target, reduction="none")
    other = (
        rg.expert_log_prob(case.logits, case.target)[:, 1] + torch.log_softmax(case.gate, -1)[:, 1]
    )
    torch.testing.assert_close(nll, -other, atol=2e-6, rtol=0)
    nll.sum().backward()
    assert (case.logits[0].grad == 0).all()
    assert torch.isfinite(case.logits[1].grad).all()
    assert torch.isfinite(case.gate.grad).all()


def test_target_excluded_by_every_expert():
    """Value +inf, gradient 0; torch's logsumexp has NaN."""
    case = make((2,), 2, 40)
    case.target[:] = 3
    for z in case.logits:
        z[0, 3] = -INF
    case = case.clone(requires_grad=True)
    nll = rg.mixture_nll(case.logits, case.gate, case.target, reduction="none")
    assert nll[0] == INF
    assert torch.isfinite(nll[1])
    nll.sum().backward()
    for tensor in (*case.logits, case.gate):
        assert (tensor.grad[0] == 0).all()
        assert torch.isfinite(tensor.grad).all()


def test_gate_weight_of_exactly_zero():
    case = make((3,), 3, 40)
    case.gate[:, 1] = -INF
    case = case.clone(requires_grad=True)
    nll = rg.mixture_nll(case.logits, case.gate, case.target, reduction="none")
    pair = rg.mixture_nll(case.logits[::2], case.gate[:, ::2], case.target, reduction="none")
    torch.testing.assert_close(nll, pair, atol=2e-6, rtol=0)
    nll.sum().backward()
    assert (case.gate.grad[:, 1] == 0).all()
    assert (case.logits[1].grad == 0).all()
    assert torch.isfinite(case.gate.grad).all()


@pytest.mark.parametrize("bad", [math.nan, INF, "only -inf"])
@pytest.mark.parametrize("column", [0, 700])
def test_a_row_without_a_softmax_is_nan_alone(bad, column):
    case = make((3,), 2, 1000)
    case.target[:] = 5
    if bad == "only -inf":
        case.logits[0][1] = -INF
    else:
        case.logits[0][1, column] = bad
    case = case.clone(requires_grad=True)
    log_prob = rg.expert_log_prob(case.logits, case.target)
    assert torch.isnan(log_prob[1, 0])
    assert torch.isfinite(log_prob[1, 1])
    assert torch.isfinite(log_prob[[0, 2]]).all()
    nll = rg.mixture_nll(case.logits, case.gate, case.target, reduction="none")
    assert torch.isnan(nll).tolist() == [False, True, False]
    nll.sum().backward()
    for tensor in (*case.logits, case.gate):
        assert torch.isfinite(tensor.grad[[0, 2]]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(dtype, offset):
    """Values are exact to float32 of the log-prob, gradients to 1e-5, however large the logits."""
    case = make((3,), 2, 700, dtype, scale=8.0)
    case.logits = [(z.float() + offset).to(dtype) for z in case.logits]
    case.logits[0][:, 650] = 3 * abs(offset)  # far beyond the 512 reference columns
    got = case.clone(requires_grad=True)
    nll = rg.mixture_nll(got.logits, got.gate, got.target, reduction="none")
    truth = case.double().clone(requires_grad=True)
    want = true_mixture_nll(truth)
    torch.testing.assert_close(nll.double(), want, atol=8e-6, rtol=1e-6)
    nll.sum().backward()
    want.sum().backward()
    bound = 1e-5 if dtype == torch.float32 else 2e-3  # half a bfloat16 ulp
    for a, b in zip(got.logits, truth.logits, strict=True):
        assert relative_error(a.grad, b.grad) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-6])
def test_near_equal_experts(dtype, distance):
    """Gate gradients are differences of nearly equal values: still right to 0.2 %.

    Log-probs of experts at total variation d differ by about d, and each is known to 1e-6; where d
    is of that size the bound is absolute, 1e-6.
    """
    base = torch.randn(16, 3000)
    second = base + distance * torch.randn(16, 3000)
    logits = [base.to(dtype), second.to(dtype)]
    target = torch.randint(0, 3000, (16,))
    gate = torch.randn(16, 2, requires_grad=True)
    rg.mixture_nll(logits, gate, target, reduction="sum").backward()
    exact = gate.detach().double().requires_grad_()
    log_prob = torch.stack(
        [torch.log_softmax(z.double(), -1)[torch.arange(16), target] for z in logits], -1
    )
    (-torch.logsumexp(torch.log_softmax(exact, -1) + log_prob, -1)).sum().backward()
    error = (gate.grad.double() - exact.grad).norm()
    assert error <= 2e-3 * exact.grad.norm() + 1e-6 * math.sqrt(32)


@pytest.mark.parametrize("gap", [10.0, 25.0, 60.0, 100.0])
@pytest.mark.parametrize(("vocab", "peak"), [(100, 7), (1000, 700)])
def test_saturated_rows(gap, vocab, peak):
    """p near 1: the log-prob is never positive, and 1 - p is right to float32 rounding of 1.

    Also where the peak lies beyond the 512 columns that the reference value comes from.
    """
    z = torch.zeros(64, vocab)
    z[:, peak] = gap
    z += torch.randn(64, 1)  # as many roundings of the reference
    z.requires_grad_()
    log_prob = rg.expert_log_prob([z], torch.full((64,), peak))
    assert (log_prob <= 0).all()
    log_prob.sum().backward()
    odds = torch.exp((z.detach()[:, peak] - z.detach()[:, 0]).double())
    one_minus_p = (vocab - 1) / (vocab - 1 + odds)
    torch.testing.assert_close(
        log_prob[:, 0].double(), torch.log1p(-one_minus_p), atol=1.2e-7, rtol=1e-5
    )
    torch.testing.assert_close(z.grad[:, peak].double(), one_minus_p, atol=1.2e-7, rtol=1e-5)


@pytest.mark.parametrize("gap", [20.0, 40.0, 80.0])
def test_peak_that_is_not_the_target(gap):
    """The reference value misses the peak by ``gap`` nats: still right to two ulps."""
    z = torch.randn(64, 1000)
    z[:, 700] += gap
    got = rg.expert_log_prob([z], torch.full((64,), 3))[:, 0].double()
    want = torch.log_softmax(z.double(), -1)[:, 3]
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1.2e-7)


@pytest.mark.parametrize("value", [1e10, -1e10, 1e30, -3.3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_rows_of_any_size(value, dtype):
    """A mask that fills a whole row with the lowest number is a uniform row, not NaN."""
    z = torch.full((2, 600), value).to(dtype)
    got = rg.expert_log_prob([z], torch.tensor([0, 599]))
    torch.testing.assert_close(got, torch.full((2, 1), -math.log(600.0)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1e-8, 1e-3, 1e3])
def test_extreme_temperatures(temperature):
    case = make((8,), 1, 300)
    z = case.logits[0].requires_grad_()
    log_prob = rg.expert_log_prob([z], case.target, temperature=temperature)
    want = true_expert_log_prob(case, temperature=temperature)
    torch.testing.assert_close(log_prob.double(), want, atol=8e-6, rtol=2e-7)
    log_prob.sum().backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("bad", [INF, -INF])
@pytest.mark.parametrize("column", [0, 700])
def test_softcap_makes_infinities_finite(bad, column):
    """With a softcap +-inf is +-softcap, as tanh says, wherever it stands."""
    z = torch.randn(1, 1000)
    z[0, column] = bad
    got = rg.expert_log_prob([z], torch.tensor([5]), softcap=5.0)
    capped = 5.0 * torch.tanh(z.double() / 5.0)
    torch.testing.assert_close(
        got[0, 0].double(), torch.log_softmax(capped, -1)[0, 5], atol=8e-6, rtol=0
    )


@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_large_gate_logits(offset):
    """Adding a constant to the gate's logits changes nothing, in value or gradient.

    The offset itself rounds the gate logits, so the truth takes them as they came out.
    """
    log_prob = torch.randn(16, 3) * 5 - 30
    gate = (torch.randn(16, 3) + offset).requires_grad_()
    value = rg.mixture_log_prob(log_prob, gate)
    value.sum().backward()
    exact = gate.detach().double().requires_grad_()
    want = torch.logsumexp(torch.log_softmax(exact, -1) + log_prob.double(), -1)
    want.sum().backward()
    torch.testing.assert_close(value.double(), want, atol=8e-6, rtol=0)
    torch.testing.assert_close(gate.grad.double(), exact.grad, atol=2e-6, rtol=1e-5)


def test_mixture_log_prob_special_values():
    log_prob = torch.tensor([[-INF, -INF], [math.nan, 0.0], [-1e4, -1e4], [0.0, -INF]])
    gate = torch.tensor([0.0, 0.0], requires_grad=True)
    log_prob.requires_grad_()
    value = rg.mixture_log_prob(log_prob, gate)
    assert value[0] == -INF
    assert torch.isnan(value[1])
    torch.testing.assert_close(value[2:], torch.tensor([-1e4, math.log(0.5)]))
    value[[0, 2, 3]].sum().backward()
    torch.testing.assert_close(
        log_prob.grad[[0, 2, 3]], torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    )
    nothing = rg.mixture_log_prob(torch.zeros(2), torch.full((2,), -INF))
    assert torch.isnan(nothing)


@pytest.mark.parametrize("vocab", [5, 13, 50, 700])
@pytest.mark.parametrize("masked", [False, True])
def test_one_nan_is_never_lost(vocab, masked):
    """Wherever it stands, alone among -inf too: its row and expert are NaN, the others are not."""
    for column in {0, vocab // 2, vocab - 1}:
        case = make((3,), 2, vocab)
        if masked:
            case.logits[0][1] = -INF
        case.logits[0][1, column] = math.nan
        log_prob = rg.expert_log_prob(case.logits, case.target)
        assert log_prob.isnan().tolist() == [[False, False], [True, False], [False, False]]

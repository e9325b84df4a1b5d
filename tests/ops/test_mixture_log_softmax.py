"""mixture_log_softmax against the float64 truth: values, gradients, identities, exact zeros.

Tolerances. A log-prob is float32: two ulps at 64 nats are 8e-6, and for larger ones the rounding is
relative, 1e-6. Gradients are right to 2e-6 in relative L2 and to the rounding of the logits' dtype;
``c r - p sum(c r)`` cancels where p is near 1 and one upstream value decides. float64: 1e-12.
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
    true_log_probs,
    true_mixture_log_softmax,
)

import robustgate as rg

INF = float("inf")
VOCABS = [1, 2, 15, 17, 97, 511, 513, 1000, 4099]

backend = backend_fixture("mixture_log_softmax", "mixture_log_softmax_backward")


def compare(logits, gate, dtype, upstream=None, relative=2e-6, **options):
    z = leaves(logits, dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    (a,) = leaves([gate], statistics)
    value = rg.mixture_log_softmax(z, a, **options)
    assert value.dtype == statistics
    assert value.is_contiguous()
    exact_a, *exact = leaves([gate, *logits])
    want = true_mixture_log_softmax(exact, exact_a, **options)
    double = dtype == torch.float64
    torch.testing.assert_close(
        value.double(), want, atol=1e-12 if double else 8e-6, rtol=1e-12 if double else 1e-6
    )
    if upstream is None:
        upstream = torch.randn(want.shape)
    got_a, *got = gradients(value, [a, *z], upstream)
    truth_a, *truth = gradients(want, [exact_a, *exact], upstream)
    # Per row a sum of V terms c (r_k - g_k), at most |c| each, and over the rows of a shared gate.
    torch.testing.assert_close(
        got_a.double(),
        truth_a,
        atol=(1e-12 if double else 2e-6) * float(upstream.abs().sum() / upstream[..., 0].numel())
        + 1e-12,
        rtol=1e-5,
    )
    vocab_size = options.get("vocab_size", logits[0].shape[-1])
    log_gate = torch.log_softmax(gate.double(), -1)
    log_p = true_log_probs(logits, **options)
    share = torch.exp(log_gate.unsqueeze(-2) + log_p - want.detach().unsqueeze(-1)).nan_to_num(0)
    for k, (grad, true) in enumerate(zip(got, truth, strict=True)):
        assert grad.dtype == dtype
        assert (grad[..., vocab_size:] == 0).all()
        total = (upstream * share[..., k]).abs().sum(-1, keepdim=True)
        scale = (log_p[..., k].exp() * total).norm() + (upstream * share[..., k]).norm()
        assert_gradient(grad, true, relative, float(scale) / options.get("temperature", 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_values_and_gradients(dtype, vocab):
    case = make((4,), 3, vocab, dtype, padding=3)
    compare(case.logits, case.gate, dtype, vocab_size=vocab)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("temperature", "softcap"), [(0.7, None), (1.3, 5.0)])
def test_temperature_and_softcap(dtype, temperature, softcap):
    case = make((4,), 3, 333, dtype)
    compare(case.logits, case.gate, dtype, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("shared_gate", [True, False])
def test_numbers_of_experts(experts, shared_gate):
    case = make((2, 3), experts, 131)
    compare(case.logits, case.gate[0, 0] if shared_gate else case.gate, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_target_it_is_minus_mixture_nll(dtype):
    case = make((7,), 3, 500, dtype).clone(requires_grad=True)
    leaves_ = [case.gate, *case.logits]
    whole = rg.mixture_log_softmax(case.logits, case.gate)
    picked = whole.gather(-1, case.target[:, None])[:, 0]
    nll = rg.mixture_nll(case.logits, case.gate, case.target, reduction="none")
    torch.testing.assert_close(picked, -nll, atol=8e-6, rtol=1e-6)
    for a, b in zip(gradients(picked, leaves_), gradients(-nll, leaves_), strict=True):
        assert_gradient(a, b.double(), 2e-6, scale=2.0)


def test_one_expert_is_log_softmax():
    case = make((5,), 1, 700)
    got = rg.mixture_log_softmax(case.logits, torch.randn(1))
    want = torch.log_softmax(case.logits[0].double(), -1)
    torch.testing.assert_close(got.double(), want, atol=8e-6, rtol=1e-6)


def test_it_is_normalised_and_symmetric():
    case = make((6,), 3, 900)
    got = rg.mixture_log_softmax(case.logits, case.gate)
    # A sum of 900 numbers, each right to 1e-6 where it matters.
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(6), atol=4e-6, rtol=0)
    order = [2, 0, 1]
    permuted = rg.mixture_log_softmax([case.logits[k] for k in order], case.gate[:, order])
    torch.testing.assert_close(permuted, got, atol=4e-6, rtol=1e-6)
    split = torch.cat([case.gate, case.gate[:, :1]], -1)
    split[:, [0, 3]] -= torch.log(torch.tensor(2.0))
    twice = rg.mixture_log_softmax([*case.logits, case.logits[0]], split)
    torch.testing.assert_close(twice, got, atol=4e-6, rtol=1e-6)


@pytest.mark.parametrize("excluding", [[0], [0, 1], [0, 1, 2]])
@pytest.mark.parametrize("vocab", [40, 1300])
def test_minus_infinity_logits(vocab, excluding):
    """Where no expert contributes: -inf, with gradient 0 also for an upstream gradient there."""
    case = make((4,), 3, vocab)
    for k in excluding:
        case.logits[k][:, vocab // 3 : vocab // 2] = -INF
        case.logits[k][:, -1] = -INF
    compare(case.logits, case.gate, torch.float32)


@pytest.mark.parametrize("weight", [-INF, -70.0])
def test_gate_weights_of_zero_and_almost(weight):
    """Also of the only expert that allows a column, and of one that is sure of another."""
    case = make((4,), 3, 300)
    case.gate[:, 1] = weight
    case.logits[1][:, 17] = 60.0
    for k in (0, 2):
        case.logits[k][:, 30] = -INF
    compare(case.logits, case.gate, torch.float32)
    if weight == -INF:
        got = rg.mixture_log_softmax(case.logits, case.gate)
        assert (got[:, 30] == -INF).all()


@pytest.mark.parametrize("sizes", [(1e4, 0, 0), (-1e4, 0, 0), (1e4, -1e4, 1e4)])
def test_large_logits(sizes):
    case = make((4,), 3, 700, scale=6.0)
    logits = [z + size for z, size in zip(case.logits, sizes, strict=True)]
    compare(logits, case.gate, torch.float32)


def test_small_probabilities_keep_their_digits():
    """Log-probs of -1e4 nats: far below what a probability can hold."""
    case = make((4,), 3, 100)
    for z in case.logits:
        z[:, 7] = -1e4
    # Responsibilities there are exponentials of differences with an ulp of 1e-3.
    compare(case.logits, case.gate, torch.float32, relative=5e-4)


@pytest.mark.parametrize("column", [0, 5, 39])
def test_upstream_gradient_of_one_column(column):
    """Generation with a chosen token, and the layouts autograd hands down."""
    case = make((4,), 2, 40).clone(requires_grad=True)
    x = [case.gate, *case.logits]
    value = rg.mixture_log_softmax(case.logits, case.gate)
    upstream = torch.zeros(4, 40)
    upstream[:, column] = 1
    dense = gradients(value, x, upstream, retain_graph=True)
    strided = gradients(value, x, upstream.T.contiguous().T, retain_graph=True)
    picked = torch.autograd.grad(value[:, column].sum(), x, retain_graph=True)
    for a, b, c in zip(dense, strided, picked, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    everywhere = torch.autograd.grad(value.sum(), x)  # stride 0
    want = gradients(rg.mixture_log_softmax(case.logits, case.gate), x, torch.ones(4, 40))
    for a, b in zip(everywhere, want, strict=True):
        assert torch.equal(a, b)

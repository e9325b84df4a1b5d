"""mixture_kl against the float64 truth: values, gradients, near-equal mixtures, exact zeros.

Tolerances are those of test_jsd.py, for the same reasons: sums of non-negative terms of float32
log-ratios, 1e-5; float64 1e-11. The gradients are differences of terms of that accuracy.
"""

import pytest
import torch
from op_cases import (
    DTYPES,
    assert_gradient,
    backend_fixture,
    exact_mixture_kl,
    gradients,
    leaves,
    make,
    relative_error,
    simplex,
    true_jsd,
    true_kl,
    true_log_probs,
    true_mixture_kl,
)

import robustgate as rg

INF = float("inf")
VOCABS = [1, 2, 15, 17, 97, 511, 513, 1000, 4099]

backend = backend_fixture("mixture_kl", "mixture_kl_backward")


def compare(logits, teacher, student, dtype, upstream=None, **options):
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    z = leaves(logits, dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = leaves([teacher, student], statistics)
    value = rg.mixture_kl(z, a, b, reduction="none", **options)
    assert value.dtype == statistics
    upstream = torch.ones(value.shape) if upstream is None else upstream
    *grads, grad_a = gradients(value, [b, *z, a], upstream, allow_unused=True)
    assert grad_a is None  # the teacher's gate is given
    exact_b, *exact = leaves([student, *logits])
    want = true_mixture_kl(exact, teacher, exact_b, **options)
    truth = gradients(want, [exact_b, *exact], upstream)
    torch.testing.assert_close(value.double(), want, atol=1e-13, rtol=tolerance)
    # gamma_k E_k[t], E_k[t] >= -1: a sum over columns of terms of either sign, each right to 1e-5.
    g, gamma = torch.softmax(teacher.double(), -1), torch.softmax(student.double(), -1)
    log_p = true_log_probs(logits, **options)
    p = log_p.exp()
    m, q = ((w.unsqueeze(-2) * p).sum(-1) for w in (g, gamma))
    t = torch.where(q > 0, m / q - 1, 0.0).unsqueeze(-1)
    tilt = upstream.unsqueeze(-1) * gamma * (p * t.abs()).sum(-2)
    if student.dim() == 1:
        tilt = tilt.flatten(0, -2)
    assert_gradient(grads[0], truth[0], tolerance, 10 * float(tilt.norm()))
    for k, (got, true) in enumerate(zip(grads[1:], truth[1:], strict=True)):
        assert got.dtype == dtype
        if vocab_size := options.get("vocab_size"):
            assert (got[..., vocab_size:] == 0).all()
        # dz = p (g (log(1+t) - E log(1+t)) - gamma (t - E t)), where p is near 1 a difference.
        parts = g[..., k : k + 1] * (1 + 2 * torch.log1p(t[..., 0]).abs())
        parts = parts + gamma[..., k : k + 1] * (1 + t[..., 0].abs())
        # A float32 log-prob of x nats is known to 6e-8 x, and so is its exponential, relatively.
        parts = parts * (1 + 0.06 * log_p[..., k].abs())
        scale = upstream.unsqueeze(-1) * p[..., k] * parts
        scale = torch.where(torch.isfinite(scale), scale, 0.0) / options.get("temperature", 1.0)
        assert_gradient(got, true, tolerance, float(scale.norm()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_values_and_gradients(dtype, vocab):
    case = make((4,), 3, vocab, dtype, padding=3)
    teacher = 2 * torch.randn(4, 3)
    compare(case.logits, teacher, case.gate, dtype, torch.randn(4), vocab_size=vocab)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("temperature", "softcap"), [(0.7, None), (1.3, 5.0)])
def test_temperature_and_softcap(dtype, temperature, softcap):
    case = make((4,), 3, 333, dtype)
    options = {"temperature": temperature, "softcap": softcap}
    compare(case.logits, torch.randn(4, 3), case.gate, dtype, torch.randn(4), **options)


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("shared_teacher", [True, False])
@pytest.mark.parametrize("shared_student", [True, False])
def test_gates_of_every_shape(experts, shared_teacher, shared_student):
    case = make((2, 3), experts, 131)
    teacher, student = torch.randn(2, 3, experts), torch.randn(2, 3, experts)
    if shared_teacher:
        teacher = teacher[0, 0]
    if shared_student:
        student = student[0, 0]
    compare(case.logits, teacher, student, torch.float32, torch.randn(2, 3))


def test_equal_gates_and_identical_experts_are_exactly_zero():
    case = make((4,), 3, 777)
    for logits, teacher, student in (
        (case.logits, case.gate, case.gate),
        (case.logits, case.gate[0], case.gate[:1].expand(4, 3)),
        ([case.logits[0]] * 3, torch.randn(4, 3), case.gate),
        (case.logits[:1], torch.randn(4, 1), torch.randn(1)),
    ):
        z, (b,) = leaves(logits, torch.float32), leaves([student], torch.float32)
        value = rg.mixture_kl(z, teacher, b, reduction="none")
        assert (value == 0).all()
        assert all((g == 0).all() for g in gradients(value, [b, *z]))


def near_equal(experts, distance, vocab=3001):
    base = 2 * torch.randn(8, vocab)
    return [base, *(base + distance * torch.randn(8, vocab) for _ in range(experts - 1))]


@pytest.mark.parametrize(
    ("experts_apart", "gates_apart", "offsets"),
    [
        (1.0, 1e-2, None),
        (1.0, 1e-4, None),
        (1e-2, 1.0, None),
        (1e-4, 1.0, None),
        (1e-6, 1.0, None),
        (1e-2, 1e-2, None),
        (1e-3, 1e-3, None),
        # Offsets of 40 round float32 logits by 2e-6, which is then part of their distance.
        (1.0, 1e-2, (5, -20, 40)),
        (1e-2, 1.0, (5, -20, 40)),
        (1e-3, 1e-3, (5, -20, 40)),
    ],
)
def test_near_equal_mixtures(experts_apart, gates_apart, offsets):
    """t = m_g / m_gamma - 1 is of the size of both distances' product, d; the KL about d^2 / 2.

    Values to 1e-5 down to 3e-9; gradients to 1e-4. A gate's float32 rounding is in its logits, not
    in the op. The student's gradient is E_k[t] = E[t p_k / m_gamma], of the size of d times the
    experts' distance, from terms of the size of d that float32 knows to 1e-7.
    """
    logits = near_equal(3, experts_apart)
    logits = [z + c for z, c in zip(logits, offsets or (0, 0, 0), strict=True)]
    teacher = torch.randn(8, 3)
    student = teacher + gates_apart * torch.randn(8, 3)
    (b,), z = leaves([student], torch.float32), leaves(logits, torch.float32)
    value = rg.mixture_kl(z, teacher, b, reduction="none")
    assert (value >= 0).all()
    want = exact_mixture_kl(logits, teacher, student)
    torch.testing.assert_close(value.double(), want, atol=3e-14, rtol=1e-5)
    (exact_b,), exact = leaves([student]), leaves(logits)
    truth = gradients(true_mixture_kl(exact, teacher, exact_b), [exact_b, *exact])
    got_b, *got = gradients(value, [b, *z])
    assert relative_error(got_b, truth[0]) <= 1e-4
    for grad, true in zip(got, truth[1:], strict=True):
        assert relative_error(grad, true) <= 1e-4


@pytest.mark.parametrize("columns", [1, 30, 1000])
def test_experts_one_ulp_of_bfloat16_apart(columns):
    base = (2 * torch.randn(8, 3001)).bfloat16()
    other = base.clone()
    other.view(torch.int16)[:, torch.randperm(3001)[:columns]] += 1
    teacher, student = torch.tensor([0.5, -0.5]), torch.tensor([-0.25, 0.25])
    z = leaves([base, other], torch.bfloat16)
    value = rg.mixture_kl(z, teacher, student, reduction="none")
    want = exact_mixture_kl([base, other], teacher, student)
    torch.testing.assert_close(value.double(), want, atol=3e-14, rtol=1e-5)
    exact = leaves([base, other])
    truth = gradients(true_mixture_kl(exact, teacher, student), exact)
    for got, true in zip(gradients(value, z), truth, strict=True):
        assert relative_error(got, true) <= 3e-4 + relative_error(true.bfloat16(), true)


def test_jsd_is_the_mean_divergence_from_one_expert_to_the_mixture():
    """KL(p_k || m): the teacher's gate on one expert, the student's the logs of the weights."""
    case, w = make((4,), 3, 500), simplex(4, 3)
    kl = []
    for k in range(3):
        one = torch.full((3,), -INF)
        one[k] = 0
        kl.append(rg.mixture_kl(case.logits, one, w.log(), reduction="none"))
    kl = torch.stack(kl, -1).double()
    torch.testing.assert_close(kl, true_kl(case.logits, w), atol=0, rtol=1e-5)
    torch.testing.assert_close((w * kl).sum(-1), true_jsd(case.logits, w), atol=0, rtol=1e-5)


@pytest.mark.parametrize("weight", [-INF, -70.0, -14.0])
@pytest.mark.parametrize("gate", ["teacher", "student", "both"])
def test_gate_weights_of_zero_and_almost(weight, gate):
    """Also where the expert that is left out is the only sure one."""
    case = make((4,), 3, 300)
    case.logits[1][:, 17] = 60.0
    teacher, student = torch.randn(4, 3), torch.randn(4, 3)
    if gate != "student":
        teacher[:, 1] = weight
    if gate != "teacher":
        student[:, 1] = weight
    compare(case.logits, teacher, student, torch.float32)


@pytest.mark.parametrize("excluding", [[0], [0, 1], [0, 1, 2]])
def test_minus_infinity_logits(excluding):
    case = make((4,), 3, 1300)
    for k in excluding:
        case.logits[k][:, 100:600] = -INF
        case.logits[k][:, -1] = -INF
    compare(case.logits, torch.randn(4, 3), case.gate, torch.float32)


@pytest.mark.parametrize("vocab", [1104, 40000])
@pytest.mark.parametrize("gap", [0.1, 5.0, 15.0, INF])
def test_rows_of_equal_terms(vocab, gap):
    """Every rounding has the same sign: what random rows average out adds up."""
    logits = [torch.zeros(2, vocab), torch.zeros(2, vocab)]
    logits[1][:, ::2] -= gap
    logits[1][1] += 1.3
    gates = torch.tensor([[1.0, 0.0], [-0.3, 0.2]]), torch.tensor([[0.0, 0.5], [0.7, 0.1]])
    compare(logits, *gates, torch.float32)


def test_student_excludes_what_the_teacher_allows():
    """Value +inf, gradient 0, in that row alone."""
    case = make((3,), 2, 40)
    case.logits[0][1, 7] = -INF
    student = torch.tensor([[0.0, 1.0], [0.0, -INF], [1.0, 0.0]])
    (b,), z = leaves([student], torch.float32), leaves(case.logits, torch.float32)
    value = rg.mixture_kl(z, torch.zeros(2), b, reduction="none")
    assert value[1] == INF
    assert torch.isfinite(value[[0, 2]]).all()
    for grad in gradients(value, [b, *z]):
        assert (grad[1] == 0).all()
        assert torch.isfinite(grad).all()
        assert (grad[[0, 2]] != 0).any()


@pytest.mark.parametrize("sizes", [(1e4, 0, 0), (1e4, -1e4, 1e4)])
def test_large_logits_and_gates(sizes):
    case = make((4,), 3, 700, scale=6.0)
    logits = [z + size for z, size in zip(case.logits, sizes, strict=True)]
    compare(logits, torch.randn(4, 3), case.gate, torch.float32)
    compare(logits, torch.randn(4, 3) + 1e3, case.gate - 1e3, torch.float32)


def test_frozen_experts_keep_no_logits():
    case = make((6,), 2, 5000)
    b = case.gate.requires_grad_()
    value = rg.mixture_kl(case.logits, torch.zeros(2), b, reduction="none")
    assert max(t.numel() for t in value.grad_fn.saved_tensors if t is not None) == 12
    for z in case.logits:
        z.fill_(torch.nan)  # would poison a backward pass that read them
    assert torch.isfinite(gradients(value, [b])[0]).all()

"""Many small random cases that mix every extreme: what single tests of each would not meet.

Each case draws its experts, columns, sizes, offsets, excluded columns, zero weights, temperature,
softcap and dtype. Tolerances: float32 statistics, as in the ops' own files, relaxed to what a case
with log-ratios of 100 nats needs: values 2e-5, gradients 2e-5 in relative L2 and 1e-5 of the terms
they are differences of (near-equal experts have tighter bounds in tests of their own).
"""

import pytest
import torch
from op_cases import (
    assert_gradient,
    backend_fixture,
    gradients,
    leaves,
    true_jsd,
    true_log_probs,
    true_mixture_kl,
    true_mixture_log_softmax,
)

import robustgate as rg

INF = float("inf")
SEEDS = range(60)

backend = backend_fixture(
    "jsd", "jsd_backward", "mixture_kl", "mixture_kl_backward", "mixture_log_softmax"
)


def draw(seed):
    """(logits, weights, dtype, options) of 3 rows."""
    g = torch.Generator().manual_seed(seed)

    def integer(high):
        return int(torch.randint(0, high, (1,), generator=g))

    def choice(*values):
        return values[integer(len(values))]

    experts, vocab = 2 + integer(4), choice(3, 16, 19, 64, 130, 530, 1100)
    dtype = choice(torch.float32, torch.float32, torch.bfloat16, torch.float16)
    base = choice(0.5, 2.0, 6.0) * torch.randn(3, vocab, generator=g)
    distance = choice(1e-3, 0.1, 1.0, 1.0, 5.0)
    logits = []
    for _ in range(experts):
        z = base + distance * torch.randn(3, vocab, generator=g)
        if choice(True, False):
            z[:, integer(vocab)] += choice(20.0, 60.0, -60.0)
        if choice(True, False):
            z += choice(100.0, -300.0, 900.0)
        if choice(True, False, False):
            excluded = torch.rand(vocab, generator=g) < choice(0.05, 0.5, 0.95)
            excluded[integer(vocab)] = False
            z[:, excluded] = -INF
        logits.append(z.to(dtype))
    weights = torch.rand(3, experts, generator=g) ** choice(1, 1, 8) + 1e-9
    if choice(True, False):
        weights[:, integer(experts)] *= choice(0.0, 1e-25, 1e-6)
    weights /= weights.sum(-1, keepdim=True)
    options = {"temperature": choice(1.0, 1.0, 0.6, 3.0), "softcap": choice(None, None, 30.0)}
    return logits, weights, dtype, options


def check_value(value, want, options, log_prob_error=0.0):
    """Divergences, to 2e-5 and to what an error of the log-probs moves them by.

    That is at most the error times the distributions' distance, about sqrt(want). A softcap's tanh
    is known to 6e-8 where it saturates: 3e-6 for a softcap of 30.
    """
    error = log_prob_error + 1e-7 * (options["softcap"] or 0.0) / options["temperature"]
    finite = torch.isfinite(want)
    assert torch.equal(value[~finite].double(), want[~finite])
    bound = 1e-11 + 2e-5 * want + error * want.clamp_min(0).sqrt()
    assert ((value.double() - want).abs() <= bound)[finite].all()


def scales(logits, options, upstream=1.0):
    """Per expert: the L2 norm of the terms its gradient is a difference of, at most this."""
    p = true_log_probs(logits, **options).exp()
    return (10 * upstream * p.norm(dim=-2) / options["temperature"]).norm(dim=0).tolist()


@pytest.mark.parametrize("seed", SEEDS)
def test_jsd(seed):
    logits, w, dtype, options = draw(seed)
    z, exact = leaves(logits, dtype), leaves(logits)
    value = rg.jsd(z, w, reduction="none", **options)
    want = true_jsd(exact, w.double() / w.double().sum(-1, keepdim=True), **options)
    check_value(value, want, options)
    truth = gradients(want, exact)
    log_ratio = 100 * w[:, None].amax(0).clamp_max(1)[0]  # w_k log(p_k / m), at most
    for k, (got, true) in enumerate(zip(gradients(value, z), truth, strict=True)):
        assert torch.isfinite(got).all()
        assert_gradient(got, true, 2e-5, scales(logits, options)[k] * float(log_ratio[k]) / 10)


@pytest.mark.parametrize("seed", SEEDS)
def test_mixture_kl(seed):
    logits, w, dtype, options = draw(seed)
    teacher, student = w.log(), w.log().flip(-1)
    z, exact = leaves(logits, dtype), leaves(logits)
    (b,), (exact_b,) = leaves([student], torch.float32), leaves([student])
    value = rg.mixture_kl(z, teacher, b, reduction="none", **options)
    want = true_mixture_kl(exact, teacher, exact_b, **options)
    check_value(value, want, options, log_prob_error=1e-6)
    finite = torch.isfinite(want)
    truth = gradients(torch.where(finite, want, 0.0), [exact_b, *exact])
    rows = finite[:, None]
    for got, true in zip(gradients(value, [b, *z]), truth, strict=True):
        assert torch.isfinite(got).all()
        assert (torch.where(rows, 0.0, got) == 0).all()
        # t = m_teacher / m_student - 1 has no bound: E_k[t] is as large as the KL's derivative is.
        true = torch.where(rows, true, 0.0).nan_to_num(0.0)
        assert_gradient(torch.where(rows, got, 0.0), true, 2e-4, 100.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_mixture_log_softmax(seed):
    logits, w, dtype, options = draw(seed)
    z, exact = leaves(logits, dtype), leaves(logits)
    (a,), (exact_a,) = leaves([w.log()], torch.float32), leaves([w.log()])
    value = rg.mixture_log_softmax(z, a, **options)
    want = true_mixture_log_softmax(exact, exact_a, **options)
    # Logits of 900 / 0.6 are rounded to 6e-5 where the division comes first.
    largest = max(float(z[torch.isfinite(z)].abs().max()) for z in logits)
    atol = 1.6e-5 + 6e-8 * largest / options["temperature"]
    torch.testing.assert_close(value.double(), want, atol=atol, rtol=1e-6)
    upstream = torch.randn(want.shape)
    truth = gradients(want, [exact_a, *exact], upstream)
    size = float(upstream.norm()) * 10
    for got, true in zip(gradients(value, [a, *z], upstream), truth, strict=True):
        assert torch.isfinite(got).all()
        assert_gradient(got, true, 2e-5, size)

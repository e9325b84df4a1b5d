"""generalized_jsd: its formula, its limits, and TRL's loss.

Tolerances as in test_jsd.py: 1e-5 for values, 1e-5 in relative L2 for gradients of experts that are
far apart, and 1e-11 in float64.
"""

import pytest
import torch
from op_cases import (
    assert_gradient,
    backend_fixture,
    gradients,
    leaves,
    make,
    relative_error,
)

import robustgate as rg

BETAS = [0, 0.1, 0.5, 0.9, 1]

backend = backend_fixture("jsd", "jsd_backward", "mixture_kl", "mixture_kl_backward")


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def formula(student, teacher, beta, temperature=1.0):
    """beta KL(T || M) + (1 - beta) KL(S || M); at 0 and 1 the unscaled KL(T || S), KL(S || T)."""
    s, t = (torch.log_softmax(z.double() / temperature, -1) for z in (student, teacher))
    if beta in (0, 1):
        return kl(t, s) if beta == 0 else kl(s, t)
    m = torch.log((1 - beta) * s.exp() + beta * t.exp())
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_formula(beta, dtype, temperature):
    logits = make((6,), 2, 333, dtype).logits
    (student, teacher), exact = leaves(logits, dtype), leaves(logits)
    value = rg.generalized_jsd(student, teacher, beta, reduction="none", temperature=temperature)
    want = formula(*exact, beta, temperature)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), want, atol=1e-13, rtol=tolerance)
    for got, true in zip(gradients(value, [student, teacher]), gradients(want, exact), strict=True):
        assert_gradient(got, true, tolerance, 40.0)  # log-ratios of up to 40 nats


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_trls_loss(beta, monkeypatch):
    """GKDTrainer.generalized_jsd_loss, in float64, with its mask and its divisors."""
    pytest.importorskip("trl", reason="TRL is not installed")
    # Its import may warn, about packages it finds or not, which says nothing about the loss.
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    logits = make((2, 5), 2, 97).logits
    labels = torch.randint(0, 97, (2, 5))
    labels[0, 1:3] = labels[1, 4] = -100
    for items in (None, 11, torch.tensor(11)):
        (student,), (exact,) = leaves(logits[:1], torch.float32), leaves(logits[:1])
        got = rg.generalized_jsd(student, logits[1], beta, target=labels, num_items=items)
        want = GKDTrainer.generalized_jsd_loss(
            exact, logits[1].double(), labels, beta=beta, num_items_in_batch=items
        )
        assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
        (a,), (b,) = gradients(got, [student]), gradients(want, [exact])
        assert_gradient(a, b, 1e-5, 10.0)


@pytest.mark.parametrize("beta", [1e-3, 1e-6, 1e-12])
def test_limits(beta):
    """JSD / beta -> KL(T || S) as beta -> 0: it tends to 0, and at 0 jumps to the unscaled KL.

    JSD = beta KL(T || S) - beta^2 chi2(T || S) / 2 + ..., chi2 below 50 here.
    """
    student, teacher = make((6,), 2, 50, scale=0.7).logits
    small = rg.generalized_jsd(student, teacher, beta, reduction="none").double() / beta
    forward = rg.generalized_jsd(student, teacher, 0, reduction="none").double()
    torch.testing.assert_close(small, forward, atol=0, rtol=1e-5 + 50 * beta)
    if beta >= 1e-6:  # else 1 - beta is 1 in float32
        large = rg.generalized_jsd(student, teacher, 1 - beta, reduction="none").double() / beta
        reverse = rg.generalized_jsd(student, teacher, 1, reduction="none").double()
        # 1 - beta is rounded to 6e-8.
        torch.testing.assert_close(large, reverse, atol=0, rtol=1e-5 + 50 * beta + 6e-8 / beta)


def test_swapping_the_two_mirrors_beta():
    student, teacher = make((6,), 2, 333).logits
    for beta in (0, 0.25, 0.5, 1):
        a = rg.generalized_jsd(student, teacher, beta, reduction="none")
        b = rg.generalized_jsd(teacher, student, 1 - beta, reduction="none")
        torch.testing.assert_close(a, b, atol=0, rtol=2e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_are_exactly_zero(beta):
    student, teacher = leaves(make((6,), 1, 333).logits * 2, torch.float32)
    value = rg.generalized_jsd(student, teacher, beta, reduction="none")
    assert (value == 0).all()
    assert all((g == 0).all() for g in gradients(value, [student, teacher]))


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_a_frozen_teacher(beta):
    """The student's gradient is the one it has beside a trained teacher."""
    logits = make((6,), 2, 333).logits
    student, teacher = leaves(logits, torch.float32)
    both = gradients(rg.generalized_jsd(student, teacher, beta), [student, teacher])
    (alone,) = gradients(rg.generalized_jsd(student, teacher.detach(), beta), [student])
    assert relative_error(alone, both[0]) <= 1e-7


def test_padding_and_masks():
    """A teacher with a wider vocabulary, ignored rows, and a sum."""
    case = make((6,), 2, 50, padding=3)
    case.target[2] = -100
    got = rg.generalized_jsd(*case.logits, 0.3, vocab_size=50, target=case.target, reduction="sum")
    rows = formula(*(z[:, :50] for z in case.logits), 0.3)
    rows[2] = 0
    assert float(got) == pytest.approx(float(rows.sum()), rel=1e-5)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match=r"generalized_jsd: beta must be between 0 and 1, got"):
        rg.generalized_jsd(torch.zeros(2, 8), torch.zeros(2, 8), beta)

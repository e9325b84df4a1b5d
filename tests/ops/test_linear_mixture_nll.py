"""linear_mixture_nll: the loss of ``hidden @ W^T``, without the logits. Memory has its own file.

Tolerances. Logits are float32 sums of H products: an error of sqrt(H) 2^-24 |z| (5e-7 for H = 80,
|z| = 10) on top of the two ulps of a log-prob at 60 nats, 8e-6 in all. Gradients are float32 sums
of N or V such products, 1e-5 in relative L2, plus the rounding to the input's dtype. A product
rounded to bfloat16 would err by 0.4 % of a logit, hundreds of times these.
"""

import pytest
import torch
from op_cases import (
    DTYPES,
    Case,
    assert_gradient,
    backend_fixture,
    gradients,
    leaves,
    make_heads,
    relative_error,
    true_heads,
    true_mixture_nll,
)

import robustgate as rg
from robustgate.ops import linear

MIB = 1 << 20

backend = backend_fixture("expert_log_prob", "expert_log_prob_backward", "mixture_log_prob")


def flat(heads):
    return [x for kind in heads for x in kind]


def kinds(tensors, experts):
    return tensors[:experts], tensors[experts : 2 * experts], tensors[2 * experts :] or None


def truth(tensors, experts, gate, target, vocab_size, **options):
    hidden, lm_head, bias = kinds(tensors, experts)
    return true_mixture_nll(
        Case(true_heads(hidden, lm_head, bias), gate, target, vocab_size), **options
    )


def compare(heads, gate, target, dtype, vocab_size=None, upstream=None, **options):
    """Values and every gradient against the truth on the same rounded inputs."""
    experts, tensors = len(heads[0]), flat(heads)
    x = leaves(tensors, dtype)
    (a,) = leaves([gate], torch.float64 if dtype == torch.float64 else torch.float32)
    hidden, lm_head, bias = kinds(x, experts)
    value = rg.linear_mixture_nll(
        hidden, lm_head, a, target, bias=bias, reduction="none", vocab_size=vocab_size, **options
    )
    assert value.dtype == a.dtype
    exact_a, *exact = leaves([gate, *tensors])
    options.pop("workspace_bytes", None)
    vocab = vocab_size or heads[1][0].shape[0]
    want = truth(exact, experts, exact_a, target, vocab, **options)
    double = dtype == torch.float64
    torch.testing.assert_close(value.double(), want, atol=1e-12 if double else 8e-6, rtol=1e-6)
    upstream = torch.randn(want.shape) if upstream is None else upstream
    got_a, *got = gradients(value, [a, *x], upstream)
    true_a, *true = gradients(want, [exact_a, *exact], upstream)
    torch.testing.assert_close(
        got_a.double(), true_a, atol=1e-12 if double else 8e-6 * float(upstream.norm()), rtol=1e-5
    )
    for i, (grad, exact_grad) in enumerate(zip(got, true, strict=True)):
        assert grad.dtype == dtype
        assert grad.shape == exact_grad.shape
        if i >= experts:  # heads and biases, whose rows beyond the vocabulary are padding
            assert (grad[vocab:] == 0).all()
        assert_gradient(grad, exact_grad, 1e-12 if double else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 17, 97, 513, 2050])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(dtype, vocab, bias):
    heads = make_heads((6,), (24, 16, 9), vocab, dtype, padding=2)
    target = torch.randint(0, vocab, (6,))
    gate = torch.randn(6, 3)
    if vocab == 1:  # everything is 0, and errors have nothing to be relative to
        loss = rg.linear_mixture_nll(*heads[:2], gate, target, vocab_size=1)
        assert loss.abs() <= 1e-6
        return
    compare(heads if bias else heads[:2], gate, target, dtype, vocab)


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("shared_gate", [True, False])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 5.0)])
def test_experts_and_transforms(experts, shared_gate, temperature, softcap):
    heads = make_heads((2, 3), range(8, 8 + 4 * experts, 4), 131)
    gate = torch.randn(experts) if shared_gate else torch.randn(2, 3, experts)
    target = torch.randint(0, 131, (2, 3))
    target[0, 1] = -100
    compare(heads, gate, target, torch.float32, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [0, 30])
def test_a_workspace_of_one_mebibyte(dtype, ignored):
    """Many tiles of rows and columns, and two walks where the rows' sums do not fit."""
    heads = make_heads((450,), (160, 48), 2051, dtype)
    target = torch.randint(0, 2051, (450,))
    target[torch.randperm(450)[:ignored]] = -100
    compare(heads, torch.randn(450, 2), target, dtype, workspace_bytes=MIB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspaces_agree(dtype):
    """Tiles only change the order of sums."""
    heads = make_heads((450,), (160, 48), 2051, dtype)
    target, gate = torch.randint(0, 2051, (450,)), torch.randn(2)
    results = []
    for workspace in (MIB, 3 * MIB, None):
        x = leaves(flat(heads), dtype)
        hidden, lm_head, bias = kinds(x, 2)
        value = rg.linear_mixture_nll(
            hidden, lm_head, gate, target, bias=bias, workspace_bytes=workspace
        )
        results.append([value.detach(), *gradients(value, x)])
    for result in results[:2]:
        for got, want in zip(result, results[2], strict=True):
            # In bfloat16 a sum that differs in its last float32 bit may round the other way.
            assert relative_error(got, want) <= (2e-6 if dtype == torch.float32 else 1e-3)


def test_it_is_mixture_nll_of_the_products():
    heads = make_heads((9,), (24, 16), 333)
    target, gate = torch.randint(0, 333, (9,)), torch.randn(9, 2)
    logits = [h @ w.T + b for h, w, b in zip(*heads, strict=True)]
    got = rg.linear_mixture_nll(*heads[:2], gate, target, bias=heads[2], reduction="none")
    want = rg.mixture_nll(logits, gate, target, reduction="none")
    torch.testing.assert_close(got, want, atol=8e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_inside(dtype):
    """Also under autocast: rounded to 16 bits, logits of 40 would err by 0.1 nats."""
    hidden, lm_head, _ = make_heads((32,), (64, 64), 500, dtype)
    lm_head = [w * 4 for w in lm_head]
    target, gate = torch.randint(0, 500, (32,)), torch.zeros(2)
    want = truth([*hidden, *lm_head], 2, gate, target, 500)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            got = rg.linear_mixture_nll(hidden, lm_head, gate, target, reduction="none")
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, atol=4e-5, rtol=1e-6)


def test_backward_under_autocast_keeps_float32_products():
    heads = make_heads((40,), (32, 32), 400)
    target, gate = torch.randint(0, 400, (40,)), torch.zeros(2)
    results = []
    for enabled in (False, True):
        x = leaves(flat(heads), torch.float32)
        hidden, lm_head, bias = kinds(x, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = rg.linear_mixture_nll(hidden, lm_head, gate, target, bias=bias)
            results.append(gradients(loss, x))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace_bytes", [None, 1 << 20])
def test_products_of_16_bit_operands(dtype, workspace_bytes, monkeypatch):
    """What CUDA's tensor cores compute, here by torch.mm on float32 copies: no digit is lost."""
    mm, shapes = torch.mm, []

    def widening(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(a, b, out=out)
        assert a.dtype == b.dtype == dtype
        shapes.append((*a.shape, b.shape[1]))
        return mm(a.to(out_dtype), b.to(out_dtype), out=out)

    monkeypatch.setattr(torch, "mm", widening)
    monkeypatch.setattr(linear, "widens", lambda tensor: tensor.dtype == dtype)
    heads = make_heads((80,), (64, 96), 700, dtype)
    gate, target = torch.tensor([0.3, -0.2]), torch.randint(0, 700, (80,))
    compare(heads, gate, target, dtype, workspace_bytes=workspace_bytes)
    # Logits, once more for the backward pass, and a bfloat16 gradient in two parts: 2 experts,
    # hidden states and head each.
    backward = 2 * 2 * 2 if dtype == torch.bfloat16 else 0
    assert len(shapes) == 4 + backward or workspace_bytes


def test_mixed_dtypes():
    """bfloat16 hidden states on a float32 head: each gets its gradient in its own dtype."""
    (h, _), (w, v), _ = make_heads((6,), (24, 24), 97)
    h = h.bfloat16()
    target, gate = torch.randint(0, 97, (6,)), torch.zeros(2)
    x = [h.requires_grad_(), w.requires_grad_(), v.bfloat16().requires_grad_()]
    value = rg.linear_mixture_nll([x[0], x[0]], x[1:], gate, target, reduction="none")
    exact = leaves(x)
    want = truth([exact[0], exact[0], *exact[1:]], 2, gate, target, 97)
    torch.testing.assert_close(value.double(), want, atol=8e-6, rtol=0)
    for t, got, true in zip(x, gradients(value, x), gradients(want, exact), strict=True):
        assert got.dtype == t.dtype
        # The shared hidden state's two gradients are rounded apart, and then their sum.
        assert relative_error(got, true) <= 1e-5 + torch.finfo(t.dtype).eps


@pytest.mark.parametrize("trainable", ["gate", "hidden", "head of one"])
def test_one_trainable_part(trainable):
    heads = make_heads((9,), (24, 16), 333)
    target, gate = torch.randint(0, 333, (9,)), torch.randn(9, 2)
    leaf = {"gate": gate, "hidden": heads[0][0], "head of one": heads[1][1]}[trainable]
    leaf.requires_grad_()
    value = rg.linear_mixture_nll(*heads[:2], gate, target, reduction="sum")
    (got,) = gradients(value, [leaf])
    exact_gate, *exact = leaves([gate, *flat(heads[:2])])
    want = truth(exact, 2, exact_gate, target, 333).sum()
    position = {"gate": exact_gate, "hidden": exact[0], "head of one": exact[3]}[trainable]
    assert_gradient(got, *gradients(want, [position]), 1e-5)


def test_frozen_experts_keep_no_hidden_states():
    hidden, lm_head, _ = make_heads((9,), (24, 16), 333)
    gate = torch.zeros(2, requires_grad=True)
    target = torch.randint(0, 333, (9,))
    value = rg.linear_mixture_nll(hidden, lm_head, gate, target)
    for t in (*hidden, *lm_head):
        t.fill_(torch.nan)  # would poison a backward pass that read them
    (grad,) = gradients(value, [gate])
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 0


def test_target_excluded_by_every_expert():
    """A bias of -inf takes a token out: +inf, with gradient 0, for the row that asks for it."""
    hidden, lm_head, bias = make_heads((3,), (8, 8), 40)
    for b in bias:
        b[7] = -torch.inf
    target = torch.tensor([3, 7, 9])
    x = leaves([*hidden, *lm_head], torch.float32)
    value = rg.linear_mixture_nll(x[:2], x[2:], torch.zeros(2), target, bias=bias, reduction="none")
    assert value[1] == torch.inf
    assert torch.isfinite(value[[0, 2]]).all()
    grads = gradients(value, x)
    assert all(torch.isfinite(grad).all() for grad in grads)
    for grad in grads[:2]:  # hidden states
        assert (grad[1] == 0).all()
        assert (grad[[0, 2]] != 0).any(-1).all()

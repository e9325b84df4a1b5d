"""linear_jsd: the divergence of ``hidden @ W^T``, without the logits. Memory has its own file.

Tolerances. Logits are float32 sums of H products with errors of sqrt(H) 2^-24 |z|, about 5e-7, so
that a divergence of d^2 / 8 errs by d 5e-7: 1e-5 relative for experts apart by 0.1 or more.
Gradients are float32 sums, 2e-5 in relative L2, plus the rounding to the input's dtype.
"""

import pytest
import torch
from op_cases import (
    DTYPES,
    assert_gradient,
    backend_fixture,
    exact_jsd,
    gradients,
    leaves,
    make_heads,
    relative_error,
    simplex,
    true_heads,
    true_jsd,
    true_kl,
)

import robustgate as rg

MIB = 1 << 20

backend = backend_fixture("expert_log_prob", "jsd", "jsd_backward")


def flat(heads):
    return [x for kind in heads for x in kind]


def kinds(tensors, experts):
    return tensors[:experts], tensors[experts : 2 * experts], tensors[2 * experts :] or None


def compare(heads, weights, dtype, vocab_size=None, target=None, **options):
    """Values and every gradient against the truth on the same rounded inputs."""
    experts, tensors = len(heads[0]), flat(heads)
    x = leaves(tensors, dtype)
    (w,) = leaves([weights], torch.float64 if dtype == torch.float64 else torch.float32)
    hidden, lm_head, bias = kinds(x, experts)
    value = rg.linear_jsd(
        hidden,
        lm_head,
        w,
        bias=bias,
        reduction="none",
        vocab_size=vocab_size,
        target=target,
        **options,
    )
    assert value.dtype == w.dtype
    exact_w, *exact = leaves([weights, *tensors])
    options.pop("workspace_bytes", None)
    vocab = vocab_size or heads[1][0].shape[0]
    want = true_jsd(true_heads(*kinds(exact, experts)), exact_w, vocab_size=vocab, **options)
    if target is not None:
        want = want.masked_fill(target == -100, 0.0)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value.double(), want, atol=1e-12, rtol=tolerance)
    upstream = torch.randn(want.shape)
    got_w, *got = gradients(value, [w, *x], upstream)
    true_w, *true = gradients(want, [exact_w, *exact], upstream)
    assert relative_error(got_w, true_w) <= tolerance
    for i, (grad, exact_grad) in enumerate(zip(got, true, strict=True)):
        assert grad.dtype == dtype
        assert grad.shape == exact_grad.shape
        if i >= experts:  # heads and biases, whose rows beyond the vocabulary are padding
            assert (grad[vocab:] == 0).all()
        assert_gradient(grad, exact_grad, 2 * tolerance, float(upstream.norm()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 17, 97, 513, 2050])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(dtype, vocab, bias):
    heads = make_heads((6,), (24, 16, 9), vocab, dtype, padding=2)
    compare(heads if bias else heads[:2], simplex(6, 3), dtype, vocab)


@pytest.mark.parametrize("experts", [2, 5])
@pytest.mark.parametrize("shared_weights", [True, False])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 5.0)])
def test_experts_and_transforms(experts, shared_weights, temperature, softcap):
    heads = make_heads((2, 3), range(8, 8 + 4 * experts, 4), 131)
    w = simplex(experts) if shared_weights else simplex(2, 3, experts)
    target = torch.zeros(2, 3, dtype=torch.long)
    target[0, 1] = -100
    compare(heads, w, torch.float32, target=target, temperature=temperature, softcap=softcap)


def test_one_expert_and_one_column_are_exactly_zero():
    for widths, vocab in (((8,), 50), ((8, 4), 1)):
        heads = make_heads((5,), widths, vocab)
        x = leaves(flat(heads), torch.float32)
        hidden, lm_head, bias = kinds(x, len(widths))
        value = rg.linear_jsd(hidden, lm_head, bias=bias, reduction="none")
        # One column: a float32 log-sum-exp of one logit errs by 2e-7, the value by its square / 8.
        assert (value.abs() <= (0 if vocab > 1 else 1e-13)).all()
        assert all((g.abs() <= (0 if vocab > 1 else 1e-5)).all() for g in gradients(value, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [0, 40])
def test_a_workspace_of_one_mebibyte(dtype, ignored):
    """Whole rows do not fit: products made twice forward, and two walks backward."""
    heads = make_heads((250,), (160, 48), 2051, dtype)
    target = torch.zeros(250, dtype=torch.long)
    target[torch.randperm(250)[:ignored]] = -100
    compare(heads, simplex(250, 2), dtype, target=target, workspace_bytes=MIB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspaces_agree(dtype):
    """Tiles only change the order of sums."""
    heads = make_heads((250,), (160, 48), 2051, dtype)
    results = []
    for workspace in (MIB, 3 * MIB, None):
        x = leaves(flat(heads), dtype)
        hidden, lm_head, bias = kinds(x, 2)
        value = rg.linear_jsd(hidden, lm_head, simplex(2), bias=bias, workspace_bytes=workspace)
        results.append([value.detach(), *gradients(value, x)])
    for result in results[:2]:
        for got, want in zip(result, results[2], strict=True):
            # In bfloat16 a sum that differs in its last float32 bit may round the other way.
            assert relative_error(got, want) <= (4e-5 if dtype == torch.float32 else 1e-3)


def test_it_is_jsd_of_the_products():
    heads = make_heads((9,), (24, 16), 333)
    logits = [h @ w.T + b for h, w, b in zip(*heads, strict=True)]
    got = rg.linear_jsd(*heads[:2], simplex(9, 2), bias=heads[2], reduction="none")
    want = rg.jsd(logits, simplex(9, 2), reduction="none")
    torch.testing.assert_close(got, want, atol=0, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("workspace", [MIB, None])
@pytest.mark.parametrize("entries", [3, 3000])
def test_near_equal_bfloat16_heads(autocast, workspace, entries):
    """Heads that differ by one ulp of bfloat16 in a few entries, on the same hidden states.

    Products rounded to bfloat16 give gradients wrong by whole per cents while the value looks
    right. Here logits are float32: each is a sum of 64 products of size 3 / 8, its error
    sqrt(64) 2^-25 3, 7e-7, against a distance of 2^-8 3 / 8 where one entry differs: 5e-4 there.
    Rounding the gradient to bfloat16 is what it is.
    """
    (h,), (weight,), _ = make_heads((200,), (64,), 2051, torch.bfloat16)
    other = weight.clone()
    flips = torch.randperm(weight.numel())[:entries]
    other.view(-1).view(torch.int16)[flips] += 1
    x, w = leaves([h, weight, other], torch.bfloat16), simplex(2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = rg.linear_jsd([x[0], x[0]], x[1:], w, reduction="none", workspace_bytes=workspace)
        got = gradients(value, x)
    exact = leaves([h, weight, other])
    logits = true_heads([exact[0], exact[0]], exact[1:])
    want = exact_jsd(logits, w)
    assert (value >= 0).all()
    assert relative_error(value, want) <= 5e-4
    for grad, true in zip(got[1:], gradients(true_jsd(logits, w), exact)[1:], strict=True):
        assert relative_error(grad, true) <= 5e-4 + relative_error(true.bfloat16(), true)


@pytest.mark.parametrize("trainable", ["weights", "hidden", "head of one"])
def test_one_trainable_part(trainable):
    heads = make_heads((9,), (24, 16), 333)
    w = simplex(9, 2)
    leaf = {"weights": w, "hidden": heads[0][0], "head of one": heads[1][1]}[trainable]
    leaf.requires_grad_()
    value = rg.linear_jsd(*heads[:2], w, reduction="sum")
    (got,) = gradients(value, [leaf])
    exact_w, *exact = leaves([w, *flat(heads[:2])])
    want = true_jsd(true_heads(exact[:2], exact[2:]), exact_w).sum()
    position = {"weights": exact_w, "hidden": exact[0], "head of one": exact[3]}[trainable]
    assert_gradient(got, *gradients(want, [position]), 2e-5)


def test_frozen_experts_keep_no_hidden_states():
    """The graph holds the [N, K] divergences, which are the weights' gradient."""
    hidden, lm_head, _ = make_heads((9,), (24, 16), 333)
    w = simplex(9, 2).requires_grad_()
    value = rg.linear_jsd(hidden, lm_head, w, reduction="none")
    want = true_kl(true_heads(hidden, lm_head), w.detach())
    for t in (*hidden, *lm_head):
        t.fill_(torch.nan)  # would poison a backward pass that read them
    torch.testing.assert_close(gradients(value, [w])[0].double(), want, atol=0, rtol=1e-5)


@pytest.mark.parametrize("workspace", [MIB, None])
def test_minus_infinity_biases_and_weights_of_zero(workspace):
    """Tokens that one head, or both, exclude; an expert of weight 0."""
    heads = make_heads((40,), (8, 6, 8), 7000)
    heads[2][0][100:4000] = -torch.inf
    heads[2][1][3000:6000] = -torch.inf
    heads[2][2][3500:3600] = -torch.inf
    w = simplex(40, 3)
    w[20:] = torch.tensor([0.25, 0.75, 0.0])
    x = leaves(flat(heads), torch.float32)
    hidden, lm_head, bias = kinds(x, 3)
    value = rg.linear_jsd(
        hidden, lm_head, w, bias=bias, reduction="none", workspace_bytes=workspace
    )
    exact = leaves(flat(heads))
    want = true_jsd(true_heads(*kinds(exact, 3)), w)
    torch.testing.assert_close(value.double(), want, atol=0, rtol=1e-5)
    for i, (grad, true) in enumerate(zip(gradients(value, x), gradients(want, exact), strict=True)):
        assert torch.isfinite(grad).all()
        assert_gradient(grad, true, 2e-5)
        if i == 2:  # the hidden states of the third expert
            assert (grad[20:] == 0).all()

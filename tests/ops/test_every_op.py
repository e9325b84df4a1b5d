"""What holds for every public op: gradcheck, layouts, shapes, masks, reductions.

Values and gradients against the float64 truth are in each op's own file.
"""

import pytest
import torch
from op_cases import BACKENDS, assert_same, gradients, leaves, on_backend
from op_problems import NAMES, ON_LOGITS, RAW_OPS, REDUCED, problem

every_op = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    names = [request.getfixturevalue(x) for x in ("name",) if x in request.fixturenames]
    with on_backend(request.param, *(raw for name in names for raw in RAW_OPS[name])):
        yield request.param


def detached(p):
    return [x.detach().clone().requires_grad_() for x in p.tensors]


@every_op
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (1.4, 3.0)])
@pytest.mark.parametrize("shared_gate", [True, False])
def test_gradcheck(name, temperature, softcap, shared_gate):
    p = problem(name, (3,), 2, 5, torch.float64, shared_gate=shared_gate)
    p.target[1] = -100
    assert torch.autograd.gradcheck(
        lambda *x: p.call(*x, temperature=temperature, softcap=softcap), leaves(p.tensors)
    )


def layouts():
    def strided(z):  # rows further apart than their width
        wide = torch.full((*z.shape[:-1], z.shape[-1] + 5), torch.nan, dtype=z.dtype)
        wide[..., : z.shape[-1]] = z
        return wide[..., : z.shape[-1]]

    def unaligned(z):  # base pointer off by one element
        return torch.empty(z.numel() + 1, dtype=z.dtype)[1:].view(z.shape).copy_(z)

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


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", layouts(), ids=lambda f: f.__name__)
def test_layouts(name, dtype, layout):
    """Every other tensor in an unusual layout (so that one list mixes strides): nothing changes."""
    p = problem(name, (3, 4), 3, 83, dtype)
    results = []
    for arranged in (False, True):
        x = [
            (layout(t) if arranged and i % 2 == 0 and t.dim() > 1 else t.clone()).requires_grad_()
            for i, t in enumerate(t.detach() for t in p.tensors)
        ]
        value = p.call(*x)
        grads = gradients(value, x, torch.linspace(-1, 1, value.numel()).view(value.shape))
        results.append([value.detach(), *grads])
    # The same arithmetic; torch's own softmax of the gate and products may round otherwise.
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_expanded_rows_and_one_stacked_tensor(name):
    """Rows of stride 0, and one [K, ..., V] tensor instead of a list."""
    p = problem(name, (3, 4), 2, 41)
    first = next(i for i, t in enumerate(p.tensors) if t.shape[-1] == 41)
    rows = [t[:1, :1].clone() for t in p.tensors[first:]]
    expanded = [t.expand(3, 4, 41) for t in rows]
    want = p.call(*p.tensors[:first], *[t.contiguous() for t in expanded])
    assert_same(p.call(*p.tensors[:first], *expanded), want)

    stacked = torch.stack(expanded).requires_grad_()
    value = p.call(*p.tensors[:first], *stacked)
    assert_same(value, want)
    (grad,) = gradients(value, [stacked])
    x = [t.detach().clone().requires_grad_() for t in expanded]
    assert_same(grad, torch.stack(gradients(p.call(*p.tensors[:first], *x), x)).expand_as(grad))


@every_op
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (2, 3), (2, 3, 4), (1, 1, 2, 3)])
@pytest.mark.parametrize("shared_gate", [True, False])
def test_leading_shapes(name, shape, shared_gate):
    """A leading shape is rows in another arrangement."""
    p = problem(name, shape, 2, 19, shared_gate=shared_gate)
    x = detached(p)
    value = p.call(*x)
    assert value.shape[: len(shape)] == shape
    grads = gradients(value, x)
    assert [g.shape for g in grads] == [t.shape for t in x]
    assert all(torch.isfinite(g).all() for g in grads)
    if value.numel() == 0:
        assert all((g == 0).all() for g in grads)
        return
    rows = p.target.numel()
    flat = problem(name, (rows,), 2, 19)
    flat.target.copy_(p.target.flatten())
    has_rows = [any(t is x for x in p.experts) for t in p.tensors]
    has_rows[0] |= not shared_gate
    y = [t.reshape(rows, -1) if r else t for t, r in zip(p.tensors, has_rows, strict=True)]
    torch.testing.assert_close(value.reshape(rows, *value.shape[len(shape) :]), flat.call(*y))


@every_op
def test_gradients_only_for_what_requires_them(name):
    """Each tensor alone gets the gradient it gets among the others."""
    p = problem(name)
    x = detached(p)
    together = gradients(p.call(*x).square(), x)
    for i, want in enumerate(together):
        alone = [t.clone().requires_grad_(j == i) for j, t in enumerate(p.tensors)]
        p.call(*alone).square().sum().backward()
        torch.testing.assert_close(alone[i].grad, want, atol=1e-7, rtol=1e-6)
        assert all(t.grad is None for j, t in enumerate(alone) if j != i)


@pytest.mark.parametrize("name", [*REDUCED, "expert_log_prob"])
@pytest.mark.parametrize("shared_gate", [True, False])
def test_ignored_rows_are_not_read(name, shared_gate):
    """Value and gradient 0, also where the experts' rows are NaN; the other rows unmoved."""
    p = problem(name, (5,), 3, 23, shared_gate=shared_gate)
    want = p.call(*p.tensors)
    p.target[[1, 4]] = -100
    for t in p.experts:
        t[[1, 4]] = torch.nan
    x = detached(p)
    value = p.call(*x)
    assert (value[[1, 4]] == 0).all()
    torch.testing.assert_close(value[[0, 2, 3]], want[[0, 2, 3]], atol=1e-6, rtol=1e-6)
    for t, g in zip(p.tensors, gradients(value, x), strict=True):
        assert torch.isfinite(g).all()
        if t.dim() == 2 and len(t) == 5:
            assert (g[[1, 4]] == 0).all()
            assert (g[[0, 2, 3]] != 0).any()


@pytest.mark.parametrize("name", REDUCED)
def test_reductions(name):
    p = problem(name, (6,))
    p.target[2] = -100
    rows = p.call(*p.tensors)
    assert torch.equal(p.call(*p.tensors, reduction="sum"), rows.sum())
    assert torch.equal(p.call(*p.tensors, reduction="mean"), rows.sum() / 5)
    for items in (7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor(7.0).double()):
        mean = p.call(*p.tensors, reduction="mean", num_items=items)
        assert mean.dtype == torch.float32
        assert mean.shape == ()
        torch.testing.assert_close(mean, rows.sum() / 7)


@pytest.mark.parametrize("name", REDUCED)
def test_num_items_scales_the_gradient(name):
    """The loss of two micro-batches, each over the items of both, is that of the whole batch."""
    p = problem(name, (6,), shared_gate=True)
    p.target[2] = -100
    x = detached(p)
    want = gradients(p.call(*x, reduction="mean"), x)
    got = gradients(p.call(*x, reduction="mean", num_items=torch.tensor(10)), x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(2 * a, b, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", REDUCED)
def test_all_rows_ignored(name):
    p = problem(name)
    p.target[:] = -100
    for reduction in ("mean", "sum", "none"):
        x = detached(p)
        value = p.call(*x, reduction=reduction)
        assert (value == 0).all()
        assert all((g == 0).all() for g in gradients(value, x))
    assert p.call(*p.tensors, reduction="mean", num_items=3) == 0


@pytest.mark.parametrize("name", ["jsd", "mixture_kl", "generalized_jsd", "linear_jsd"])
def test_masks_of_any_ignore_index(name):
    """A target is only compared with ignore_index: ids outside the vocabulary are rows too."""
    p = problem(name)
    want = p.call(*p.tensors)
    p.target[:] = torch.tensor([-5, 10**6, 0, 7])
    got = p.call(*p.tensors, ignore_index=7)
    # A linear op leaves the fourth row out of its products, which may then round otherwise.
    torch.testing.assert_close(got[:3], want[:3], atol=1e-6, rtol=1e-6)
    assert got[3] == 0


@every_op
def test_a_row_without_a_softmax_is_nan_alone(name):
    row, others = 1, [0, 2, 3]
    want = (p := problem(name, (4,), 3, 600)).call(*p.tensors)
    for column, bad in ((slice(None), -torch.inf), (550, torch.nan), (3, torch.inf)):
        p = problem(name, (4,), 3, 600)
        if name.startswith("linear"):
            p.experts[-1][row] = bad  # a hidden state: all of its logits are NaN or infinite
        else:
            p.experts[-1][row, column] = bad
        x = detached(p)
        value = p.call(*x)
        assert torch.isnan(value[row]).any()
        if name in REDUCED:
            assert torch.isnan(p.call(*x, reduction="mean"))
        torch.testing.assert_close(value[others], want[others], atol=1e-6, rtol=1e-6)
        for t, g in zip(p.tensors, gradients(value, x), strict=True):
            if t.dim() == 2 and len(t) == 4:
                assert torch.isfinite(g[others]).all()

"""Every public op inside torch: compile, autocast, checkpoint, transforms, threads, repeat runs."""

import pytest
import torch
from op_cases import BACKENDS, gradients, on_backend
from op_problems import NAMES, ON_LOGITS, RAW_OPS, problem
from torch.utils.checkpoint import checkpoint

every_op = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def _native(name):
    with on_backend("native", *RAW_OPS[name]):
        yield


@pytest.fixture(params=BACKENDS)
def _each_backend(request, name):
    with on_backend(request.param, *RAW_OPS[name]):
        yield


def detached(p):
    return [x.detach().clone().requires_grad_() for x in p.tensors]


def results(function, x):
    value = function(*x)
    upstream = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *gradients(value, x, upstream)]


def equal(got, want):
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Dynamo instantiates autograd functions while it traces them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_op
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(name, dynamic):
    """One graph, whose values and gradients have the same bits; also for other numbers of rows."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(call, x):
        return 2 * call(*x)

    for rows in (5, 6) if dynamic else (5,):
        p = problem(name, (rows,), 2, 33, seed=rows)
        want = results(lambda *x, p=p: 2 * p.call(*x), detached(p))
        assert equal(results(lambda *x, p=p: compiled(p.call, x), detached(p)), want)


@every_op
@pytest.mark.usefixtures("_each_backend")
def test_backward_twice_and_repeat_runs(name):
    """The same bits every time."""
    p = problem(name, (33,), 3, 1001, torch.bfloat16)
    x = detached(p)
    value = p.call(*x)
    first = gradients(value, x, retain_graph=True)
    assert equal(gradients(value, x), first)
    again = detached(p)
    repeated = p.call(*again)
    assert torch.equal(repeated, value)
    assert equal(gradients(repeated, again), first)


@pytest.mark.parametrize("name", ON_LOGITS)
@pytest.mark.usefixtures("_native")
def test_thread_count_does_not_change_a_bit(name):
    p = problem(name, (97,), 3, 4001)
    threads = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outcomes.append(results(p.call, detached(p)))
    finally:
        torch.set_num_threads(threads)
    assert equal(outcomes[1], outcomes[0])
    assert equal(outcomes[2], outcomes[0])


@every_op
@pytest.mark.usefixtures("_each_backend")
def test_upstream_gradients_of_every_layout(name):
    """Stride 0 (from a sum), strided, and zero for all rows but one."""
    p = problem(name, (4,), 3, 50)
    x = detached(p)
    value = p.call(*x)
    dense = gradients(value, x, torch.ones(value.shape), retain_graph=True)
    assert equal(torch.autograd.grad(value.sum(), x, retain_graph=True), dense)
    strided = torch.ones(*value.shape, 2)[..., 0]
    assert equal(gradients(value, x, strided, retain_graph=True), dense)
    one = torch.zeros(value.shape)
    one[0] = 1
    for t, g, all_rows in zip(x, gradients(value, x, one), dense, strict=True):
        if t.dim() == 2 and len(t) == 4:
            torch.testing.assert_close(g[0], all_rows[0], atol=1e-7, rtol=1e-6)
            assert (g[1:] == 0).all()


@every_op
@pytest.mark.usefixtures("_each_backend")
def test_autocast_changes_nothing(name):
    """Outputs and statistics are float32, and no product inside is made in bfloat16."""
    p = problem(name, (5,), 2, 40)
    want = results(p.call, detached(p))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(p.call, detached(p))
    assert got[0].dtype == torch.float32
    assert equal(got, want)


@every_op
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(name, reentrant):
    p = problem(name, (5,), 2, 40)
    x, y = detached(p), detached(p)
    p.call(*x).sum().backward()
    checkpoint(p.call, *y, use_reentrant=reentrant).sum().backward()
    assert equal([t.grad for t in y], [t.grad for t in x])


@every_op
def test_no_grad_and_inference_mode(name):
    p = problem(name, (5,), 2, 40)
    x = detached(p)
    value = p.call(*x)
    assert value.requires_grad
    with torch.no_grad():
        plain = p.call(*x)
    with torch.inference_mode():
        inside = p.call(*x)
    assert not plain.requires_grad
    assert not inside.requires_grad
    assert torch.equal(plain, value)
    assert torch.equal(inside, value)


def name_in_message(name):
    """generalized_jsd is jsd under another name."""
    return {"generalized_jsd": "jsd"}.get(name, name.split()[0])


@every_op
def test_torch_func_is_refused_by_name(name):
    p = problem(name)
    message = rf"{name_in_message(name)} does not support torch\.func"
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda last: p.call(*p.tensors[:-1], last).sum())(p.tensors[-1])
    with pytest.raises(RuntimeError, match=message):
        torch.func.vmap(lambda last: p.call(*p.tensors[:-1], last))(torch.stack(p.tensors[-1:]))


# torch compiles its forward-mode formulas with torch.jit.script on first use.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@every_op
def test_forward_mode_is_refused_by_name(name):
    p = problem(name)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p.tensors[-1], torch.ones_like(p.tensors[-1]))
        with pytest.raises(
            RuntimeError, match=f"{name_in_message(name)} does not support forward-mode"
        ):
            p.call(*p.tensors[:-1], dual)


@every_op
@pytest.mark.parametrize("upstream_requires_grad", [True, False])
@pytest.mark.parametrize("by", ["backward", "grad"])
def test_second_derivatives_are_refused(name, upstream_requires_grad, by):
    """Also of a gradient penalty, whose upstream gradient is a constant: it would be lost."""
    p = problem(name)
    x = detached(p)
    value = p.call(*x)
    upstream = torch.ones(value.shape, requires_grad=upstream_requires_grad)
    grads = torch.autograd.grad(value, x, upstream, create_graph=True)
    for grad in grads:
        loss = value.sum() + grad.square().sum()
        differentiate = {
            "backward": lambda loss: loss.backward(retain_graph=True),
            "grad": lambda loss: torch.autograd.grad(loss, x, retain_graph=True),
        }[by]
        with pytest.raises(RuntimeError, match="once_differentiable"):
            differentiate(loss)

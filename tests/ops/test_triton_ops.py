"""What is said of the Triton kernels alone; test_triton_interpreter.py runs this file."""

import os

import pytest
import torch
from op_cases import make, make_heads, on_backend, true_heads, true_log_probs
from op_problems import NAMES, RAW_OPS, problem

import robustgate as rg
from robustgate.ops.library import serving

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton_interpreter.py"
)


def test_kernels_serve_every_op_and_none_is_chosen_on_a_cpu():
    for op, backends in serving("cpu").items():
        assert backends == ["native", "triton", "eager"], op


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_compile_fullgraph(name):
    torch.compiler.reset()
    p = problem(name, (2,), 2, 20)

    def run(call):
        x = [t.detach().clone().requires_grad_() for t in p.tensors]
        value = call(*x)
        return [value, *torch.autograd.grad(value.sum(), x)]

    with on_backend("triton", *RAW_OPS[name]):
        want = run(p.call)
        got = run(torch.compile(p.call, fullgraph=True, backend="aot_eager"))
        again = run(p.call)
    for a, b, c in zip(got, want, again, strict=True):
        assert torch.equal(a, b)  # opaque to the compiler
        assert torch.equal(b, c)  # and the same bits every time


def test_a_target_out_of_range_is_nan_and_reads_nothing():
    case = make((4,), 3, 50)
    case.target[:] = torch.tensor([50, -1, 7, -100])
    for z in case.logits:
        z[[0, 1, 3]] = torch.nan
    z = [x.requires_grad_() for x in case.logits]
    with rg.backend("triton"):
        nll = rg.mixture_nll(z, case.gate, case.target, reduction="none")
        assert torch.isnan(nll).tolist() == [True, True, False, False]
        grads = torch.autograd.grad(nll[2], z)
    assert all((g[[0, 1, 3]] == 0).all() and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_masked_with_the_lowest_number(dtype):
    """As transformers masks them: finite, and in the last row nothing else is left."""
    z = torch.randn(2, 3, 20).to(dtype)
    z[0, 0, ::2] = z[1, 1, 5:] = z[:, 2] = torch.finfo(dtype).min
    target = torch.tensor([1, 3, 7])
    results = []
    for backend in ("triton", "native"):
        with rg.backend(backend):
            results.append(rg.mixture_nll(z, torch.zeros(2), target, reduction="none"))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)  # float32 sums of 20 terms
    torch.testing.assert_close(results[0][2].exp(), torch.tensor(20.0), atol=0, rtol=1e-5)


@pytest.mark.parametrize("op", ["jsd", "mixture_kl", "mixture_log_softmax"])
def test_more_experts_than_a_kernel_holds_run_on_eager_torch(op):
    z = make((2,), 17, 20).logits
    gate = torch.randn(17)
    call = {
        "jsd": lambda: rg.jsd(z, torch.softmax(gate, 0)),
        "mixture_kl": lambda: rg.mixture_kl(z, gate, gate.flip(0)),
        "mixture_log_softmax": lambda: rg.mixture_log_softmax(z, gate),
    }[op]
    results = []
    for backend in ("triton", "eager"):
        with rg.backend(backend):
            results.append(call())
    assert torch.equal(*results)


def test_likelihoods_of_more_experts_than_a_launch_holds():
    case = make((3,), 18, 40).clone(requires_grad=True)
    results = []
    for backend in ("triton", "native"):
        with rg.backend(backend):
            nll = rg.mixture_nll(case.logits, case.gate, case.target, reduction="none")
            results.append([nll, *torch.autograd.grad(nll.sum(), [case.gate, *case.logits])])
    # Two float32 computations of log-probs of some nats, and of products of such.
    torch.testing.assert_close(*results, atol=4e-6, rtol=1e-5)


def test_frozen_logits_of_any_layout_are_not_copied_for_their_absent_gradient():
    from robustgate.ops.triton import launch

    z = torch.randn(20, 6).t()  # columns are not next to each other
    _grads, places, needs = launch.fresh_gradients([z, z], [False, True], 20)
    assert needs == 2
    assert places.tensors[0].data_ptr() == z.data_ptr()


# The interpreter multiplies bfloat16 numbers by their bits; float16 takes the same path.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (1.3, 5.0)])
@pytest.mark.parametrize("biased", [True, False])
def test_fused_linear_log_prob(dtype, temperature, softcap, biased, monkeypatch):
    """Against float64; 3 parts of the vocabulary, merged; ragged rows, widths and columns."""
    from robustgate.ops.triton import launch, linear_mixture_nll

    monkeypatch.setattr(launch, "parts_of", lambda *_: 3)
    hidden, heads, bias = make_heads((2, 70), (24, 100), 700, dtype, padding=3)
    bias = bias if biased else []
    target = torch.randint(0, 700, (2, 70))
    target[0, 3], target[1, 1] = -100, 700
    got, lse = linear_mixture_nll.forward(
        hidden, heads, bias, target, 700, -100, temperature, softcap
    )
    assert (got[0, 3] == 0).all()
    assert (lse[0, 3] == 0).all()
    assert torch.isnan(got[1, 1]).all()
    logits = [z[..., :700] for z in true_heads(hidden, heads, bias or None)]
    log_p = true_log_probs(logits, temperature=temperature, softcap=softcap)
    index = target.clamp(0, 699)[..., None, None].expand(2, 70, 1, 2)
    want = log_p.gather(-2, index).squeeze(-2)
    counted = (target >= 0) & (target < 700)
    # Float32 sums of at most 100 products of size 3: 1e-5 of a logit.
    torch.testing.assert_close(got[counted].double(), want[counted], atol=2e-5, rtol=1e-6)


def test_fused_linear_log_prob_of_one_position():
    hidden, heads, bias = make_heads((), (24, 100), 50, torch.float32)
    target, gate = torch.tensor(7), torch.tensor([0.3, -1.0])
    results = []
    for backend in ("triton", "native"):
        with rg.backend(backend):
            results.append(rg.linear_mixture_nll(hidden, heads, gate, target, bias=bias))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-6)  # as above

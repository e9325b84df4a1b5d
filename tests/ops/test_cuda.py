"""Every op on a CUDA device, on each backend that serves it there.

`-k small` selects what compute-sanitizer can afford.
"""

import pytest
import torch
from op_cases import gradients
from op_problems import NAMES, ON_LOGITS, problem

import robustgate as rg
from robustgate.ops.library import serving

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"

every_op = pytest.mark.parametrize("name", NAMES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "triton"], autouse=True)
def backend(request):
    if not all(request.param in served for served in serving("cuda").values()):
        pytest.skip(f"{request.param} serves no CUDA device: see `robustgate env`")
    with rg.backend(request.param):
        yield request.param


def results(name, dtype, device, **options):
    """The op's value and all of its gradients, for an upstream gradient that varies by row."""
    p = problem(name, dtype=dtype, device=device, **options)
    x = [t.detach().clone().requires_grad_() for t in p.tensors]
    value = p.call(*x)
    upstream = torch.linspace(-1, 2, value.numel()).view(value.shape).to(device)
    return [value, *gradients(value, x, upstream)]


def check(name, dtype, **options):
    """Agreement with float64 on the CPU, on the same rounded inputs.

    Statistics and sums are float32, to about 1e-5 of values up to 30; gradients are rounded to the
    logits' dtype, up to an ulp where two are added: 2^-8 for bfloat16, 2^-11 for float16.
    """
    inputs = problem(name, dtype=dtype, **options)
    p = problem(name, dtype=torch.float64, **options)
    x = [t.double().detach().clone().requires_grad_() for t in inputs.tensors]
    with rg.backend("eager"):
        value = p.call(*x)
        upstream = torch.linspace(-1, 2, value.numel()).view(value.shape)
        want = [value, *gradients(value, x, upstream)]
    for got, exact in zip(results(name, dtype, DEVICE, **options), want, strict=True):
        ulp = {torch.float32: 0.0, torch.bfloat16: 8e-3, torch.float16: 1e-3}[got.dtype]
        scale = float(exact.detach().abs().max()) + 1e-30
        error = float((got.detach().cpu().double() - exact.detach()).abs().max())
        assert error <= (ulp + 2e-5) * scale + 2e-6, (error, scale, got.dtype)


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [1, 2, 4, 5])
def test_small(name, dtype, experts):
    check(name, dtype, experts=experts, vocab=37, shape=(3,))


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "experts"), [(1, 2), (1000, 3), (5001, 2), (33001, 4)])
def test_wide(name, dtype, vocab, experts):
    check(name, dtype, experts=experts, vocab=vocab, shape=(2, 3))


@pytest.mark.parametrize("name", ON_LOGITS)
@pytest.mark.parametrize(("vocab", "experts"), [(128256, 4), (262144, 8)])
def test_rows_of_any_length(name, vocab, experts):
    check(name, torch.bfloat16, experts=experts, vocab=vocab, shape=(3,))


@every_op
def test_runs_are_equal_bit_for_bit(name):
    first, second = (
        results(name, torch.bfloat16, DEVICE, shape=(64,), vocab=8193) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ON_LOGITS)
def test_no_synchronisation(name):
    p = problem(name, device=DEVICE, vocab=999)
    x = [t.detach().clone().requires_grad_() for t in p.tensors]
    p.call(*x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        p.call(*x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ON_LOGITS)
def test_graph_capture(name):
    p = problem(name, device=DEVICE, vocab=999)
    x = [t.detach().clone() for t in p.tensors]
    want = p.call(*x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = p.call(*x)
    for t in x:
        t.add_(0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_current_stream(name):
    """Inputs are filled late on the stream that the op runs on."""
    p = problem(name, shape=(64,), device=DEVICE, vocab=9999)
    want = p.call(*p.tensors)
    stream = torch.cuda.Stream()
    late = [torch.zeros_like(t) for t in p.tensors]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        for t, source in zip(late, p.tensors, strict=True):
            t.copy_(source)
        got = p.call(*late)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@every_op
def test_second_device(name):
    first, second = (
        results(name, torch.float32, device, vocab=777) for device in ("cuda:0", "cuda:1")
    )
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(first, second, strict=True))


def test_target_out_of_range_is_nan():
    logits = [torch.randn(4, 50, device=DEVICE) for _ in range(2)]
    target = torch.tensor([0, 50, -1, 49], device=DEVICE)
    nll = rg.mixture_nll(logits, torch.zeros(2, device=DEVICE), target, reduction="none")
    assert nll.isnan().tolist() == [False, True, True, False]


def test_offsets_beyond_32_bits():
    rows, vocab = 9000, 262144  # 2.4e9 elements, 4.7 GB each
    if torch.cuda.get_device_properties(0).total_memory < 30 << 30:
        pytest.skip("needs 30 GB")
    z = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    z[-1, 5] = 20.0
    target = torch.full((rows,), 5, device=DEVICE)
    nll = rg.mixture_nll([z, z], torch.zeros(2, device=DEVICE), target, reduction="none")
    want = torch.log_softmax(z[-2:].double(), -1)[:, 5]
    torch.testing.assert_close(nll[-2:].double(), -want, atol=1e-5, rtol=1e-6)
    divergence = rg.jsd([z, z.flip(0)], reduction="none")
    assert divergence[1:-1].eq(0).all()
    assert divergence[0] == divergence[-1] > 0.1

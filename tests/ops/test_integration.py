"""The ops inside torch: opcheck, gradcheck, compile, autocast, checkpoint, fork, repeat runs."""

import os
import subprocess
import sys

import pytest
import torch
from op_cases import make, true_mixture_nll

import robustgate as rg


def raw_ops(dtype):
    """(name, arguments) of every raw op, on small inputs."""
    case = make((4,), 3, 20, dtype, padding=2)
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    gate = case.gate.to(stat)
    settings = (case.vocab_size, -100, 1.3, 5.0)
    ops = torch.ops.robustgate
    log_prob, lse = ops.expert_log_prob(case.logits, case.target, *settings)
    rows = torch.randn(4, dtype=stat)
    return [
        ("expert_log_prob", (case.logits, case.target, *settings)),
        (
            "expert_log_prob_backward",
            (torch.randn_like(log_prob), None, case.logits, case.target, lse, *settings),
        ),
        ("mixture_log_prob", (log_prob, gate)),
        ("mixture_log_prob", (log_prob, gate[0])),
        ("mixture_log_prob_backward", (rows, log_prob, gate)),
        ("mixture_nll", (case.logits, gate, case.target, *settings)),
        ("mixture_nll_backward", (rows, log_prob, gate, case.target, -100)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("index", range(7))
def test_opcheck(dtype, index):
    name, arguments = raw_ops(dtype)[index]
    torch.library.opcheck(getattr(torch.ops.robustgate, name).default, arguments)


@pytest.mark.parametrize("index", range(7))
def test_native_and_eager_raw_ops_agree(index):
    name, arguments = raw_ops(torch.float64)[index]
    op = getattr(torch.ops.robustgate, name)
    results = []
    for backend in ("native", "eager"):
        with rg.backend(backend):
            out = op(*arguments)
        results.append([out] if isinstance(out, torch.Tensor) else list(out))
    torch.testing.assert_close(*results, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (1.4, 3.0)])
def test_gradcheck(backend, temperature, softcap):
    case = make((3,), 3, 11, torch.float64, padding=2).clone(requires_grad=True)
    case.gate = case.gate.detach().double().requires_grad_()
    case.target[1] = -100
    options = {"temperature": temperature, "softcap": softcap, "vocab_size": 11}
    with rg.backend(backend):
        assert torch.autograd.gradcheck(
            lambda gate, *logits: rg.mixture_nll(
                logits, gate, case.target, reduction="none", **options
            ),
            (case.gate, *case.logits),
        )
        assert torch.autograd.gradcheck(
            lambda *logits: rg.expert_log_prob(logits, case.target, **options), case.logits
        )
        log_prob = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
        for gate in (case.gate, case.gate[0].detach().requires_grad_()):
            assert torch.autograd.gradcheck(rg.mixture_log_prob, (log_prob, gate))


def test_frozen_experts_keep_no_logits():
    """The graph of a loss with frozen experts holds [N, K] values, not the logits."""
    case = make((6,), 2, 5000)
    gate = case.gate.requires_grad_()
    loss = rg.mixture_nll(case.logits, gate, case.target, reduction="none")
    saved = loss.grad_fn.saved_tensors
    assert max(tensor.numel() for tensor in saved) == 12
    for z in case.logits:
        z.fill_(torch.nan)  # would poison a backward pass that read them
    loss.sum().backward()
    assert torch.isfinite(gate.grad).all()


def test_one_trainable_expert_keeps_its_own_logits_alone():
    case = make((6,), 3, 5000)
    case.logits[1].requires_grad_()
    for out in (
        rg.mixture_nll(case.logits, case.gate, case.target, reduction="none"),
        rg.expert_log_prob(case.logits, case.target),
    ):
        large = [tensor for tensor in out.grad_fn.saved_tensors if tensor.numel() == 30000]
        assert len(large) == 1
        assert large[0].data_ptr() == case.logits[1].data_ptr()


# Dynamo instantiates autograd functions while it traces them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(frozen, dynamic):
    def loss(gate, target, *logits):
        return rg.mixture_nll(logits, gate * 2, target) + rg.expert_log_prob(logits, target).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 6, 7):
        case = make((rows,), 2, 33, seed=rows)
        results = []
        for function in (loss, compiled):
            copy = case.clone(requires_grad=True)
            for z in copy.logits:
                z.requires_grad_(not frozen)
            value = function(copy.gate, copy.target, *copy.logits)
            value.backward()
            results.append(
                [value.detach(), copy.gate.grad, *([] if frozen else [z.grad for z in copy.logits])]
            )
        for eager, graph in zip(*results, strict=True):
            assert torch.equal(eager, graph)


def test_upstream_gradients_of_every_layout():
    """Stride-0 (from sum), non-contiguous, and zero gradients, which skip their rows."""
    case = make((4,), 2, 50).clone(requires_grad=True)
    nll = rg.mixture_nll(case.logits, case.gate, case.target, reduction="none")
    (stride0,) = torch.autograd.grad(nll.sum(), case.logits[0], retain_graph=True)
    (dense,) = torch.autograd.grad(nll, case.logits[0], torch.ones(4), retain_graph=True)
    (strided,) = torch.autograd.grad(nll, case.logits[0], torch.ones(8)[::2], retain_graph=True)
    assert torch.equal(stride0, dense)
    assert torch.equal(stride0, strided)
    (first_only,) = torch.autograd.grad(nll, case.logits[0], torch.tensor([1.0, 0, 0, 0]))
    assert torch.equal(first_only[0], dense[0])
    assert (first_only[1:] == 0).all()


def test_backward_twice_with_retain_graph_and_bitwise_repeats():
    case = make((64,), 3, 3001, torch.bfloat16).clone(requires_grad=True)
    nll = rg.mixture_nll(case.logits, case.gate, case.target)
    first = torch.autograd.grad(nll, [case.gate, *case.logits], retain_graph=True)
    second = torch.autograd.grad(nll, [case.gate, *case.logits])
    again = rg.mixture_nll(case.logits, case.gate, case.target)
    assert torch.equal(nll, again)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_thread_count_does_not_change_a_bit():
    case = make((97,), 3, 4001)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            copy = case.clone(requires_grad=True)
            nll = rg.mixture_nll(copy.logits, copy.gate, copy.target, reduction="none")
            nll.sum().backward()
            results.append([nll.detach(), copy.gate.grad, *[z.grad for z in copy.logits]])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_autocast_leaves_the_statistics_in_float32():
    case = make((5,), 2, 40, torch.bfloat16)
    router = torch.nn.Linear(4, 2)
    x = torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = rg.mixture_nll(case.logits, router(x), case.target)
    assert nll.dtype == torch.float32
    nll.backward()
    assert router.weight.grad.abs().sum() > 0


def test_activation_checkpointing():
    case = make((5,), 2, 40)
    results = []
    for wrapped in (False, True):
        copy = case.clone(requires_grad=True)

        def loss(*logits, copy=copy):
            return rg.mixture_nll(logits, copy.gate, copy.target)

        if wrapped:
            value = torch.utils.checkpoint.checkpoint(loss, *copy.logits, use_reentrant=False)
        else:
            value = loss(*copy.logits)
        value.backward()
        results.append([copy.gate.grad, *[z.grad for z in copy.logits]])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_inference_mode_and_no_grad():
    case = make((5,), 2, 40).clone(requires_grad=True)
    with torch.inference_mode():
        inside = rg.mixture_nll(case.logits, case.gate, case.target)
    with torch.no_grad():
        assert not rg.mixture_nll(case.logits, case.gate, case.target).requires_grad
    torch.testing.assert_close(inside.double(), true_mixture_nll(case).mean(), atol=8e-6, rtol=0)


def test_int32_targets():
    case = make((5,), 2, 40)
    assert torch.equal(
        rg.expert_log_prob(case.logits, case.target.int()),
        rg.expert_log_prob(case.logits, case.target),
    )


FORK = """
import os, torch, robustgate as rg
torch.set_num_threads(4)
logits = [torch.randn(64, 20000) for _ in range(2)]
target = torch.zeros(64, dtype=torch.long)

def value():
    return rg.mixture_nll(logits, torch.zeros(2), target)

want = value()  # starts the worker threads of the parent
for _ in range(4):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        alone = value()
        torch.set_num_threads(4)
        os._exit(0 if torch.equal(alone, want) and torch.equal(value(), want) else 1)
    assert os.waitpid(child, 0)[1] == 0
assert torch.equal(value(), want)
print("ok")
"""


def test_fork_after_threads_were_started():
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == "ok\n", result.stderr


def test_calls_from_many_python_threads():
    from concurrent.futures import ThreadPoolExecutor

    case = make((64,), 2, 5000)
    want = rg.mixture_nll(case.logits, case.gate, case.target)
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(rg.mixture_nll, case.logits, case.gate, case.target) for _ in range(64)
        ]
        for future in futures:
            assert torch.equal(future.result(), want)


@pytest.mark.slow
@pytest.mark.skipif(
    os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 << 30, reason="needs 8 GiB free"
)
def test_more_than_two_to_the_31_elements():
    """int64 offsets: the last row of a logits tensor of 2^31 + V elements (bfloat16, 4.3 GB)."""
    vocab = 2**16
    rows = 2**15 + 1
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    logits[-1, 5] = 10.0
    target = torch.full((rows,), 5)
    got = rg.expert_log_prob([logits], target)[[0, -1], 0]
    want = torch.log_softmax(logits[[0, -1]].double(), -1)[:, 5]
    torch.testing.assert_close(got.double(), want, atol=8e-6, rtol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", [1, 7, 33, 1000, 128256])
def test_cuda_agrees_with_the_truth(dtype, vocab):
    case = make((5,), 3, vocab, dtype, padding=1)
    case.target[0] = -100
    nll = rg.mixture_nll(
        [z.cuda() for z in case.logits],
        case.gate.cuda(),
        case.target.cuda(),
        reduction="none",
        vocab_size=vocab,
    )
    tolerance = 1e-10 if dtype == torch.float64 else 8e-6
    torch.testing.assert_close(
        nll.cpu().double(), true_mixture_nll(case), atol=tolerance, rtol=1e-6
    )

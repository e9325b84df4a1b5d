"""What the graph keeps, gates from a router, forks, threads, sizes beyond 32 bits, CUDA."""

import subprocess
import sys

import pytest
import torch
from op_cases import BACKENDS, make

import robustgate as rg


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3,), (4, 3)])
def test_gradcheck_of_mixture_log_prob(backend, shape):
    log_prob = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with rg.backend(backend):
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


def test_autocast_leaves_the_statistics_in_float32():
    case = make((5,), 2, 40, torch.bfloat16)
    router = torch.nn.Linear(4, 2)
    x = torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = rg.mixture_nll(case.logits, router(x), case.target)
    assert nll.dtype == torch.float32
    nll.backward()
    assert router.weight.grad.abs().sum() > 0


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


def test_offsets_beyond_31_bits_of_the_row_that_counts():
    """Every row but the last is ignored, and its memory never touched: pages that do not exist."""
    rows, vocab = 2**15 + 1, 2**16
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16)
    logits[-1] = torch.randn(vocab)
    other = torch.randn(vocab).bfloat16().expand(rows, vocab)
    target = torch.full((rows,), -100)
    target[-1] = 5
    last = [logits[-1:], other[-1:]]
    zero, one = torch.zeros(2), torch.tensor([1.0, 0.0])
    with rg.backend("native"):
        assert torch.equal(
            rg.expert_log_prob([logits], target)[-1], rg.expert_log_prob(last[:1], target[-1:])[0]
        )
        assert torch.equal(rg.jsd([logits, other], target=target), rg.jsd(last))
        assert torch.equal(
            rg.mixture_kl([logits, other], zero, one, target=target), rg.mixture_kl(last, zero, one)
        )
        smoothed = [
            rg.mixture_nll(z, zero, y, label_smoothing=0.1, z_loss=0.1)
            for z, y in (([logits, other], target), (last, target[-1:]))
        ]
        assert torch.equal(*smoothed)

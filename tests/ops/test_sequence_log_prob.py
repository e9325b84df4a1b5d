"""sequence_log_prob: sums per document of a packed batch, in float64."""

import math

import pytest
import torch

import robustgate as rg


def documents(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("experts", [None, 1, 3])
@pytest.mark.parametrize("lengths", [[], [5], [3, 0, 1, 0, 7], [0, 0], [1] * 40, [1000, 1]])
def test_sums(dtype, experts, lengths):
    total = sum(lengths)
    log_prob = (-8 * torch.rand(total, *([] if experts is None else [experts]))).to(dtype)
    got = rg.sequence_log_prob(log_prob, documents(lengths))
    assert got.dtype == torch.float64
    assert got.shape == (len(lengths), *log_prob.shape[1:])
    for i, document in enumerate(log_prob.split(lengths) if lengths else []):
        rows = document.double().reshape(len(document), experts or 1).T.tolist()
        want = [math.fsum(row) for row in rows]
        # math.fsum is exact; a float64 sum of 1000 terms of 8 nats errs by 1e-12 at most.
        assert got[i].flatten().tolist() == pytest.approx(want, abs=1e-12)


def test_no_digit_is_lost_to_float32():
    """A float32 running sum of 2^17 tokens is wrong by hundredths of a nat and more."""
    log_prob = torch.full((2**17,), -3.3)
    got = rg.sequence_log_prob(log_prob, documents([2**17]))
    assert float(got) == pytest.approx(2**17 * float(log_prob[0]), rel=1e-12)


def test_special_values():
    log_prob = torch.tensor([-1.0, -math.inf, -2.0, 0.0, math.nan, -3.0])
    got = rg.sequence_log_prob(log_prob, documents([1, 2, 1, 1, 1]))
    assert got[:3].tolist() == [-1.0, -math.inf, 0.0]
    assert math.isnan(got[3])
    assert got[4] == -3


@pytest.mark.parametrize("experts", [None, 3])
def test_gradient(experts):
    """Each token gets its document's, also behind other ops; tokens past the last document none."""
    shape = (9, *([] if experts is None else [experts]))
    log_prob = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    cu_seqlens = documents([3, 0, 4])
    assert torch.autograd.gradcheck(lambda x: rg.sequence_log_prob(x, cu_seqlens), [log_prob])
    upstream = torch.randn(3, *shape[1:], dtype=torch.float64)
    rg.sequence_log_prob(log_prob, cu_seqlens).backward(upstream)
    want = torch.cat([upstream[:1].expand(3, *shape[1:]), upstream[2:].expand(4, *shape[1:])])
    assert torch.equal(log_prob.grad[:7], want)
    assert (log_prob.grad[7:] == 0).all()
    single = log_prob.detach().float().requires_grad_()
    rg.sequence_log_prob(single, cu_seqlens).sum().backward()  # stride 0
    assert single.grad.dtype == torch.float32
    assert (single.grad[:7] == 1).all()


def test_it_follows_expert_log_prob():
    """Log-probs of packed documents under K experts, ignored tokens adding nothing."""
    logits = [torch.randn(10, 30, requires_grad=True) for _ in range(2)]
    target = torch.randint(0, 30, (10,))
    target[[3, 9]] = -100
    cu_seqlens = documents([4, 6])
    tokens = rg.expert_log_prob(logits, target)
    got = rg.sequence_log_prob(tokens, cu_seqlens)
    kept = torch.stack([torch.log_softmax(z.double(), -1) for z in logits], -1)
    kept = kept[torch.arange(10), target.clamp_min(0)] * (target >= 0)[:, None]
    want = torch.stack([kept[:4].sum(0), kept[4:].sum(0)])
    torch.testing.assert_close(got, want, atol=6e-5, rtol=0)  # six float32 log-probs each
    gate = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    rg.mixture_log_prob(got, gate).sum().backward()
    assert gate.grad.abs().max() > 0
    assert (logits[0].grad[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_layouts_and_index_dtypes(dtype):
    log_prob = torch.randn(12, 4)
    cu_seqlens = documents([5, 7])
    want = rg.sequence_log_prob(log_prob, cu_seqlens)
    strided = torch.empty(4, 24)[:, ::2].T.copy_(log_prob)
    assert torch.equal(rg.sequence_log_prob(strided, cu_seqlens.to(dtype)), want)
    spread = torch.stack([cu_seqlens, -cu_seqlens], 1).to(dtype)[:, 0]
    assert torch.equal(rg.sequence_log_prob(log_prob, spread), want)


def test_repeats_and_threads_change_no_bit():
    log_prob = -8 * torch.rand(100_000, 3)
    cu_seqlens = documents([99_000, 1, 999])
    want = rg.sequence_log_prob(log_prob, cu_seqlens)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(rg.sequence_log_prob(log_prob, cu_seqlens), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("log_prob", "cu_seqlens", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.long), torch.zeros(1).long(), TypeError, "log_prob must be a"),
        (torch.zeros(()), torch.zeros(1).long(), ValueError, r"\[T\] or \[T, K\], got \[\]"),
        (torch.zeros(1, 2, 3), torch.zeros(1).long(), ValueError, r"\[T\] or \[T, K\], got"),
        (torch.zeros(3), torch.zeros(2), TypeError, "cu_seqlens must be an integer tensor, got"),
        (torch.zeros(3), torch.zeros(2).bool(), TypeError, "cu_seqlens must be an integer tensor"),
        (torch.zeros(3), torch.zeros(0).long(), ValueError, r"must be \[n \+ 1\], got \[0\]"),
        (torch.zeros(3), torch.zeros(2, 2).long(), ValueError, r"must be \[n \+ 1\], got \[2, 2\]"),
        (torch.zeros(3), torch.zeros(2, device="meta").long(), ValueError, "cu_seqlens is on meta"),
    ],
)
def test_errors(log_prob, cu_seqlens, error, message):
    with pytest.raises(error, match=f"sequence_log_prob: .*{message}"):
        rg.sequence_log_prob(log_prob, cu_seqlens)

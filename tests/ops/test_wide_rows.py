"""Rows wide enough that several blocks of a GPU, or several passes of a thread, share one."""

import pytest
import torch
from op_cases import assert_gradient, backend_fixture, gradients, leaves
from op_problems import ON_LOGITS, problem

import robustgate as rg

backend = backend_fixture(
    "mixture_nll", "mixture_log_softmax", "mixture_mean_log_prob", "jsd", "mixture_kl"
)


# Blocks of 256 threads with 16-byte loads: 2 to 8 of them a row, the last with few columns.
@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(33_001, torch.bfloat16), (70_003, torch.float32), (150_001, torch.float16)],
)
@pytest.mark.parametrize("name", ON_LOGITS)
def test_wide_rows(name, vocab, dtype):
    p = problem(name, (3,), 3, vocab, dtype)
    p.target[1] = vocab - 1
    upstream = torch.linspace(0.5, 1, 3) / 16  # float16 gradients stay finite
    x = [t.clone().requires_grad_() for t in p.tensors]
    value = p.call(*x)
    upstream = upstream.reshape(3, *[1] * (value.dim() - 1)).expand(value.shape)
    got = gradients(value, x, upstream)
    with rg.backend("eager"):
        doubles = leaves(p.tensors)
        truth = p.call(*doubles)
        want = gradients(truth, doubles, upstream)
    # float32 throughout: some rounding errors of 6e-8 each, of values near 1 nat and above.
    torch.testing.assert_close(value.double(), truth, atol=1e-6, rtol=1e-6)
    for a, b in zip(got, want, strict=True):
        # Sums of V float32 terms, each rounded at random.
        assert_gradient(a, b, 2**-24 * vocab**0.5, scale=float(upstream.double().norm()))

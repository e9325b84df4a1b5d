"""What the linear ops allocate, seen from outside: the peak of the process's resident memory.

Measured in a process of its own. Linux resets the peak (VmHWM) on request; glibc is told to return
every large block at once, so that nothing hides in memory that was freed before. The bound is the
op's workspace, 64 MiB by default, and 8 MiB of slack: the statistics per row, pages of small
blocks, and the buffers into which the BLAS packs its operands (2 MiB a thread).
"""

import json
import os
import subprocess
import sys

import pytest
from op_cases import on_backend
from op_problems import RAW_OPS

MIB = 1 << 20
SLACK = 8

MEASURE = """
import json
import sys
import torch
import robustgate as rg

torch.set_num_threads(1)


def inputs(dtype, rows, vocab, width, trained):
    dtype = getattr(torch, dtype)
    hidden = [torch.randn(rows, width).to(dtype) for _ in range(2)]
    lm_head = [(torch.randn(vocab, width) / width**0.5).to(dtype) for _ in range(2)]
    gate = torch.tensor([0.5, 0.5])
    leaves = {"all": [gate, *hidden, *lm_head], "hidden": hidden, "gate": [gate]}[trained]
    for leaf in leaves:
        leaf.requires_grad_()
    return hidden, lm_head, gate, torch.zeros(rows, dtype=torch.long), leaves


def forward(op, hidden, lm_head, gate, target, workspace):
    if op == "linear_jsd":
        return rg.linear_jsd(hidden, lm_head, gate, workspace_bytes=workspace)
    return rg.linear_mixture_nll(hidden, lm_head, gate, target, workspace_bytes=workspace)


def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) / 1024


def peak_of(function, *arguments):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    result = function(*arguments)
    return result, status("VmHWM") - before


def measure(op, dtype, rows, vocab, width, trained, workspace):
    *x, leaves = inputs(dtype, rows, vocab, width, trained)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves) / 2**20
    loss, first = peak_of(forward, op, *x, workspace)
    _, second = peak_of(loss.backward)
    return first, second - gradients


with rg.backend("native"):
    op = sys.argv[1]
    for dtype in ("float32", "bfloat16"):
        measure(op, dtype, 8, 100, 32, "all", None)  # libraries, threads, kernels
    print(json.dumps({name: measure(op, *case) for name, case in json.loads(sys.argv[2]).items()}))
"""

CASES = {
    # Float32 logits would take 400 MB, and their gradients as much again.
    "all float32": ("float32", 1000, 50000, 32, "all", None),
    "all bfloat16": ("bfloat16", 1000, 50000, 32, "all", None),
    "4 MiB": ("bfloat16", 300, 50000, 32, "all", 4 * MIB),
    # The heads' gradients would take 205 MB.
    "frozen heads": ("float32", 64, 50000, 512, "hidden", None),
    "frozen experts": ("float32", 200, 50000, 32, "gate", None),
}


@pytest.fixture(scope="module", params=["linear_mixture_nll", "linear_jsd"])
def extra(request):
    """MiB beyond inputs and gradients at the peak of (forward, backward), for each case."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of resident memory can only be reset on Linux")
    with on_backend("native", *RAW_OPS[request.param]):
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, request.param, json.dumps(CASES)],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", ["all float32", "all bfloat16", "frozen heads"])
def test_the_default_workspace(extra, case):
    forward, backward = extra[case]
    assert forward <= 64 + SLACK
    assert backward <= 64 + SLACK


def test_a_smaller_workspace(extra):
    forward, backward = extra["4 MiB"]
    assert forward <= 4 + SLACK
    assert backward <= 4 + SLACK


def test_frozen_experts_make_no_product_backward(extra):
    """Only the gate is trained: the backward pass allocates its gradient and no more."""
    assert extra["frozen experts"][1] <= 1

"""Tests of what CUDA alone promises; they need plugin.py, so test_cuda_on_cpu.py asks for them."""

import ctypes

import pytest
import torch
from cuda_on_cpu.plugin import library
from op_cases import gradients
from op_problems import ON_LOGITS, problem

import robustgate as rg
from robustgate.ops.backends import native


@pytest.fixture(autouse=True)
def _native():
    with rg.backend("native"):
        yield


def current_device() -> int:
    device = ctypes.c_int(-1)
    library.cudaGetDevice(ctypes.byref(device))
    return device.value


def value_and_gradients(p):
    x = [t.detach().clone().requires_grad_() for t in p.tensors]
    value = p.call(*x)
    return [value.detach(), *gradients(value, x)]


@pytest.mark.parametrize("vocab", [97, 20_001])
@pytest.mark.parametrize("name", ON_LOGITS)
def test_bitwise_equal_in_any_order_of_threads(name, vocab):
    """The emulator draws another order for every launch."""
    p = problem(name, (3,), 3, vocab)
    first, *others = (value_and_gradients(p) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("target", [-1, 20, 2**62])
@pytest.mark.parametrize("name", ["expert_log_prob", "mixture_nll", "mixture_nll smoothed"])
def test_target_out_of_range_is_nan_in_its_row(name, target):
    p = problem(name)
    want = value_and_gradients(p)
    p.target[2] = target
    got = value_and_gradients(p)
    others = [0, 1, 3]
    for a, b in zip(got, want, strict=True):
        assert torch.isnan(a[2]).any()
        torch.testing.assert_close(a[others], b[others])


@pytest.mark.parametrize("name", ON_LOGITS)
def test_another_device(name, monkeypatch):
    p = problem(name)
    want = value_and_gradients(p)
    monkeypatch.setattr(native, "where", lambda tensor: (1, 0))
    assert all(torch.equal(a, b) for a, b in zip(value_and_gradients(p), want, strict=True))
    assert current_device() == 0
    monkeypatch.setattr(native, "where", lambda tensor: (2, 0))
    with pytest.raises(RuntimeError, match=r"robustgate::\w+: invalid device ordinal"):
        p.call(*p.tensors)
    assert current_device() == 0
    assert library.cudaPeekAtLastError() == 0

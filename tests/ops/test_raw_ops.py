"""Every raw op of torch.ops.robustgate: opcheck, and native and eager kernels are interchangeable.

The arguments are those the public ops pass, forward and backward, recorded on the way.
"""

import functools

import pytest
import torch
from op_cases import BACKENDS, gradients, leaves, on_backend, simplex
from op_problems import NAMES, problem
from torch.utils._python_dispatch import TorchDispatchMode

import robustgate as rg
from robustgate.ops.library import serving


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "robustgate":
            self.calls.append((function.__name__.removesuffix(".default"), detached(args)))
        return function(*args, **(kwargs or {}))


def detached(x):
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    return type(x)(detached(y) for y in x) if isinstance(x, (list, tuple)) else x


@functools.cache
def calls(dtype):
    """(op, variant) -> arguments, with padding, a softcap, ignored rows and frozen experts."""
    found = {}
    for name in NAMES:
        for shared in (False, True):
            p = problem(name, (2, 3), 3, 20, dtype, shared_gate=shared)
            p.target[0, 1] = -100
            x = leaves(p.tensors, dtype)
            x[0] = x[0].detach().to(p.tensors[0].dtype).requires_grad_()
            if shared:
                x[-1].requires_grad_(False)
            with Recorder() as recorder, rg.backend("eager"):
                value = p.call(*x, temperature=1.3, softcap=5.0)
                gradients(value, [t for t in x if t.requires_grad])
            for op, arguments in recorder.calls:
                found.setdefault((op, f"{name}, {'shared' if shared else 'per row'}"), arguments)
    # As the tiles of linear_jsd use it: with the log-sum-exps of whole rows, on some columns.
    logits, _, _, target, *settings = found["jsd", "jsd, per row"]
    w = simplex(2, 3, 3).to(torch.float64 if dtype == torch.float64 else torch.float32)
    lse = torch.ops.robustgate.jsd(logits, w, None, target, *settings)[2]
    some = [z[..., :7].contiguous() for z in logits]
    found["jsd", "columns"] = (some, w, lse, None, 7, *settings[1:])
    return found


OPS = sorted(
    name.removeprefix("robustgate::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("robustgate::")
)


def test_the_public_ops_reach_every_raw_op():
    assert {op for op, _ in calls(torch.float32)} == set(OPS)


def test_native_kernels_serve_every_raw_op():
    """But those that are made of others."""
    served = serving("cpu")
    assert set(OPS) - set(served) == {op for op in OPS if op.startswith("linear")}
    assert [op for op in served if served[op] != ["native", "eager"]] == []


def signature(x):
    if isinstance(x, torch.Tensor):
        return x.dim()
    return tuple(signature(y) for y in x) if isinstance(x, (list, tuple)) else type(x)


SCHEMA = ("test_schema", "test_faketensor")
OPCHECKS = {
    "native-float32": ("native", torch.float32, (*SCHEMA, "test_aot_dispatch_dynamic")),
    "native-bfloat16": ("native", torch.bfloat16, SCHEMA),
    "eager-float64": ("eager", torch.float64, SCHEMA),
    "triton-float16": ("triton", torch.float16, SCHEMA),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("backend", "dtype", "checks"),
    [pytest.param(*x, id=name) for name, x in OPCHECKS.items() if x[0] in BACKENDS],
)
def test_opcheck(op, backend, dtype, checks):
    """The schema says what is aliased and changed, and the fake kernel which tensors come out."""
    variants = {
        signature(arguments): arguments
        for (name, _), arguments in calls(dtype).items()
        if name == op
    }
    with on_backend(backend, *([op] if op in serving("cpu") else [])):
        for arguments in variants.values():
            function = getattr(torch.ops.robustgate, op).default
            torch.library.opcheck(function, arguments, test_utils=checks)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_and_eager_agree(op, dtype):
    """Also in a backward pass from what the other one's forward saved."""
    function = getattr(torch.ops.robustgate, op)
    for (name, _), arguments in calls(dtype).items():
        if name != op:
            continue
        results = []
        for backend in BACKENDS:
            with on_backend(backend, *([op] if op in serving("cpu") else [])):
                out = function(*arguments)
            results.append([out] if isinstance(out, torch.Tensor) else list(out))
        flat = [[t for x in r for t in (x if isinstance(x, list) else [x])] for r in results]
        assert len(flat[0]) == len(flat[1]) > 0
        for got, want in zip(*flat, strict=True):
            # Two float32 computations of log-probs of 10 nats and of products of such.
            atol, rtol = (1e-12, 1e-11) if dtype == torch.float64 else (4e-6, 1e-5)
            torch.testing.assert_close(got, want, atol=atol, rtol=rtol)

"""Every bad argument is refused by name, with what was expected and what came."""

import pytest
import torch

import robustgate as rg

Z = torch.zeros(3, 8)
Y = torch.zeros(3, dtype=torch.long)
A = torch.zeros(2)


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        ([], Y, {}, ValueError, "at least one expert"),
        ([Z, "x"], Y, {}, TypeError, r"logits\[1\] must be a tensor, got str"),
        ([Z, Z.long()], Y, {}, TypeError, r"logits\[1\] must be a dense float32.*int64"),
        ([Z.to_sparse()], Y, {}, TypeError, r"logits\[0\] must be a dense"),
        (
            [Z, Z.bfloat16()],
            Y,
            {},
            TypeError,
            "share one dtype, got torch.float32 and torch.bfloat16",
        ),
        ([Z, Z.to("meta")], Y, {}, ValueError, "on one device, got cpu and meta"),
        ([Z, Z[:2]], Y, {}, ValueError, r"leading shape, got \[3\] and \[2\]"),
        ([Z, torch.zeros(3, 9)], Y, {}, ValueError, r"widths \[8, 9\]; pass vocab_size"),
        ([torch.zeros(3, 0)], Y, {}, ValueError, r"widths \[0\]"),
        ([torch.tensor(1.0)], Y, {}, ValueError, r"logits\[0\] must be \[\.\.\., V\]"),
        (torch.zeros(8), Y, {}, ValueError, r"must be \[K, \.\.\., V\], got shape \[8\]"),
        ([Z, Z], Y, {"vocab_size": 9}, ValueError, "between 1 and the smallest width 8, got 9"),
        ([Z, Z], Y, {"vocab_size": 0}, ValueError, "vocab_size must be between 1"),
        (
            [Z, Z],
            Y.float(),
            {},
            TypeError,
            "target must be a dense integer tensor, got torch.float32",
        ),
        ([Z, Z], Y.bool(), {}, TypeError, "target must be a dense integer tensor, got torch.bool"),
        ([Z, Z], [0, 1, 2], {}, TypeError, "target must be a dense integer tensor, got list"),
        ([Z, Z], Y[:2], {}, ValueError, r"leading shape \[3\], got \[2\]"),
        ([Z, Z], Y.to("meta"), {}, ValueError, "target is on meta, experts are on cpu"),
        (
            [Z, Z],
            Y,
            {"temperature": 0.0},
            ValueError,
            r"temperature must be between 1e-30 and 1e30, got 0\.0",
        ),
        ([Z, Z], Y, {"temperature": float("inf")}, ValueError, "temperature must be between"),
        ([Z, Z], Y, {"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a number"),
        ([Z, Z], Y, {"softcap": torch.tensor(1.0)}, TypeError, "softcap must be a number"),
        ([Z, Z], Y.to_sparse(), {}, TypeError, r"dense integer tensor, got torch\.int64 \(torch"),
        (
            [Z, Z],
            Y,
            {"softcap": -1.0},
            ValueError,
            r"softcap must be between 1e-30 and 1e30, got -1",
        ),
    ],
)
@pytest.mark.parametrize("op", ["expert_log_prob", "mixture_nll"])
def test_logits_and_target(op, logits, target, options, error, message):
    gate = () if op == "expert_log_prob" else (A,)
    with pytest.raises(error, match=f"{op}: .*{message}"):
        getattr(rg, op)(logits, *gate, target, **options)


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("bad", [8, -1, 2**40])
def test_target_out_of_range_names_the_first_row(backend, bad):
    target = torch.tensor([0, bad, bad])
    with (
        rg.backend(backend),
        pytest.raises(ValueError, match=rf"target of row 1 is {bad}, outside \[0, 8\)"),
    ):
        rg.mixture_nll([Z, Z], A, target)
    with rg.backend(backend), pytest.raises(ValueError, match="target of row 1"):
        rg.expert_log_prob([Z, Z], target)
    assert torch.isfinite(rg.mixture_nll([Z, Z], A, target, ignore_index=bad))


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"gate_logits must be \[2\] or \[3, 2\], got \[3\]"),
        (torch.zeros(2, 3), ValueError, "gate_logits must be"),
        (torch.zeros(2, dtype=torch.long), TypeError, "floating-point tensor, got torch.int64"),
        ([0.5, 0.5], TypeError, "got list"),
        (torch.zeros(2, device="meta"), ValueError, "gate_logits are on meta"),
    ],
)
def test_gate(gate, error, message):
    with pytest.raises(error, match=message):
        rg.mixture_nll([Z, Z], gate, Y)
    with pytest.raises(error, match=message):
        rg.mixture_log_prob(torch.zeros(3, 2), gate)


def test_mixture_log_prob_input():
    with pytest.raises(TypeError, match=r"dense floating-point tensor, got torch\.int64"):
        rg.mixture_log_prob(Y, A)
    with pytest.raises(ValueError, match=r"must be \[\.\.\., K\] with K >= 1"):
        rg.mixture_log_prob(torch.zeros(3, 0), A)


def test_reduction():
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum', got 'batch'"):
        rg.mixture_nll([Z, Z], A, Y, reduction="batch")


def test_backend():
    with pytest.raises(ValueError, match="must be one of auto, eager, native, triton, got 'cuda'"):
        rg.backend("cuda").__enter__()
    with (
        rg.backend("triton"),
        pytest.raises(RuntimeError, match="backend 'triton' has no kernel for these tensors"),
    ):
        rg.mixture_nll([Z, Z], A, Y)


def test_torch_func_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"mixture_nll does not support torch\.func"):
        torch.func.grad(lambda a: rg.mixture_nll([Z, Z], a, Y))(A)
    with pytest.raises(RuntimeError, match=r"expert_log_prob does not support torch\.func"):
        torch.func.vmap(lambda z: rg.expert_log_prob([z], Y))(Z.expand(2, 3, 8))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_func_is_refused_inside_compiled_functions():
    compiled = torch.compile(
        lambda a: torch.func.grad(lambda b: rg.mixture_nll([Z, Z + 1], b, Y))(a),
        backend="eager",
    )
    with pytest.raises(Exception, match=r"does not support torch\.func"):
        compiled(A)


# torch compiles its forward-mode formulas with torch.jit.script on first use.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level():
        gate = torch.autograd.forward_ad.make_dual(A, torch.ones(2))
        with pytest.raises(RuntimeError, match="does not support forward-mode"):
            rg.mixture_nll([Z, Z], gate, Y)


def test_double_backward_is_refused():
    gate = A.clone().requires_grad_()
    loss = rg.mixture_nll([Z, Z + torch.arange(8.0)], gate, Y)
    upstream = torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(loss, gate, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()

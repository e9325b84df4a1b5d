"""Every bad argument is refused by name, with what was expected and what came."""

import pytest
import torch

import robustgate as rg

Z = torch.zeros(3, 8)
Y = torch.zeros(3, dtype=torch.long)
A = torch.zeros(2)
H = [torch.zeros(3, 4)] * 2
W = [torch.zeros(8, 4)] * 2


# The ops that take logits, with a target where they have one.
CALLS = {
    "expert_log_prob": lambda z, y, **options: rg.expert_log_prob(z, y, **options),
    "mixture_nll": lambda z, y, **options: rg.mixture_nll(z, A, y, **options),
    "jsd": lambda z, y, **options: rg.jsd(z, target=y, **options),
    "mixture_kl": lambda z, y, **options: rg.mixture_kl(z, A, A, target=y, **options),
    "mixture_log_softmax": lambda z, y, **options: rg.mixture_log_softmax(z, A, **options),
}


@pytest.mark.parametrize(
    ("logits", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one expert"),
        ([Z, "x"], {}, TypeError, r"logits\[1\] must be a tensor, got str"),
        ([Z, Z.long()], {}, TypeError, r"logits\[1\] must be a dense float32.*int64"),
        ([Z.to_sparse()], {}, TypeError, r"logits\[0\] must be a dense"),
        ([Z, Z.bfloat16()], {}, TypeError, "one dtype, got torch.float32 and torch.bfloat16"),
        ([Z, Z.to("meta")], {}, ValueError, "on one device, got cpu and meta"),
        ([Z, Z[:2]], {}, ValueError, r"leading shape, got \[3\] and \[2\]"),
        ([Z, torch.zeros(3, 9)], {}, ValueError, r"widths \[8, 9\]; pass vocab_size"),
        ([torch.zeros(3, 0)], {}, ValueError, r"widths \[0\]"),
        ([torch.tensor(1.0)], {}, ValueError, r"logits\[0\] must be \[\.\.\., V\]"),
        (torch.zeros(8), {}, ValueError, r"must be \[K, \.\.\., V\], got shape \[8\]"),
        ([Z, Z], {"vocab_size": 9}, ValueError, "between 1 and the smallest width 8, got 9"),
        ([Z, Z], {"vocab_size": 0}, ValueError, "vocab_size must be between 1"),
        ([Z, Z], {"temperature": 0.0}, ValueError, r"between 1e-30 and 1e30, got 0\.0"),
        ([Z, Z], {"temperature": float("inf")}, ValueError, "temperature must be between"),
        ([Z, Z], {"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a number"),
        ([Z, Z], {"softcap": torch.tensor(1.0)}, TypeError, "softcap must be a number"),
        ([Z, Z], {"softcap": -1.0}, ValueError, r"softcap must be between 1e-30 and 1e30, got -1"),
    ],
)
@pytest.mark.parametrize("op", CALLS)
def test_logits(op, logits, options, error, message):
    with pytest.raises(error, match=f"{op}: .*{message}"):
        CALLS[op](logits, Y, **options)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (Y.float(), TypeError, "target must be a dense integer tensor, got torch.float32"),
        (Y.bool(), TypeError, "target must be a dense integer tensor, got torch.bool"),
        ([0, 1, 2], TypeError, "target must be a dense integer tensor, got list"),
        (Y[:2], ValueError, r"leading shape \[3\], got \[2\]"),
        (Y.to("meta"), ValueError, "target is on meta, experts are on cpu"),
        (Y.to_sparse(), TypeError, r"dense integer tensor, got torch\.int64 \(torch"),
    ],
)
@pytest.mark.parametrize("op", ["expert_log_prob", "mixture_nll", "jsd", "mixture_kl"])
def test_target(op, target, error, message):
    with pytest.raises(error, match=f"{op}: .*{message}"):
        CALLS[op]([Z, Z], target)


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
    with pytest.raises(error, match=f"mixture_log_softmax: .*{message}"):
        rg.mixture_log_softmax([Z, Z], gate)
    for name in ("teacher", "student"):
        gates = (gate, A) if name == "teacher" else (A, gate)
        of_this = message.replace("gate_logits", f"{name}_gate_logits")
        with pytest.raises(error, match=f"mixture_kl: .*{of_this}"):
            rg.mixture_kl([Z, Z], *gates)
    with pytest.raises(error, match=message.replace("gate_logits", "jsd: weights")):
        rg.jsd([Z, Z], gate)
    with pytest.raises(error, match=message):
        rg.linear_mixture_nll(H, W, gate, Y)
    with pytest.raises(error, match=message.replace("gate_logits", "linear_jsd: weights")):
        rg.linear_jsd(H, W, gate)


def test_mixture_log_prob_input():
    with pytest.raises(TypeError, match=r"dense floating-point tensor, got torch\.int64"):
        rg.mixture_log_prob(Y, A)
    with pytest.raises(ValueError, match=r"must be \[\.\.\., K\] with K >= 1"):
        rg.mixture_log_prob(torch.zeros(3, 0), A)


REDUCED = {
    "mixture_nll": lambda **options: rg.mixture_nll([Z, Z], A, Y, **options),
    "jsd": lambda **options: rg.jsd([Z, Z], **options),
    "mixture_kl": lambda **options: rg.mixture_kl([Z, Z], A, A, **options),
    "linear_mixture_nll": lambda **options: rg.linear_mixture_nll(H, W, A, Y, **options),
    "linear_jsd": lambda **options: rg.linear_jsd(H, W, **options),
}


@pytest.mark.parametrize("op", REDUCED)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "batch"}, "reduction must be 'none', 'mean' or 'sum', got 'batch'"),
        ({"reduction": "sum", "num_items": 3}, "num_items divides a 'mean', got reduction='sum'"),
        ({"reduction": "none", "num_items": 3}, "num_items divides a 'mean'"),
        ({"num_items": torch.ones(2)}, r"num_items must be a number or a tensor of one, got \[2\]"),
    ],
)
def test_reduction(op, options, message):
    with pytest.raises(ValueError, match=f"{op}: {message}"):
        REDUCED[op](**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1\.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
        ({"label_smoothing": float("nan")}, "label_smoothing must be in"),
        ({"z_loss": -1e-3}, "z_loss must be finite and at least 0, got -0.001"),
        ({"z_loss": float("inf")}, "z_loss must be finite"),
        ({"z_loss": float("nan")}, "z_loss must be finite"),
    ],
)
def test_regularisers(options, message):
    with pytest.raises(ValueError, match=f"mixture_nll: {message}"):
        rg.mixture_nll([Z, Z], A, Y, **options)


@pytest.mark.parametrize(
    ("hidden", "lm_head", "options", "error", "message"),
    [
        ([], [], {}, ValueError, "K >= 1 hidden states, K heads and K biases or none, got 0, 0"),
        (H, W[:1], {}, ValueError, "got 2, 1 and 0"),
        (H, W, {"bias": [Z[0]]}, ValueError, "got 2, 2 and 1"),
        (H, [W[0], "x"], {}, TypeError, r"lm_head\[1\] must be a dense floating.*got str"),
        ([H[0], H[1].long()], W, {}, TypeError, r"hidden\[1\] must be a dense.*torch\.int64"),
        (H, [W[0].to_sparse(), W[1]], {}, TypeError, r"lm_head\[0\] must be a dense"),
        (H, [W[0], W[1][0]], {}, ValueError, r"lm_head\[1\] must be \[V, H\], got \[4\]"),
        (H, W, {"bias": [Z[0], Z]}, ValueError, r"bias\[1\] must be \[V\], got \[3, 8\]"),
        (H, [W[0], W[1].to("meta")], {}, ValueError, r"on one device, got cpu and meta \(lm_head"),
        (H, [W[0], W[1].double()], {}, TypeError, "float64 does not mix with other dtypes"),
        (
            H,
            [W[0], W[1][:, :3]],
            {},
            ValueError,
            r"hidden\[1\] must be \[3, 3\] for a head \[8, 3\]",
        ),
        ([H[0], H[1][:2]], W, {}, ValueError, r"hidden\[1\] must be \[3, 4\].*got \[2, 4\]"),
        (H, [W[0], W[1][:5]], {}, ValueError, r"heads have sizes \[8, 5\]; pass vocab_size"),
        (H, W, {"vocab_size": 9}, ValueError, "between 1 and the smallest size 8, got 9"),
        (H, W, {"vocab_size": 0}, ValueError, "vocab_size must be between 1"),
        (H, W, {"bias": [Z[0], Z[0, :5]], "vocab_size": 6}, ValueError, "smallest size 5, got 6"),
        (H, W, {"workspace_bytes": 1000}, ValueError, "at least 1 MiB, got 1000"),
        (H, W, {"temperature": 0.0}, ValueError, "temperature must be between"),
    ],
)
@pytest.mark.parametrize("op", ["linear_mixture_nll", "linear_jsd"])
def test_heads(op, hidden, lm_head, options, error, message):
    required = {"linear_mixture_nll": (A, Y), "linear_jsd": ()}[op]
    with pytest.raises(error, match=f"{op}: .*{message}"):
        getattr(rg, op)(hidden, lm_head, *required, **options)


def test_targets_of_linear_ops():
    with pytest.raises(ValueError, match=r"target of row 1 is 8, outside \[0, 8\)"):
        rg.linear_mixture_nll(H, W, A, torch.tensor([0, 8, 9]))
    with pytest.raises(ValueError, match=r"linear_jsd: target must have .* \[3\], got \[2\]"):
        rg.linear_jsd(H, W, target=Y[:2])


def test_backend():
    with pytest.raises(ValueError, match="must be one of auto, eager, native, triton, got 'cuda'"):
        rg.backend("cuda").__enter__()
    with (
        rg.backend("triton"),
        pytest.raises(RuntimeError, match="backend 'triton' has no kernel for these tensors"),
    ):
        rg.mixture_nll([Z, Z], A, Y)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_func_is_refused_inside_compiled_functions():
    compiled = torch.compile(
        lambda a: torch.func.grad(lambda b: rg.mixture_nll([Z, Z + 1], b, Y))(a),
        backend="eager",
    )
    with pytest.raises(Exception, match=r"does not support torch\.func"):
        compiled(A)

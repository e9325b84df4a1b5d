"""Every public op on small inputs, behind one signature: what tests of all ops run over."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from op_cases import make, make_heads
from torch import Tensor

import robustgate as rg

# What a test can ask for, and the raw ops whose native kernels it then needs.
RAW_OPS = {
    "expert_log_prob": ("expert_log_prob", "expert_log_prob_backward"),
    "mixture_nll": ("mixture_nll", "mixture_nll_backward", "expert_log_prob_backward"),
    "mixture_nll smoothed": ("mixture_mean_log_prob", "mixture_mean_log_prob_backward"),
    "mixture_log_softmax": ("mixture_log_softmax", "mixture_log_softmax_backward"),
    "jsd": ("jsd", "jsd_backward"),
    "mixture_kl": ("mixture_kl", "mixture_kl_backward"),
    "generalized_jsd": ("jsd", "jsd_backward"),
    "linear_mixture_nll": ("expert_log_prob", "expert_log_prob_backward"),
    "linear_jsd": ("expert_log_prob", "jsd", "jsd_backward"),
}
NAMES = list(RAW_OPS)
# They take logits, one tensor per expert, behind their gate; the others take hidden states.
ON_LOGITS = [name for name in NAMES if not name.startswith("linear")]
# They give one value per row, which ignore_index may exclude, and a reduction.
REDUCED = [name for name in NAMES if name not in ("expert_log_prob", "mixture_log_softmax")]


@dataclass(frozen=True)
class Problem:
    """An op: ``call(*tensors, **options)`` has one value, or a row of them, for each row."""

    call: Callable[..., Tensor]
    tensors: list[Tensor]  # all that it differentiates: gate first, then experts
    target: Tensor  # [...]; rows with -100 are ignored, but by mixture_log_softmax
    experts: list[Tensor]  # those of the tensors that have rows of an expert: logits, hidden states
    raw_ops: tuple[str, ...]


def problem(
    name: str,
    shape=(4,),
    experts=3,
    vocab=20,
    dtype=torch.float32,
    seed=0,
    shared_gate=False,
    device="cpu",
) -> Problem:
    """Return the op called ``name`` on random inputs, the same on every device."""
    if name == "generalized_jsd":
        experts = 2
    case = make(shape, experts, vocab, dtype, seed=seed).to(device)
    gate = case.gate.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if shared_gate:
        gate = torch.linspace(-0.5, 0.5, experts, dtype=gate.dtype, device=device)
    teacher = torch.linspace(1, -1, experts, dtype=gate.dtype, device=device)
    target, per_row = case.target, {"reduction": "none"}

    def expert_log_prob(*z, **options):
        return rg.expert_log_prob(z, target, **options)

    def mixture_nll(a, *z, **options):
        return rg.mixture_nll(z, a, target, **{**per_row, **options})

    def smoothed(a, *z, **options):
        return mixture_nll(a, *z, **{"label_smoothing": 0.2, "z_loss": 1e-2, **options})

    def mixture_log_softmax(a, *z, **options):
        return rg.mixture_log_softmax(z, a, **options)

    def jsd(b, *z, **options):
        return rg.jsd(z, torch.softmax(b, -1), target=target, **{**per_row, **options})

    def mixture_kl(b, *z, **options):
        return rg.mixture_kl(z, teacher, b, target=target, **{**per_row, **options})

    def generalized_jsd(*z, **options):
        return rg.generalized_jsd(*z, 0.3, target=target, **{**per_row, **options})

    def linear_mixture_nll(a, *x, **options):
        h, w, b = split(x)
        return rg.linear_mixture_nll(h, w, a, target, bias=b, **{**per_row, **options})

    def linear_jsd(a, *x, **options):
        h, w, b = split(x)
        weights = torch.softmax(a, -1)
        return rg.linear_jsd(h, w, weights, bias=b, target=target, **{**per_row, **options})

    def split(x):
        return x[:experts], x[experts : 2 * experts], x[2 * experts :]

    calls = {
        "expert_log_prob": (expert_log_prob, case.logits),
        "mixture_nll": (mixture_nll, [gate, *case.logits]),
        "mixture_nll smoothed": (smoothed, [gate, *case.logits]),
        "mixture_log_softmax": (mixture_log_softmax, [gate, *case.logits]),
        "jsd": (jsd, [gate, *case.logits]),
        "mixture_kl": (mixture_kl, [gate, *case.logits]),
        "generalized_jsd": (generalized_jsd, case.logits),
        "linear_mixture_nll": (linear_mixture_nll, None),
        "linear_jsd": (linear_jsd, None),
    }
    call, tensors = calls[name]
    rows = case.logits
    if tensors is None:
        heads = make_heads(shape, range(8, 8 + 4 * experts, 4), vocab, dtype, seed=seed)
        tensors = [gate, *(x.to(device) for kind in heads for x in kind)]
        rows = tensors[1 : 1 + experts]
    return Problem(call, tensors, target, rows, RAW_OPS[name])

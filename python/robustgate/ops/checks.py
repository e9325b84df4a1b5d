"""Argument checks shared by the public ops: one gate before every pointer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

_FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_INTEGER = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))

LogitsArgument = Tensor | Sequence[Tensor]


def refuse_transforms(op: str) -> None:
    """Raise where an opaque kernel would be differentiated wrongly, and in silence."""
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            f"robustgate.{op} does not support torch.func transforms (grad, vmap, jvp, ...); "
            "use torch.autograd, or pass a leading batch dimension instead of vmap"
        )
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            f"robustgate.{op} does not support forward-mode differentiation; use torch.autograd"
        )


def unpack_logits(
    op: str, logits: LogitsArgument, vocab_size: int | None
) -> tuple[list[Tensor], int, bool]:
    """Return the K logit tensors, the shared vocabulary size, and whether any requires grad."""
    if isinstance(logits, Tensor):
        if logits.dim() < 2:
            raise ValueError(
                f"{op}: logits as one tensor must be [K, ..., V], got shape {list(logits.shape)}"
            )
        experts = list(logits.unbind(0))
    else:
        experts = list(logits)
    if not experts:
        raise ValueError(f"{op}: logits must hold at least one expert, got none")
    first = experts[0]
    _check_expert(op, 0, first)
    dtype, device, shape = first.dtype, first.device, first.shape
    requires_grad = first.requires_grad
    narrowest = shape[-1]
    equal_widths = True
    for k in range(1, len(experts)):
        expert = experts[k]
        if not isinstance(expert, Tensor) or expert.dtype is not dtype:
            _check_expert(op, k, expert)
            raise TypeError(
                f"{op}: logits must share one dtype, got {dtype} and {expert.dtype} (logits[{k}])"
            )
        if expert.shape != shape:
            _check_expert(op, k, expert)
            if expert.shape[:-1] != shape[:-1]:
                raise ValueError(
                    f"{op}: logits must share their leading shape, got {list(shape[:-1])} and "
                    f"{list(expert.shape[:-1])} (logits[{k}])"
                )
            equal_widths, narrowest = False, min(narrowest, expert.shape[-1])
        if expert.device != device or expert.layout is not torch.strided:
            _check_expert(op, k, expert)
            raise ValueError(
                f"{op}: logits must be on one device, got {device} and {expert.device} "
                f"(logits[{k}])"
            )
        requires_grad = requires_grad or expert.requires_grad
    if vocab_size is None:
        if not equal_widths or narrowest < 1:
            raise ValueError(
                f"{op}: experts have widths {[z.shape[-1] for z in experts]}; pass vocab_size, the "
                "number of shared columns, at least 1"
            )
        vocab_size = narrowest
    elif not 1 <= vocab_size <= narrowest:
        raise ValueError(
            f"{op}: vocab_size must be between 1 and the smallest width {narrowest}, "
            f"got {vocab_size}"
        )
    return experts, vocab_size, requires_grad


def _check_expert(op: str, k: int, expert: Tensor) -> None:
    if not isinstance(expert, Tensor):
        raise TypeError(f"{op}: logits[{k}] must be a tensor, got {type(expert).__name__}")
    if expert.dtype not in _FLOATING or expert.layout is not torch.strided:
        raise TypeError(
            f"{op}: logits[{k}] must be a dense float32, bfloat16, float16 or float64 tensor, "
            f"got {expert.dtype} ({expert.layout})"
        )
    if expert.dim() < 1:
        raise ValueError(f"{op}: logits[{k}] must be [..., V], got a scalar")


def _describe(argument: object) -> str:
    if not isinstance(argument, Tensor):
        return type(argument).__name__
    dense = argument.layout is torch.strided
    return str(argument.dtype) if dense else f"{argument.dtype} ({argument.layout})"


def _is_dense(argument: object, dtypes: frozenset[torch.dtype]) -> bool:
    return (
        isinstance(argument, Tensor)
        and argument.dtype in dtypes
        and argument.layout is torch.strided
    )


def check_target(op: str, target: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Return the target as int64 [...], the leading shape of the experts' tensors."""
    if not _is_dense(target, _INTEGER):
        raise TypeError(f"{op}: target must be a dense integer tensor, got {_describe(target)}")
    leading = experts[0].shape[:-1]
    if target.shape != leading:
        raise ValueError(
            f"{op}: target must have the experts' leading shape {list(leading)}, "
            f"got {list(target.shape)}"
        )
    if target.device != experts[0].device:
        raise ValueError(f"{op}: target is on {target.device}, experts are on {experts[0].device}")
    return target if target.dtype == torch.int64 else target.long()


def check_gate(
    op: str, gate_logits: Tensor, shape: Sequence[int], like: Tensor, name: str = "gate_logits"
) -> Tensor:
    """Return gate logits [K] or ``shape`` = [..., K] in the dtype of the statistics of ``like``."""
    if not _is_dense(gate_logits, _FLOATING):
        raise TypeError(
            f"{op}: {name} must be a dense floating-point tensor, got {_describe(gate_logits)}"
        )
    if gate_logits.device != like.device:
        raise ValueError(f"{op}: {name} are on {gate_logits.device}, experts on {like.device}")
    if gate_logits.shape != tuple(shape) and gate_logits.shape != tuple(shape[-1:]):
        raise ValueError(
            f"{op}: {name} must be {list(shape[-1:])} or {list(shape)}, "
            f"got {list(gate_logits.shape)}"
        )
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return gate_logits if gate_logits.dtype == dtype else gate_logits.to(dtype)


def check_log_prob(op: str, log_prob: Tensor) -> None:
    """Check experts' log-probabilities, [..., K]."""
    if not _is_dense(log_prob, _FLOATING):
        raise TypeError(
            f"{op}: expert_log_prob must be a dense floating-point tensor, "
            f"got {_describe(log_prob)}"
        )
    if log_prob.dim() < 1 or log_prob.shape[-1] < 1:
        raise ValueError(
            f"{op}: expert_log_prob must be [..., K] with K >= 1, got shape {list(log_prob.shape)}"
        )


def check_transform(op: str, temperature: float, softcap: float | None) -> None:
    """Check the scalars of ``z' = softcap * tanh(z / softcap) / temperature``."""
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is None and name == "softcap":
            continue
        if isinstance(value, Tensor) or value is None:
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
        if not 1e-30 < value < 1e30:
            raise ValueError(f"{op}: {name} must be between 1e-30 and 1e30, got {value}")


def check_regularisers(op: str, label_smoothing: float, z_loss: float) -> None:
    """Check the two regularisers of a likelihood loss."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss must be finite and at least 0, got {z_loss}")


@dataclass(frozen=True)
class HeadArguments:
    """Checked arguments of a linear op: K hidden states, heads and biases (none, or K)."""

    hidden: list[Tensor]  # K x [..., H_k]
    lm_head: list[Tensor]  # K x [>= V, H_k]
    bias: list[Tensor]  # K x [>= V], or empty
    vocab_size: int
    requires_grad: bool

    @property
    def like(self) -> Tensor:
        """A tensor of the device and dtype of the statistics, without elements."""
        double = self.hidden[0].dtype == torch.float64
        return self.hidden[0].new_empty(0, dtype=torch.float64 if double else torch.float32)


def unpack_heads(
    op: str,
    hidden: Sequence[Tensor],
    lm_head: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    vocab_size: int | None,
) -> HeadArguments:
    """Return the checked tensors of K language-model heads and the shared vocabulary size."""
    states, heads, biases = list(hidden), list(lm_head), list(bias or ())
    if not states or len(states) != len(heads) or (biases and len(biases) != len(heads)):
        raise ValueError(
            f"{op}: expected K >= 1 hidden states, K heads and K biases or none, "
            f"got {len(states)}, {len(heads)} and {len(biases)}"
        )
    for name, tensors, rank in (("hidden", states, 1), ("lm_head", heads, 2), ("bias", biases, 1)):
        for k, x in enumerate(tensors):
            if not _is_dense(x, _FLOATING):
                raise TypeError(
                    f"{op}: {name}[{k}] must be a dense floating-point tensor, got {_describe(x)}"
                )
            if x.dim() != rank and not (name == "hidden" and x.dim() >= rank):
                expected = {"hidden": "[..., H]", "lm_head": "[V, H]", "bias": "[V]"}[name]
                raise ValueError(f"{op}: {name}[{k}] must be {expected}, got {list(x.shape)}")
            if x.device != states[0].device:
                raise ValueError(
                    f"{op}: tensors must be on one device, got {states[0].device} and {x.device} "
                    f"({name}[{k}])"
                )
            if (x.dtype == torch.float64) != (states[0].dtype == torch.float64):
                raise TypeError(
                    f"{op}: float64 does not mix with other dtypes, got {states[0].dtype} and "
                    f"{x.dtype} ({name}[{k}])"
                )
    for k, (x, head) in enumerate(zip(states, heads, strict=True)):
        if x.shape[-1] != head.shape[1] or x.shape[:-1] != states[0].shape[:-1]:
            raise ValueError(
                f"{op}: hidden[{k}] must be {[*states[0].shape[:-1], head.shape[1]]} for a head "
                f"{list(head.shape)}, got {list(x.shape)}"
            )
    sizes = [head.shape[0] for head in heads] + [b.shape[0] for b in biases]
    if vocab_size is None:
        if len(set(sizes)) > 1 or sizes[0] < 1:
            raise ValueError(
                f"{op}: heads have sizes {sizes}; pass vocab_size, the number of shared rows, "
                "at least 1"
            )
        vocab_size = sizes[0]
    elif not 1 <= vocab_size <= min(sizes):
        raise ValueError(
            f"{op}: vocab_size must be between 1 and the smallest size {min(sizes)}, "
            f"got {vocab_size}"
        )
    requires_grad = any(x.requires_grad for x in (*states, *heads, *biases))
    return HeadArguments(states, heads, biases, vocab_size, requires_grad)


def check_workspace(op: str, workspace_bytes: int | None, device: torch.device) -> int:
    """Return the workspace of a linear op in bytes: 64 MiB on a CPU, else 512 MiB by default."""
    if workspace_bytes is None:
        return (64 if device.type == "cpu" else 512) << 20
    if workspace_bytes < 1 << 20:
        raise ValueError(f"{op}: workspace_bytes must be at least 1 MiB, got {workspace_bytes}")
    return workspace_bytes


def check_mask(op: str, target: Tensor | None, experts: Sequence[Tensor]) -> Tensor | None:
    """Return the target of an op that only looks for ``ignore_index`` in it."""
    return None if target is None else check_target(op, target, experts)


def check_weights(op: str, weights: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
    """Return mixture weights [K] or ``shape`` = [..., K]; 1/K each where none are given."""
    if weights is None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return like.new_full((shape[-1],), 1.0 / shape[-1], dtype=dtype)
    return check_gate(op, weights, shape, like, "weights")


def check_reduction(op: str, reduction: str, num_items: Tensor | float | None = None) -> None:
    """Check the name of a reduction, and that a divisor comes with a mean."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"{op}: num_items divides a 'mean', got reduction={reduction!r}")
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(
            f"{op}: num_items must be a number or a tensor of one, got {list(num_items.shape)}"
        )


def reduce(
    values: Tensor,  # [...]
    target: Tensor | None,  # [...]
    ignore_index: int,
    reduction: str,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Apply ``"none"``, ``"sum"`` or ``"mean"`` (over rows that count; 0 if there are none).

    ``num_items`` replaces the number of rows that count.
    """
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    if num_items is not None:
        if isinstance(num_items, Tensor):
            num_items = num_items.squeeze().to(total.dtype)
        return total / num_items
    if target is None:
        return total / max(values.numel(), 1)
    return total / torch.count_nonzero(target != ignore_index).clamp_min(1)

"""``expert_log_prob``: the log-probability each expert gives the target token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustgate.ops import checks, reference
from robustgate.ops.autograd import once_differentiable
from robustgate.ops.library import define


def _fake(
    logits: Sequence[Tensor], target: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:  # [..., K], [..., K]
    shape = (*target.shape, len(logits))
    dtype = reference.statistics_dtype(logits[0].dtype)
    return target.new_empty(shape, dtype=dtype), target.new_empty(shape, dtype=torch.float64)


def _fake_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    logits: Sequence[Tensor],
    target: Tensor,
    lse: Tensor,
    *settings: Any,
) -> list[Tensor]:
    return fresh_gradients(logits)


def fresh_gradients(logits: Sequence[Tensor]) -> list[Tensor]:
    """Return an uninitialised contiguous tensor like each of the logits."""
    return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in logits]


def check_target_range(target: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raise on the first target out of range; CPU tensors only, because it reads the values."""
    outside = ((target < 0) | (target >= vocab_size)) & (target != ignore_index)
    if outside.any():
        raise_target_out_of_range(target, int(outside.flatten().nonzero()[0]), vocab_size)


def raise_target_out_of_range(target: Tensor, row: int, vocab_size: int) -> None:
    """Raise the error that names the row, its target and the range."""
    raise ValueError(
        f"target of row {row} is {int(target.flatten()[row])}, outside [0, {vocab_size}) "
        "and not ignore_index"
    )


def _eager(
    logits: Sequence[Tensor],
    target: Tensor,
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    if target.device.type == "cpu":
        check_target_range(target, vocab_size, ignore_index)
    return reference.expert_log_prob(logits, target, vocab_size, ignore_index, temperature, softcap)


def _eager_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    logits: Sequence[Tensor],
    target: Tensor,
    lse: Tensor,
    *settings: Any,
) -> list[Tensor]:
    return reference.expert_log_prob_backward(grad, grad_lse, logits, target, lse, *settings)


SETTINGS = "SymInt vocab_size, int ignore_index, float temperature, float? softcap"
_expert_log_prob = define(
    f"expert_log_prob(Tensor[] logits, Tensor target, {SETTINGS}) -> (Tensor, Tensor)",
    _fake,
    _eager,
)
_expert_log_prob_backward = define(
    "expert_log_prob_backward(Tensor grad, Tensor? grad_lse, Tensor[] logits, Tensor target, "
    f"Tensor lse, {SETTINGS}) -> Tensor[]",
    _fake_backward,
    _eager_backward,
)


def trainable(logits: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor]:
    """Return the logits that need a gradient: a backward pass keeps and reads no others."""
    return [z for z, needed in zip(logits, needs_grad, strict=True) if needed]


def per_expert(grads: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of the experts that need one in their places, None elsewhere."""
    remaining = iter(grads)
    return [next(remaining) if needed else None for needed in needs_grad]


def logits_gradients(
    grad: Tensor,  # [..., K]
    grad_lse: Tensor | None,  # [..., K]
    logits: Sequence[Tensor],  # those that need a gradient, [..., >= V] each
    target: Tensor,  # [...]
    lse: Tensor,  # [..., K]
    needs_grad: Sequence[bool],  # K
    settings: tuple[Any, ...],
) -> list[Tensor | None]:
    """Return dL/dz for the experts that need it, None for the others."""
    if not logits:
        return [None] * len(needs_grad)
    if len(logits) < len(needs_grad):
        columns = [k for k, needed in enumerate(needs_grad) if needed]
        grad, lse = grad[..., columns], lse[..., columns]
        grad_lse = None if grad_lse is None else grad_lse[..., columns]
    grads = _expert_log_prob_backward(
        grad.contiguous(), grad_lse, list(logits), target, lse, *settings
    )
    return per_expert(grads, needs_grad)


class _ExpertLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target: Tensor, settings: tuple[Any, ...], *logits: Tensor) -> Tensor:
        log_prob: Tensor
        log_prob, lse = _expert_log_prob(list(logits), target, *settings)
        ctx.save_for_backward(target, lse, *trainable(logits, ctx.needs_input_grad[2:]))
        ctx.settings = settings
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        target, lse, *logits = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[2:]
        return (
            None,
            None,
            *logits_gradients(grad, None, logits, target, lse, needs_grad, ctx.settings),
        )


_apply: Callable[..., Tensor] = _ExpertLogProb.apply


def expert_log_prob(
    logits: checks.LogitsArgument,  # K x [..., V] or [K, ..., V]
    target: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:  # [..., K]
    r"""Return the log-probability of each target token under each of K experts.

    .. math:: l_k = z'_k(y) - \log \sum_v e^{z'_k(v)}, \qquad
              z' = c \tanh(z / c) / \tau

    Args:
        logits: list of K tensors ``[..., V]``, each with its own strides and padded width, or one
            tensor ``[K, ..., V]`` (whose gradient is assembled by one more copy). float32,
            bfloat16, float16 or float64, all the same; +-1e4 and -inf are fine.
        target: integer ``[...]``, the token ids.

    Other args:
        ignore_index: rows with this target give 0 and no gradient; their logits are not read.
        temperature: :math:`\tau`, positive.
        softcap: :math:`c`, positive, or None for no cap.
        vocab_size: number of columns V that count. Columns beyond are padding: never read, gradient
            0. Needed when the experts' widths differ.

    Returns:
        Log-probabilities in nats, ``[..., K]``, float32 (float64 for float64 logits).
        A row without a softmax (NaN, +inf, nothing but -inf) is NaN, for that row and expert alone.

    Raises:
        ValueError: shapes, devices, scalars or (on a CPU) a target out of range. On a CUDA device
            such a row is NaN instead, because looking would wait for the device.
        TypeError: dtypes.
        RuntimeError: inside a ``torch.func`` transform.

    Example:
        >>> import robustgate as rg, torch
        >>> experts = [torch.zeros(3, 8), torch.zeros(3, 8)]
        >>> rg.expert_log_prob(experts, torch.tensor([0, 7, -100]))
        tensor([[-2.0794, -2.0794],
                [-2.0794, -2.0794],
                [ 0.0000,  0.0000]])
    """
    op = "expert_log_prob"
    checks.refuse_transforms(op)
    experts, vocab_size, requires_grad = checks.unpack_logits(op, logits, vocab_size)
    target = checks.check_target(op, target, experts)
    checks.check_transform(op, temperature, softcap)
    settings = (vocab_size, ignore_index, temperature, softcap)
    if requires_grad and torch.is_grad_enabled():
        out = _apply(target, settings, *experts)
    else:
        out = _expert_log_prob(experts, target, *settings)[0]
    return out

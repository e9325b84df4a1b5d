"""The mean of a mixture's log-probs over the vocabulary: the smoothing term of ``mixture_nll``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustgate.ops import reference
from robustgate.ops.autograd import once_differentiable
from robustgate.ops.expert_log_prob import SETTINGS, fresh_gradients, per_expert, trainable
from robustgate.ops.library import define
from robustgate.ops.mixture_log_prob import gate_gradient


def _fake(
    logits: Sequence[Tensor], gate_logits: Tensor, target: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., K], [..., K]
    shape = (*target.shape, len(logits))
    return (
        gate_logits.new_empty(target.shape),
        gate_logits.new_empty(shape),
        gate_logits.new_empty(shape, dtype=torch.float64),
    )


def _fake_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    gate_logits: Tensor,
    target: Tensor,
    share: Tensor,
    lse: Tensor,
    needs_grad: Sequence[bool],
    *settings: Any,
) -> list[Tensor]:
    return fresh_gradients(trainable(logits, needs_grad))


def _eager_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    gate_logits: Tensor,
    target: Tensor,
    share: Tensor,
    lse: Tensor,
    needs_grad: Sequence[bool],
    *settings: Any,
) -> list[Tensor]:
    return reference.mixture_mean_log_prob_backward(
        grad, logits, gate_logits, target, needs_grad, *settings
    )


_mixture_mean_log_prob = define(
    "mixture_mean_log_prob(Tensor[] logits, Tensor gate_logits, Tensor target, "
    f"{SETTINGS}) -> (Tensor, Tensor, Tensor)",
    _fake,
    reference.mixture_mean_log_prob,
)
_mixture_mean_log_prob_backward = define(
    "mixture_mean_log_prob_backward(Tensor grad, Tensor[] logits, Tensor gate_logits, "
    f"Tensor target, Tensor share, Tensor lse, bool[] needs_grad, {SETTINGS}) -> Tensor[]",
    _fake_backward,
    _eager_backward,
)


class _MixtureMeanLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_logits: Tensor, target: Tensor, settings: tuple[Any, ...], *logits: Tensor
    ) -> Tensor:
        mean: Tensor
        mean, share, lse = _mixture_mean_log_prob(list(logits), gate_logits, target, *settings)
        # One trainable expert needs them all: its responsibilities are relative to the others.
        kept = logits if any(ctx.needs_input_grad[3:]) else ()
        ctx.save_for_backward(gate_logits, target, mean, share, lse, *kept)
        ctx.settings = settings
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate_logits, target, mean, share, lse, *logits = ctx.saved_tensors
        nothing = (target == ctx.settings[1]) | (mean == float("-inf"))
        grad = grad.masked_fill(nothing, 0.0)
        needs_gate, _, _, *needs_logits = ctx.needs_input_grad
        grad_gate: Tensor | None = None
        grad_logits: list[Tensor | None] = [None] * len(needs_logits)
        if needs_gate:
            difference = share - torch.softmax(gate_logits, -1)
            grad_gate = gate_gradient(grad.unsqueeze(-1) * difference, gate_logits)
        if logits:
            grad_logits = per_expert(
                _mixture_mean_log_prob_backward(
                    grad, logits, gate_logits, target, share, lse, needs_logits, *ctx.settings
                ),
                needs_logits,
            )
        return (grad_gate, None, None, *grad_logits)


_apply: Callable[..., Tensor] = _MixtureMeanLogProb.apply


def mixture_mean_log_prob(
    logits: Sequence[Tensor],  # K x [..., >= V]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor,  # [...]
    settings: tuple[Any, ...],
) -> Tensor:  # [...]
    """Return ``(1 / V) sum_v log sum_k g_k p_k(v)``, 0 on ignored rows; -inf has gradient 0."""
    needs_grad = gate_logits.requires_grad or any(z.requires_grad for z in logits)
    if needs_grad and torch.is_grad_enabled():
        return _apply(gate_logits, target, settings, *logits)
    mean: Tensor = _mixture_mean_log_prob(list(logits), gate_logits, target, *settings)[0]
    return mean

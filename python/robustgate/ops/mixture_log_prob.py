"""``mixture_log_prob``: the log-probability of a gated mixture, from the experts' log-probs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustgate.ops import checks, reference
from robustgate.ops.autograd import once_differentiable
from robustgate.ops.library import define


def _fake(log_prob: Tensor, gate_logits: Tensor) -> Tensor:
    return log_prob.new_empty(log_prob.shape[:-1])


def _fake_backward(grad: Tensor, log_prob: Tensor, gate_logits: Tensor) -> tuple[Tensor, Tensor]:
    return log_prob.new_empty(log_prob.shape), log_prob.new_empty(log_prob.shape)


_mixture_log_prob = define(
    "mixture_log_prob(Tensor log_prob, Tensor gate_logits) -> Tensor",
    _fake,
    reference.mixture_log_prob,
)
_mixture_log_prob_backward = define(
    "mixture_log_prob_backward(Tensor grad, Tensor log_prob, Tensor gate_logits) "
    "-> (Tensor, Tensor)",
    _fake_backward,
    reference.mixture_log_prob_backward,
)


def gate_gradient(grad: Tensor, gate_logits: Tensor) -> Tensor:
    """Sum a per-row gradient [..., K] over the rows when the gate is shared, [K]."""
    return grad if gate_logits.dim() == grad.dim() else grad.flatten(0, -2).sum(0)


class _MixtureLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, gate_logits: Tensor) -> Tensor:
        value: Tensor = _mixture_log_prob(log_prob, gate_logits)
        ctx.save_for_backward(log_prob, gate_logits)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        log_prob, gate_logits = ctx.saved_tensors
        grad_log_prob, grad_gate = _mixture_log_prob_backward(
            grad.contiguous(), log_prob, gate_logits
        )
        needs_log_prob, needs_gate = ctx.needs_input_grad
        return (
            grad_log_prob if needs_log_prob else None,
            gate_gradient(grad_gate, gate_logits) if needs_gate else None,
        )


_apply: Callable[..., Tensor] = _MixtureLogProb.apply


def mixture_log_prob(
    expert_log_prob: Tensor,  # [..., K]
    gate_logits: Tensor,  # [..., K] or [K]
) -> Tensor:  # [...]
    r"""Return the log-probability of a gated mixture of K experts.

    .. math:: \log \sum_k g_k e^{l_k}, \qquad g = \mathrm{softmax}(a)

    Args:
        expert_log_prob: l, ``[..., K]``, of tokens or of whole documents, in nats.
        gate_logits: a, ``[..., K]`` or ``[K]`` for one gate on every row. Log-weights are gate
            logits; -inf is a weight of exactly 0.

    Returns:
        ``[...]``, float32, or float64 for float64 log-probs. -inf where no expert contributes
        (gradient 0 there); NaN stays in its row.

    Raises:
        ValueError: shapes or devices.
        TypeError: dtypes.
        RuntimeError: inside a ``torch.func`` transform.

    Gradients: responsibilities :math:`r_k` to :math:`l_k`, :math:`r_k - g_k` to :math:`a_k`.

    Example:
        >>> import robustgate as rg, torch
        >>> rg.mixture_log_prob(torch.tensor([0.5, 0.25]).log(), torch.zeros(2)).exp()
        tensor(0.3750)
    """
    op = "mixture_log_prob"
    checks.refuse_transforms(op)
    checks.check_log_prob(op, expert_log_prob)
    gate = checks.check_gate(op, gate_logits, expert_log_prob.shape, expert_log_prob)
    log_prob = expert_log_prob.to(gate.dtype)
    if torch.is_grad_enabled() and (log_prob.requires_grad or gate.requires_grad):
        out = _apply(log_prob, gate)
    else:
        out = _mixture_log_prob(log_prob, gate)
    return out

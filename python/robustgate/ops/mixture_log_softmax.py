"""``mixture_log_softmax``: the next-token log-probs of a gated mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustgate.ops import checks, reference
from robustgate.ops.autograd import once_differentiable
from robustgate.ops.expert_log_prob import fresh_gradients, per_expert, trainable
from robustgate.ops.library import define
from robustgate.ops.mixture_log_prob import gate_gradient


def _fake(
    logits: Sequence[Tensor],
    gate_logits: Tensor,
    vocab_size: int,
    *settings: Any,
) -> tuple[Tensor, Tensor]:  # [..., V], [..., K]
    leading = logits[0].shape[:-1]
    return (
        gate_logits.new_empty((*leading, vocab_size)),
        gate_logits.new_empty((*leading, len(logits)), dtype=torch.float64),
    )


def _fake_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    gate_logits: Tensor,
    lse: Tensor,
    needs_grad: Sequence[bool],
    *settings: Any,
) -> tuple[list[Tensor], Tensor]:
    return fresh_gradients(trainable(logits, needs_grad)), lse.new_empty(
        lse.shape, dtype=gate_logits.dtype
    )


def _eager_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    gate_logits: Tensor,
    lse: Tensor,
    needs_grad: Sequence[bool],
    vocab_size: int,
    temperature: float,
    softcap: float | None,
) -> tuple[list[Tensor], Tensor]:
    return reference.mixture_log_softmax_backward(
        grad, logits, gate_logits, needs_grad, vocab_size, temperature, softcap
    )


_SETTINGS = "SymInt vocab_size, float temperature, float? softcap"
_mixture_log_softmax = define(
    f"mixture_log_softmax(Tensor[] logits, Tensor gate_logits, {_SETTINGS}) -> (Tensor, Tensor)",
    _fake,
    reference.mixture_log_softmax,
)
_mixture_log_softmax_backward = define(
    "mixture_log_softmax_backward(Tensor grad, Tensor[] logits, Tensor gate_logits, "
    f"Tensor lse, bool[] needs_grad, {_SETTINGS}) -> (Tensor[], Tensor)",
    _fake_backward,
    _eager_backward,
)


class _MixtureLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate_logits: Tensor, settings: tuple[Any, ...], *logits: Tensor
    ) -> Tensor:
        log_mixture: Tensor
        log_mixture, lse = _mixture_log_softmax(list(logits), gate_logits, *settings)
        ctx.save_for_backward(gate_logits, lse, *logits)
        ctx.settings = settings
        return log_mixture

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate_logits, lse, *logits = ctx.saved_tensors
        needs_gate, _, *needs_logits = ctx.needs_input_grad
        grads, grad_gate = _mixture_log_softmax_backward(
            grad.contiguous(), logits, gate_logits, lse, needs_logits, *ctx.settings
        )
        return (
            gate_gradient(grad_gate, gate_logits) if needs_gate else None,
            None,
            *per_expert(grads, needs_logits),
        )


_apply: Callable[..., Tensor] = _MixtureLogSoftmax.apply


def mixture_log_softmax(
    logits: checks.LogitsArgument,  # K x [..., V] or [K, ..., V]
    gate_logits: Tensor,  # [..., K] or [K]
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:  # [..., V]
    r"""Return the log-probabilities of every token under a gated mixture of K language models.

    .. math:: \log m(v) = \log \sum_k g_k \, p_k(v), \qquad g = \mathrm{softmax}(a), \quad
              p_k = \mathrm{softmax}(z'_k), \quad z' = c \tanh(z / c) / \tau

    What a mixture needs to generate, and the general form of :func:`mixture_nll` for losses that
    look at more than one token. With K = 1 this is ``log_softmax``.

    Args:
        logits: list of K tensors ``[..., V]``, each with its own strides and padded width, or one
            tensor ``[K, ..., V]``. float32, bfloat16, float16 or float64, all the same.
        gate_logits: a, ``[..., K]`` or ``[K]`` for one gate on every row; -inf is a weight of 0.

    Other args:
        temperature: :math:`\tau`, positive; of the experts, not of the mixture.
        softcap: :math:`c`, positive, or None for no cap.
        vocab_size: number of columns V that count. Columns beyond are padding: never read, gradient
            0. Needed when the experts' widths differ.

    Returns:
        Log-probabilities in nats, ``[..., V]``, float32 (float64 for float64 logits), contiguous.
        -inf where no expert contributes, with gradient 0. A row without a softmax in any expert is
        NaN.

    Raises:
        ValueError: shapes, devices or scalars out of range.
        TypeError: dtypes.
        RuntimeError: inside a ``torch.func`` transform, or on double backward.

    Gradients for an upstream c(v), with :math:`r_k(v) = g_k p_k(v) / m(v)`, each only for the
    inputs that require it: :math:`\partial / \partial a_k = \sum_v c(v) (r_k(v) - g_k)` and
    :math:`\partial / \partial z_k(v) = c(v) r_k(v) - p_k(v) \sum_u c(u) r_k(u)`.

    Example:
        >>> import robustgate as rg, torch
        >>> logits = [torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()]
        >>> rg.mixture_log_softmax(logits, torch.zeros(2)).exp()
        tensor([0.7000, 0.3000])
    """
    op = "mixture_log_softmax"
    checks.refuse_transforms(op)
    experts, vocab_size, requires_grad = checks.unpack_logits(op, logits, vocab_size)
    shape = (*experts[0].shape[:-1], len(experts))
    gate = checks.check_gate(op, gate_logits, shape, experts[0])
    checks.check_transform(op, temperature, softcap)
    settings = (vocab_size, temperature, softcap)
    if (requires_grad or gate.requires_grad) and torch.is_grad_enabled():
        return _apply(gate, settings, *experts)
    log_mixture: Tensor = _mixture_log_softmax(experts, gate, *settings)[0]
    return log_mixture

"""``jsd``: the Jensen-Shannon divergence of K experts, straight from their logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustgate.ops import checks, divergence_reference, reference
from robustgate.ops.autograd import once_differentiable
from robustgate.ops.expert_log_prob import SETTINGS, fresh_gradients, per_expert, trainable
from robustgate.ops.library import define
from robustgate.ops.mixture_log_prob import gate_gradient


def _fake(
    logits: Sequence[Tensor],
    weights: Tensor,
    lse: Tensor | None,
    target: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., K], [..., K]
    z = logits[0]
    shape = (*z.shape[:-1], len(logits))
    dtype = reference.statistics_dtype(z.dtype)
    return (
        z.new_empty(shape[:-1], dtype=dtype),
        z.new_empty(shape, dtype=dtype),
        z.new_empty(shape, dtype=torch.float64),
    )


def _fake_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    weights: Tensor,
    kl: Tensor,
    lse: Tensor,
    target: Tensor | None,
    needs_grad: Sequence[bool],
    *settings: Any,
) -> list[Tensor]:
    return fresh_gradients(trainable(logits, needs_grad))


def _eager_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    weights: Tensor,
    kl: Tensor,
    lse: Tensor,
    target: Tensor | None,
    needs_grad: Sequence[bool],
    *settings: Any,
) -> list[Tensor]:
    return divergence_reference.jsd_backward(
        grad, logits, weights, kl, lse, target, needs_grad, *settings
    )


_jsd = define(
    f"jsd(Tensor[] logits, Tensor weights, Tensor? lse, Tensor? target, {SETTINGS}) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
    divergence_reference.jsd,
)
_jsd_backward = define(
    "jsd_backward(Tensor grad, Tensor[] logits, Tensor weights, Tensor kl, Tensor lse, "
    f"Tensor? target, bool[] needs_grad, {SETTINGS}) -> Tensor[]",
    _fake_backward,
    _eager_backward,
)


def weights_gradient(grad: Tensor, kl: Tensor, weights: Tensor) -> Tensor:
    """Return ``grad KL_k`` [..., K], summed over the rows where the weights are shared, [K].

    A row that asks for nothing gives nothing, also where a KL is infinite.
    """
    upstream = grad.unsqueeze(-1)
    return gate_gradient((upstream * kl).masked_fill(upstream == 0, 0.0), weights)


class _JSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weights: Tensor,
        target: Tensor | None,
        settings: tuple[Any, ...],
        *logits: Tensor,
    ) -> Tensor:
        value: Tensor
        value, kl, lse = _jsd(list(logits), weights, None, target, *settings)
        # The weights' gradient is the saved KL_k; one trainable expert needs every logit.
        kept = logits if any(ctx.needs_input_grad[3:]) else ()
        ctx.save_for_backward(weights, target, kl, lse, *kept)
        ctx.settings = settings
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, target, kl, lse, *logits = ctx.saved_tensors
        needs_weights, _, _, *needs_logits = ctx.needs_input_grad
        grad_logits: list[Tensor | None] = [None] * len(needs_logits)
        if logits:
            grads = _jsd_backward(
                grad.contiguous(), logits, weights, kl, lse, target, needs_logits, *ctx.settings
            )
            grad_logits = per_expert(grads, needs_logits)
        grad_weights = weights_gradient(grad, kl, weights) if needs_weights else None
        return (grad_weights, None, None, *grad_logits)


_apply: Callable[..., Tensor] = _JSD.apply


def jsd(
    logits: checks.LogitsArgument,  # K x [..., V] or [K, ..., V]
    weights: Tensor | None = None,  # [..., K] or [K]
    *,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    target: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    r"""Return the generalised Jensen-Shannon divergence of K language models.

    .. math:: \sum_k w_k \, \mathrm{KL}(p_k \,\|\, m), \qquad m = \sum_k w_k p_k, \quad
              p_k = \mathrm{softmax}(z'_k), \quad z' = c \tanh(z / c) / \tau

    Computed in a form that does not cancel: never negative, exactly 0 for identical experts, and
    right to float32 rounding of the logits' differences where experts are nearly equal.

    Args:
        logits: list of K >= 1 tensors ``[..., V]``, each with its own strides and padded width, or
            one tensor ``[K, ..., V]``. float32, bfloat16, float16 or float64, all the same.
        weights: w, ``[..., K]`` or ``[K]``, at least 0 and summing to 1 (not checked: looking would
            wait for the device); None for 1/K each.

    Other args:
        reduction: ``"mean"`` over the rows that count (0 if there are none), ``"sum"`` or
            ``"none"``.
        num_items: what ``"mean"`` divides by instead of the rows that count: a number or a tensor
            of one.
        target: integer ``[...]``; only compared with ``ignore_index``, for packed and padded
            batches.
        ignore_index: rows with this target give 0 and no gradient; their logits are not read.
        temperature: :math:`\tau`, positive.
        softcap: :math:`c`, positive, or None for no cap.
        vocab_size: number of columns V that count. Columns beyond are padding: never read, gradient
            0. Needed when the experts' widths differ.

    Returns:
        Divergence in nats, between 0 and the entropy of the weights: a scalar, or ``[...]`` for
        ``reduction="none"``; float32 (float64 for float64 logits). A row without a softmax in any
        expert is NaN.

    Raises:
        ValueError: shapes, devices or scalars out of range.
        TypeError: dtypes.
        RuntimeError: inside a ``torch.func`` transform, or on double backward.

    Gradients, each only for the inputs that require it:
    :math:`\partial / \partial z_k(v) = w_k p_k(v) (\log \frac{p_k(v)}{m(v)} - \mathrm{KL}_k)` and
    :math:`\partial / \partial w_k = \mathrm{KL}_k = \mathrm{KL}(p_k \,\|\, m)`. An expert of weight
    0 adds nothing and receives nothing; its weight's gradient is still :math:`\mathrm{KL}_k`.

    Example:
        >>> import robustgate as rg, torch
        >>> certain = [torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])]
        >>> rg.jsd(certain)  # log 2: nothing in common
        tensor(0.6931)

    Source: J. Lin, Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 1991.
    """
    op = "jsd"
    checks.refuse_transforms(op)
    experts, vocab_size, requires_grad = checks.unpack_logits(op, logits, vocab_size)
    target = checks.check_mask(op, target, experts)
    w = checks.check_weights(op, weights, (*experts[0].shape[:-1], len(experts)), experts[0])
    checks.check_transform(op, temperature, softcap)
    checks.check_reduction(op, reduction, num_items)
    settings = (vocab_size, ignore_index, temperature, softcap)
    if (requires_grad or w.requires_grad) and torch.is_grad_enabled():
        value = _apply(w, target, settings, *experts)
    else:
        value = _jsd(experts, w, None, target, *settings)[0]
    return checks.reduce(value, target, ignore_index, reduction, num_items)

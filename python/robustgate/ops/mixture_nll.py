"""``mixture_nll``: the loss of a gated mixture of experts, straight from their logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from robustgate.ops import checks, reference
from robustgate.ops.autograd import once_differentiable
from robustgate.ops.expert_log_prob import check_target_range, logits_gradients, trainable
from robustgate.ops.library import define
from robustgate.ops.mixture_log_prob import gate_gradient
from robustgate.ops.mixture_mean_log_prob import mixture_mean_log_prob


def _fake(
    logits: Sequence[Tensor], gate_logits: Tensor, target: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., K], [..., K]
    dtype = reference.statistics_dtype(logits[0].dtype)
    shape = (*target.shape, len(logits))
    return (
        target.new_empty(target.shape, dtype=dtype),
        target.new_empty(shape, dtype=dtype),
        target.new_empty(shape, dtype=torch.float64),
    )


def _fake_backward(
    grad: Tensor,
    log_prob: Tensor,
    gate_logits: Tensor,
    target: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    return log_prob.new_empty(log_prob.shape), log_prob.new_empty(log_prob.shape)


def from_log_prob(
    log_prob: Tensor,  # [..., K]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor,  # [...]
    ignore_index: int,
) -> Tensor:  # [...]
    """Return the mixture NLL in plain torch, exactly 0 on ignored rows."""
    nll = -reference.mixture_log_prob(log_prob, gate_logits)
    return nll.masked_fill(target == ignore_index, 0.0)


def _eager(
    logits: Sequence[Tensor],
    gate_logits: Tensor,
    target: Tensor,
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if target.device.type == "cpu":
        check_target_range(target, vocab_size, ignore_index)
    log_prob, lse = reference.expert_log_prob(
        logits, target, vocab_size, ignore_index, temperature, softcap
    )
    return from_log_prob(log_prob, gate_logits, target, ignore_index), log_prob, lse


def _eager_backward(
    grad: Tensor,
    log_prob: Tensor,
    gate_logits: Tensor,
    target: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    grad = -grad.masked_fill(target == ignore_index, 0.0)
    return reference.mixture_log_prob_backward(grad, log_prob, gate_logits)


_mixture_nll = define(
    "mixture_nll(Tensor[] logits, Tensor gate_logits, Tensor target, SymInt vocab_size, "
    "int ignore_index, float temperature, float? softcap) -> (Tensor, Tensor, Tensor)",
    _fake,
    _eager,
)
_mixture_nll_backward = define(
    "mixture_nll_backward(Tensor grad, Tensor log_prob, Tensor gate_logits, Tensor target, "
    " int ignore_index) -> (Tensor, Tensor)",
    _fake_backward,
    _eager_backward,
)


class _MixtureNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_logits: Tensor,
        target: Tensor,
        settings: tuple[Any, ...],
        z_loss: float,
        *logits: Tensor,
    ) -> Tensor:
        nll: Tensor
        nll, log_prob, lse = _mixture_nll(list(logits), gate_logits, target, *settings)
        # Frozen experts: the [N, K] values are all the backward pass needs.
        ctx.save_for_backward(
            gate_logits, target, log_prob, lse, *trainable(logits, ctx.needs_input_grad[4:])
        )
        ctx.settings, ctx.z_loss = settings, z_loss
        return _add_z_loss(nll, lse, z_loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate_logits, target, log_prob, lse, *logits = ctx.saved_tensors
        grad_log_prob, grad_gate = _mixture_nll_backward(
            grad.contiguous(), log_prob, gate_logits, target, ctx.settings[1]
        )
        grad_lse = None
        if ctx.z_loss and logits:
            grad_lse = (2 * ctx.z_loss * lse * grad.unsqueeze(-1)).to(log_prob.dtype)
        needs_gate, _, _, _, *needs_logits = ctx.needs_input_grad
        return (
            gate_gradient(grad_gate, gate_logits) if needs_gate else None,
            None,
            None,
            None,
            *logits_gradients(
                grad_log_prob, grad_lse, logits, target, lse, needs_logits, ctx.settings
            ),
        )


_apply: Callable[..., Tensor] = _MixtureNLL.apply


def _add_z_loss(nll: Tensor, lse: Tensor, z_loss: float) -> Tensor:
    """Add ``z_loss * sum_k lse_k^2``; the log-sum-exps [..., K] of ignored rows are 0."""
    return nll + (z_loss * lse.square().sum(-1)).to(nll.dtype) if z_loss else nll


def mixture_nll(
    logits: checks.LogitsArgument,  # K x [..., V] or [K, ..., V]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor,  # [...]
    *,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    r"""Return the negative log-likelihood of a gated mixture of K language models.

    .. math:: -\log \sum_k g_k \, p_k(y), \qquad g = \mathrm{softmax}(a), \quad
              p_k = \mathrm{softmax}(z'_k), \quad z' = c \tanh(z / c) / \tau

    The logits are read once. With frozen experts the backward pass does not touch them: it needs
    the K saved log-probabilities of each row only. With K = 1 this is the cross-entropy.

    Args:
        logits: list of K tensors ``[..., V]``, each with its own strides and padded width, or one
            tensor ``[K, ..., V]``. float32, bfloat16, float16 or float64, all the same.
        gate_logits: a, ``[..., K]`` or ``[K]`` for one gate on every row.
        target: integer ``[...]``, the token ids.

    Other args:
        reduction: ``"mean"`` over the rows that count (0 if there are none), ``"sum"`` or
            ``"none"``.
        num_items: what ``"mean"`` divides by instead of the rows that count: a number or a tensor
            of one, such as the tokens of all micro-batches of a step, on all ranks.
        label_smoothing: :math:`\varepsilon` in [0, 1): the loss becomes :math:`-(1 - \varepsilon)
            \log m(y) - \frac{\varepsilon}{V} \sum_v \log m(v)` for the mixture m, the
            cross-entropy to a smoothed target. Reads the logits twice more.
        z_loss: :math:`\zeta \ge 0`: adds :math:`\zeta \sum_k (\log \sum_v e^{z'_k(v)})^2`, which
            keeps each expert's normaliser near 1 (for K = 1 the z-loss of PaLM); no cost.
        ignore_index: rows with this target give 0 and no gradient; their logits are not read.
        temperature: :math:`\tau`, positive.
        softcap: :math:`c`, positive, or None for no cap.
        vocab_size: number of columns V that count. Columns beyond are padding: never read, gradient
            0. Needed when the experts' widths differ.

    Returns:
        Loss in nats: a scalar, or ``[...]`` for ``reduction="none"``; float32 (float64 for float64
        logits). +inf, with gradient 0, where every expert excludes the target. A row without a
        softmax is NaN.

    Raises:
        ValueError: shapes, devices, scalars or (on a CPU) a target out of range. On a CUDA device
            such a row is NaN instead, because looking would wait for the device.
        TypeError: dtypes.
        RuntimeError: inside a ``torch.func`` transform, or on double backward.

    Gradients: :math:`\partial / \partial a_k = g_k - r_k` and
    :math:`\partial / \partial z_k(v) = r_k (p_k(v) - 1[v = y])`, r the responsibilities; each only
    for the inputs that require it.

    Example:
        >>> import robustgate as rg, torch
        >>> experts = [torch.zeros(3, 8), torch.zeros(3, 8)]
        >>> rg.mixture_nll(experts, torch.zeros(2), torch.tensor([0, 7, -100]))
        tensor(2.0794)
    """
    op = "mixture_nll"
    checks.refuse_transforms(op)
    experts, vocab_size, requires_grad = checks.unpack_logits(op, logits, vocab_size)
    target = checks.check_target(op, target, experts)
    gate = checks.check_gate(op, gate_logits, (*target.shape, len(experts)), experts[0])
    checks.check_transform(op, temperature, softcap)
    checks.check_reduction(op, reduction, num_items)
    checks.check_regularisers(op, label_smoothing, z_loss)
    settings = (vocab_size, ignore_index, temperature, softcap)
    hard = 1.0 - label_smoothing
    z_loss = z_loss / hard
    if (requires_grad or gate.requires_grad) and torch.is_grad_enabled():
        nll = _apply(gate, target, settings, z_loss, *experts)
    else:
        nll, _, lse = _mixture_nll(experts, gate, target, *settings)
        nll = _add_z_loss(nll, lse, z_loss)
    if label_smoothing:
        nll = hard * nll - label_smoothing * mixture_mean_log_prob(experts, gate, target, settings)
    return checks.reduce(nll, target, ignore_index, reduction, num_items)

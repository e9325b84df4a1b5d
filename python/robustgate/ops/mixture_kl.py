"""``mixture_kl``: the divergence between two gates over the same experts."""

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
    logits: Sequence[Tensor], teacher: Tensor, student: Tensor, *settings: Any
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
    teacher: Tensor,
    student: Tensor,
    value: Tensor,
    lse: Tensor,
    target: Tensor | None,
    needs_grad: Sequence[bool],
    *settings: Any,
) -> list[Tensor]:
    return fresh_gradients(trainable(logits, needs_grad))


def _eager_backward(
    grad: Tensor,
    logits: Sequence[Tensor],
    teacher: Tensor,
    student: Tensor,
    value: Tensor,
    lse: Tensor,
    *settings: Any,
) -> list[Tensor]:
    return divergence_reference.mixture_kl_backward(
        grad, logits, teacher, student, value, *settings
    )


_mixture_kl = define(
    "mixture_kl(Tensor[] logits, Tensor teacher_gate_logits, Tensor student_gate_logits, "
    f"Tensor? target, {SETTINGS}) -> (Tensor, Tensor, Tensor)",
    _fake,
    divergence_reference.mixture_kl,
)
_mixture_kl_backward = define(
    "mixture_kl_backward(Tensor grad, Tensor[] logits, Tensor teacher_gate_logits, "
    "Tensor student_gate_logits, Tensor value, Tensor lse, "
    f"Tensor? target, bool[] needs_grad, {SETTINGS}) -> Tensor[]",
    _fake_backward,
    _eager_backward,
)


class _MixtureKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        teacher: Tensor,
        student: Tensor,
        target: Tensor | None,
        settings: tuple[Any, ...],
        *logits: Tensor,
    ) -> Tensor:
        value: Tensor
        value, *statistics = _mixture_kl(list(logits), teacher, student, target, *settings)
        # Frozen experts: the student's gradient is the saved tilt.
        kept = logits if any(ctx.needs_input_grad[4:]) else ()
        ctx.save_for_backward(teacher, student, target, value, *statistics, *kept)
        ctx.settings = settings
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        teacher, student, target, value, tilt, lse, *logits = ctx.saved_tensors
        _, needs_student, _, _, *needs_logits = ctx.needs_input_grad
        grad_logits: list[Tensor | None] = [None] * len(needs_logits)
        if logits:
            grads = _mixture_kl_backward(
                grad.contiguous(),
                logits,
                teacher,
                student,
                value,
                lse,
                target,
                needs_logits,
                *ctx.settings,
            )
            grad_logits = per_expert(grads, needs_logits)
        grad_student = None
        if needs_student:
            grad_student = gate_gradient(-grad.unsqueeze(-1) * tilt, student)
        return (None, grad_student, None, None, *grad_logits)


_apply: Callable[..., Tensor] = _MixtureKL.apply


def mixture_kl(
    logits: checks.LogitsArgument,  # K x [..., V] or [K, ..., V]
    teacher_gate_logits: Tensor,  # [..., K] or [K]
    student_gate_logits: Tensor,  # [..., K] or [K]
    *,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    target: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    r"""Return KL(teacher || student) of two gated mixtures of the same K language models.

    .. math:: \sum_v m_g(v) \log \frac{m_g(v)}{m_\gamma(v)}, \qquad
              m_g = \sum_k g_k p_k, \quad m_\gamma = \sum_k \gamma_k p_k

    for the teacher's gate :math:`g = \mathrm{softmax}(a)` and the student's
    :math:`\gamma = \mathrm{softmax}(b)`. Distils one gate into another, token by token. Computed in
    a form that does not cancel: never negative, exactly 0 for equal gates or identical experts.

    Args:
        logits: list of K tensors ``[..., V]``, each with its own strides and padded width, or one
            tensor ``[K, ..., V]``. float32, bfloat16, float16 or float64, all the same.
        teacher_gate_logits: a, ``[..., K]`` or ``[K]``; receives no gradient.
        student_gate_logits: b, ``[..., K]`` or ``[K]``.

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
        Divergence in nats: a scalar, or ``[...]`` for ``reduction="none"``; float32 (float64 for
        float64 logits). +inf, with gradient 0, where the student excludes what the teacher allows.
        A row without a softmax in any expert is NaN.

    Raises:
        ValueError: shapes, devices or scalars out of range.
        TypeError: dtypes.
        RuntimeError: inside a ``torch.func`` transform, or on double backward.

    Gradients, each only for the inputs that require it, with
    :math:`t(v) = m_g(v) / m_\gamma(v) - 1`: :math:`\partial / \partial b_k = -\gamma_k E_{p_k}[t]`
    and :math:`\partial / \partial z_k(v) = p_k(v) [ g_k (\log(1 + t(v)) - E_{p_k} \log(1 + t)) -
    \gamma_k (t(v) - E_{p_k} t) ]`. Trainable experts move both mixtures; detach their logits to
    hold the teacher fixed.

    Example:
        >>> import robustgate as rg, torch
        >>> experts = [torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()]
        >>> rg.mixture_kl(experts, torch.tensor([9.0, -9.0]), torch.zeros(2))
        tensor(0.0872)
    """
    op = "mixture_kl"
    checks.refuse_transforms(op)
    experts, vocab_size, requires_grad = checks.unpack_logits(op, logits, vocab_size)
    target = checks.check_mask(op, target, experts)
    shape = (*experts[0].shape[:-1], len(experts))
    teacher = checks.check_gate(op, teacher_gate_logits, shape, experts[0], "teacher_gate_logits")
    student = checks.check_gate(op, student_gate_logits, shape, experts[0], "student_gate_logits")
    checks.check_transform(op, temperature, softcap)
    checks.check_reduction(op, reduction, num_items)
    settings = (vocab_size, ignore_index, temperature, softcap)
    teacher = teacher.detach()
    if (requires_grad or student.requires_grad) and torch.is_grad_enabled():
        value = _apply(teacher, student, target, settings, *experts)
    else:
        value = _mixture_kl(experts, teacher, student, target, *settings)[0]
    return checks.reduce(value, target, ignore_index, reduction, num_items)

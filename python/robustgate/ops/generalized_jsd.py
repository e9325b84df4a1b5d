"""``generalized_jsd``: the two-way divergence of knowledge distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustgate.ops.jsd import jsd
from robustgate.ops.mixture_kl import mixture_kl

_INFINITY = float("inf")


def generalized_jsd(
    student: Tensor,  # [..., V]
    teacher: Tensor,  # [..., V]
    beta: float = 0.5,
    **options: Any,
) -> Tensor:
    r"""Return the generalised Jensen-Shannon divergence between a student and a teacher.

    .. math:: \beta \, \mathrm{KL}(T \,\|\, M) + (1 - \beta) \, \mathrm{KL}(S \,\|\, M), \qquad
              M = \beta T + (1 - \beta) S

    which is ``jsd([student, teacher], [1 - beta, beta])``. It tends to 0 at both ends; as in the
    distillation losses of TRL and Liger-Kernel, exactly ``beta = 0`` gives the unscaled
    KL(T || S) instead, and exactly ``beta = 1`` gives KL(S || T). This is a jump.

    Args:
        student: logits ``[..., V]``, any float dtype.
        teacher: logits of the same leading shape, dtype and device; the width may differ where
            ``vocab_size`` is given. Detach them, or compute them under ``torch.no_grad()``: a
            teacher that requires a gradient gets one.
        beta: :math:`\beta` in [0, 1]; 0.5 is the symmetric divergence.

    Other args:
        options: the keyword arguments of :func:`robustgate.jsd` (``reduction``, ``num_items``,
            ``target``, ``ignore_index``, ``temperature``, ``softcap``, ``vocab_size``).

    Returns:
        Divergence in nats: a scalar, or ``[...]`` for ``reduction="none"``; float32 (float64 for
        float64 logits). It is not multiplied by the squared temperature.

    Raises:
        ValueError: ``beta`` outside [0, 1]; shapes, devices or scalars out of range.
        TypeError: dtypes.

    Example:
        >>> import robustgate as rg, torch
        >>> rg.generalized_jsd(torch.zeros(3, 8), torch.zeros(3, 8), beta=0.1)
        tensor(0.)

    Source: R. Agarwal et al., On-policy distillation of language models, arXiv 2306.13649.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"generalized_jsd: beta must be between 0 and 1, got {beta}")
    if 0 < beta < 1:
        return jsd([student, teacher], _pair(1 - beta, beta, student), **options)
    is_student, is_teacher = _pair(0.0, -_INFINITY, student), _pair(-_INFINITY, 0.0, student)
    first, second = (is_teacher, is_student) if beta == 0 else (is_student, is_teacher)
    return mixture_kl([student, teacher], first, second, **options)


def _pair(first: float, second: float, like: Tensor) -> Tensor:
    """Return a float64 [2] on a device without waiting for it, as a copy from the host would."""
    return torch.stack([like.new_full((), value, dtype=torch.float64) for value in (first, second)])

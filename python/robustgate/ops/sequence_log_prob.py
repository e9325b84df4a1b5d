"""``sequence_log_prob``: token log-probs of packed documents, summed per document in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_log_prob(
    log_prob: Tensor,  # [T] or [T, K]
    cu_seqlens: Tensor,  # [n + 1]
) -> Tensor:  # [n] or [n, K]
    r"""Sum the token log-probs of each document of a packed batch, in float64.

    .. math:: L_i = \sum_{t = c_i}^{c_{i+1} - 1} l_t

    float32 sums of thousands of tokens lose hundredths of a nat, which is the size of what a gate
    between experts decides on.

    Args:
        log_prob: token log-probabilities in nats, ``[T]``, or ``[T, K]`` for K experts, any float
            dtype; what :func:`robustgate.expert_log_prob` returns, 0 on ignored tokens.
        cu_seqlens: integer ``[n + 1]``, the cumulative lengths of FlashAttention's packed layout:
            0, then the end of each document; document i is ``[cu_seqlens[i], cu_seqlens[i + 1])``.
            Not checked against T: looking would wait for the device.

    Returns:
        ``[n]`` or ``[n, K]``, float64; 0 for an empty document, -inf where a token has -inf.
        Differentiable in ``log_prob``. The order of summation is fixed.

    Raises:
        ValueError: shapes or devices.
        TypeError: dtypes.

    Example:
        >>> import robustgate as rg, torch
        >>> rg.sequence_log_prob(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3]))
        tensor([-3., -4.], dtype=torch.float64)
    """
    op = "sequence_log_prob"
    if not log_prob.is_floating_point():
        raise TypeError(f"{op}: log_prob must be a floating-point tensor, got {log_prob.dtype}")
    if log_prob.dim() not in (1, 2):
        raise ValueError(f"{op}: log_prob must be [T] or [T, K], got {list(log_prob.shape)}")
    if cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"{op}: cu_seqlens must be an integer tensor, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens must be [n + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != log_prob.device:
        raise ValueError(
            f"{op}: cu_seqlens is on {cu_seqlens.device}, log_prob on {log_prob.device}"
        )
    return torch.segment_reduce(
        log_prob.double(), "sum", offsets=cu_seqlens.long(), axis=0, unsafe=True, initial=0.0
    )

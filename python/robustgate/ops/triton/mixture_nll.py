"""-log sum_k g_k p_k(y): the log-probs of expert_log_prob.py, then one small kernel over [N, K].

The second launch costs some microseconds beside a pass over the logits, and leaves the first one
program a (row, expert): few rows still fill the device. The backward pass is the small kernel's
alone; where experts train, that of expert_log_prob.py follows.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from robustgate.ops.triton import expert_log_prob, mixture_log_prob


def forward(
    logits: Sequence[Tensor],  # K x [..., >= V]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor,  # [...]
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., K], [..., K] float64
    """Return the NLL, the experts' log-probs and their log-sum-exps (the raw op)."""
    log_prob, lse = expert_log_prob.forward(
        logits, target, vocab_size, ignore_index, temperature, softcap
    )
    return (
        mixture_log_prob.forward(log_prob, gate_logits, target, -1.0, ignore_index),
        log_prob,
        lse,
    )


def backward(
    grad: Tensor,  # [...]
    log_prob: Tensor,  # [..., K]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor,  # [...]
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # [..., K], [..., K]
    """Return the gradients of the log-probs and of the gate logits (the raw op)."""
    return mixture_log_prob.backward(grad, log_prob, gate_logits, target, -1.0, ignore_index)

"""The truth: every op in plain torch, any device, any floating dtype, float64-capable.

The fused kernels are tested against these functions evaluated in float64. They are also the
``eager`` backend: what runs where no compiled kernel serves a device. Every function keeps the
conventions of the kernels: statistics in float32 (float64 for float64 logits), ignored rows 0,
a row without a softmax (NaN, +inf, nothing but -inf) is NaN in its own row and expert.

Shape letters: N rows (any leading shape ``[...]``), K experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of outputs and statistics: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def effective_logits(
    logits: Tensor,  # [..., >= V]
    vocab_size: int,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # [..., V]
    """Drop padding columns, then ``z' = softcap * tanh(z / softcap) / temperature``."""
    z = logits[..., :vocab_size].to(statistics_dtype(logits.dtype))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z if temperature == 1.0 else z / temperature


def _safe_index(
    target: Tensor, vocab_size: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a target that indexes safely, the ignored rows, and the rows out of range."""
    ignored = target == ignore_index
    outside = ((target < 0) | (target >= vocab_size)) & ~ignored
    return target.masked_fill(ignored | outside, 0), ignored, outside


def expert_log_prob(
    logits: Sequence[Tensor],  # K x [..., >= V]
    target: Tensor,  # [...]
    vocab_size: int,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # [..., K], [..., K] float64
    """Return ``l_k = z'_k(y) - lse_k`` and ``lse_k = log sum_v exp z'_k(v)``."""
    index, ignored, outside = _safe_index(target, vocab_size, ignore_index)
    log_prob, lse = [], []
    for expert in logits:
        z = effective_logits(expert, vocab_size, temperature, softcap)
        log_p = torch.log_softmax(z, dim=-1)
        log_prob.append(log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1))
        lse.append(torch.logsumexp(z, dim=-1).double())
    out = torch.stack(log_prob, dim=-1).masked_fill(outside.unsqueeze(-1), float("nan"))
    zero = ignored.unsqueeze(-1)
    return out.masked_fill(zero, 0.0), torch.stack(lse, dim=-1).masked_fill(zero, 0.0)


def expert_log_prob_backward(
    grad: Tensor,  # [..., K]
    logits: Sequence[Tensor],  # K x [..., >= V]
    target: Tensor,  # [...]
    vocab_size: int,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> list[Tensor]:  # K x [..., V_k]
    """Return ``dz_k(v) = grad_k (1[v = y] - p_k(v)) dz'/dz``; padding columns receive 0."""
    index, ignored, outside = _safe_index(target, vocab_size, ignore_index)
    grads = []
    for k, expert in enumerate(logits):
        z = effective_logits(expert, vocab_size, temperature, softcap)
        one_hot = torch.zeros_like(z).scatter_(-1, index.unsqueeze(-1), 1.0)
        weight = grad[..., k : k + 1].to(z.dtype)
        dz = weight * (one_hot - torch.softmax(z, dim=-1)) / temperature
        if softcap is not None:
            capped = torch.tanh(expert[..., :vocab_size].to(z.dtype) / softcap)
            dz = dz * (1 - capped * capped)
        dz = dz.masked_fill((ignored | outside).unsqueeze(-1) | (weight == 0), 0.0)
        out = expert.new_zeros(expert.shape)
        out[..., :vocab_size] = dz
        grads.append(out)
    return grads


def mixture_log_prob(
    log_prob: Tensor,  # [..., K]
    gate_logits: Tensor,  # [..., K] or [K]
) -> Tensor:  # [...]
    """Return ``log sum_k g_k exp(l_k)`` with ``g = softmax(gate_logits)``."""
    return torch.logsumexp(torch.log_softmax(gate_logits, dim=-1) + log_prob, dim=-1)


def mixture_log_prob_backward(
    grad: Tensor,  # [...]
    log_prob: Tensor,  # [..., K]
    gate_logits: Tensor,  # [..., K] or [K]
) -> tuple[Tensor, Tensor]:  # [..., K], [..., K]
    """Return the gradients ``grad r_k`` and ``grad (r_k - g_k)``, r the responsibilities.

    Where no expert contributes (value -inf) both are 0; torch's softmax would give NaN.
    """
    log_gate = torch.log_softmax(gate_logits, dim=-1)
    joint = log_gate + log_prob
    nothing = (joint == float("-inf")).all(-1) | (grad == 0)
    responsibility = torch.softmax(joint, dim=-1)
    g, zero = grad.unsqueeze(-1), nothing.unsqueeze(-1)
    return (
        (g * responsibility).masked_fill(zero, 0.0),
        (g * (responsibility - torch.exp(log_gate))).masked_fill(zero, 0.0),
    )

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


def log_sum_exp(z: Tensor) -> Tensor:
    """Return ``log sum_v exp z_v`` in float64: as exact as the sum."""
    top = z.amax(-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    total = torch.exp(z - top).contiguous().sum(-1, dtype=torch.float64)
    return top.squeeze(-1).double() + total.log()


def effective_target_logit(z: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Return the effective logit of single logits, in float64."""
    z = z.double()
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


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
        lse.append(log_sum_exp(z))
    out = torch.stack(log_prob, dim=-1).masked_fill(outside.unsqueeze(-1), float("nan"))
    zero = ignored.unsqueeze(-1)
    return out.masked_fill(zero, 0.0), torch.stack(lse, dim=-1).masked_fill(zero, 0.0)


def log_relative(z: Tensor, lse: Tensor) -> Tensor:
    """Return ``z - lse`` in the dtype of z, exact however large a float64 ``lse`` is."""
    top = lse.to(z.dtype)
    return (z - top) - (lse - top).to(z.dtype)


def logits_gradient(
    dz: Tensor,  # [..., V]  gradient of the effective logits
    logits: Tensor,  # [..., V_k]
    target: Tensor | None,  # [...]
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> Tensor:  # [..., V_k]
    """Return ``dz dz'/dz`` in the logits' dtype, 0 on ignored rows and padding columns."""
    vocab_size = dz.shape[-1]
    dz = dz / temperature
    if softcap is not None:
        capped = torch.tanh(logits[..., :vocab_size].to(dz.dtype) / softcap)
        dz = dz * (1 - capped * capped)
    if target is not None:
        dz = dz.masked_fill((target == ignore_index).unsqueeze(-1), 0.0)
    out = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    out[..., :vocab_size] = dz
    return out


def expert_log_prob_backward(
    grad: Tensor,  # [..., K]
    grad_lse: Tensor | None,  # [..., K]
    logits: Sequence[Tensor],  # K x [..., >= V]
    target: Tensor,  # [...]
    lse: Tensor,  # [..., K]
    vocab_size: int,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> list[Tensor]:  # K x [..., V_k]
    """Return ``dz_k(v) = [ grad_k (1[v = y] - p_k(v)) + grad_lse_k p_k(v) ] dz'/dz``.

    ``p_k = exp(z'_k - lse_k)``: the logits may be some columns of a row only.
    """
    index, _, outside = _safe_index(target, vocab_size, ignore_index)
    grads = []
    for k, expert in enumerate(logits):
        z = effective_logits(expert, vocab_size, temperature, softcap)
        log_p = log_relative(z, lse[..., k : k + 1])
        p = torch.exp(log_p)
        at_target = -torch.expm1(log_p.gather(-1, index.unsqueeze(-1)))
        weight = grad[..., k : k + 1].to(z.dtype)
        one_minus = (-p).scatter(-1, index.unsqueeze(-1), at_target)
        dz = (weight * one_minus).masked_fill(outside.unsqueeze(-1) | (weight == 0), 0.0)
        if grad_lse is not None:
            weight = grad_lse[..., k : k + 1].to(z.dtype)
            dz = dz + (weight * p).masked_fill(weight == 0, 0.0)
        grads.append(logits_gradient(dz, expert, target, ignore_index, temperature, softcap))
    return grads


def mixture_log_softmax(
    logits: Sequence[Tensor],  # K x [..., >= V]
    gate_logits: Tensor,  # [..., K] or [K]
    vocab_size: int,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # [..., V], [..., K] float64
    """Return ``log m(v) = log sum_k g_k p_k(v)`` and the log-sum-exps."""
    log_gate = torch.log_softmax(gate_logits, dim=-1)
    joint, lse = [], []
    for k, expert in enumerate(logits):
        z = effective_logits(expert, vocab_size, temperature, softcap)
        joint.append(log_gate[..., k : k + 1] + torch.log_softmax(z, dim=-1))
        lse.append(log_sum_exp(z))
    return torch.logsumexp(torch.stack(joint, dim=-1), dim=-1), torch.stack(lse, dim=-1)


def mixture_log_softmax_backward(
    grad: Tensor,  # [..., V] or [..., 1]
    logits: Sequence[Tensor],  # K x [..., >= V]
    gate_logits: Tensor,  # [..., K] or [K]
    needs_grad: Sequence[bool],  # K
    vocab_size: int,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[list[Tensor], Tensor]:  # [..., V_k] for each expert that needs it; [..., K]
    """Return ``dz_k = c r_k - p_k sum_u c r_k`` and ``da_k = sum_v c (r_k - g_k)``, c = grad."""
    log_mixture, _ = mixture_log_softmax(logits, gate_logits, vocab_size, temperature, softcap)
    log_gate = torch.log_softmax(gate_logits, dim=-1)
    grads, shares = [], []
    for k, expert in enumerate(logits):
        z = effective_logits(expert, vocab_size, temperature, softcap)
        log_p = torch.log_softmax(z, dim=-1)
        share = torch.exp(log_gate[..., k : k + 1] + log_p - log_mixture)
        share = share.masked_fill(log_mixture == float("-inf"), 0.0) * grad
        shares.append(share.sum(-1))
        if needs_grad[k]:
            dz = share - torch.exp(log_p) * shares[k].unsqueeze(-1)
            grads.append(logits_gradient(dz, expert, None, 0, temperature, softcap))
    upstream = (
        grad.expand_as(log_mixture).masked_fill(log_mixture == float("-inf"), 0.0).sum(-1, True)
    )
    return grads, torch.stack(shares, dim=-1) - torch.exp(log_gate) * upstream


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


def mixture_mean_log_prob(
    logits: Sequence[Tensor],  # K x [..., >= V]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor,  # [...]
    vocab_size: int,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., K], [..., K] float64
    """Return the means over the vocabulary of ``log m(v)`` and of r_k(v), and the log-sum-exps."""
    ignored = target == ignore_index
    logits = [z.masked_fill(ignored.unsqueeze(-1), 0.0) for z in logits]
    log_mixture, lse = mixture_log_softmax(logits, gate_logits, vocab_size, temperature, softcap)
    log_gate = torch.log_softmax(gate_logits, dim=-1)
    shares = []
    for k, expert in enumerate(logits):
        z = effective_logits(expert, vocab_size, temperature, softcap)
        share = torch.exp(log_gate[..., k : k + 1] + torch.log_softmax(z, dim=-1) - log_mixture)
        shares.append(share.masked_fill(log_mixture == float("-inf"), 0.0).mean(-1))
    mean = log_mixture.mean(-1).masked_fill(ignored, 0.0)
    zero = ignored.unsqueeze(-1)
    share = torch.stack(shares, dim=-1).masked_fill(zero, 0.0)
    return mean, share, lse.masked_fill(zero, 0.0)


def mixture_mean_log_prob_backward(
    grad: Tensor,  # [...]
    logits: Sequence[Tensor],  # K x [..., >= V]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor,  # [...]
    needs_grad: Sequence[bool],  # K
    vocab_size: int,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> list[Tensor]:  # one [..., V_k] for each expert that needs it
    """Return ``dz_k(v) = grad (r_k(v) / V - p_k(v) mean_u r_k(u)) dz'/dz``."""
    ignored = target == ignore_index
    logits = [z.masked_fill(ignored.unsqueeze(-1), 0.0) for z in logits]
    upstream = (grad / vocab_size).masked_fill(ignored, 0.0).unsqueeze(-1)
    return mixture_log_softmax_backward(
        upstream, logits, gate_logits, needs_grad, vocab_size, temperature, softcap
    )[0]

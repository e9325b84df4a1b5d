"""The truth of the divergences: K-way JSD and the KL between two mixtures, in plain torch.

Near-equal distributions cancel, so everything here is float64 whatever the logits are, and in
forms that do not cancel. Per column, with ref the largest of the experts' log-probs l_k,

    d_k = l_k - ref,  e_k = exp(d_k),  M = sum_k w_k e_k = m / e^ref,  t_k = p_k / m - 1,
    KL(p_k || m) = sum_v e^ref [ e_k log(p_k / m) - e_k + M ] = sum_v m phi(t_k) >= 0,

phi(t) = (1 + t) log(1 + t) - t, which is t^2/2 - t^3/6 + ... where t is small, and t_k comes from
u_k = expm1(d_k). These functions are the ``eager`` backend of the two ops as well.

Shape letters: N rows (any leading shape ``[...]``), K experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustgate.ops.reference import effective_logits, logits_gradient, statistics_dtype

_INFINITY = float("inf")
_SMALL = 2.0**-10  # below it four terms of phi's series are exact to float64


def _expert_columns(
    logits: Sequence[Tensor],  # K x [..., >= V]
    target: Tensor | None,  # [...]
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    lse: Tensor | None = None,  # [..., K], given where the logits are some columns of a row only
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d [..., V, K], e^ref [..., V, 1] and lse [..., K]; ignored rows are all zeros."""
    z = torch.stack(
        [effective_logits(z.double(), vocab_size, temperature, softcap) for z in logits], dim=-1
    )
    if target is not None:
        z = z.masked_fill((target == ignore_index)[..., None, None], 0.0)
    if lse is None:
        lse = torch.logsumexp(z, dim=-2)
    log_prob = z - lse.unsqueeze(-2)
    ref = log_prob.amax(-1, keepdim=True)
    d = torch.where(ref == -_INFINITY, -_INFINITY, log_prob - ref)
    return d, torch.exp(ref), lse


def _ignore(value: Tensor, target: Tensor | None, ignore_index: int) -> Tensor:
    """Zero the ignored rows of [...] or [..., K]."""
    if target is None:
        return value
    ignored = target == ignore_index
    return value.masked_fill(ignored if value.dim() == ignored.dim() else ignored[..., None], 0.0)


def _scaled_phi(t: Tensor, scale: Tensor, ratio_term: Tensor, difference: Tensor) -> Tensor:
    """``scale * phi(t)``: the series where t is small, else ``ratio_term - difference``."""
    series = t * t * (1 / 2 - t / 6 + t * t / 12 - t * t * t / 20)
    return torch.where(t.abs() < _SMALL, scale * series, ratio_term - difference)


def _against_mixture(d: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return M [..., V, 1] and, [..., V, K], e_k - M, t_k and log(p_k / m)."""
    w = weights.double().unsqueeze(-2)
    e, u = torch.exp(d), torch.expm1(d)
    mean_u, mean_e = (w * u).sum(-1, keepdim=True), (w * e).sum(-1, keepdim=True)
    near = mean_u > -0.5  # else 1 + mean_u would cancel
    total = torch.where(near, 1 + mean_u, mean_e)
    difference = torch.where(near, u - mean_u, e - mean_e)
    t = difference / total
    log_ratio = d - torch.where(near, torch.log1p(mean_u), torch.log(mean_e))
    return total, difference, t, torch.where(t.abs() < 0.5, torch.log1p(t), log_ratio)


def jsd(
    logits: Sequence[Tensor],  # K x [..., >= V]
    weights: Tensor,  # [..., K] or [K]
    lse: Tensor | None,  # [..., K]
    target: Tensor | None,  # [...]
    vocab_size: int,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., K], [..., K] float64
    """Return ``sum_k w_k KL_k``, ``KL_k = KL(p_k || sum_j w_j p_j)`` and the log-sum-exps.

    With ``lse`` given, the sums run over the columns at hand: some columns of whole rows.
    """
    d, p_ref, lse = _expert_columns(
        logits, target, vocab_size, ignore_index, temperature, softcap, lse
    )
    total, difference, t, log_ratio = _against_mixture(d, weights)
    e = torch.exp(d)
    ratio_term = torch.where(e == 0, 0.0, e * log_ratio)
    terms = p_ref * _scaled_phi(t, total, ratio_term, difference)
    kl = torch.where(p_ref == 0, 0.0, terms).sum(-2)  # an impossible column adds nothing
    w = weights.double()
    value = torch.where(w == 0, 0.0, w * kl).sum(-1)
    value = torch.where(torch.isnan(lse).any(-1), torch.nan, value)
    dtype = statistics_dtype(logits[0].dtype)
    kl = _ignore(kl, target, ignore_index).to(dtype)
    lse = _ignore(lse, target, ignore_index).clone()  # an argument must not be a result
    return _ignore(value, target, ignore_index).to(dtype), kl, lse


def jsd_backward(
    grad: Tensor,  # [...]
    logits: Sequence[Tensor],  # K x [..., >= V]
    weights: Tensor,  # [..., K] or [K]
    kl: Tensor,  # [..., K]
    lse: Tensor,  # [..., K]
    target: Tensor | None,  # [...]
    needs_grad: Sequence[bool],  # K
    vocab_size: int,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> list[Tensor]:  # one [..., V_k] for each expert that needs it
    """Return ``dz_k(v) = grad w_k p_k(v) (log(p_k / m)(v) - KL_k) dz'/dz``."""
    d, p_ref, _ = _expert_columns(
        logits, target, vocab_size, ignore_index, temperature, softcap, lse
    )
    _, _, _, log_ratio = _against_mixture(d, weights)
    p = p_ref * torch.exp(d)
    scale = grad.double().unsqueeze(-1) * weights.double()
    dz = scale.unsqueeze(-2) * p * (log_ratio - kl.double().unsqueeze(-2))
    dz = dz.masked_fill((scale == 0).unsqueeze(-2) | (p == 0), 0.0)
    return [
        logits_gradient(dz[..., k], z, target, ignore_index, temperature, softcap)
        for k, z in enumerate(logits)
        if needs_grad[k]
    ]


def _two_mixtures(
    d: Tensor,  # [..., V, K]
    teacher: Tensor,  # [..., K] or [K]  log-weights
    student: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return m_student / e^ref, t = m_teacher / m_student - 1, log(1 + t) and e^-ref KL's terms."""
    g, gamma = torch.exp(teacher).unsqueeze(-2), torch.exp(student).unsqueeze(-2)
    e, u = torch.exp(d), torch.expm1(d)
    above, below = (g * e).sum(-1, keepdim=True), (gamma * e).sum(-1, keepdim=True)
    # Both gates sum to 1: with equal experts, or equal gates, the difference is exactly 0.
    difference = ((g - gamma) * u).sum(-1, keepdim=True)
    t = difference / below
    log_ratio = torch.where(t.abs() < 0.5, torch.log1p(t), torch.log(above) - torch.log(below))
    ratio_term = torch.where(above == 0, 0.0, above * log_ratio)
    return below, t, log_ratio, _scaled_phi(t, below, ratio_term, difference)


def _pull(g: Tensor, gamma: Tensor, t: Tensor, log_ratio: Tensor) -> Tensor:
    """Return ``g_k log(1 + t) - gamma_k t`` [..., V, K]; a weight of 0 drops its term."""
    return torch.where(g == 0, 0.0, g * log_ratio) - torch.where(gamma == 0, 0.0, gamma * t)


def mixture_kl(
    logits: Sequence[Tensor],  # K x [..., >= V]
    teacher_gate_logits: Tensor,  # [..., K] or [K]
    student_gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor | None,  # [...]
    vocab_size: int,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., K], [..., K] float64
    """Return KL, gamma_k E_k[t] (what the student's gradient needs) and the log-sum-exps.

    E_k is the mean under expert k, gamma the student's gate, t the mixtures' ratio minus 1; 0 in
    rows whose KL is infinite.
    """
    d, p_ref, lse = _expert_columns(logits, target, vocab_size, ignore_index, temperature, softcap)
    teacher = torch.log_softmax(teacher_gate_logits.double(), -1)
    student = torch.log_softmax(student_gate_logits.double(), -1)
    below, t, _, terms = _two_mixtures(d, teacher, student)
    value = torch.where(p_ref == 0, 0.0, p_ref * terms).sum((-2, -1))
    value = torch.where(torch.isnan(lse).any(-1), torch.nan, value)
    p = p_ref * torch.exp(d)
    gamma = torch.exp(student).unsqueeze(-2)
    # Second-order where experts are nearly equal: sum_v m_gamma t is 0.
    tilt = torch.where(below == 0, 0.0, gamma * (p - p_ref * below) * t).sum(-2)
    infinite = (value == _INFINITY).unsqueeze(-1)
    dtype = statistics_dtype(logits[0].dtype)
    value, tilt = value.to(dtype), tilt.masked_fill(infinite, 0.0).to(dtype)
    value, tilt, lse = (_ignore(x, target, ignore_index) for x in (value, tilt, lse))
    return value, tilt, lse


def mixture_kl_backward(
    grad: Tensor,  # [...]
    logits: Sequence[Tensor],  # K x [..., >= V]
    teacher_gate_logits: Tensor,  # [..., K] or [K]
    student_gate_logits: Tensor,  # [..., K] or [K]
    value: Tensor,  # [...]
    target: Tensor | None,  # [...]
    needs_grad: Sequence[bool],  # K
    vocab_size: int,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> list[Tensor]:  # one [..., V_k] for each expert that needs it
    """Return ``dz_k = grad p_k [ f_k - E_k f_k ] dz'/dz``, ``f_k = g_k log(1 + t) - gamma_k t``."""
    d, p_ref, _ = _expert_columns(logits, target, vocab_size, ignore_index, temperature, softcap)
    teacher = torch.log_softmax(teacher_gate_logits.double(), -1)
    student = torch.log_softmax(student_gate_logits.double(), -1)
    _, t, log_ratio, _ = _two_mixtures(d, teacher, student)
    g, gamma = torch.exp(teacher).unsqueeze(-2), torch.exp(student).unsqueeze(-2)
    p = p_ref * torch.exp(d)
    pull = torch.where(p == 0, 0.0, p * _pull(g, gamma, t, log_ratio))
    dz = grad.double()[..., None, None] * (pull - p * pull.sum(-2, keepdim=True))
    nothing = ((grad == 0) | (value == _INFINITY))[..., None, None]
    dz = dz.masked_fill(nothing | (p == 0), 0.0)
    return [
        logits_gradient(dz[..., k], z, target, ignore_index, temperature, softcap)
        for k, z in enumerate(logits)
        if needs_grad[k]
    ]

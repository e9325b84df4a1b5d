"""From a model on a finite space back to a gate over the experts.

Many gates realise a model ``m``; the one of maximum entropy at each point is an exponential tilt,

    g_k = exp(s u_k) / sum_j exp(s u_j),   u_k = (pi_k - lo) / (hi - lo),
    s such that sum_k g_k u_k = (m - lo) / (hi - lo).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_BLOCK: Final = 2**15  # points solved at once: their temporaries stay in cache
_MAX_STEPS: Final = 200
_ACCURACY: Final = 1e-13  # of the log-odds aimed at, relative to 1 + their size
_NEWTON_STEPS: Final = 30  # after these, every second step halves the bracket instead


def maximum_entropy_gate(
    model: Tensor,  # [..., X]
    expert_probs: Tensor,  # [..., K, X]
) -> Tensor:  # [..., K, X]
    """Return the gate of maximum entropy whose mixture of the experts is ``model``.

    At a point where the model equals the experts' minimum or maximum the gate is uniform over the
    experts that attain it; where all experts agree it is uniform.

    Args:
        model: ``m(x)``, ``[..., X]`` floating point, ``min_k pi_k <= m <= max_k pi_k``.
        expert_probs: ``pi_k(x)``, ``[..., K, X]`` floating point.

    Returns:
        ``g(x, k)``, ``[..., K, X]`` float64, with ``sum_k g = 1`` and ``sum_k g_k pi_k = m``.

    Raises:
        ValueError: shapes that do not fit, or a model outside the experts' range.

    Example:
        >>> import torch
        >>> from robustgate.game import maximum_entropy_gate
        >>> experts = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
        >>> maximum_entropy_gate(torch.tensor([0.5, 0.5]), experts)
        tensor([[0.2500, 0.2500],
                [0.7500, 0.7500]], dtype=torch.float64)

    Source: Jaynes (1957); docs/theory.md, "The exact game".
    """
    if expert_probs.dim() < 2 or model.shape != expert_probs.select(-2, 0).shape:
        raise ValueError(
            f"model, expert_probs: expected shapes [..., X] and [..., K, X], "
            f"got {tuple(model.shape)} and {tuple(expert_probs.shape)}"
        )
    points = expert_probs.detach().to("cpu", torch.float64).transpose(-1, -2)  # [..., X, K]
    flat = points.reshape(-1, points.shape[-1])  # [N, K]
    target = model.detach().to("cpu", torch.float64).reshape(-1)  # [N]
    low, high = flat.amin(dim=1), flat.amax(dim=1)
    slack = 1e-6 * high + 1e-9  # rounding of float32 models, no more
    if not bool(((target >= low - slack) & (target <= high + slack)).all()):
        raise ValueError("model: expected numbers between the experts' smallest and largest")
    width = high - low
    unit = torch.where(width > 0, width, 1.0)
    gate = torch.empty_like(flat)
    for rows in torch.arange(len(flat)).split(_BLOCK):
        block = slice(int(rows[0]), int(rows[-1]) + 1)
        scaled = (flat[block] - low[block, None]) / unit[block, None]
        share = ((target[block] - low[block]) / unit[block]).clamp(0.0, 1.0)
        gate[block] = _tilted(scaled, share, width[block] == 0)
    return gate.reshape(points.shape).transpose(-1, -2)


def _tilted(
    scaled: Tensor,  # [N, K], from 0 to 1 in every row
    share: Tensor,  # [N], the mean aimed at
    equal: Tensor,  # [N], all experts agree
) -> Tensor:  # [N, K]
    """Solve ``log(M / (1 - M)) = log(share / (1 - share))`` for s, M the mean under the tilt.

    On this scale the equation is exactly linear for two experts and nearly so for more. Newton's
    method keeps to a bracket, which starts unbounded.
    """
    aim = share.log() - (-share).log1p()  # [N], infinite at the ends
    at_end = aim.isinf() | equal
    aim = torch.where(at_end, 0.0, aim)
    slope = aim.clone()
    low, high = torch.full_like(aim, -torch.inf), torch.full_like(aim, torch.inf)
    for count in range(_MAX_STEPS):
        gate = torch.softmax(slope.unsqueeze(1) * scaled, dim=1)
        mean = (gate * scaled).sum(dim=1)
        rest = (gate * (1.0 - scaled)).sum(dim=1)
        error = mean.log() - rest.log() - aim  # infinite where a tilt is so steep as to underflow
        done = at_end | (error.abs() <= _ACCURACY * (1.0 + aim.abs()))
        if bool(done.all()):
            break
        low, high = torch.where(error < 0, slope, low), torch.where(error > 0, slope, high)
        variance = (gate * (scaled - mean.unsqueeze(1)).square()).sum(dim=1)
        newton = slope - error * mean * rest / variance
        middle = torch.where(low.isinf(), 2.0 * high.clamp(max=-1.0), 0.5 * (low + high))
        middle = torch.where(high.isinf(), 2.0 * low.clamp(min=1.0), middle)
        trusted = (newton > low) & (newton < high) & newton.isfinite()
        if count >= _NEWTON_STEPS and count % 2:
            trusted = torch.zeros_like(trusted)
        slope = torch.where(done, slope, torch.where(trusted, newton, middle))
    at_top = (share == 1.0).unsqueeze(1) & (scaled == 1.0)
    at_bottom = (share == 0.0).unsqueeze(1) & (scaled == 0.0)
    ends = (at_top | at_bottom).to(torch.float64)
    ends = torch.where(equal.unsqueeze(1), 1.0, ends)
    ends = ends / ends.sum(dim=1, keepdim=True).clamp(min=1.0)
    return torch.where(at_end.unsqueeze(1), ends, gate)

"""JSD = sum_k w_k KL_k, KL_k = sum_v p_k log(p_k / m), m = sum_k w_k p_k.

Rows whose experts are clearly apart are served by jsd_apart.py. The others are compared column by
column, without cancellation (columns.py): with d_k <= 0 the log-probs relative to p_top, the
largest of the experts that count,

    u_k = expm1(d_k),  ubar = sum_k w_k u_k,  M = 1 + ubar = m / p_top,  t_k = (u_k - ubar) / M,
    log(p_k / m) = d_k - log1p(ubar),  KL_k += p_top [ e^d_k log(p_k / m) - (u_k - ubar) ].

The bracket is M phi(t_k), phi(t) = (1 + t) log(1 + t) - t; where t_k is small it cancels and phi's
series takes its place: no term is negative, identical experts give exactly 0. One program a row.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# ruff: noqa: RUF005  (Triton joins tuples, it does not unpack them)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustgate.ops.triton import launch
from robustgate.ops.triton.algebra import (
    FAR,
    IMPOSSIBLE,
    MAX_ADDS,
    steps_of,
)
from robustgate.ops.triton.columns import (
    below_highest,
    correct_log_sum_exps,
    heaviest_of,
    load_columns,
    load_log_sum_exps,
    load_scalars,
    locate_all,
    log2_probs,
    mixture_of,
    relative_log_probs,
    rows_of,
)
from robustgate.ops.triton.jsd_apart import jsd_apart


@triton.jit
def _terms(d, top, log2_p, weights, inside, K: tl.constexpr):
    """Return what a column adds to each KL_k."""
    total, log_total, differences = mixture_of(d, weights, K)
    inverse = 1.0 / total
    p_top = tl.where(inside, tl.exp2(top), 0.0)
    terms = ()
    for k in tl.static_range(K):
        e, difference = differences[k]
        log_ratio = d[k] - log_total
        t = difference * inverse
        series = difference * t * (((t * -0.05 + 0.0833333333) * t - 0.166666667) * t + 0.5)
        bracket = tl.where(tl.abs(t) < 0.03125, series, e * log_ratio - difference)
        # An expert of weight 0 may stand far above the mixture, or alone.
        p = tl.where(inside, tl.exp2(log2_p[k]), 0.0)
        above = p * (log_ratio - 1.0) + p_top * total
        above = tl.where(top < IMPOSSIBLE, tl.where(p > 0, float("inf"), 0.0), above)
        terms = terms + (tl.where(d[k] > FAR, above, p_top * bracket),)
    return terms


@triton.jit(do_not_specialize=["inner_rows"])
def _forward_kernel(
    zs,  # K x [N, V]
    outer,
    inner,
    inner_rows,
    weights,  # [N, K] or [K]
    weight_stride,
    target,  # [N]
    lse,  # [N, K] float64
    kl,  # [N, K]
    value,  # [N]
    left,  # [N]  which rows to take
    vocab,
    ignore_index,
    transform,
    K: tl.constexpr,
    CHOSEN: tl.constexpr,  # only rows with left != 0; else all
    MASKED: tl.constexpr,  # whether there is a target
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    wide = n.to(tl.int64)
    weights = weights + wide * weight_stride
    ref, _known = heaviest_of(weights, K)
    w = load_scalars(weights, K)
    lses, finite = load_log_sum_exps(lse + wide * K, K)
    places, offsets = locate_all(lses, ref, transform, CAP, K)
    rows = rows_of(zs, n, inner_rows, outer, inner, K)
    stop = tl.where(finite, vocab, 0)
    fill = tl.where(finite, 0.0, float("nan"))
    if MASKED:
        ignored = tl.load(target + n) == ignore_index
        stop = tl.where(ignored, 0, stop)
        fill = tl.where(ignored, 0.0, fill)
    chosen = vocab > 0
    if CHOSEN:
        chosen = tl.load(left + n) != 0
        stop = tl.where(chosen, stop, 0)

    totals = ()
    for _ in tl.static_range(K):
        totals = totals + (tl.full([], 0.0, tl.float64),)
    for begin in range(0, stop, BLOCK * MAX_ADDS):
        sums = ()
        for _ in tl.static_range(K):
            sums = sums + (tl.zeros([BLOCK], tl.float32),)
        for step in range(0, steps_of(begin, stop, BLOCK)):
            columns = begin + step * BLOCK + tl.arange(0, BLOCK)
            xs = load_columns(rows, columns, stop, places, transform, CAP, TAIL, K)
            a = relative_log_probs(xs, ref, offsets, transform, EXACT, K)
            log2_p = log2_probs(xs, places, transform, K)
            d, top = below_highest(a, log2_p, w, K)
            terms = _terms(d, top, log2_p, w, columns < stop, K)
            new = ()
            for k in tl.static_range(K):
                new = new + (sums[k] + terms[k],)
            sums = new
        new = ()
        for k in tl.static_range(K):
            new = new + (totals[k] + tl.sum(sums[k], 0).to(tl.float64),)
        totals = new

    total = fill.to(tl.float64)
    for k in tl.static_range(K):
        divergence = tl.where(totals[k] < 0, 0.0, totals[k])  # rounding
        tl.store(kl + wide * K + k, (divergence + fill).to(tl.float32), mask=chosen)
        total += tl.where(w[k] == 0, 0.0, w[k].to(tl.float64) * divergence)
    tl.store(value + n, total.to(tl.float32), mask=chosen)


def forward(
    logits: Sequence[Tensor],  # K x [..., >= V]
    weights: Tensor,  # [..., K] or [K]
    lse: Tensor | None,  # [..., K] float64
    target: Tensor | None,  # [...]
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., K], [..., K] float64
    """Return the divergences, the KL_k and the log-sum-exps (the raw op)."""
    settings = launch.Settings(vocab_size, ignore_index, temperature, softcap)
    leading, experts = logits[0].shape[:-1], len(logits)
    count = leading.numel()
    rows, weights = launch.address_rows(logits), weights.contiguous()
    target = None if target is None else target.contiguous()
    value = logits[0].new_empty(leading, dtype=torch.float32)
    kl = logits[0].new_empty((*leading, experts), dtype=torch.float32)
    weight_stride = experts if weights.dim() == kl.dim() else 0
    if count == 0:
        return value, kl, torch.empty_like(kl, dtype=torch.float64)
    if given := lse is not None:  # some columns of longer rows: compared column by column
        lse = lse.clone(memory_format=torch.contiguous_format)
        left = lse
    else:
        lse = torch.empty_like(kl, dtype=torch.float64)
        left = jsd_apart(rows, weights, weight_stride, target, lse, kl, value, settings)
        correct_log_sum_exps(rows, weights, weight_stride, lse, left, settings)
    with launch.on_device(value):
        _forward_kernel[(count,)](
            *rows.arguments,
            weights,
            weight_stride,
            lse if target is None else target,
            lse,
            kl,
            value,
            left,
            vocab_size,
            ignore_index,
            settings.transform,
            K=experts,
            CHOSEN=not given,
            MASKED=target is not None,
            **settings.flags,
            EXACT=logits[0].element_size() == 4,
            BLOCK=launch.column_block(vocab_size, experts, 1024),
            num_warps=4,
            **launch.OPTIONS,
        )
    return value, kl, lse

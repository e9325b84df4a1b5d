"""JSD of rows whose experts are clearly apart: KL_k = sum_v p_k log p_k - sum_v p_k log m.

A program takes rows one after another: entropies first (apart.py), then the columns, last ones
first, which the cache still holds. Rows it cannot serve are marked for the kernels of jsd.py.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005  (Triton joins tuples, it does not unpack them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustgate.ops.triton import launch
from robustgate.ops.triton.algebra import LN2, MAX_ADDS, log_sum, log_sum_exp, steps_of
from robustgate.ops.triton.apart import APART, TINY, load_exponentials, row_statistics
from robustgate.ops.triton.columns import load_scalars, rows_of


@triton.jit(do_not_specialize=["inner_rows", "N"])
def _kernel(
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
    left,  # [N]  1: this row is left to the others
    N,
    vocab,
    ignore_index,
    transform,
    K: tl.constexpr,
    MASKED: tl.constexpr,  # whether there is a target
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        wide = tl.cast(n, tl.int64)
        stop = vocab
        if MASKED:
            stop = tl.where(tl.load(target + wide) == ignore_index, 0, vocab)
        w = load_scalars(weights + wide * weight_stride, K)
        rows = rows_of(zs, n, inner_rows, outer, inner, K)
        tops, totals, negentropies, level, usable = row_statistics(
            rows, w, stop, transform, CAP, TAIL, ROW_BLOCK, K
        )
        factors = ()
        for k in tl.static_range(K):
            factors = factors + (w[k] / totals[k] * tl.exp2(-level),)

        cross = ()  # sum_v exponential_k log m of each expert
        for _ in tl.static_range(K):
            cross = cross + (tl.full([], 0.0, tl.float64),)
        span = BLOCK * MAX_ADDS
        last = tl.where(usable, stop, 0)
        spans = tl.cdiv(last, span)
        for i in range(0, spans):
            begin = (spans - 1 - i) * span
            sums = ()
            for _ in tl.static_range(K):
                sums = sums + (tl.zeros([BLOCK], tl.float32),)
            for step in range(0, steps_of(begin, last, BLOCK)):
                columns = begin + step * BLOCK + tl.arange(0, BLOCK)
                e = load_exponentials(rows, columns, last, tops, transform, CAP, TAIL, K)
                m = factors[0] * e[0]
                for k in tl.static_range(1, K):
                    m += factors[k] * e[k]
                log_m = log_sum(tl.where(m < TINY, TINY, m), 0.0)
                new = ()
                for k in tl.static_range(K):
                    new = new + (sums[k] + e[k] * log_m,)
                sums = new
            new = ()
            for k in tl.static_range(K):
                new = new + (cross[k] + tl.sum(sums[k], 0).to(tl.float64),)
            cross = new

        stands = usable
        total = tl.full([], 0.0, tl.float32)
        for k in tl.static_range(K):
            divergence = (negentropies[k] - level) * LN2 - cross[k].to(tl.float32) / totals[k]
            stands = stands & (divergence >= APART)
            divergence = tl.where(stop > 0, divergence, 0.0)
            tl.store(kl + wide * K + k, divergence)
            row_lse = log_sum_exp(tops[k], totals[k], transform)
            tl.store(lse + wide * K + k, tl.where(stop > 0, row_lse, 0.0))
            total += w[k] * divergence
        tl.store(value + wide, tl.where(stop > 0, total, 0.0))
        tl.store(left + wide, tl.where(stands | (stop == 0), 0, 1))


def jsd_apart(
    rows: launch.Rows,
    weights: Tensor,  # [..., K] or [K]
    weight_stride: int,
    target: Tensor | None,  # [...]
    lse: Tensor,  # [..., K] float64
    kl: Tensor,  # [..., K]
    value: Tensor,  # [...]
    settings: launch.Settings,
) -> Tensor:  # [N] int32
    """Fill lse, and kl and value of the rows it serves; return 1 for the rows that are left."""
    count, experts = value.numel(), len(rows.tensors)
    left = torch.empty(count, dtype=torch.int32, device=value.device)
    with launch.on_device(value):
        _kernel[(launch.resident_programs(value, rows.row_bytes(settings.vocab_size), count),)](
            *rows.arguments,
            weights,
            weight_stride,
            lse if target is None else target,
            lse,
            kl,
            value,
            left,
            count,
            settings.vocab_size,
            settings.ignore_index,
            settings.transform,
            K=experts,
            MASKED=target is not None,
            **settings.flags,
            ROW_BLOCK=launch.block_of(settings.vocab_size, 2048),
            BLOCK=launch.column_block(settings.vocab_size, experts, 8192),
            num_warps=8,
            **launch.OPTIONS,
        )
    return left

"""KL of two gated mixtures that are clearly apart: sum_v m_g (log m_g - log m_gamma).

With tilt_k = gamma_k (sum_v p_k m_g / m_gamma - 1). A program takes rows one after another: sums
and entropies first (apart.py), then the columns, last ones first, which the cache still holds. Rows
it cannot serve are marked for the kernels of mixture_kl.py.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005  (Triton joins tuples, it does not unpack them)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustgate.ops.triton import launch
from robustgate.ops.triton.algebra import MAX_ADDS, log_sum, log_sum_exp, steps_of
from robustgate.ops.triton.apart import APART, TINY, load_exponentials, row_statistics
from robustgate.ops.triton.columns import rows_of
from robustgate.ops.triton.two_mixtures import load_gates


@triton.jit(do_not_specialize=["inner_rows", "N"])
def _kernel(
    zs,  # K x [N, V]
    outer,
    inner,
    inner_rows,
    teacher,  # [N, K] or [K]
    teacher_stride,
    student,  # [N, K] or [K]
    student_stride,
    target,  # [N]
    lse,  # [N, K] float64
    tilt,  # [N, K]
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
        gates, known = load_gates(
            teacher + wide * teacher_stride, student + wide * student_stride, K
        )
        rows = rows_of(zs, n, inner_rows, outer, inner, K)
        tops, totals, _negentropies, level, usable = row_statistics(
            rows, gates[1], stop, transform, CAP, TAIL, ROW_BLOCK, K
        )
        above = ()
        below = ()
        for k in tl.static_range(K):
            factor = tl.exp2(-level) / totals[k]
            above = above + (gates[0][k] * factor,)
            below = below + (gates[1][k] * factor,)

        cross = ()  # sum_v exponential_k m_g / m_gamma of each expert, then the value
        for _ in tl.static_range(K + 1):
            cross = cross + (tl.full([], 0.0, tl.float64),)
        span = BLOCK * MAX_ADDS
        last = tl.where(usable & known, stop, 0)
        spans = tl.cdiv(last, span)
        for i in range(0, spans):
            begin = (spans - 1 - i) * span
            sums = ()
            for _ in tl.static_range(K + 1):
                sums = sums + (tl.zeros([BLOCK], tl.float32),)
            for step in range(0, steps_of(begin, last, BLOCK)):
                columns = begin + step * BLOCK + tl.arange(0, BLOCK)
                e = load_exponentials(rows, columns, last, tops, transform, CAP, TAIL, K)
                of_teacher = above[0] * e[0]
                of_student = below[0] * e[0] + TINY
                for k in tl.static_range(1, K):
                    of_teacher += above[k] * e[k]
                    of_student += below[k] * e[k]
                log_teacher = log_sum(tl.where(of_teacher < TINY, TINY, of_teacher), 0.0)
                log_ratio = log_teacher - log_sum(of_student, 0.0)
                ratio = of_teacher / of_student
                new = ()
                for k in tl.static_range(K):
                    new = new + (sums[k] + e[k] * ratio,)
                sums = new + (sums[K] + of_teacher * log_ratio,)
            new = ()
            for k in tl.static_range(K + 1):
                new = new + (cross[k] + tl.sum(sums[k], 0).to(tl.float64),)
            cross = new

        divergence = cross[K].to(tl.float32) * tl.exp2(level)
        stands = usable & known & (divergence >= APART)
        tl.store(value + wide, tl.where(stop > 0, divergence, 0.0))
        tl.store(left + wide, tl.where(stands | (stop == 0), 0, 1))
        for k in tl.static_range(K):
            moved = gates[1][k] * (cross[k] / totals[k] - 1.0).to(tl.float32)
            tl.store(tilt + wide * K + k, tl.where(stop > 0, moved, 0.0))
            row_lse = log_sum_exp(tops[k], totals[k], transform)
            tl.store(lse + wide * K + k, tl.where(stop > 0, row_lse, 0.0))


def mixture_kl_apart(
    rows: launch.Rows,
    teacher: Tensor,  # [..., K] or [K]
    teacher_stride: int,
    student: Tensor,  # [..., K] or [K]
    student_stride: int,
    target: Tensor | None,  # [...]
    lse: Tensor,  # [..., K] float64
    tilt: Tensor,  # [..., K]
    value: Tensor,  # [...]
    settings: launch.Settings,
) -> Tensor:  # [N] int32
    """Fill lse, and tilt and value of the rows it serves; return 1 for the rows that are left."""
    count, experts = value.numel(), len(rows.tensors)
    left = torch.empty(count, dtype=torch.int32, device=value.device)
    with launch.on_device(value):
        _kernel[(launch.resident_programs(value, rows.row_bytes(settings.vocab_size), count),)](
            *rows.arguments,
            teacher,
            teacher_stride,
            student,
            student_stride,
            lse if target is None else target,
            lse,
            tilt,
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
            BLOCK=launch.column_block(settings.vocab_size, experts, 1024),
            num_warps=8,
            **launch.OPTIONS,
        )
    return left

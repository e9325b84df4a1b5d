"""KL(m_g || m_gamma) = sum_v m_g log(m_g / m_gamma) of two gates over K experts, and its gradients.

Forward: a program a row, for the rows that mixture_kl_apart.py leaves: sum_v m_gamma phi(t) with
t = m_g / m_gamma - 1 (two_mixtures.py), and for the student's gate tilt_k = gamma_k sum_v (p_k -
m_gamma) t, second-order where experts are nearly equal. Backward: f_k = g_k log(1 + t) - gamma_k t,
balance_k = sum_v p_k f_k, then dz_k = c p_k (f_k - balance_k) dz'/dz; a program takes rows one
after another, the second pass from the last columns, which the cache still holds: two reads, one
write.
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
    MAX_ADDS,
    inverse_temperature_of,
    row_of,
    steps_of,
    store_row,
)
from robustgate.ops.triton.columns import (
    correct_log_sum_exps,
    heaviest_of,
    load_columns,
    load_log_sum_exps,
    locate_all,
    log2_probs,
    relative_log_probs,
    rows_of,
)
from robustgate.ops.triton.mixture_kl_apart import mixture_kl_apart
from robustgate.ops.triton.two_mixtures import (
    compare_mixtures,
    divergence_terms,
    load_gates,
    pulls,
)


@triton.jit(do_not_specialize=["inner_rows"])
def _forward_kernel(
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
    left,  # [N]  which rows to take
    vocab,
    ignore_index,
    transform,
    K: tl.constexpr,
    MASKED: tl.constexpr,  # whether there is a target
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    wide = n.to(tl.int64)
    teacher = teacher + wide * teacher_stride
    student = student + wide * student_stride
    ref, _known = heaviest_of(student, K)
    gates, known = load_gates(teacher, student, K)
    lses, finite = load_log_sum_exps(lse + wide * K, K)
    places, offsets = locate_all(lses, ref, transform, CAP, K)
    rows = rows_of(zs, n, inner_rows, outer, inner, K)
    stop = tl.where(finite & known, vocab, 0)
    fill = tl.where(finite & known, 0.0, float("nan"))
    if MASKED:
        ignored = tl.load(target + n) == ignore_index
        stop = tl.where(ignored, 0, stop)
        fill = tl.where(ignored, 0.0, fill)
    chosen = tl.load(left + n) != 0
    stop = tl.where(chosen, stop, 0)

    totals = ()  # tilt_k / gamma_k of each expert, then the value
    for _ in tl.static_range(K + 1):
        totals = totals + (tl.full([], 0.0, tl.float64),)
    for begin in range(0, stop, BLOCK * MAX_ADDS):
        sums = ()
        for _ in tl.static_range(K + 1):
            sums = sums + (tl.zeros([BLOCK], tl.float32),)
        for step in range(0, steps_of(begin, stop, BLOCK)):
            columns = begin + step * BLOCK + tl.arange(0, BLOCK)
            xs = load_columns(rows, columns, stop, places, transform, CAP, TAIL, K)
            a = relative_log_probs(xs, ref, offsets, transform, EXACT, K)
            log2_p = log2_probs(xs, places, transform, K)
            column, experts = compare_mixtures(a, log2_p, gates, columns < stop, K)
            term, tilts = divergence_terms(column, experts, K)
            new = ()
            for k in tl.static_range(K):
                new = new + (sums[k] + tilts[k],)
            sums = new + (sums[K] + term,)
        new = ()
        for k in tl.static_range(K + 1):
            new = new + (totals[k] + tl.sum(sums[k], 0).to(tl.float64),)
        totals = new

    divergence = tl.where(totals[K] < 0, 0.0, totals[K]).to(tl.float32)  # rounding
    tl.store(value + n, divergence + fill, mask=chosen)
    for k in tl.static_range(K):
        counts = (gates[1][k] > 0) & (divergence < float("inf"))
        moved = tl.where(counts, gates[1][k] * totals[k].to(tl.float32), 0.0)
        tl.store(tilt + wide * K + k, moved + fill, mask=chosen)


@triton.jit(do_not_specialize=["inner_rows", "N"])
def _backward_kernel(
    zs,  # K x [N, V]
    outer,
    inner,
    inner_rows,
    dzs,  # K x [N, V_k]; those in NEEDS
    dz_outer,
    dz_inner,
    grad,  # [N]
    teacher,  # [N, K] or [K]
    teacher_stride,
    student,  # [N, K] or [K]
    student_stride,
    target,  # [N]
    lse,  # [N, K] float64
    value,  # [N]
    N,
    vocab,
    ignore_index,
    transform,
    K: tl.constexpr,
    NEEDS: tl.constexpr,  # bits: whose gradient is asked for
    MASKED: tl.constexpr,
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        wide = tl.cast(n, tl.int64)
        ref, _known = heaviest_of(student + wide * student_stride, K)
        gates, known = load_gates(
            teacher + wide * teacher_stride, student + wide * student_stride, K
        )
        lses, finite = load_log_sum_exps(lse + wide * K, K)
        places, offsets = locate_all(lses, ref, transform, CAP, K)
        rows = rows_of(zs, n, inner_rows, outer, inner, K)
        upstream = tl.load(grad + wide)
        nothing = (upstream == 0) | (tl.load(value + wide) == float("inf"))
        if MASKED:
            nothing = nothing | (tl.load(target + wide) == ignore_index)
        stop = tl.where(nothing, 0, vocab)  # nothing is read of rows that ask for nothing
        fill = tl.where(finite & known, 0.0, float("nan"))
        upstream = upstream * inverse_temperature_of(transform)

        balances = ()
        for _ in tl.static_range(K):
            balances = balances + (tl.full([], 0.0, tl.float64),)
        for begin in range(0, stop, BLOCK * MAX_ADDS):
            sums = ()
            for _ in tl.static_range(K):
                sums = sums + (tl.zeros([BLOCK], tl.float32),)
            for step in range(0, steps_of(begin, stop, BLOCK)):
                columns = begin + step * BLOCK + tl.arange(0, BLOCK)
                xs = load_columns(rows, columns, stop, places, transform, CAP, TAIL, K)
                a = relative_log_probs(xs, ref, offsets, transform, EXACT, K)
                log2_p = log2_probs(xs, places, transform, K)
                column, experts = compare_mixtures(a, log2_p, gates, columns < stop, K)
                pull = pulls(column, experts, gates, K)
                new = ()
                for k in tl.static_range(K):
                    new = new + (sums[k] + pull[k],)
                sums = new
            new = ()
            for k in tl.static_range(K):
                new = new + (balances[k] + tl.sum(sums[k], 0).to(tl.float64),)
            balances = new

        steps = tl.cdiv(vocab, BLOCK)
        for step in range(0, steps):
            columns = (steps - 1 - step) * BLOCK + tl.arange(0, BLOCK)
            xs = load_columns(rows, columns, stop, places, transform, CAP, TAIL, K)
            a = relative_log_probs(xs, ref, offsets, transform, EXACT, K)
            log2_p = log2_probs(xs, places, transform, K)
            column, experts = compare_mixtures(a, log2_p, gates, columns < stop, K)
            pull = pulls(column, experts, gates, K)
            for k in tl.static_range(K):
                if (NEEDS >> k) & 1:
                    p, _difference, _ratio = experts[k]
                    dz = upstream * (pull[k] - p * balances[k].to(tl.float32)) + fill
                    if CAP:
                        dz = dz * (1.0 - xs[k] * xs[k])
                    dz = tl.where(nothing, 0.0, dz)
                    row = row_of(dzs[k], n, inner_rows, dz_outer[k], dz_inner[k])
                    store_row(row, columns, dz, vocab, TAIL)


def forward(
    logits: Sequence[Tensor],  # K x [..., >= V]
    teacher: Tensor,  # [..., K] or [K]
    student: Tensor,  # [..., K] or [K]
    target: Tensor | None,  # [...]
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., K], [..., K] float64
    """Return the divergences, the tilts and the log-sum-exps (the raw op)."""
    settings = launch.Settings(vocab_size, ignore_index, temperature, softcap)
    leading, experts = logits[0].shape[:-1], len(logits)
    count = leading.numel()
    rows = launch.address_rows(logits)
    teacher, student = teacher.contiguous(), student.contiguous()
    target = None if target is None else target.contiguous()
    value = logits[0].new_empty(leading, dtype=torch.float32)
    tilt = logits[0].new_empty((*leading, experts), dtype=torch.float32)
    student_stride = experts if student.dim() == tilt.dim() else 0
    lse = torch.empty_like(tilt, dtype=torch.float64)
    if count:
        teacher_stride = experts if teacher.dim() == tilt.dim() else 0
        gates = (teacher, teacher_stride, student, student_stride)
        left = mixture_kl_apart(rows, *gates, target, lse, tilt, value, settings)
        correct_log_sum_exps(rows, student, student_stride, lse, left, settings)
        with launch.on_device(value):
            _forward_kernel[(count,)](
                *rows.arguments,
                *gates,
                lse if target is None else target,
                lse,
                tilt,
                value,
                left,
                vocab_size,
                ignore_index,
                settings.transform,
                K=experts,
                MASKED=target is not None,
                **settings.flags,
                EXACT=logits[0].element_size() == 4,
                BLOCK=launch.column_block(vocab_size, experts, 512),
                num_warps=4,
                **launch.OPTIONS,
            )
    return value, tilt, lse


def backward(
    grad: Tensor,  # [...]
    logits: Sequence[Tensor],  # K x [..., >= V]
    teacher: Tensor,  # [..., K] or [K]
    student: Tensor,  # [..., K] or [K]
    value: Tensor,  # [...]
    lse: Tensor,  # [..., K] float64
    target: Tensor | None,  # [...]
    needs_grad: Sequence[bool],  # K
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> list[Tensor]:  # one [..., V_k] for each expert that needs it
    """Return dL/dz (the raw op)."""
    settings = launch.Settings(vocab_size, ignore_index, temperature, softcap)
    experts, count = len(logits), grad.numel()
    grads, places, needs = launch.fresh_gradients(logits, needs_grad, vocab_size)
    if count and grads:
        row_bytes = experts * vocab_size * logits[0].element_size()
        values = 1024 if 2 < experts <= 4 else 2048  # others would spill registers
        with launch.on_device(grad):
            _backward_kernel[(launch.resident_programs(grad, row_bytes, count),)](
                *launch.address_rows(logits).arguments,
                *places.arguments[:3],
                grad.contiguous(),
                teacher.contiguous(),
                experts if teacher.dim() == lse.dim() else 0,
                student.contiguous(),
                experts if student.dim() == lse.dim() else 0,
                lse if target is None else target.contiguous(),
                lse.contiguous(),
                value.contiguous(),
                count,
                vocab_size,
                ignore_index,
                settings.transform,
                K=experts,
                NEEDS=needs,
                MASKED=target is not None,
                **settings.flags,
                EXACT=logits[0].element_size() == 4,
                BLOCK=launch.column_block(vocab_size, experts, values),
                num_warps=8,
                **launch.OPTIONS,
            )
    return grads

"""(1 / V) sum_v log m(v), m = sum_k g_k p_k, with (1 / V) sum_v r_k(v), and the logits' gradient.

The smoothing term of mixture_nll. Forward: a program takes rows one after another, the log-sum-exps
first, then the columns, last ones first. Backward: dz_k(v) = c (r_k(v) / V - p_k(v) mean_u r_k(u))
dz'/dz from the saved means; a program takes some columns of a row: one read, one write. Ignored
rows are not read and give 0.
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
from robustgate.ops.triton.columns import load_log_sum_exps, rows_of
from robustgate.ops.triton.gated import (
    all_finite,
    gate_columns,
    load_gate,
    locate_experts,
    log_mixture,
    normaliser,
    row_log_sum_exps,
)

_STEPS = 8  # of a backward program


@triton.jit(do_not_specialize=["inner_rows", "N"])
def _forward_kernel(
    zs,  # K x [N, V]
    outer,
    inner,
    inner_rows,
    gate,  # [N, K] or [K]
    gate_stride,
    target,  # [N]
    mean,  # [N]
    share,  # [N, K]
    lse,  # [N, K] float64
    N,
    vocab,
    ignore_index,
    transform,
    K: tl.constexpr,
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        wide = tl.cast(n, tl.int64)
        ignored = tl.load(target + wide) == ignore_index
        stop = tl.where(ignored, 0, vocab)
        rows = rows_of(zs, n, inner_rows, outer, inner, K)
        lses = row_log_sum_exps(rows, stop, transform, CAP, TAIL, ROW_BLOCK, K)
        log2_gate, _weights, known = load_gate(gate + wide * gate_stride, K)
        fill = tl.where(ignored | (known & all_finite(lses, K)), 0.0, float("nan"))
        places = locate_experts(lses, transform, CAP, K)
        for k in tl.static_range(K):
            tl.store(lse + wide * K + k, tl.where(ignored, 0.0, lses[k]))

        totals = ()  # sum_v r_k of each expert, then sum_v log m
        for _ in tl.static_range(K + 1):
            totals = totals + (tl.full([], 0.0, tl.float64),)
        span = BLOCK * MAX_ADDS
        spans = tl.cdiv(stop, span)
        for i in range(0, spans):
            begin = (spans - 1 - i) * span
            sums = ()
            for _ in tl.static_range(K + 1):
                sums = sums + (tl.zeros([BLOCK], tl.float32),)
            for step in range(0, steps_of(begin, stop, BLOCK)):
                columns = begin + step * BLOCK + tl.arange(0, BLOCK)
                inside = columns < stop
                _xs, _log2_p, powers, top, total = gate_columns(
                    rows, columns, stop, places, log2_gate, transform, CAP, TAIL, K
                )
                weight = tl.where(inside, normaliser(top, total), 0.0)
                new = ()
                for k in tl.static_range(K):
                    new = new + (sums[k] + weight * powers[k],)
                sums = new + (sums[K] + tl.where(inside, log_mixture(top, total), 0.0),)
            new = ()
            for k in tl.static_range(K + 1):
                new = new + (totals[k] + tl.sum(sums[k], 0).to(tl.float64),)
            totals = new
        for k in tl.static_range(K):
            value = (totals[k] / vocab).to(tl.float32) + fill
            tl.store(share + wide * K + k, value)
        tl.store(mean + wide, (totals[K] / vocab).to(tl.float32) + fill)


@triton.jit(do_not_specialize=["inner_rows"])
def _backward_kernel(
    zs,  # K x [N, V]
    outer,
    inner,
    inner_rows,
    dzs,  # K x [N, V_k]; those in NEEDS
    dz_outer,
    dz_inner,
    grad,  # [N]
    gate,  # [N, K] or [K]
    gate_stride,
    target,  # [N]
    share,  # [N, K]
    lse,  # [N, K] float64
    vocab,
    ignore_index,
    transform,
    K: tl.constexpr,
    NEEDS: tl.constexpr,  # bits: whose gradient is asked for
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    n = tl.program_id(0)
    wide = n.to(tl.int64)
    upstream = tl.load(grad + n) * inverse_temperature_of(transform)
    nothing = (tl.load(target + n) == ignore_index) | (upstream == 0)
    stop = tl.where(nothing, 0, vocab)  # nothing is read of rows that ask for nothing
    rows = rows_of(zs, n, inner_rows, outer, inner, K)
    lses, finite = load_log_sum_exps(lse + wide * K, K)
    log2_gate, _weights, known = load_gate(gate + wide * gate_stride, K)
    fill = tl.where(known & finite, 0.0, float("nan"))
    places = locate_experts(lses, transform, CAP, K)
    inverse_vocab = 1.0 / vocab

    begin = tl.program_id(1) * (BLOCK * STEPS)
    for start in range(begin, tl.minimum(begin + BLOCK * STEPS, vocab), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        xs, log2_p, powers, top, total = gate_columns(
            rows, columns, stop, places, log2_gate, transform, CAP, TAIL, K
        )
        weight = normaliser(top, total) * inverse_vocab
        for k in tl.static_range(K):
            if (NEEDS >> k) & 1:
                pull = tl.exp2(log2_p[k]) * tl.load(share + wide * K + k)
                dz = upstream * (weight * powers[k] - pull) + fill
                if CAP:
                    dz = dz * (1.0 - xs[k] * xs[k])
                dz = tl.where(nothing, 0.0, dz)
                row = row_of(dzs[k], n, inner_rows, dz_outer[k], dz_inner[k])
                store_row(row, columns, dz, vocab, TAIL)


def forward(
    logits: Sequence[Tensor],  # K x [..., >= V]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor,  # [...]
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [...], [..., K], [..., K] float64
    """Return the means of log m and of the responsibilities, and the log-sum-exps (the raw op)."""
    settings = launch.Settings(vocab_size, ignore_index, temperature, softcap)
    experts, count = len(logits), target.numel()
    mean = logits[0].new_empty(target.shape, dtype=torch.float32)
    share = logits[0].new_empty((*target.shape, experts), dtype=torch.float32)
    lse = torch.empty_like(share, dtype=torch.float64)
    if count:
        row_bytes = experts * vocab_size * logits[0].element_size()
        with launch.on_device(mean):
            _forward_kernel[(launch.resident_programs(mean, row_bytes, count),)](
                *launch.address_rows(logits).arguments,
                gate_logits.contiguous(),
                experts if gate_logits.dim() == lse.dim() else 0,
                target.contiguous(),
                mean,
                share,
                lse,
                count,
                vocab_size,
                ignore_index,
                settings.transform,
                K=experts,
                **settings.flags,
                ROW_BLOCK=launch.row_block(vocab_size),
                BLOCK=launch.column_block(vocab_size, experts, 4096),
                num_warps=8,
                **launch.OPTIONS,
            )
    return mean, share, lse


def backward(
    grad: Tensor,  # [...]
    logits: Sequence[Tensor],  # K x [..., >= V]
    gate_logits: Tensor,  # [..., K] or [K]
    target: Tensor,  # [...]
    share: Tensor,  # [..., K]
    lse: Tensor,  # [..., K] float64
    needs_grad: Sequence[bool],  # K
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> list[Tensor]:  # one [..., V_k] for each expert that needs it
    """Return dL/dz (the raw op)."""
    settings = launch.Settings(vocab_size, ignore_index, temperature, softcap)
    experts, count = len(logits), target.numel()
    grads, places, needs = launch.fresh_gradients(logits, needs_grad, vocab_size)
    if count and grads:
        block = launch.column_block(vocab_size, experts, 2048)
        with launch.on_device(grad):
            _backward_kernel[(count, triton.cdiv(vocab_size, block * _STEPS))](
                *launch.address_rows(logits).arguments,
                *places.arguments[:3],
                grad.contiguous(),
                gate_logits.contiguous(),
                experts if gate_logits.dim() == lse.dim() else 0,
                target.contiguous(),
                share.contiguous(),
                lse.contiguous(),
                vocab_size,
                ignore_index,
                settings.transform,
                K=experts,
                NEEDS=needs,
                **settings.flags,
                BLOCK=block,
                STEPS=_STEPS,
                num_warps=4,
                **launch.OPTIONS,
            )
    return grads

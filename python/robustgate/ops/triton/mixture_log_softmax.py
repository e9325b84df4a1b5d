"""log m(v) = log sum_k g_k p_k(v) for every v, and its gradients.

Forward: a program takes rows one after another: the log-sum-exps of the row's experts first, then
its columns, last ones first, which the cache still holds; one write of float32. Backward for an
upstream c(v), with r_k = g_k p_k / m: sum_v c r_k and sum_v c first, then dz_k = (c r_k - p_k sum_u
c r_k) dz'/dz, in the same way; the gate's gradient, sum_v c (r_k - g_k), needs the first pass only.
A column no expert allows has log m = -inf and takes part in nothing.
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
    IMPOSSIBLE,
    MAX_ADDS,
    inverse_temperature_of,
    load_row,
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


@triton.jit(do_not_specialize=["inner_rows", "N"])
def _forward_kernel(
    zs,  # K x [N, V]
    outer,
    inner,
    inner_rows,
    gate,  # [N, K] or [K]
    gate_stride,
    out,  # [N, V]
    lse,  # [N, K] float64
    N,
    vocab,
    transform,
    K: tl.constexpr,
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        wide = tl.cast(n, tl.int64)
        rows = rows_of(zs, n, inner_rows, outer, inner, K)
        lses = row_log_sum_exps(rows, vocab, transform, CAP, TAIL, ROW_BLOCK, K)
        log2_gate, _weights, known = load_gate(gate + wide * gate_stride, K)
        fill = tl.where(known & all_finite(lses, K), 0.0, float("nan"))
        places = locate_experts(lses, transform, CAP, K)
        for k in tl.static_range(K):
            tl.store(lse + wide * K + k, lses[k])
        steps = tl.cdiv(vocab, BLOCK)
        for step in range(0, steps):
            columns = (steps - 1 - step) * BLOCK + tl.arange(0, BLOCK)
            _xs, _log2_p, _powers, top, total = gate_columns(
                rows, columns, vocab, places, log2_gate, transform, CAP, TAIL, K
            )
            value = log_mixture(top, total) + fill
            store_row(out + wide * vocab, columns, value, vocab, TAIL)


@triton.jit(do_not_specialize=["inner_rows", "N"])
def _backward_kernel(
    zs,  # K x [N, V]
    outer,
    inner,
    inner_rows,
    dzs,  # K x [N, V_k]; those in NEEDS
    dz_outer,
    dz_inner,
    grad,  # [N, V]
    gate,  # [N, K] or [K]
    gate_stride,
    lse,  # [N, K] float64
    grad_gate,  # [N, K]
    N,
    vocab,
    transform,
    K: tl.constexpr,
    NEEDS: tl.constexpr,  # bits: whose gradient is asked for
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        wide = tl.cast(n, tl.int64)
        rows = rows_of(zs, n, inner_rows, outer, inner, K)
        upstream = grad + wide * vocab
        lses, finite = load_log_sum_exps(lse + wide * K, K)
        log2_gate, weights, known = load_gate(gate + wide * gate_stride, K)
        fill = tl.where(known & finite, 0.0, float("nan"))
        places = locate_experts(lses, transform, CAP, K)

        totals = ()  # sum_v c r_k of each expert, then sum_v c
        for _ in tl.static_range(K + 1):
            totals = totals + (tl.full([], 0.0, tl.float64),)
        for begin in range(0, vocab, BLOCK * MAX_ADDS):
            sums = ()
            for _ in tl.static_range(K + 1):
                sums = sums + (tl.zeros([BLOCK], tl.float32),)
            for step in range(0, steps_of(begin, vocab, BLOCK)):
                columns = begin + step * BLOCK + tl.arange(0, BLOCK)
                c = load_row(upstream, columns, vocab, 0.0, TAIL)
                _xs, _log2_p, powers, top, total = gate_columns(
                    rows, columns, vocab, places, log2_gate, transform, CAP, TAIL, K
                )
                weight = c * normaliser(top, total)
                new = ()
                for k in tl.static_range(K):
                    new = new + (sums[k] + weight * powers[k],)
                sums = new + (sums[K] + tl.where(top < IMPOSSIBLE, 0.0, c),)
            new = ()
            for k in tl.static_range(K + 1):
                new = new + (totals[k] + tl.sum(sums[k], 0).to(tl.float64),)
            totals = new
        for k in tl.static_range(K):
            difference = totals[k].to(tl.float32) - weights[k] * totals[K].to(tl.float32)
            tl.store(grad_gate + wide * K + k, difference + fill)

        if NEEDS > 0:
            steps = tl.cdiv(vocab, BLOCK)
            for step in range(0, steps):
                columns = (steps - 1 - step) * BLOCK + tl.arange(0, BLOCK)
                c = load_row(upstream, columns, vocab, 0.0, TAIL)
                xs, log2_p, powers, top, total = gate_columns(
                    rows, columns, vocab, places, log2_gate, transform, CAP, TAIL, K
                )
                weight = c * normaliser(top, total)
                for k in tl.static_range(K):
                    if (NEEDS >> k) & 1:
                        pull = tl.exp2(log2_p[k]) * totals[k].to(tl.float32)
                        dz = (weight * powers[k] - pull) * inverse_temperature_of(transform) + fill
                        if CAP:
                            dz = dz * (1.0 - xs[k] * xs[k])
                        row = row_of(dzs[k], n, inner_rows, dz_outer[k], dz_inner[k])
                        store_row(row, columns, dz, vocab, TAIL)


def forward(
    logits: Sequence[Tensor],  # K x [..., >= V]
    gate_logits: Tensor,  # [..., K] or [K]
    vocab_size: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # [..., V], [..., K] float64
    """Return the mixture's log-probs and the log-sum-exps (the raw op)."""
    settings = launch.Settings(vocab_size, 0, temperature, softcap)
    leading, experts = logits[0].shape[:-1], len(logits)
    count = leading.numel()
    out = logits[0].new_empty((*leading, vocab_size), dtype=torch.float32)
    lse = logits[0].new_empty((*leading, experts), dtype=torch.float64)
    if count:
        row_bytes = experts * vocab_size * logits[0].element_size()
        with launch.on_device(out):
            _forward_kernel[(launch.resident_programs(out, row_bytes, count),)](
                *launch.address_rows(logits).arguments,
                gate_logits.contiguous(),
                experts if gate_logits.dim() == lse.dim() else 0,
                out,
                lse,
                count,
                vocab_size,
                settings.transform,
                K=experts,
                **settings.flags,
                ROW_BLOCK=launch.row_block(vocab_size),
                BLOCK=launch.column_block(vocab_size, experts, 4096),
                num_warps=8,
                **launch.OPTIONS,
            )
    return out, lse


def backward(
    grad: Tensor,  # [..., V]
    logits: Sequence[Tensor],  # K x [..., >= V]
    gate_logits: Tensor,  # [..., K] or [K]
    lse: Tensor,  # [..., K] float64
    needs_grad: Sequence[bool],  # K
    vocab_size: int,
    temperature: float,
    softcap: float | None,
) -> tuple[list[Tensor], Tensor]:  # [..., V_k] for each expert that needs it; [..., K]
    """Return dL/dz and the gate logits' gradient of every row (the raw op)."""
    settings = launch.Settings(vocab_size, 0, temperature, softcap)
    experts = len(logits)
    count = lse.numel() // experts
    grads, places, needs = launch.fresh_gradients(logits, needs_grad, vocab_size)
    grad_gate = lse.new_empty(lse.shape, dtype=torch.float32)
    if count:
        row_bytes = vocab_size * (experts * logits[0].element_size() + grad.element_size())
        values = 4096 if experts <= 4 else 2048  # more would spill registers
        with launch.on_device(grad):
            _backward_kernel[(launch.resident_programs(grad, row_bytes, count),)](
                *launch.address_rows(logits).arguments,
                *places.arguments[:3],
                grad.contiguous(),
                gate_logits.contiguous(),
                experts if gate_logits.dim() == lse.dim() else 0,
                lse.contiguous(),
                grad_gate,
                count,
                vocab_size,
                settings.transform,
                K=experts,
                NEEDS=needs,
                **settings.flags,
                BLOCK=launch.column_block(vocab_size, experts, values),
                num_warps=8,
                **launch.OPTIONS,
            )
    return grads, grad_gate

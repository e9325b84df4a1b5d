"""dJSD/dz_k(v) = g w_k p_k(v) (log(p_k / m)(v) - KL_k) dz'/dz for an upstream g.

A program takes some columns of a row: one read of the experts, one write for each that asks for a
gradient. Where all KL_k are clearly above 0, log p_k - log m serves; else the log-ratio comes
without cancellation (columns.py): nearly equal experts keep their digits, identical ones get 0.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005  (Triton joins tuples, it does not unpack them)

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from robustgate.ops.triton import launch
from robustgate.ops.triton.algebra import (
    LN2,
    inverse_temperature_of,
    log_sum,
    row_of,
    store_row,
)
from robustgate.ops.triton.apart import APART, SMALLEST_WEIGHT, TINY
from robustgate.ops.triton.columns import (
    below_highest,
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

_STEPS = 8  # of a program


@triton.jit(do_not_specialize=["inner_rows"])
def _kernel(
    zs,  # K x [N, V]
    outer,
    inner,
    inner_rows,
    dzs,  # K x [N, V_k]; those in NEEDS
    dz_outer,
    dz_inner,
    grad,  # [N]
    weights,  # [N, K] or [K]
    weight_stride,
    target,  # [N]
    lse,  # [N, K] float64
    kl,  # [N, K]
    vocab,
    ignore_index,
    transform,
    K: tl.constexpr,
    NEEDS: tl.constexpr,  # bits: whose gradient is asked for
    MASKED: tl.constexpr,  # whether there is a target
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    n = tl.program_id(0)
    wide = n.to(tl.int64)
    weights = weights + wide * weight_stride
    ref, _known = heaviest_of(weights, K)
    w = load_scalars(weights, K)
    kls = load_scalars(kl + wide * K, K)
    lses, finite = load_log_sum_exps(lse + wide * K, K)
    places, offsets = locate_all(lses, ref, transform, CAP, K)
    rows = rows_of(zs, n, inner_rows, outer, inner, K)
    upstream = tl.load(grad + n)
    if MASKED:
        upstream = tl.where(tl.load(target + n) == ignore_index, 0.0, upstream)
    stop = tl.where(upstream == 0, 0, vocab)  # nothing is read of rows that ask for nothing
    upstream = upstream * inverse_temperature_of(transform)
    apart = finite
    for k in tl.static_range(K):
        apart = apart & (w[k] >= SMALLEST_WEIGHT) & (kls[k] >= APART)

    begin = tl.program_id(1) * (BLOCK * STEPS)
    end = tl.minimum(begin + BLOCK * STEPS, vocab)
    if apart:
        for start in range(begin, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            xs = load_columns(rows, columns, stop, places, transform, CAP, TAIL, K)
            log2_p = log2_probs(xs, places, transform, K)
            ps = ()
            for k in tl.static_range(K):
                ps = ps + (tl.exp2(log2_p[k]),)
            m = w[0] * ps[0]
            for k in tl.static_range(1, K):
                m += w[k] * ps[k]
            log_m = log_sum(tl.where(m < TINY, TINY, m), 0.0)
            for k in tl.static_range(K):
                if (NEEDS >> k) & 1:
                    dz = upstream * w[k] * ps[k] * (log2_p[k] * LN2 - log_m - kls[k])
                    if CAP:
                        dz = dz * (1.0 - xs[k] * xs[k])
                    dz = tl.where(upstream == 0, 0.0, dz)
                    row = row_of(dzs[k], n, inner_rows, dz_outer[k], dz_inner[k])
                    store_row(row, columns, dz, vocab, TAIL)
    else:
        for start in range(begin, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            xs = load_columns(rows, columns, stop, places, transform, CAP, TAIL, K)
            a = relative_log_probs(xs, ref, offsets, transform, EXACT, K)
            log2_p = log2_probs(xs, places, transform, K)
            d, _top = below_highest(a, log2_p, w, K)
            _mixture, log_mixture, _differences = mixture_of(d, w, K)
            for k in tl.static_range(K):
                if (NEEDS >> k) & 1:
                    scale = upstream * w[k]
                    dz = scale * tl.exp2(log2_p[k]) * (d[k] - log_mixture - kls[k])
                    if CAP:
                        dz = dz * (1.0 - xs[k] * xs[k])
                    dz = tl.where(scale == 0, 0.0, dz)
                    row = row_of(dzs[k], n, inner_rows, dz_outer[k], dz_inner[k])
                    store_row(row, columns, dz, vocab, TAIL)


def backward(
    grad: Tensor,  # [...]
    logits: Sequence[Tensor],  # K x [..., >= V]
    weights: Tensor,  # [..., K] or [K]
    kl: Tensor,  # [..., K]
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
        block = launch.column_block(vocab_size, experts, 2048)
        with launch.on_device(grad):
            _kernel[(count, triton.cdiv(vocab_size, block * _STEPS))](
                *launch.address_rows(logits).arguments,
                *places.arguments[:3],
                grad.contiguous(),
                weights.contiguous(),
                experts if weights.dim() == kl.dim() else 0,
                lse if target is None else target.contiguous(),
                lse.contiguous(),
                kl.contiguous(),
                vocab_size,
                ignore_index,
                settings.transform,
                K=experts,
                NEEDS=needs,
                MASKED=target is not None,
                **settings.flags,
                EXACT=logits[0].element_size() == 4,
                BLOCK=block,
                STEPS=_STEPS,
                num_warps=4,
                **launch.OPTIONS,
            )
    return grads

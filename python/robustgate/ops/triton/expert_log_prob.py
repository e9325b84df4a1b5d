"""l[n, k] = z'[n, k, y] - log sum_v exp z'[n, k, v], and the logits' gradient.

Forward: one program a (row, expert), the experts of a row next to each other; one read of the
logits, a maximum and a sum in every lane, merged at the end. Ignored rows are not read and give 0;
a target out of range gives NaN and reads nothing. Backward: dz_v = [a (1[v = y] - p_v) + b p_v]
dz'/dz for the gradients a of the log-prob and b of the log-sum-exp, p recomputed from the saved
log-sum-exp; a program takes some columns of a row: one read, one write.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustgate.ops.reference import statistics_dtype
from robustgate.ops.triton import launch
from robustgate.ops.triton.algebra import (
    LN2,
    LOG2E,
    exponential,
    inverse_temperature_of,
    inverse_unit_of,
    load_row,
    log_sum_exp,
    natural,
    pick,
    row_max_and_sums,
    row_of,
    scale_of,
    store_row,
    to_u,
    unit_of,
)

_EXPERTS_PER_LAUNCH = 16
_COLUMNS_PER_PROGRAM = 8  # steps of a backward program


@triton.jit(do_not_specialize=["inner_rows"])
def _forward_kernel(
    zs,  # K x [N, V]
    outer,
    inner,
    inner_rows,
    target,  # [N]
    log_prob,  # [N, ALL]
    lse,  # [N, ALL] float64
    vocab,
    ignore_index,
    transform,
    ALL,  # experts of the outputs; these are columns [0, K) of them
    K: tl.constexpr,
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) // K
    k = tl.program_id(0) % K
    z = row_of(pick(zs, k, K), n, inner_rows, pick(outer, k, K), pick(inner, k, K))
    y = tl.load(target + n)
    ignored = y == ignore_index
    counts = (y >= 0) & (y < vocab) & (y != ignore_index)
    stop = tl.where(counts, vocab, 0)  # nothing is read of the other rows

    top, totals = row_max_and_sums(z, stop, transform, CAP, TAIL, BLOCK)
    total = tl.sum(totals.to(tl.float64), 0)  # a probability near 1 keeps its distance from 1
    log_total = natural(tl.log(total), transform)
    u = to_u(tl.load(z + y, mask=counts, other=0.0), transform, CAP)
    value = (u.to(tl.float64) - top.to(tl.float64)) * unit_of(transform) - log_total
    value = tl.where(value > 0, 0.0, value)  # rounding: no probability exceeds 1

    fill = tl.where(ignored, 0.0, float("nan"))
    out = n.to(tl.int64) * ALL + k
    tl.store(log_prob + out, tl.where(counts, value, fill).to(tl.float32))
    row_lse = log_sum_exp(top, total, transform)
    tl.store(lse + out, tl.where(counts, row_lse, fill.to(tl.float64)))


@triton.jit(do_not_specialize=["inner_rows"])
def _backward_kernel(
    zs,  # K x [N, V]
    outer,
    inner,
    inner_rows,
    dzs,  # K x [N, V_k]
    dz_outer,
    dz_inner,
    target,  # [N]
    grad,  # [N, ALL]
    grad_lse,  # [N, ALL]
    lse,  # [N, ALL] float64
    vocab,
    ignore_index,
    transform,
    ALL,
    K: tl.constexpr,
    OF_LSE: tl.constexpr,  # whether there is a gradient of the log-sum-exp
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    n = tl.program_id(0) // K
    k = tl.program_id(0) % K
    z = row_of(pick(zs, k, K), n, inner_rows, pick(outer, k, K), pick(inner, k, K))
    dz = row_of(pick(dzs, k, K), n, inner_rows, pick(dz_outer, k, K), pick(dz_inner, k, K))
    i = n.to(tl.int64) * ALL + k
    y = tl.load(target + n)
    a = tl.load(grad + i).to(tl.float32)
    b = tl.full([], 0.0, tl.float32)
    if OF_LSE:
        b = tl.load(grad_lse + i).to(tl.float32)
    counts = (y >= 0) & (y < vocab) & (y != ignore_index) & ((a != 0) | (b != 0))
    stop = tl.where(counts, vocab, 0)  # nothing is read of the other rows

    # log2 p = scale (u - top) - residual, top near the log-sum-exp in units of u: exact where p is
    # not negligible, however large the logits are.
    row_lse = tl.load(lse + i)
    top = (row_lse * inverse_unit_of(transform)).to(tl.float32)
    rest = row_lse - top.to(tl.float64) * unit_of(transform)
    residual = rest.to(tl.float32) * LOG2E
    scale = scale_of(transform)
    factor = b - a
    u_y = to_u(tl.load(z + y, mask=counts, other=0.0), transform, CAP)
    p_y, p_y_minus_one = exponential(((u_y - top) * scale - residual) * LN2)
    at_target = b * p_y - a * p_y_minus_one  # a (1 - p) + b p, without cancellation

    begin = tl.program_id(1) * (BLOCK * STEPS)
    for start in range(begin, tl.minimum(begin + BLOCK * STEPS, vocab), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        u = to_u(load_row(z, columns, stop, 0.0, TAIL), transform, CAP)
        g = factor * tl.exp2((u - top) * scale - residual)
        g = tl.where(columns == y, at_target, g) * inverse_temperature_of(transform)
        if CAP:
            g = g * (1.0 - u * u)
        g = tl.where(counts, g, 0.0)
        store_row(dz, columns, g, vocab, TAIL)


def forward(
    logits: Sequence[Tensor],  # K x [..., >= V]
    target: Tensor,  # [...]
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # [..., K], [..., K] float64
    """Return the experts' log-probs of the target and their log-sum-exps (the raw op)."""
    target = target.contiguous()
    experts, rows = len(logits), target.numel()
    shape = (*target.shape, experts)
    log_prob = target.new_empty(shape, dtype=statistics_dtype(logits[0].dtype))
    lse = target.new_empty(shape, dtype=torch.float64)
    flat, flat_lse = log_prob.view(-1), lse.view(-1)
    for first in range(0, experts if rows else 0, _EXPERTS_PER_LAUNCH):
        some = logits[first : first + _EXPERTS_PER_LAUNCH]
        with launch.on_device(target):
            _forward_kernel[(rows * len(some),)](
                *launch.address_rows(some).arguments,
                target,
                flat[first:],
                flat_lse[first:],
                vocab_size,
                ignore_index,
                launch.transform(temperature, softcap),
                experts,
                K=len(some),
                CAP=softcap is not None,
                TAIL=vocab_size % 16 != 0,
                BLOCK=launch.row_block(vocab_size),
                num_warps=8,
                **launch.OPTIONS,
            )
    return log_prob, lse


def backward(
    grad: Tensor,  # [..., K]
    grad_lse: Tensor | None,  # [..., K]
    logits: Sequence[Tensor],  # K x [..., >= V]
    target: Tensor,  # [...]
    lse: Tensor,  # [..., K]
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> list[Tensor]:  # K x [..., V_k]
    """Return dL/dz of every expert (the raw op)."""
    target, grad, lse = target.contiguous(), grad.contiguous(), lse.contiguous()
    of_lse = grad if grad_lse is None else grad_lse.contiguous()
    experts, rows = len(logits), target.numel()
    grads: list[Tensor] = []
    block = launch.row_block(vocab_size)
    for first in range(0, experts, _EXPERTS_PER_LAUNCH):
        some = logits[first : first + _EXPERTS_PER_LAUNCH]
        fresh, places, _ = launch.fresh_gradients(some, [True] * len(some), vocab_size)
        grads += fresh
        if rows == 0:
            continue
        with launch.on_device(target):
            _backward_kernel[
                (rows * len(some), triton.cdiv(vocab_size, block * _COLUMNS_PER_PROGRAM))
            ](
                *launch.address_rows(some).arguments,
                *places.arguments[:3],
                target,
                grad.view(-1)[first:],
                of_lse.view(-1)[first:],
                lse.view(-1)[first:],
                vocab_size,
                ignore_index,
                launch.transform(temperature, softcap),
                experts,
                K=len(some),
                OF_LSE=grad_lse is not None,
                CAP=softcap is not None,
                TAIL=vocab_size % 16 != 0,
                BLOCK=block,
                STEPS=_COLUMNS_PER_PROGRAM,
                num_warps=8,
                **launch.OPTIONS,
            )
    return grads

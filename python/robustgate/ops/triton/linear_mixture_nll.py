"""l[n, k] = z'[n, k, y] - log sum_v exp z'[n, k, v] for z_k = hidden_k @ lm_head_k^T (+ bias_k).

The logits live in registers only, in float32: a program takes a block of rows and a part of the
vocabulary, and per tile of the product updates each row's maximum, its sum relative to it, and the
target's logit. Blocks of rows run next to each other, so that they share the head's tiles in the L2
cache. A second, small kernel merges the parts in a fixed order. Float32 products are float32, not
TensorFloat-32. With frozen experts nothing else is needed: the mixture and its gradient start from
l; where experts train the backward pass is that of the version in tiles.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from robustgate.ops.triton import launch
from robustgate.ops.triton.algebra import (
    LOWEST,
    log_sum_exp,
    natural,
    scale_of,
    to_u,
    unit_of,
)

_TILE = 128, 128, 64  # rows, columns, and a step over H
_SINGLE_TILE = 64, 64, 16  # the same for float32 products
_PROGRAMS_PER_PROCESSOR = 4
_MERGED_ROWS = 32


@triton.jit(do_not_specialize=["N", "tiles"])
def _tile_kernel(
    hidden,  # [N, H]
    hidden_stride,
    weight,  # [>= V, H]
    weight_stride,
    bias,  # [>= V]
    target,  # [N]
    parts,  # [3, parts, N]: maximum, sum, target's u
    N,
    H,
    vocab,
    tiles,  # of a part
    transform,
    BIASED: tl.constexpr,
    SINGLE: tl.constexpr,  # multiply in float32; else in the inputs' 16 bits
    CAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    inside = rows < N
    y = tl.load(target + rows, inside, other=-1)
    scale = scale_of(transform)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    at_target = tl.zeros([ROWS], tl.float32)
    end = tl.minimum((part + 1) * tiles * COLUMNS, vocab)
    for start in range(part * tiles * COLUMNS, end, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        within = columns < vocab
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, H, WIDTH):
            width = first + tl.arange(0, WIDTH)
            a = tl.load(
                hidden + rows[:, None] * hidden_stride + width[None, :],
                mask=inside[:, None] & (width < H)[None, :],
                other=0.0,
            )
            b = tl.load(
                weight + columns.to(tl.int64)[None, :] * weight_stride + width[:, None],
                mask=within[None, :] & (width < H)[:, None],
                other=0.0,
            )
            if SINGLE:
                product = tl.dot(
                    a.to(tl.float32), b.to(tl.float32), product, input_precision="ieee"
                )
            else:
                product = tl.dot(a, b, product)
        if BIASED:
            product += tl.load(bias + columns, within, other=0.0).to(tl.float32)[None, :]
        u = to_u(product, transform, CAP)
        at_target += tl.sum(tl.where(columns[None, :] == y[:, None], u, 0.0), 1)
        u = tl.where(within[None, :], u, -float("inf"))
        highest = tl.max(u, 1)
        highest = tl.where(highest > top, highest, top)
        term = tl.sum(tl.exp2((u - highest[:, None]) * scale), 1)
        total = total * tl.exp2((top - highest) * scale) + term
        top = highest
    out = parts + part.to(tl.int64) * N + rows
    stride = tl.num_programs(1).to(tl.int64) * N
    tl.store(out, top, inside)
    tl.store(out + stride, total, inside)
    tl.store(out + 2 * stride, at_target, inside)


@triton.jit(do_not_specialize=["N", "PARTS"])
def _merge_kernel(
    parts,  # [3, PARTS, N]
    target,  # [N]
    log_prob,  # [N, K], one column of it
    lse,  # [N, K] float64, one column of it
    N,
    K,
    vocab,
    ignore_index,
    transform,
    PARTS,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    y = tl.load(target + rows, inside, other=0)
    stride = tl.cast(PARTS, tl.int64) * N
    scale = scale_of(transform)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    at_target = tl.zeros([ROWS], tl.float32)
    for part in range(0, PARTS):
        address = parts + tl.cast(part, tl.int64) * N + rows
        other = tl.load(address, inside, other=LOWEST)
        highest = tl.where(other > top, other, top)
        added = tl.load(address + stride, inside, other=0.0) * tl.exp2((other - highest) * scale)
        total = total * tl.exp2((top - highest) * scale) + added
        top = highest
        at_target += tl.load(address + 2 * stride, inside, other=0.0)
    log_total = natural(tl.log(total.to(tl.float64)), transform)
    value = (at_target.to(tl.float64) - top.to(tl.float64)) * unit_of(transform) - log_total
    value = tl.where(value > 0, 0.0, value)  # rounding: no probability exceeds 1
    ignored = y == ignore_index
    fill = tl.where(ignored, 0.0, float("nan"))
    counts = (y >= 0) & (y < vocab) & (y != ignore_index)
    tl.store(log_prob + rows * K, tl.where(counts, value, fill).to(tl.float32), inside)
    row_lse = log_sum_exp(top, total, transform)
    tl.store(lse + rows * K, tl.where(ignored, 0.0, row_lse), inside)


def forward(
    hidden: Sequence[Tensor],  # K x [..., H_k]
    lm_head: Sequence[Tensor],  # K x [>= V, H_k]
    bias: Sequence[Tensor],  # K x [>= V], or empty
    target: Tensor,  # [...]
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # [..., K], [..., K] float64
    """Return the experts' log-probs of the target and their log-sum-exps, without any logits."""
    settings = launch.Settings(vocab_size, ignore_index, temperature, softcap)
    target = target.contiguous()
    experts, rows = len(hidden), target.numel()
    log_prob = target.new_empty((*target.shape, experts), dtype=torch.float32)
    lse = target.new_empty((*target.shape, experts), dtype=torch.float64)
    if rows == 0:
        return log_prob, lse
    dtypes = {x.dtype for x in (*hidden, *lm_head)}
    single = len(dtypes) > 1 or torch.float32 in dtypes
    tile_rows, tile_columns, width = _SINGLE_TILE if single else _TILE
    row_blocks, tiles = triton.cdiv(rows, tile_rows), triton.cdiv(vocab_size, tile_columns)
    parts = launch.parts_of(target, row_blocks, tiles, _PROGRAMS_PER_PROCESSOR)
    tiles_of_part = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, tiles_of_part)
    partial = torch.empty((3, parts, rows), dtype=torch.float32, device=target.device)
    for k in range(experts):
        states = hidden[k].detach().reshape(rows, hidden[k].shape[-1])
        weight = lm_head[k].detach()
        states = states if states.stride(-1) == 1 else states.contiguous()
        weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        with launch.on_device(target):
            _tile_kernel[(row_blocks, parts)](
                states,
                states.stride(0),
                weight,
                weight.stride(0),
                bias[k].contiguous() if bias else weight,
                target,
                partial,
                rows,
                states.shape[-1],
                vocab_size,
                tiles_of_part,
                settings.transform,
                BIASED=bool(bias),
                SINGLE=single,
                CAP=softcap is not None,
                ROWS=tile_rows,
                COLUMNS=tile_columns,
                WIDTH=width,
                num_warps=8,
                num_stages=3,
                **launch.OPTIONS,
            )
            _merge_kernel[(triton.cdiv(rows, _MERGED_ROWS),)](
                partial,
                target,
                log_prob.view(-1)[k:],
                lse.view(-1)[k:],
                rows,
                experts,
                vocab_size,
                ignore_index,
                settings.transform,
                parts,
                ROWS=_MERGED_ROWS,
                num_warps=1,
                **launch.OPTIONS,
            )
    return log_prob, lse

"""K experts column by column, in differences that do not cancel; log-sum-exps of near-equal rows.

    a_k(v) = log p_k(v) - log p_r(v) = unit ((u_k - c_k) - (u_r - c_r)) - (high_k + low_k),
    d_k(v) = a_k(v) - max_j a_j(v) over the experts j that count,

r the row's heaviest expert. The logits' difference is taken first and is exact where they are
nearly equal; that of the log-sum-exps comes from float64 in two parts, so nearly equal experts keep
every digit of their difference. Centres c_k are 0 unless logits are large, when z - c_k is exact.
Where r is e^20 below another expert the differences come from log2 p_k. Columns more than 2^20 nats
below a row's log-sum-exp count as impossible.

Errors of 1e-8 in the log-sum-exps are too much for the gradients of experts that differ by 1e-6:
sum_v p_r (p_k / p_r - 1) is 0 but for these errors, and corrects them where experts are nearly
equal.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005  (Triton joins tuples, it does not unpack them)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from robustgate.ops.triton import launch
from robustgate.ops.triton.algebra import (
    FAR,
    IMPOSSIBLE,
    LN2,
    LOG2E,
    LOWEST,
    exponential,
    inverse_unit_of,
    load_row,
    log_sum,
    pick,
    row_of,
    scale_of,
    to_u,
    unit_of,
)


@triton.jit
def heaviest_of(heaviness, K: tl.constexpr):
    """Return the index of the largest of K numbers in memory, and whether none is NaN."""
    index = tl.full([], 0, tl.int32)
    best = tl.load(heaviness)
    known = best == best
    for k in tl.static_range(1, K):
        candidate = tl.load(heaviness + k)
        index = tl.where(candidate > best, k, index)
        best = tl.where(candidate > best, candidate, best)
        known = known & (candidate == candidate)
    return index, known


@triton.jit
def load_scalars(values, K: tl.constexpr):
    """Return K numbers in memory."""
    loaded = ()
    for k in tl.static_range(K):
        loaded = loaded + (tl.load(values + k),)
    return loaded


@triton.jit
def load_log_sum_exps(lse, K: tl.constexpr):
    """Return a row's log-sum-exps, all NaN where one is not finite, and whether all are finite."""
    finite = tl.abs(tl.load(lse)) < float("inf")
    for k in tl.static_range(1, K):
        finite = finite & (tl.abs(tl.load(lse + k)) < float("inf"))
    values = ()
    for k in tl.static_range(K):
        values = values + (tl.where(finite, tl.load(lse + k), float("nan")),)
    return values, finite


@triton.jit
def locate(lse, transform, CAP: tl.constexpr):
    """Return an expert's centre, floor, top and residual: log2 p = scale (x - top) - residual."""
    inverse = inverse_unit_of(transform)
    in_u = lse * inverse
    centre = tl.full([], 0.0, tl.float32)
    floor = tl.full([], -2.0, tl.float32)
    if not CAP:
        centre = tl.where(tl.abs(in_u) < 64.0, 0.0, in_u).to(tl.float32)
        floor = (in_u + IMPOSSIBLE * inverse).to(tl.float32)
        floor = tl.where(floor < LOWEST, LOWEST, floor)
    top = (in_u - centre.to(tl.float64)).to(tl.float32)
    reference = centre.to(tl.float64) + top.to(tl.float64)
    residual = (lse - reference * unit_of(transform)).to(tl.float32) * LOG2E
    return centre, floor, top, residual


@triton.jit
def locate_all(lses, ref, transform, CAP: tl.constexpr, K: tl.constexpr):
    """Return (centre, floor, top, residual) and (high, low), relative to expert ref, of each."""
    places = ()
    for k in tl.static_range(K):
        places = places + (locate(lses[k], transform, CAP),)
    unit = tl.cast(transform[2], tl.float64)
    ratio = unit * inverse_unit_of(transform)
    ref_lse = pick(lses, ref, K)
    ref_centre = places[0][0]
    for k in tl.static_range(1, K):
        ref_centre = tl.where(ref == k, places[k][0], ref_centre)
    offsets = ()
    for k in tl.static_range(K):
        between = places[k][0].to(tl.float64) - ref_centre.to(tl.float64)
        offset = (lses[k] - ref_lse) * ratio - between * unit
        high = offset.to(tl.float32)
        offsets = offsets + ((high, (offset - high.to(tl.float64)).to(tl.float32)),)
    return places, offsets


@triton.jit
def rows_of(zs, n, inner_rows, outer, inner, K: tl.constexpr):
    """Return the addresses of row n of every expert."""
    rows = ()
    for k in tl.static_range(K):
        rows = rows + (row_of(zs[k], n, inner_rows, outer[k], inner[k]),)
    return rows


@triton.jit
def load_columns(
    rows, columns, vocab, places, transform, CAP: tl.constexpr, TAIL: tl.constexpr, K: tl.constexpr
):
    """Return x_k = u_k - c_k, never below the floor; beyond the vocabulary a finite number."""
    xs = ()
    for k in tl.static_range(K):
        centre, floor, _top, _residual = places[k]
        u = to_u(load_row(rows[k], columns, vocab, 0.0, TAIL), transform, CAP)
        xs = xs + (tl.where(u < floor, floor, u) - centre,)
    return xs


@triton.jit
def relative_log_probs(xs, ref, offsets, transform, EXACT: tl.constexpr, K: tl.constexpr):
    """Return a_k. Float32 logits (EXACT): the rounding error of their difference is added back.

    That is Knuth's two-sum; the differences of nearly equal 16-bit logits have no error.
    """
    unit = transform[2]
    x_ref = pick(xs, ref, K)
    a = ()
    for k in tl.static_range(K):
        high, low = offsets[k]
        s = xs[k] - x_ref
        d = s * unit - high
        if EXACT:
            v = s - xs[k]
            error = (xs[k] - (s - v)) - (x_ref + v)
            d = d + (error * unit - low)
        else:
            d = d - low
        a = a + (d,)
    return a


@triton.jit
def log2_probs(xs, places, transform, K: tl.constexpr):
    """Return log2 p_k."""
    scale = scale_of(transform)
    values = ()
    for k in tl.static_range(K):
        values = values + ((xs[k] - places[k][2]) * scale - places[k][3],)
    return values


@triton.jit
def below_highest(a, log2_p, counts, K: tl.constexpr):
    """Return d_k and the log2-prob they are relative to; counts[k] is 1 where expert k counts."""
    highest = tl.where(counts[0] > 0, a[0], -float("inf"))
    top = tl.where(counts[0] > 0, log2_p[0], -float("inf"))
    for k in tl.static_range(1, K):
        highest = tl.where(a[k] > highest, tl.where(counts[k] > 0, a[k], highest), highest)
        top = tl.where(log2_p[k] > top, tl.where(counts[k] > 0, log2_p[k], top), top)
    d = ()
    for k in tl.static_range(K):
        d = d + (tl.where(highest > FAR, (log2_p[k] - top) * LN2, a[k] - highest),)
    return d, top


@triton.jit
def mixture_of(d, weights, K: tl.constexpr):
    """Return M = m / p_top of m = sum_k w_k p_k, log M, and (e_k, e_k - M) of each e_k = e^d_k."""
    mean_u = d[0] * 0.0
    mean_e = d[0] * 0.0
    powers = ()
    for k in tl.static_range(K):
        e, u = exponential(tl.where(d[k] > FAR, FAR, d[k]))
        powers = powers + ((e, u),)
        mean_u += tl.where(weights[k] > 0, weights[k] * u, 0.0)
        mean_e += tl.where(weights[k] > 0, weights[k] * e, 0.0)
    near = mean_u > -0.5  # else 1 + mean_u would cancel
    one_plus = 1.0 + mean_u
    total = tl.where(near, one_plus, mean_e)
    log_total = log_sum(total, tl.where(near, mean_u - (one_plus - 1.0), 0.0))
    differences = ()
    for k in tl.static_range(K):
        e, u = powers[k]
        differences = differences + ((e, tl.where(near, u - mean_u, e - mean_e)),)
    return total, log_total, differences


@triton.jit(do_not_specialize=["inner_rows"])
def _correct_kernel(
    zs,  # K x [N, V]
    outer,
    inner,
    inner_rows,
    heaviness,  # [N, K] or [K]
    heaviness_stride,
    lse,  # [N, K] float64, corrected in place
    left,  # [N]  which rows to take
    vocab,
    transform,
    K: tl.constexpr,
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    lse = lse + n.to(tl.int64) * K
    ref, known = heaviest_of(heaviness + n.to(tl.int64) * heaviness_stride, K)
    lses, finite = load_log_sum_exps(lse, K)
    places, offsets = locate_all(lses, ref, transform, CAP, K)
    rows = rows_of(zs, n, inner_rows, outer, inner, K)
    stop = tl.where(finite & known & (tl.load(left + n) != 0), vocab, 0)
    errors = ()
    for _ in tl.static_range(K):
        errors = errors + (tl.zeros([BLOCK], tl.float32),)
    distance = tl.zeros([BLOCK], tl.float32)
    for start in range(0, stop, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        xs = load_columns(rows, columns, stop, places, transform, CAP, TAIL, K)
        a = relative_log_probs(xs, ref, offsets, transform, EXACT, K)
        log2_p = log2_probs(xs, places, transform, K)
        inside = columns < stop
        p_ref = tl.where(inside, tl.exp2(pick(log2_p, ref, K)), 0.0)
        new = ()
        for k in tl.static_range(K):
            far = a[k] > FAR
            d = tl.where(far, FAR, a[k])
            p = tl.where(inside, tl.exp2(log2_p[k]), 0.0)
            _power, u = exponential(d)
            new = new + (errors[k] + tl.where(far, p - p_ref, p_ref * u),)
            distance += tl.where(far, p, p_ref) * d * d
        errors = new
    close = (tl.sum(distance, 0) < 1e-3) & (stop > 0)
    for k in tl.static_range(K):
        error = tl.sum(errors[k], 0).to(tl.float64)
        # log1p of at most 1e-2: its cube is below float64's share in lse.
        moved = error - 0.5 * error * error + error * error * error / 3.0
        tl.store(lse + k, lses[k] + moved, mask=close & (ref != k))


def correct_log_sum_exps(
    rows: launch.Rows,
    heaviness: Tensor,  # [..., K] or [K]
    heaviness_stride: int,
    lse: Tensor,  # [..., K] float64
    left: Tensor,  # [N]
    settings: launch.Settings,
) -> None:
    """Correct the log-sum-exps where experts are nearly equal, in place, of rows with left != 0."""
    experts = len(rows.tensors)
    with launch.on_device(lse):
        _correct_kernel[(lse.numel() // experts,)](
            *rows.arguments,
            heaviness,
            heaviness_stride,
            lse,
            left,
            settings.vocab_size,
            settings.transform,
            K=experts,
            **settings.flags,
            EXACT=rows.tensors[0].element_size() == 4,
            BLOCK=launch.column_block(settings.vocab_size, experts, 1024),
            num_warps=4,
            **launch.OPTIONS,
        )

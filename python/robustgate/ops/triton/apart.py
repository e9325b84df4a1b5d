"""What serves rows whose experts are clearly apart: entropies, from exponentials and first moments.

One pass over an expert's row leaves its maximum, the sum s of 2^t_v and the first moment f = sum_v
2^t_v t_v, t_v = scale (u_v - max): sum_v p log2 p = f / s - log2 s. A second pass then costs one
exponential an expert and one logarithm a column. Differences of such sums err by some 1e-7 nats, so
they stand only where every divergence is above APART, and every weight above SMALLEST_WEIGHT, so
that a mixture is never far below all its experts; the other rows are left to the kernels that
compare columns.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# ruff: noqa: RUF005  (Triton joins tuples, it does not unpack them)

import triton
import triton.language as tl

from robustgate.ops.triton.algebra import LOWEST, load_row, scale_of, to_u

APART = tl.constexpr(0.0625)  # nats
SMALLEST_WEIGHT = tl.constexpr(1e-6)
TINY = tl.constexpr(1.17549435e-38)  # smallest normal number
LOWEST_EXPONENT = tl.constexpr(-200.0)  # of two; 2^-200 is 0


@triton.jit
def row_moments(z, vocab, transform, CAP: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """Return a row's maximum, sum and first moment, float32 scalars; NaN sums stay NaN."""
    scale = scale_of(transform)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = to_u(load_row(z, columns, vocab, -float("inf"), TAIL), transform, CAP)
        if CAP:
            x = tl.where(columns < vocab, x, -float("inf"))
        t = (x - top) * scale
        above = t > 0
        t = -tl.abs(t)
        t = tl.where(t < LOWEST_EXPONENT, LOWEST_EXPONENT, t)
        term = tl.exp2(t)
        # A new maximum: the sums so far become relative to it, and it adds 1 and 0.
        moment = tl.where(above, (moment + t * total) * term, moment + t * term)
        total = tl.where(above, total * term + 1.0, total + term)
        top = tl.where(above, x, top)
    highest = tl.max(top, 0)
    t = (top - highest) * scale
    t = tl.where(t < LOWEST_EXPONENT, LOWEST_EXPONENT, t)
    term = tl.exp2(t)
    return highest, tl.sum(total * term, 0), tl.sum((moment + t * total) * term, 0)


@triton.jit
def load_exponentials(
    rows, columns, vocab, tops, transform, CAP: tl.constexpr, TAIL: tl.constexpr, K: tl.constexpr
):
    """Return 2^(scale (u - max)) of every expert in some columns, 0 beyond the vocabulary."""
    values = ()
    for k in tl.static_range(K):
        u = to_u(load_row(rows[k], columns, vocab, -float("inf"), TAIL), transform, CAP)
        if CAP:
            u = tl.where(columns < vocab, u, -float("inf"))
        values = values + (tl.exp2((u - tops[k]) * scale_of(transform)),)
    return values


@triton.jit
def row_statistics(
    rows,
    weights,
    vocab,
    transform,
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
):
    """Return (maximum, sum, sum_v p log2 p) of every expert, and whether the row may stand.

    Also the level of log2 m where the mass is, an integer: a constant logarithm would round the
    same way in every column, so the factors of a mixture hold 2^-level.
    """
    tops = ()
    totals = ()
    negentropies = ()
    level = tl.full([], 0.0, tl.float32)
    usable = vocab > 0
    for k in tl.static_range(K):
        top, total, moment = row_moments(rows[k], vocab, transform, CAP, TAIL, BLOCK)
        negentropy = moment / total - tl.log2(total)
        tops = tops + (top,)
        totals = totals + (total,)
        negentropies = negentropies + (negentropy,)
        level += weights[k] * negentropy
        usable = usable & (total > 0) & (total < float("inf")) & (weights[k] >= SMALLEST_WEIGHT)
    return tops, totals, negentropies, tl.floor(tl.where(usable, level, 0.0)), usable

"""A gated mixture column by column, in logarithms: m(v) = sum_k g_k p_k(v).

    j_k = log2 g_k + log2 p_k,  top = max_k j_k,  log m = ln 2 (top + log2 sum_k 2^(j_k - top)),

and the responsibilities are r_k = 2^(j_k - top) / sum. A column no expert allows has log m = -inf
and responsibilities of 0.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# ruff: noqa: RUF005  (Triton joins tuples, it does not unpack them)

import triton
import triton.language as tl

from robustgate.ops.triton.algebra import (
    IMPOSSIBLE,
    LN2,
    LOG2E,
    exponential,
    log_sum,
    log_sum_exp,
    row_max_and_sums,
)
from robustgate.ops.triton.columns import load_columns, locate, log2_probs


@triton.jit
def load_gate(gate, K: tl.constexpr):
    """Return log2 g_k, g_k, and whether they are a softmax (no NaN, +inf, nothing but -inf)."""
    top = tl.load(gate)
    for k in tl.static_range(1, K):
        a = tl.load(gate + k)
        top = tl.where(a > top, a, top)
    terms = ()
    total = top * 0.0  # NaN where the gate has no softmax
    for k in tl.static_range(K):
        d = tl.load(gate + k) - top
        term, _minus_one = exponential(d)
        term = tl.where(d < -87.0, 0.0, term)
        total += tl.where(d == d, term, d)
        terms = terms + ((d, term),)
    log_total = log_sum(total, 0.0)
    log2_gate = ()
    weights = ()
    for k in tl.static_range(K):
        d, term = terms[k]
        log2_gate = log2_gate + ((d - log_total) * LOG2E,)
        weights = weights + (term / total,)
    return log2_gate, weights, total == total


@triton.jit
def row_log_sum_exps(
    rows,
    vocab,
    transform,
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
):
    """Return the log-sum-exps of a row of every expert, one expert after another."""
    values = ()
    for k in tl.static_range(K):
        top, totals = row_max_and_sums(rows[k], vocab, transform, CAP, TAIL, BLOCK)
        values = values + (log_sum_exp(top, tl.sum(totals, 0), transform),)
    return values


@triton.jit
def all_finite(values, K: tl.constexpr):
    """Return whether K numbers are finite."""
    finite = tl.abs(values[0]) < float("inf")
    for k in tl.static_range(1, K):
        finite = finite & (tl.abs(values[k]) < float("inf"))
    return finite


@triton.jit
def locate_experts(lses, transform, CAP: tl.constexpr, K: tl.constexpr):
    """Return (centre, floor, top, residual) of each expert."""
    places = ()
    for k in tl.static_range(K):
        places = places + (locate(lses[k], transform, CAP),)
    return places


@triton.jit
def gate_columns(
    rows,
    columns,
    vocab,
    places,
    log2_gate,
    transform,
    CAP: tl.constexpr,
    TAIL: tl.constexpr,
    K: tl.constexpr,
):
    """Return x_k, log2 p_k, 2^(j_k - top), top and the sum of the powers."""
    xs = load_columns(rows, columns, vocab, places, transform, CAP, TAIL, K)
    log2_p = log2_probs(xs, places, transform, K)
    top = log2_p[0] + log2_gate[0]
    for k in tl.static_range(1, K):
        joint = log2_p[k] + log2_gate[k]
        top = tl.where(joint > top, joint, top)
    powers = ()
    total = top * 0.0
    for k in tl.static_range(K):
        power = tl.exp2(log2_p[k] + log2_gate[k] - top)
        powers = powers + (power,)
        total += power
    return xs, log2_p, powers, top, total


@triton.jit
def log_mixture(top, total):
    """Return log m, -inf in columns no expert allows."""
    return tl.where(top < IMPOSSIBLE, -float("inf"), top * LN2 + log_sum(total, 0.0))


@triton.jit
def normaliser(top, total):
    """Return what turns powers into responsibilities: 0 in columns no expert allows."""
    return tl.where(top < IMPOSSIBLE, 0.0, 1.0 / total)

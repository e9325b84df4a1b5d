"""Two gated mixtures of the same experts, column by column, without cancellation.

Relative to p_top, the largest of the experts the student counts, with e_k = e^{d_k}, u_k = e_k - 1:

    M = sum_k gamma_k e_k = m_gamma / p_top,
    t = m_g / m_gamma - 1 = sum_k (g_k - gamma_k) u_k / M,
    E = log(1 + t) - t, by its series where t is small: phi(t) = E + t log(1 + t) >= 0.

Equal gates and identical experts give t = 0 exactly. Where |t| is above 1/2 both mixtures'
logarithms are taken, the teacher's relative to the largest of its own experts: the student may all
but exclude it.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# ruff: noqa: RUF005  (Triton joins tuples, it does not unpack them)

import triton
import triton.language as tl

from robustgate.ops.triton.algebra import FAR, IMPOSSIBLE, LOG2E, exponential, log1p, log_sum
from robustgate.ops.triton.columns import below_highest


@triton.jit
def softmax64(logits, K: tl.constexpr):
    """Return the softmax of K numbers in memory, in float64; NaN where there is none."""
    top = tl.load(logits)
    for k in tl.static_range(1, K):
        a = tl.load(logits + k)
        top = tl.where(a > top, a, top)
    total = (top * 0.0).to(tl.float64)
    terms = ()
    for k in tl.static_range(K):
        term = tl.exp(tl.load(logits + k).to(tl.float64) - top.to(tl.float64))
        terms = terms + (term,)
        total += term
    values = ()
    for k in tl.static_range(K):
        values = values + (terms[k] / total,)
    return values


@triton.jit
def load_gates(teacher, student, K: tl.constexpr):
    """Return (g, gamma, g - gamma) in float32, and whether both gates are a softmax."""
    g = softmax64(teacher, K)
    gamma = softmax64(student, K)
    gs = ()
    gammas = ()
    differences = ()
    for k in tl.static_range(K):
        gs = gs + (g[k].to(tl.float32),)
        gammas = gammas + (gamma[k].to(tl.float32),)
        differences = differences + ((g[k] - gamma[k]).to(tl.float32),)
    return (gs, gammas, differences), (g[0] == g[0]) & (gamma[0] == gamma[0])


@triton.jit
def compare_mixtures(a, log2_p, gates, inside, K: tl.constexpr):
    """Return what a column needs of two mixtures, and (p_k, u_k - ubar, e_k / M) of each expert.

    The first: p_top, m_g, m_gamma, t, log(1 + t), E and whether |t| < 1/2.
    """
    teacher, student, difference = gates
    d, top = below_highest(a, log2_p, student, K)
    mean_u = d[0] * 0.0
    mean_e = d[0] * 0.0
    moved = d[0] * 0.0  # sum_k (g_k - gamma_k) u_k
    lift = d[0] * 0.0  # how far the teacher's largest expert is above the student's
    powers = ()
    for k in tl.static_range(K):
        e, u = exponential(tl.where(d[k] > FAR, FAR, d[k]))
        powers = powers + ((e, u),)
        mean_u += tl.where(student[k] > 0, student[k] * u, 0.0)
        mean_e += tl.where(student[k] > 0, student[k] * e, 0.0)
        moved += difference[k] * u
        lift = tl.where(d[k] > lift, tl.where(teacher[k] > 0, d[k], lift), lift)
    near = mean_u > -0.5  # else 1 + mean_u would cancel
    one_plus = 1.0 + mean_u
    total = tl.where(near, one_plus, mean_e)
    log_total = log_sum(total, tl.where(near, mean_u - (one_plus - 1.0), 0.0))
    inverse = 1.0 / total
    t = tl.where(lift > FAR, 1e9, moved * inverse)

    above = d[0] * 0.0
    for k in tl.static_range(K):
        above += tl.where(teacher[k] > 0, teacher[k] * tl.exp2((d[k] - lift) * LOG2E), 0.0)
    # The teacher's mass may be far below every expert the student counts: then it has none.
    log_above = tl.where(above > 0, log_sum(above, 0.0), -1e30)
    p_top = tl.where(inside, tl.exp2(top), 0.0)
    of_student = p_top * total
    of_teacher = tl.where(inside, tl.exp2(top + lift * LOG2E) * above, 0.0)
    small = tl.abs(t) < 0.5
    apart = lift + log_above - log_total
    apart = tl.where((top < IMPOSSIBLE) & (of_teacher > 0), float("inf"), apart)
    log_ratio = tl.where(small, log1p(t), apart)
    series = ((((t * 0.166666667 - 0.2) * t + 0.25) * t - 0.333333333) * t + 0.5) * t * -t
    excess = tl.where(tl.abs(t) < 0.03125, series, log_ratio - t)
    experts = ()
    for k in tl.static_range(K):
        e, u = powers[k]
        p = tl.where(inside, tl.exp2(log2_p[k]), 0.0)
        experts = experts + ((p, tl.where(near, u - mean_u, e - mean_e), e * inverse),)
    return (p_top, of_teacher, of_student, t, log_ratio, excess, small), experts


@triton.jit
def divergence_terms(column, experts, K: tl.constexpr):
    """Return what a column adds to the KL and to sum_v (p_k - m_gamma) t of each expert."""
    p_top, of_teacher, of_student, t, log_ratio, excess, small = column
    close = of_student * (excess + t * log_ratio)
    far = tl.where(of_teacher > 0, of_teacher * log_ratio, 0.0) - of_teacher + of_student
    tilts = ()
    for k in tl.static_range(K):
        p, difference, ratio = experts[k]
        moved = of_teacher * ratio - p - of_teacher + of_student
        tilts = tilts + (tl.where(small, p_top * difference * t, moved),)
    return tl.where(small, close, far), tilts


@triton.jit
def pulls(column, experts, gates, K: tl.constexpr):
    """Return p_k (g_k log(1 + t) - gamma_k t) of each expert."""
    _p_top, of_teacher, _of_student, _t, log_ratio, excess, small = column
    teacher, student, difference = gates
    values = ()
    for k in tl.static_range(K):
        p, _difference, ratio = experts[k]
        close = p * (difference[k] * log_ratio + student[k] * excess)
        toward = tl.where(p > 0, p * teacher[k] * log_ratio, 0.0)
        toward = tl.where(teacher[k] > 0, toward, 0.0)
        away = tl.where(student[k] > 0, student[k] * (of_teacher * ratio - p), 0.0)
        values = values + (tl.where(small, close, toward - away),)
    return values

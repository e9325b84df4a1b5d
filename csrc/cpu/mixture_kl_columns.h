// Two gated mixtures of the same experts, column by column: the ratio m_g / m_gamma and what it
// adds to the KL and to the gradients, without cancellation. The equations stand in mixture_kl.cpp.
#pragma once

#include "cpu/columns.h"

namespace robustgate {
namespace RG_ISA {

constexpr float kNear = 0.03125f;  // |t| below which the series serves

// Both gates of a row, in the rows' order: g, gamma, g - gamma, log2 g, log2 gamma.
template <DType D>
struct KLColumns : Columns<D> {
  // Sums: the value, sum_v p_0 sum_k d_k^2; then tilt and sum_v p_0 u_k, or balance, of each
  // expert.
  explicit KLColumns(int64_t experts)
      : Columns<D>(experts, 2 + 2 * experts),
        gates(new float[6 * experts]),
        teacher(gates),
        student(gates + experts),
        difference(gates + 2 * experts),
        log_teacher(gates + 3 * experts),
        log_student(gates + 4 * experts),
        heaviness(gates + 5 * experts),
        exact(new double[2 * experts]) {}
  ~KLColumns() {
    delete[] gates;
    delete[] exact;
  }
  float* const gates;
  float *const teacher, *const student, *const difference, *const log_teacher, *const log_student;
  float* const heaviness;  // gamma in the caller's order
  double* const exact;     // g, gamma in the caller's order

  // Returns false where a gate or a log-sum-exp is not finite.
  template <bool kCap>
  bool start_row(const MixtureKL& op, const LogitRows* grads, int64_t n, const Exponent& e) {
    const int64_t experts = this->experts;
    double *g = exact, *gamma = exact + experts;
    softmax(op.teacher_logits + n * op.teacher_stride, experts, g);
    softmax(op.student_logits + n * op.student_stride, experts, gamma);
    for (int64_t k = 0; k < experts; ++k) heaviness[k] = (float)gamma[k];
    const bool finite = this->template start<kCap>(op.spec, op.logits, grads, n, heaviness,
                                                   op.lse + n * experts, e);
    for (int64_t i = 0; i < experts; ++i) {
      const int64_t k = this->order[i];
      teacher[i] = (float)g[k];
      student[i] = (float)gamma[k];
      difference[i] = (float)(g[k] - gamma[k]);
      log_teacher[i] = (float)::log2(g[k]);
      log_student[i] = (float)::log2(gamma[k]);
    }
    return finite && g[0] == g[0] && gamma[0] == gamma[0];
  }
};

// A vector of columns: both mixtures, t and log(1 + t); e[k] holds p_k.
struct Ratio {
  Vec squared;  // sum_k d_k^2
  Vec p0;
  Vec ubar;          // sum_k gamma_k u_k
  Vec student;       // m_gamma
  Vec t, log_ratio;  // log_ratio = log(1 + t)
  Vec excess;        // E
};

inline Vec log_excess(Vec t, Vec log_ratio) {
  const Vec series =
      -t * t * ((((t * 0.166666667f - 0.2f) * t + 0.25f) * t - 0.333333333f) * t + 0.5f);
  return (t < kNear) & (t > -kNear) ? series : log_ratio - t;
}

// The common case: columns where no expert is e^20 above expert 0; the others count as columns of
// identical experts. c.d, c.e and c.u come from `compare`.
template <DType D>
inline Ratio ratio_of(const KLColumns<D>& c, const Spread& spread, const Vec* x, Vec valid,
                      const Exponent& e) {
  Ratio r;
  Vec difference = {}, teacher = splat(c.teacher[0]);
  r.squared = spread.squared;
  r.ubar = Vec{};
  for (int64_t k = 1; k < c.experts; ++k) {
    r.ubar += c.student[k] * c.u[k];
    difference += c.difference[k] * c.u[k];
    teacher += c.teacher[k] * c.e[k];
  }
  const Vec student = 1.0f + r.ubar, inverse = 1.0f / student;
  r.t = difference * inverse;
  // log(1 + t), and from the ratio itself where 1 + t cancels.
  const VecI small = r.t > -0.5f;
  const Vec sum = 1.0f + r.t;
  r.log_ratio = log_sum(small ? sum : teacher * inverse, small ? r.t - (sum - 1.0f) : Vec{});
  r.excess = log_excess(r.t, r.log_ratio);
  r.p0 = exp2(log2_prob(c.rows[0], x[0], e.scale)) * valid;
  r.student = r.p0 * student;
  for (int64_t k = 0; k < c.experts; ++k) c.e[k] *= r.p0;
  return r;
}

// Columns of any spread, relative to the student's largest term 2^top.
struct FarRatio {
  Vec teacher, student;  // m_g, m_gamma
  Vec t, log_ratio, excess;
  VecI small;        // |t| < 1/2: as in the common case
  Vec log2_student;  // log2 m_gamma
};

template <DType D>
inline FarRatio compare_far_mixtures(const KLColumns<D>& c, const Vec* x, Vec valid,
                                     const Exponent& e) {
  constexpr int kStride = Loader<D>::kPerLoad;
  Vec top_teacher = splat(-3e38f), top = splat(-3e38f);
  for (int64_t k = 0; k < c.experts; ++k) {
    c.d[k] = log2_prob(c.rows[k], x[k * kStride], e.scale);
    c.e[k] = exp2(c.d[k]) * valid;
    top_teacher = max(c.d[k] + c.log_teacher[k], top_teacher);
    top = max(c.d[k] + c.log_student[k], top);
  }
  Vec teacher = {}, student = {}, difference = {};
  for (int64_t k = 0; k < c.experts; ++k) {
    teacher += exp2(c.d[k] + c.log_teacher[k] - top_teacher);
    student += exp2(c.d[k] + c.log_student[k] - top);
    if (c.difference[k] != 0) difference += c.difference[k] * exp2(c.d[k] - top);
  }
  FarRatio r;
  r.teacher = exp2(top_teacher) * teacher * valid;
  r.student = exp2(top) * student * valid;
  r.t = difference / student;
  r.small = (r.t < 0.5f) & (r.t > -0.5f);
  const Vec log_student = log_sum(student, Vec{});
  r.log2_student = top + log_student * kLog2E;
  const Vec log_ratio = (top_teacher - top) * kLn2 + log_sum(teacher, Vec{}) - log_student;
  const VecI excluded = (top < kImpossible) & (r.teacher > 0.0f);
  r.log_ratio = r.small ? log1p(r.t) : excluded ? splat(INFINITY) : log_ratio;
  r.excess = log_excess(r.t, r.log_ratio);
  return r;
}

// g_k p_k log(1 + t) - gamma_k p_k t of expert k.
template <DType D>
inline Vec far_balance(const KLColumns<D>& c, const FarRatio& r, int64_t k) {
  const Vec p = c.e[k];
  const Vec close = p * (c.difference[k] * r.log_ratio + c.student[k] * r.excess);
  // gamma_k p_k (1 + t) = m_g times the student's responsibility, in logarithms.
  const Vec share = r.teacher * exp2(c.d[k] + c.log_student[k] - r.log2_student);
  const Vec toward = p > 0.0f ? p * c.teacher[k] * r.log_ratio : Vec{};
  const Vec apart =
      (c.teacher[k] > 0 ? toward : Vec{}) - ((r.teacher > 0.0f ? share : Vec{}) - c.student[k] * p);
  return r.small ? close : apart;
}

template <DType D>
void add_far_terms(const KLColumns<D>& c, const FarRatio& r, VecI far) {
  Vec *tilt = c.sums + 2, *error = tilt + c.experts;
  const Vec close = r.student * (r.excess + r.t * r.log_ratio);
  const Vec apart = (r.teacher > 0.0f ? r.teacher * r.log_ratio : Vec{}) - r.teacher + r.student;
  c.sums[0] += far ? (r.small ? close : apart) : Vec{};
  for (int64_t k = 0; k < c.experts; ++k) {
    const Vec p = c.e[k];
    const Vec share = r.teacher * exp2(c.d[k] - r.log2_student);  // p_k (1 + t)
    const Vec moved = (r.teacher > 0.0f ? share : Vec{}) - p - r.teacher + r.student;
    tilt[k] += far ? (r.small ? (p - r.student) * r.t : moved) : Vec{};
    error[k] += far ? p - c.e[0] : Vec{};
    c.sums[1] += far ? p * (kFar * kFar) : Vec{};
  }
}

template <DType D>
inline void add_terms(const KLColumns<D>& c, const Vec* x, Vec valid, const Exponent& e) {
  const int64_t experts = c.experts;
  Vec *tilt = c.sums + 2, *error = tilt + experts;
  Spread spread = compare(c, x, (float)e.unit);
  if (any_above(spread.highest, kFar)) {
    add_far_terms(c, compare_far_mixtures(c, x, valid, e), spread.highest > kFar);
    spread = compare(c, x, (float)e.unit);
    ignore_far(c, spread);
  }
  const Ratio r = ratio_of(c, spread, x, valid, e);
  c.sums[0] += r.student * (r.excess + r.t * r.log_ratio);
  c.sums[1] += r.p0 * r.squared;
  const Vec weighted = r.p0 * r.t;
  for (int64_t k = 0; k < experts; ++k) {
    tilt[k] += weighted * (c.u[k] - r.ubar);
    error[k] += r.p0 * c.u[k];
  }
}

}  // namespace RG_ISA
}  // namespace robustgate

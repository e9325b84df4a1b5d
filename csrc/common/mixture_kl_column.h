// What one column adds to KL(m_g || m_gamma) of two gated mixtures of the same experts, and to its
// gradients, without cancellation. With expert 0 the student's heaviest and Delta = g - gamma,
//
//   m_gamma / p_0 = 1 + sum_k gamma_k u_k,   t = m_g / m_gamma - 1 = sum_k Delta_k u_k p_0 /
//   m_gamma, KL += m_gamma phi(t),   phi(t) = (1 + t) log(1 + t) - t = E + t log(1 + t),   E =
//   log(1 + t) - t,
//
// E by its series where t is small: equal gates and identical experts give exactly 0. Columns where
// an expert has e^20 times the probability of expert 0 are taken in logarithms. A Column has
// teacher(k), student(k), difference(k), log2_teacher(k) and log2_student(k) besides what
// common/column.h asks for.
#pragma once

#include "common/column.h"

namespace robustgate {
namespace RG_ISA {

constexpr float kNearRatio = 0.03125f;  // |t| below which the series of E serves

struct KLColumn {
  bool far, close;             // close: |t| < 1/2, or not far
  float distance;              // p_0 sum_k d_k^2, at most 400 sum_k p_k
  float reference;             // far: log2 of the student's largest term; else x_0
  float p0, teacher, student;  // m_g, m_gamma
  float t, log_ratio, excess;  // log(1 + t), E
  float ubar;                  // near: sum_k gamma_k u_k
  float log2_student;          // far: log2 m_gamma
};

RG_HOST_DEVICE float log_excess(float t, float log_ratio) {
  const float series =
      -t * t * ((((t * 0.166666667f - 0.2f) * t + 0.25f) * t - 0.333333333f) * t + 0.5f);
  return ::fabsf(t) < kNearRatio ? series : log_ratio - t;
}

template <typename Column>
RG_HOST_DEVICE KLColumn kl_column(const Column& c, const Exponent& e) {
  const float unit = (float)e.unit, x0 = centred(c, c.base());
  const Spread spread = spread_of(c, x0, unit);
  KLColumn r;
  r.far = spread.highest > kFar;
  r.p0 = ::exp2f(log2_prob(c, c.base(), e.scale));
  if (!r.far) {
    float ubar = 0.0f, difference = 0.0f, teacher = 0.0f;
    RG_UNROLL for (int k = 0; k < c.count(); ++k) {
      const float d = relative_log_prob(c, k, x0, unit), u = ::expm1f(d);
      ubar += c.student(k) * u;
      difference += c.difference(k) * u;
      teacher += c.teacher(k) * ::exp2f(d * (float)kLog2EDouble);
    }
    const float student = 1.0f + ubar;
    r.distance = r.p0 * spread.squared;
    r.ubar = ubar;
    r.close = true;
    r.reference = x0;
    r.t = difference / student;
    // log(1 + t), and from the ratio itself where 1 + t cancels; finite where it is 0.
    r.log_ratio = r.t > -0.5f ? ::log1pf(r.t) : ::logf(::fmaxf(teacher / student, kTiny));
    r.student = r.p0 * student;
    r.teacher = r.p0 * teacher;
    r.log2_student = 0.0f;
  } else {
    float top = -3e38f, top_teacher = -3e38f;
    r.distance = 0.0f;
    RG_UNROLL for (int k = 0; k < c.count(); ++k) {
      const float log2_p = log2_prob(c, k, e.scale);
      r.distance += kFar * kFar * ::exp2f(log2_p);
      top = ::fmaxf(log2_p + c.log2_student(k), top);
      top_teacher = ::fmaxf(log2_p + c.log2_teacher(k), top_teacher);
    }
    float student = 0.0f, teacher = 0.0f, difference = 0.0f;
    RG_UNROLL for (int k = 0; k < c.count(); ++k) {
      const float log2_p = log2_prob(c, k, e.scale);
      student += ::exp2f(log2_p + c.log2_student(k) - top);
      teacher += ::exp2f(log2_p + c.log2_teacher(k) - top_teacher);
      if (c.difference(k) != 0) difference += c.difference(k) * ::exp2f(log2_p - top);
    }
    r.ubar = 0.0f;
    r.reference = top;
    r.student = ::exp2f(top) * student;
    r.teacher = ::exp2f(top_teacher) * teacher;
    r.t = difference / student;
    r.close = ::fabsf(r.t) < 0.5f;
    r.log2_student = top + ::log2f(student);
    const bool excluded = top < kImpossible && r.teacher > 0.0f;
    const float apart = (top_teacher - top) * kLn2 + ::logf(teacher) - ::logf(student);
    r.log_ratio = r.close ? ::log1pf(r.t) : excluded ? (float)INFINITY : apart;
  }
  r.excess = log_excess(r.t, r.log_ratio);
  return r;
}

// What the column adds to the KL.
RG_HOST_DEVICE float kl_value(const KLColumn& r) {
  if (r.close) return r.student * (r.excess + r.t * r.log_ratio);
  return (r.teacher > 0.0f ? r.teacher * r.log_ratio : 0.0f) - r.teacher + r.student;
}

// What it adds to sum_v (p_k - m_gamma) t and to sum_v (p_k - p_0).
struct KLSums {
  float tilt, error;
};

template <typename Column>
RG_HOST_DEVICE KLSums kl_sums(const Column& c, const KLColumn& r, int k, const Exponent& e) {
  if (!r.far) {
    const float u = ::expm1f(relative_log_prob(c, k, r.reference, (float)e.unit));
    return {r.p0 * (u - r.ubar) * r.t, r.p0 * u};
  }
  const float log2_p = log2_prob(c, k, e.scale), p = ::exp2f(log2_p);
  if (r.close) return {(p - r.student) * r.t, p - r.p0};
  const float share = r.teacher > 0.0f ? r.teacher * ::exp2f(log2_p - r.log2_student) : 0.0f;
  return {share - p - r.teacher + r.student, p - r.p0};  // share = p_k (1 + t)
}

// p_k, and the pull g_k p_k log(1 + t) - gamma_k p_k t.
struct KLPull {
  float p, pull;
};

template <typename Column>
RG_HOST_DEVICE KLPull kl_pull(const Column& c, const KLColumn& r, int k, const Exponent& e) {
  float p;
  if (!r.far) {
    const float d = relative_log_prob(c, k, r.reference, (float)e.unit);
    p = r.p0 * ::exp2f(d * (float)kLog2EDouble);
  } else {
    p = ::exp2f(log2_prob(c, k, e.scale));
  }
  if (r.close) return {p, p * (c.difference(k) * r.log_ratio + c.student(k) * r.excess)};
  // gamma_k p_k (1 + t) = m_g times the student's responsibility, in logarithms.
  const float log2_p = log2_prob(c, k, e.scale);
  const float share =
      r.teacher > 0.0f ? r.teacher * ::exp2f(log2_p + c.log2_student(k) - r.log2_student) : 0.0f;
  const float toward = p > 0.0f && c.teacher(k) > 0.0f ? p * c.teacher(k) * r.log_ratio : 0.0f;
  return {p, toward - (share - c.student(k) * p)};
}

}  // namespace RG_ISA
}  // namespace robustgate

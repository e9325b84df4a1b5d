// What one column adds to KL_k = sum_v p_k log(p_k / m), m = sum_k w_k p_k, and to its gradient,
// without cancellation. With expert 0 the one of the largest weight,
//
//   u_k = expm1(d_k),  ubar = sum_k w_k u_k,  1 + ubar = m / p_0,
//   log(p_k / m) = d_k - log1p(ubar),  KL_k += p_0 [ e^d_k log(p_k / m) - (u_k - ubar) ].
//
// The bracket is (m / p_0) phi(t_k) with t_k = (u_k - ubar) / (1 + ubar); where all d_k are small
// it cancels, and phi's series t^2/2 - t^3/6 + t^4/12 - t^5/20 takes its place: identical experts
// give exactly 0. Columns where an expert has e^20 times the probability of expert 0 are taken
// relative to their largest expert. A Column has weight(k) besides what common/column.h asks for.
#pragma once

#include "common/column.h"

namespace robustgate {
namespace RG_ISA {

constexpr float kNearSquared = 9.765625e-4f;  // the series serves where sum d_k^2 is below: 2^-10

struct JsdColumn {
  bool far;
  float squared;    // sum_k d_k^2
  float distance;   // p_0 sum_k d_k^2, at most 400 sum_k p_k
  float reference;  // far: log2 of the largest probability with a weight; else x_0
  float total;      // m relative to it, or to p_0
  float excess;     // near: total - 1
  float log_total;
  float p0, m;
};

template <typename Column>
RG_HOST_DEVICE JsdColumn jsd_column(const Column& c, const Exponent& e) {
  const float unit = (float)e.unit, x0 = centred(c, c.base());
  const Spread spread = spread_of(c, x0, unit);
  JsdColumn j;
  j.far = spread.highest > kFar;
  j.squared = spread.squared;
  j.p0 = ::exp2f(log2_prob(c, c.base(), e.scale));
  if (!j.far) {
    j.distance = j.p0 * j.squared;
    j.reference = x0;
    j.excess = 0.0f;
    RG_UNROLL for (int k = 0; k < c.count(); ++k) {
      j.excess += c.weight(k) * ::expm1f(relative_log_prob(c, k, x0, unit));
    }
    j.total = 1.0f + j.excess;
    j.log_total = ::log1pf(j.excess);
    j.m = j.p0 * j.total;
    return j;
  }
  j.reference = -3e38f;
  j.distance = 0.0f;
  RG_UNROLL for (int k = 0; k < c.count(); ++k) {
    j.distance += kFar * kFar * ::exp2f(log2_prob(c, k, e.scale));
    if (c.weight(k) > 0) j.reference = ::fmaxf(log2_prob(c, k, e.scale), j.reference);
  }
  j.excess = j.total = 0.0f;
  RG_UNROLL for (int k = 0; k < c.count(); ++k) {
    if (c.weight(k) > 0) {
      j.total += c.weight(k) * ::exp2f(log2_prob(c, k, e.scale) - j.reference);
    }
  }
  j.log_total = ::logf(j.total);
  j.m = ::exp2f(j.reference) * j.total;
  return j;
}

// p_k and log(p_k / m), which is infinite where no expert that counts allows the column.
struct JsdTerm {
  float p, log_ratio;
};

template <typename Column>
RG_HOST_DEVICE JsdTerm jsd_term(const Column& c, const JsdColumn& j, int k, const Exponent& e) {
  if (!j.far) {
    const float d = relative_log_prob(c, k, j.reference, (float)e.unit);
    return {j.p0 * ::exp2f(d * (float)kLog2EDouble), d - j.log_total};
  }
  const float log2_p = log2_prob(c, k, e.scale);
  const float p = ::exp2f(log2_p);
  const bool excluded = j.reference < kImpossible && p > 0.0f;
  return {p, excluded ? (float)INFINITY : (log2_p - j.reference) * kLn2 - j.log_total};
}

// What the column adds to KL_k, and to sum_v (p_k - p_0).
struct JsdSums {
  float kl, error;
};

template <typename Column>
RG_HOST_DEVICE JsdSums jsd_sums(const Column& c, const JsdColumn& j, int k, const Exponent& e) {
  const JsdTerm term = jsd_term(c, j, k, e);
  if (j.far) return {term.p * term.log_ratio - term.p + j.m, term.p - j.p0};
  const float u = ::expm1f(relative_log_prob(c, k, j.reference, (float)e.unit));
  const float difference = u - j.excess;
  if (j.squared < kNearSquared) {
    const float t = difference / j.total;
    const float series = (((t * -0.05f + 0.0833333333f) * t - 0.166666667f) * t + 0.5f);
    return {j.p0 * (difference * t * series), j.p0 * u};
  }
  return {term.p * term.log_ratio - j.p0 * difference, j.p0 * u};
}

}  // namespace RG_ISA
}  // namespace robustgate

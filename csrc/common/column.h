// One column of K experts, relative to one of them: what the ops that compare experts start with,
// for any K and without memory of its own. Shared by host and device.
//
//   d_k = log p_k - log p_0 = unit (x_k - x_0) - (high_k + low_k),   x_k = max(u_k, floor_k) - c_k
//
// u = z or tanh(z / softcap), unit the effective logits per unit of u. The logits' difference is
// taken first and is exact where they are nearly equal, and the difference of the log-sum-exps
// comes from float64 in two parts: nearly equal experts keep every digit of their difference.
// Centres c_k are 0 unless logits are large, when u - c_k is exact. Columns more than 2^20 nats
// below the row's log-sum-exp count as impossible.
//
// A Column has count() experts, base() the one the others are compared with, u(k) and scalars(k).
#pragma once

#include "common/exponent.h"
#include "common/thresholds.h"

namespace robustgate {
namespace RG_ISA {

// What a row's log-sum-exp comes to for one expert.
struct ExpertScalars {
  float centre, floor;       // x = max(u, floor) - centre
  float high, low;           // d = unit (x - x_0) - high - low
  float exponent, residual;  // log2 p = (u scale - exponent) - residual
};

RG_HOST_DEVICE float centre_of(double lse, const Exponent& e, bool cap) {
  const double in_u = lse / e.unit;
  return cap || (in_u < 64 && in_u > -64) ? 0.0f : (float)in_u;
}

RG_HOST_DEVICE ExpertScalars expert_scalars(double lse, double lse_of_base, const Exponent& e,
                                            bool cap) {
  // In effective logits of the rounded unit, so that its rounding is relative.
  const double unit = (float)e.unit;
  const double floor = lse / e.unit + kImpossible / e.unit;
  ExpertScalars s;
  s.centre = centre_of(lse, e, cap);
  s.floor = cap ? -2.0f : (float)(floor > -3.4e38 ? floor : -3.4e38);
  const double offset = (lse - lse_of_base) * (unit / e.unit) -
                        ((double)s.centre - centre_of(lse_of_base, e, cap)) * unit;
  s.high = (float)offset;
  s.low = (float)(offset - s.high);
  const double exponent = lse / e.natural;
  s.exponent = (float)exponent;
  s.residual = (float)(exponent - s.exponent);
  return s;
}

// log2 p, finite also where the logit is -inf.
RG_HOST_DEVICE float log2_prob(float u, const ExpertScalars& s, float scale) {
  return ::fmaf(::fmaxf(u, s.floor), scale, -s.exponent) - s.residual;
}

template <typename Column>
RG_HOST_DEVICE float log2_prob(const Column& c, int k, float scale) {
  return log2_prob(c.u(k), c.scalars(k), scale);
}

template <typename Column>
RG_HOST_DEVICE float centred(const Column& c, int k) {
  const ExpertScalars& s = c.scalars(k);
  return ::fmaxf(c.u(k), s.floor) - s.centre;
}

// d_k, with the rounding error of the logits' difference added back (Knuth's two-sum): experts that
// differ by a constant leave a small difference of large numbers.
template <typename Column>
RG_HOST_DEVICE float relative_log_prob(const Column& c, int k, float x0, float unit) {
  const float x = centred(c, k);
  const float difference = x - x0;
  const float v = difference - x;
  const float error = (x - (difference - v)) - (x0 + v);
  return (difference * unit - c.scalars(k).high) + (error * unit - c.scalars(k).low);
}

// What the d_k of a column come to.
struct Spread {
  float highest;  // max_k d_k, at least 0
  float squared;  // sum_k d_k^2
};

template <typename Column>
RG_HOST_DEVICE Spread spread_of(const Column& c, float x0, float unit) {
  Spread spread{0.0f, 0.0f};
  RG_UNROLL for (int k = 0; k < c.count(); ++k) {
    const float d = relative_log_prob(c, k, x0, unit);
    spread.highest = ::fmaxf(d, spread.highest);
    spread.squared += d * d;
  }
  return spread;
}

}  // namespace RG_ISA
}  // namespace robustgate

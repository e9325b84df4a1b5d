// Log-sum-exps of rows of logits: what every op over logits starts with.
//
// Terms are 2^(a u - a top) with u = z (or tanh(z / softcap)), a = log2(e) softcap / temperature,
// and top the maximum of the first 512 columns and of one column the caller names, such as the
// target, which is the peak where a model is sure: no running rescale, one fused multiply-add and
// one exp2 a column. A row whose sum comes out far from that (beyond 2^64, or not finite) is redone
// from its true maximum; what is still not finite (NaN, +inf) ends as NaN, and the log-sum-exp of
// nothing but -inf is -inf.
//
// Sums are float32 for kAddsPerFloatSum terms a lane, then float64: a row of equal terms rounds the
// same way at every addition.
#pragma once

#include "common/exponent.h"
#include "common/online_softmax.h"
#include "cpu/simd.h"

namespace robustgate {
namespace RG_ISA {

constexpr int64_t kReferenceColumns = 512;
constexpr int64_t kAddsPerFloatSum = 16;
constexpr int kUnroll = 4;  // vectors in flight
constexpr int64_t kColumnsPerFloatSum = kAddsPerFloatSum * kUnroll * kLanes;

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

// Largest sum relative to a guessed maximum that is accepted: terms up to 2^64 err by 1.3e-6.
constexpr double kLargestSum = 1.8446744073709552e19;

template <bool kCap>
inline Vec capped(Vec x, const Exponent& e) {
  return kCap ? tanh(x * e.inner) : x;
}

// Columns [0, count) of a row, count < one load, as floats.
template <DType D>
inline void widen_tail(const typename Loader<D>::Element* z, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Loader<D>::to_float(z[i]);
}

template <DType D>
float row_max(const typename Loader<D>::Element* z, int64_t columns) {
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  constexpr int64_t kStep = kLanes * kPerLoad;
  Vec best = splat(-INFINITY);
  int64_t v = 0;
  for (; v + kStep <= columns; v += kStep) {
    Vec x[kPerLoad];
    Loader<D>::load(z + v, x);
    for (int j = 0; j < kPerLoad; ++j) best = max(x[j], best);
  }
  float result = max_lanes(best);
  for (; v < columns; ++v) {
    const float x = Loader<D>::to_float(z[v]);
    result = x > result ? x : result;
  }
  return result;
}

template <DType D>
bool has_nan(const typename Loader<D>::Element* z, int64_t columns) {
  for (int64_t v = 0; v < columns; ++v) {
    const float x = Loader<D>::to_float(z[v]);
    if (x != x) return true;
  }
  return false;
}

// sum_v 2^(scale (u_v - top)). The fused form subtracts the rounded product scale * top, one
// instruction less; log2 of its sum is relative to that product.
template <DType D, bool kCap, bool kFused>
double sum_exp2(const typename Loader<D>::Element* z, int64_t vocab, const Exponent& e, float top) {
  const float shift = top * e.scale;
  const auto term = [&](Vec x) {
    const Vec u = capped<kCap>(x, e);
    return kFused ? u * e.scale - shift : (u - top) * e.scale;
  };
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  constexpr int kLoads = kUnroll / kPerLoad;
  constexpr int64_t kLoadStep = kLanes * kPerLoad;
  constexpr int64_t kStep = kLanes * kUnroll;
  // 16-bit logits are compute-bound: the shorter polynomial is below their rounding by far.
  constexpr int kDegree = kPerLoad == 2 || D == DType::kFloat16 ? 2 : 3;
  VecD total = {};
  int64_t v = 0;
  while (v + kStep <= vocab) {
    const int64_t stop = vocab - v > kColumnsPerFloatSum ? v + kColumnsPerFloatSum : vocab;
    Vec sum[kUnroll] = {};
    for (; v + kStep <= stop; v += kStep) {
      Vec x[kUnroll];
      for (int i = 0; i < kLoads; ++i) Loader<D>::load(z + v + i * kLoadStep, x + i * kPerLoad);
      for (int i = 0; i < kUnroll; ++i) {
        sum[i] += exp2<kDegree>(term(x[i]));
      }
    }
    total += widen((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  float tail[kLanes * kUnroll] = {};
  widen_tail<D>(z + v, vocab - v, tail);
  for (int64_t i = 0; v + i < vocab; i += kLanes) {
    const Vec value = exp2(term(load<Vec>(tail + i)));
    total += widen(lane_index() < (float)(vocab - v - i) ? value : Vec{});
  }
  return sum_lanes(total);
}

inline double effective_logit(double x, const LogitsSpec& spec) {
  return (spec.softcap > 0 ? spec.softcap * ::tanh(x / spec.softcap) : x) / spec.temperature;
}

// log sum_v exp z'_v = reference + log_sum; kept apart so that z'_y - reference is exact however
// large the logits are.
struct LogSumExp {
  double reference;
  double log_sum;

  double value() const { return reference + log_sum; }
};

template <DType D, bool kCap>
LogSumExp row_log_sum_exp(const typename Loader<D>::Element* z, int64_t likely_peak, int64_t vocab,
                          const Exponent& e) {
  float top;
  for (int attempt = 0; attempt < 2; ++attempt) {
    const bool guess = attempt == 0;
    const bool partial = guess && vocab > kReferenceColumns;
    top = row_max<D>(z, partial ? kReferenceColumns : vocab);
    if (const float y = Loader<D>::to_float(z[likely_peak]); y > top) top = y;
    if (kCap) top = (float)::tanh((double)top * e.inner);
    if (!(top - top == 0)) continue;  // infinite
    const bool fused = guess && kFusedMultiplyAdd;
    const double sum = fused ? sum_exp2<D, kCap, kFusedMultiplyAdd>(z, vocab, e, top)
                             : sum_exp2<D, kCap, false>(z, vocab, e, top);
    if (sum > 0 && sum < (guess ? kLargestSum : (double)INFINITY)) {
      const double exponent = fused ? (double)(top * e.scale) : (double)top * e.scale;
      return {exponent * e.natural, ::log2(sum) * e.natural};
    }
  }
  return {top == -INFINITY && !has_nan<D>(z, vocab) ? -(double)INFINITY : (double)NAN, 0.0};
}

inline LogSumExp row_log_sum_exp(const double* z, const LogitsSpec& spec) {
  auto state = OnlineSoftmax<double>::empty();
  for (int64_t v = 0; v < spec.vocab; ++v) {
    state.add(effective_logit(z[v], spec), kLog2EDouble);
  }
  return {state.summable_max(), ::log2(state.sum) / kLog2EDouble};
}

}  // namespace RG_ISA
}  // namespace robustgate

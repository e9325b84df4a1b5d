// Rows of every expert as exponentials, for columns whose experts are clearly apart.
//
// exp(z' - reference) of a row goes to a cache-resident scratch together with its sum and first
// moment, so that a second pass over the columns costs a product per expert and one logarithm: p_k
// = scratch_k / sum_k and E_{p_k}[log p_k] = E[exponent] - log sum. Differences of such sums err by
// about 2e-7 nats: they serve where every divergence is above kApart, and every weight above
// kSmallestWeight, so that a mixture is never far below all its experts.
#pragma once

#include "cpu/columns.h"

namespace robustgate {
namespace RG_ISA {

constexpr float kLowestExponent = -200.0f;  // of two; 2^-200 is 0

// Columns in a scratch row: whole steps of sum_exp2.
inline int64_t scratch_stride(int64_t vocab) {
  constexpr int64_t kStep = kLanes * kUnroll;
  return (vocab + kStep - 1) / kStep * kStep;
}

// exp(z' - reference) of a row, in the order of the Loader's vectors.
struct RowExponentials {
  double sum;
  double mean_exponent;  // E_p[log2 of the exponential]
  LogSumExp lse;
};

// Fills out and returns whether the row has a finite sum relative to the guessed maximum.
template <DType D, bool kCap>
bool row_exponentials(const typename Loader<D>::Element* z, int64_t vocab, const Exponent& e,
                      float* out, RowExponentials& row) {
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  constexpr int kLoads = kUnroll / kPerLoad;
  constexpr int64_t kStep = kLanes * kUnroll;
  constexpr int kDegree = kPerLoad == 2 || D == DType::kFloat16 ? 2 : 3;
  float top = row_max<D>(z, vocab > kReferenceColumns ? kReferenceColumns : vocab);
  if (kCap) top = (float)::tanh((double)top * e.inner);
  if (!(top - top == 0)) return false;
  const float shift = top * e.scale;
  VecD total = {}, moment = {};
  Vec sum[kUnroll] = {}, first[kUnroll] = {};
  const auto add = [&](Vec* x, float* to, const Vec* valid) {
    for (int i = 0; i < kUnroll; ++i) {
      const Vec u = capped<kCap>(x[i], e);
      // NaN stays NaN: `max` returns its second argument then.
      const Vec t = max(splat(kLowestExponent),
                        kFusedMultiplyAdd ? u * e.scale - shift : (u - top) * e.scale);
      const Vec value = valid ? exp2<kDegree>(t) * valid[i] : exp2<kDegree>(t);
      store(to + i * kLanes, value);
      sum[i] += value;
      first[i] += value * t;
    }
  };
  int64_t v = 0;
  while (v + kStep <= vocab) {
    const int64_t stop = vocab - v > kColumnsPerFloatSum / 2 ? v + kColumnsPerFloatSum / 2 : vocab;
    for (; v + kStep <= stop; v += kStep) {
      Vec x[kUnroll];
      for (int i = 0; i < kLoads; ++i)
        Loader<D>::load(z + v + i * kLanes * kPerLoad, x + i * kPerLoad);
      add(x, out + v, nullptr);
    }
    total += widen((sum[0] + sum[1]) + (sum[2] + sum[3]));
    moment += widen((first[0] + first[1]) + (first[2] + first[3]));
    for (int i = 0; i < kUnroll; ++i) sum[i] = first[i] = Vec{};
  }
  if (v < vocab) {
    typename Loader<D>::Element tail[kStep], ones[kStep];
    for (int64_t i = 0; i < kStep; ++i) {
      tail[i] = z[v + (v + i < vocab ? i : 0)];
      ones[i] = Loader<D>::from_float(v + i < vocab ? 1.0f : 0.0f);
    }
    Vec x[kUnroll], valid[kUnroll];
    for (int i = 0; i < kLoads; ++i) {
      Loader<D>::load(tail + i * kLanes * kPerLoad, x + i * kPerLoad);
      Loader<D>::load(ones + i * kLanes * kPerLoad, valid + i * kPerLoad);
    }
    add(x, out + v, valid);
    total += widen((sum[0] + sum[1]) + (sum[2] + sum[3]));
    moment += widen((first[0] + first[1]) + (first[2] + first[3]));
  }
  row.sum = sum_lanes(total);
  // Terms beyond 2^64 would overflow the products of the second pass.
  if (!(row.sum > 0 && row.sum < kLargestSum)) return false;
  row.mean_exponent = sum_lanes(moment) / row.sum;
  const double exponent = kFusedMultiplyAdd ? (double)shift : (double)top * e.scale;
  row.lse = {exponent * e.natural, ::log2(row.sum) * e.natural};
  return true;
}

// The rows of K experts in scratch, and the factors that make a mixture of them.
struct Exponentials {
  float* rows;     // [K, stride]
  float* factors;  // [2, K]
  int64_t stride;

  Exponentials(float* scratch, int64_t experts, int64_t vocab)
      : rows(scratch),
        factors(scratch + experts * scratch_stride(vocab)),
        stride(scratch_stride(vocab)) {}

  const float* row(int64_t k) const { return rows + k * stride; }
};

}  // namespace RG_ISA
}  // namespace robustgate

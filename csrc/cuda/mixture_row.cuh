// The mixture of K log-probs of one row: by one thread for any K, or by the lanes of a warp.
#pragma once

#include <math.h>
#include <stdint.h>

namespace robustgate::cuda {

// Finite shift for exp(x - shift); 0 where the maximum is infinite or NaN, which then propagates.
template <typename S>
__device__ __forceinline__ S finite_or_zero(S x) {
  return x - x == 0 ? x : S(0);
}

// log sum_k exp(term(k)), as a shift and the log of the sum relative to it: large terms lose
// nothing.
template <typename S>
struct LogSum {
  S shift, log_sum;

  template <typename Term>
  static __device__ LogSum of(int64_t count, const Term& term) {
    S top = term(0);
    for (int64_t k = 1; k < count; ++k) top = term(k) > top ? term(k) : top;
    const S shift = finite_or_zero(top);
    S sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += ::exp(term(k) - shift);
    return {shift, ::log(sum)};
  }
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = ::fmaxf(x, __shfl_xor_sync(~0u, x, lanes));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// Softmax of the gate logits in the lanes, in float64; lanes without one hold -inf and get 0. NaN
// for NaN, +inf or nothing but -inf.
__device__ __forceinline__ double softmax_of_lanes(float gate) {
  const double power = ::exp(static_cast<double>(gate) - warp_max(gate));
  double sum = power;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  return power / sum;
}

// log sum_k softmax(gate)_k exp(log_prob_k) with expert k in lane k; the other lanes hold -inf.
// Every lane of the warp calls and gets it. NaN stays.
__device__ __forceinline__ float mixture_of_lanes(float log_prob, float gate) {
  const float centred = gate - finite_or_zero(warp_max(gate));
  const float log_gate = centred - ::logf(warp_sum(::expf(centred)));
  const float term = log_gate + log_prob;
  const float top = finite_or_zero(warp_max(term));
  return top + ::logf(warp_sum(::expf(term - top)));
}

}  // namespace robustgate::cuda

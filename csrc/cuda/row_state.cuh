// The log-sum-exp of a row, one thread's share of it.
#pragma once

#include "common/exponent.h"
#include "common/online_softmax.h"
#include "cuda/columns.cuh"
#include "cuda/packs.cuh"

namespace robustgate::cuda {

// Adds a pack: one rescale for all of its values. Differences are taken before they are scaled, so
// that large logits lose nothing. NaN stays in the sum.
template <int kCount>
__device__ __forceinline__ void add_exponents(OnlineSoftmax<float>& state, const float (&u)[kCount],
                                              float scale) {
  float top = state.max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) top = ::fmaxf(top, u[i]);
  // Nothing but -inf so far: any finite reference gives a sum of 0.
  const float reference = top == -INFINITY ? 0.0f : top;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += ::exp2f((u[i] - reference) * scale);
  state.sum = ::fmaf(state.sum, ::exp2f((state.max - reference) * scale), sum);
  state.max = top;
}

// The log-sum-exp state of columns [begin, end) of a row, one thread's share. With kOnce the row is
// in global memory and read past the caches.
template <bool kOnce, typename T>
__device__ OnlineSoftmax<float> row_state(const T* z, int64_t begin, int64_t end, float scale,
                                          const ColumnTransform& transform) {
  constexpr int kPack = kPackSize<T>, kUnroll = 4;
  auto state = OnlineSoftmax<float>::empty();
  const auto add = [&](uint4 pack) {
    float u[kPack];
    unpack<T>(pack, u);
    if (transform.cap) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) u[i] = transform(u[i]);
    }
    add_exponents(state, u, scale);
  };
  // Scalar head up to a 16-byte boundary, packs, scalar tail.
  const int64_t head = ::min(end - begin, static_cast<int64_t>(to_boundary(z + begin)));
  const int64_t packs = (end - begin - head) / kPack;
  const int64_t tail = begin + head + packs * kPack;
  const int64_t edge = threadIdx.x < head ? begin + threadIdx.x : tail + (threadIdx.x - head);
  if (edge < end && (threadIdx.x < head || edge >= tail)) {
    const float u[1] = {transform(to_float(z[edge]))};
    add_exponents(state, u, scale);
  }
  const uint4* packed = reinterpret_cast<const uint4*>(z + begin + head);
  const int64_t step = blockDim.x;
  for (int64_t p = threadIdx.x; p < packs; p += kUnroll * step) {
    uint4 pack[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (p + i * step < packs) {
        pack[i] = kOnce ? __ldcs(packed + p + i * step) : packed[p + i * step];
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (p + i * step < packs) add(pack[i]);
    }
  }
  return state;
}

// The natural log of a merged state's sum, relative to its maximum.
__device__ __forceinline__ double log_of_sum(OnlineSoftmax<float> state, const Exponent& e) {
  return ::log2(static_cast<double>(state.sum)) * e.natural;
}

// Natural log-sum-exp of a merged state; NaN where there is none.
__device__ __forceinline__ double log_sum_exp(OnlineSoftmax<float> state, const Exponent& e) {
  return state.summable_max() * e.unit + log_of_sum(state, e);
}

}  // namespace robustgate::cuda

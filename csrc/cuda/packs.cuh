// 16-byte packs of logits: loads at any alignment, conversion to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace robustgate::cuda {

template <typename T>
constexpr int kPackSize = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  return x;
}
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}

// Elements between p and the 16-byte boundary at or after it.
template <typename T>
__device__ __forceinline__ int to_boundary(const T* p) {
  return static_cast<int>(-reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// kPackSize elements from any element's address: one aligned load, or two and a shift. What the two
// cover beyond the elements lies in the same 16 bytes as one of them.
template <typename T>
__device__ __forceinline__ uint4 load_pack(const T* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const unsigned offset = address % 16;
  const uint4* aligned = reinterpret_cast<const uint4*>(address - offset);
  const uint4 a = aligned[0];
  if (offset == 0) return a;
  const uint4 b = aligned[1];
  const bool two = offset & 8, one = offset & 4;
  const uint32_t w0 = two ? a.z : a.x, w1 = two ? a.w : a.y, w2 = two ? b.x : a.z;
  const uint32_t w3 = two ? b.y : a.w, w4 = two ? b.z : b.x, w5 = two ? b.w : b.y;
  const uint32_t v0 = one ? w1 : w0, v1 = one ? w2 : w1, v2 = one ? w3 : w2;
  const uint32_t v3 = one ? w4 : w3, v4 = one ? w5 : w4;
  const unsigned bits = offset % 4 * 8;
  return make_uint4(__funnelshift_r(v0, v1, bits), __funnelshift_r(v1, v2, bits),
                    __funnelshift_r(v2, v3, bits), __funnelshift_r(v3, v4, bits));
}

// The pack as floats.
template <typename T>
__device__ __forceinline__ void unpack(uint4 pack, float (&out)[kPackSize<T>]) {
  const T* elements = reinterpret_cast<const T*>(&pack);
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) out[i] = to_float(elements[i]);
}

// Rounds and stores a pack, past the caches: nobody reads it soon.
template <typename T>
__device__ __forceinline__ void store_pack(T* p, const float (&values)[kPackSize<T>]) {
  uint4 pack;
  T* elements = reinterpret_cast<T*>(&pack);
#pragma unroll
  for (int i = 0; i < kPackSize<T>; ++i) elements[i] = from_float<T>(values[i]);
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    __stcs(reinterpret_cast<uint4*>(p), pack);
  } else {
#pragma unroll
    for (int i = 0; i < kPackSize<T>; ++i) p[i] = elements[i];
  }
}

}  // namespace robustgate::cuda

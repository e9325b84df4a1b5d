// The 16-bit floating-point types, and what cuda_fp16.h and cuda_bf16.h have in common.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>

#include "cuda_on_cpu/vector_types.h"

namespace cuda_on_cpu {

struct Binary16 {
  static uint16_t round(float x) {  // to nearest even
    const auto sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16 & 0x8000);
    const float size = fabsf(x);
    if (x != x) return 0x7fff;
    if (size >= 65520) return sign | 0x7c00;
    const int exponent = size < 0x1p-14f ? -14 : ilogbf(size);
    const float steps = nearbyintf(ldexpf(size, 10 - exponent));  // of the last of 11 digits
    return sign | static_cast<uint16_t>(((exponent + 14) << 10) + static_cast<int>(steps));
  }
  static float widen(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
    const bool finite = (bits & 0x7c00) != 0x7c00;
    const float size =
        finite ? std::bit_cast<float>(rest) * 0x1p112f : std::bit_cast<float>(rest | 0x7f800000u);
    return std::bit_cast<float>(std::bit_cast<uint32_t>(size) | sign);
  }
};

struct BFloat16 {
  static uint16_t round(float x) {  // to nearest even
    const auto bits = std::bit_cast<uint32_t>(x);
    return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static float widen(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

template <typename Format>
struct ShortFloat {
  uint16_t bits;
  ShortFloat() = default;
  ShortFloat(float x) : bits(Format::round(x)) {}
  operator float() const { return Format::widen(bits); }
};

template <typename Format>
struct alignas(4) ShortFloat2 {
  ShortFloat<Format> x, y;
};

}  // namespace cuda_on_cpu

// Conversions named after the type: name is half or bfloat16, pair half2 or bfloat162.
#define CUDA_ON_CPU_SHORT_FLOAT(type, name, pair)                                           \
  inline float __##name##2float(type x) { return x; }                                       \
  inline type __float2##name(float x) { return x; }                                         \
  inline type __float2##name##_rn(float x) { return x; }                                    \
  inline unsigned short __##name##_as_ushort(type x) { return x.bits; }                     \
  inline type __ushort_as_##name(unsigned short bits) { return std::bit_cast<type>(bits); } \
  inline type##2 __floats2##pair##_rn(float x, float y) { return {x, y}; }                  \
  inline type##2 __float22##pair##_rn(float2 v) { return {v.x, v.y}; }                      \
  inline type##2 __halves2##pair(type x, type y) { return {x, y}; }                         \
  inline float2 __##pair##2float2(type##2 v) { return {v.x, v.y}; }                         \
  inline float __low2float(type##2 v) { return v.x; }                                       \
  inline float __high2float(type##2 v) { return v.y; }

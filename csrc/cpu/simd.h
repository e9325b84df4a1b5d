// Vectors of float for one instruction set, on GCC/Clang vector extensions.
//
// The same source is compiled once per instruction set (CMakeLists.txt) with RG_ISA naming the
// namespace; everything here has that namespace, and nothing from the C++ standard library is used,
// so that no inline function can be merged across instruction sets by the linker.
//
//   Vec        kLanes floats, one register
//   exp2(t)    2^t; 0 for t = -inf, inf for t >= 128, NaN kept; relative error: see the two forms
//   tanh(y)    relative error <= 3.5e-7, NaN kept
//   Loader<T>  reads kLanes * kPerLoad elements of T as kPerLoad vectors (order inside is free,
//              the same for Loader<T>::store)
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

namespace robustgate {
namespace RG_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef double VecD __attribute__((vector_size(8 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));  // also what a comparison gives

inline Vec splat(float x) { return Vec{} + x; }

template <typename V>
inline V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
inline void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

// max(a, b) that returns b when either is NaN.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// Whether x > bound in any lane; false where x is NaN.
inline bool any_above(Vec x, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)splat(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)splat(bound), _CMP_GT_OQ)) != 0;
#else
  const VecI above = x > splat(bound);
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= above[i];
  return any != 0;
#endif
}

// Whether x > bound in every lane; false where x is NaN.
inline bool all_above(Vec x, float bound) {
  for (int i = 0; i < kLanes; ++i) {
    if (!(x[i] > bound)) return false;
  }
  return true;
}

// 0, 1, 2, ...
inline Vec lane_index() {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = (float)i;
  return v;
}

inline VecD widen(Vec v) { return __builtin_convertvector(v, VecD); }

inline double sum_lanes(VecD v) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline float max_lanes(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// 2^t. Adding 1.5 * 2^s rounds t to a multiple of 2^(s - 23) and leaves its integer in the low
// bits.
#if defined(__AVX512F__)
// 2^t = 2^floor(t) * table[j] * P(t - floor(t) - j/16), j = floor(16 t) mod 16. P interpolates at
// both ends of [0, 1/16], so the result is continuous and exact at t = 0; it errs by <= 6.6e-7
// (degree 2, mean 4e-9) or 4e-9 (degree 3), then rounding. reduce() and scalef() follow IEEE for
// infinities.
template <int kDegree = 3>
inline Vec exp2(Vec t) {
  const Vec table = {1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                     1.29683959f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                     1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};
  constexpr int kSixteenths = 4 << 4, kFloor = 1, kQuiet = 8;
  const __m512i index = (__m512i)_mm512_add_round_ps((__m512)t, (__m512)splat(786432.0f),
                                                     _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const Vec f = (Vec)_mm512_reduce_ps((__m512)t, kSixteenths | kFloor | kQuiet);
  Vec p;
  if constexpr (kDegree == 2) {
    p = f * 0.245496377f + 0.693036973f;
  } else {
    p = (f * 0.0567211546f + 0.240181178f) * f + 0.6931476f;
  }
  p = p * f + 1.0f;
  const Vec power = (Vec)_mm512_permutexvar_ps(index, (__m512)table);
  return (Vec)_mm512_scalef_ps((__m512)power, (__m512)t) * p;
}
#else
// 2^t = 2^n P(t - n), n the nearest integer; the degree-6 minimax polynomial errs by <= 2e-8.
template <int kDegree = 3>
inline Vec exp2(Vec t) {
  t = min(splat(128.0f), max(splat(-127.0f), t));
  const Vec magic = splat(12582912.0f + 127.0f);  // 1.5 * 2^23 + exponent bias
  const Vec shifted = t + magic;
  const Vec f = t - (shifted - magic);
  Vec p = f * 1.5353362e-4f + 1.3398874e-3f;
  p = p * f + 9.6184370e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314720e-1f;
  p = p * f + 1.0f;
  return (Vec)((VecU)shifted << 23) * p;
}
#endif

constexpr float kLog2E = 1.44269504088896340736f;

// e^d and e^d - 1, both to 1e-7 relative, for d <= 80; below -87 they are 0 and -1.
struct Exponential {
  Vec value;
  Vec minus_one;
};

// e^d = 2^n 2^f with n the nearest integer, and 2^f - 1 = f P(f) errs by <= 1.1e-8 relative.
inline Exponential exponential(Vec d) {
#if defined(__AVX512F__)
  constexpr int kNearest = 8;
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)(d * kLog2E), kNearest);
  const Vec power = (Vec)_mm512_scalef_ps((__m512)splat(1.0f), (__m512)n);
#else
  const VecI tiny = d < -87.0f;
  d = max(splat(-87.0f), d);
  const Vec magic = splat(12582912.0f + 127.0f);
  const Vec shifted = d * kLog2E + magic;
  const Vec n = shifted - magic;
  const Vec power = (Vec)((VecU)shifted << 23);
#endif
  const Vec f = d * kLog2E - n;
  Vec p = f * 1.5403512e-4f + 1.3390736e-3f;
  p = p * f + 9.6182376e-3f;
  p = p * f + 5.5503574e-2f;
  p = p * f + 2.4022649e-1f;
  p = (p * f + 6.9314718e-1f) * f;
  const Vec value = power * p + power;
#if defined(__AVX512F__)
  return {value, power * p + (power - 1.0f)};
#else
  return {tiny ? Vec{} : value, power * p + (power - 1.0f)};
#endif
}

// log(y + residual) for y > 0 and a residual of at most its last place: relative error 1e-7 also
// near 1, where log1p(x) = log_sum(1 + x, x - ((1 + x) - 1)). y = 0 gives about -88.
inline Vec log_sum(Vec y, Vec residual) {
  const VecI bits = (VecI)y;
  const VecI exponent = ((bits - 0x3f400000) >> 23) << 23;  // y = m 2^exponent, m in [0.75, 1.5)
  const Vec m = (Vec)(bits - exponent);
  const Vec r = residual * (Vec)(0x3f800000 - exponent) + (m - 1.0f);
  Vec q = r * 5.4111741e-2f - 1.2076720e-1f;
  q = q * r + 1.4994498e-1f;
  q = q * r - 1.6824313e-1f;
  q = q * r + 1.9975913e-1f;
  q = q * r - 2.4993218e-1f;
  q = q * r + 3.3333594e-1f;
  q = q * r - 5.0000066e-1f;
  q = q * r * r + r;
  const Vec n = __builtin_convertvector(exponent >> 23, Vec);
  return n * 0.693147181f + q;
}

// log2 m for normal m > 0, to 1e-7 absolute.
inline Vec log2_of(Vec m) {
#if defined(__AVX512F__)
  // m = 2^n (1 + j/16 + ...): log2 m = n + log2(c_j) + log2(m 2^-n / c_j), c_j = 1 + (j + 1/2)/16.
  const Vec inverse = {0.969696999f, 0.914285719f, 0.864864886f, 0.820512831f,
                       0.780487776f, 0.744186044f, 0.711111128f, 0.680851042f,
                       0.653061211f, 0.627451003f, 0.603773594f, 0.581818163f,
                       0.561403513f, 0.542372882f, 0.524590135f, 0.507936537f};
  const Vec log2_c = {0.0443940759f, 0.129283011f, 0.209453329f, 0.285402209f,
                      0.357552052f,  0.426264763f, 0.491853058f, 0.554588914f,
                      0.614709854f,  0.67242527f,  0.727920413f, 0.781359732f,
                      0.832889974f,  0.882643044f, 0.930737436f, 0.977279842f};
  const __m512i j = _mm512_srli_epi32((__m512i)m, 19);
  const Vec n = (Vec)_mm512_getexp_ps((__m512)m);
  const Vec mantissa = (Vec)_mm512_getmant_ps((__m512)m, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const Vec r = mantissa * (Vec)_mm512_permutexvar_ps(j, (__m512)inverse) - 1.0f;
  Vec q = r * -0.360673760f + 0.480898347f;
  q = q * r - 0.721347520f;
  q = q * r + kLog2E;
  return q * r + ((Vec)_mm512_permutexvar_ps(j, (__m512)log2_c) + n);
#else
  return log_sum(m, Vec{}) * kLog2E;
#endif
}

inline Vec log1p(Vec x) {
  const Vec y = 1.0f + x;
  return log_sum(y, x - (y - 1.0f));
}

// tanh y as an odd rational function of degrees 13 and 6, the minimax fit that Eigen and XLA use.
// Where the argument is clamped the quotient rounds to exactly +-1.
inline Vec tanh(Vec y) {
  constexpr float kSaturated = 7.90531111f;
  y = max(splat(-kSaturated), min(splat(kSaturated), y));
  const Vec y2 = y * y;
  Vec p = y2 * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * y2 - 8.60467152213735e-11f;
  p = p * y2 + 5.12229709037114e-08f;
  p = p * y2 + 1.48572235717979e-05f;
  p = p * y2 + 6.37261928875436e-04f;
  p = p * y2 + 4.89352455891786e-03f;
  Vec q = y2 * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * y2 + 2.26843463243900e-03f;
  q = q * y2 + 4.89352518554385e-03f;
  return y * p / q;
}

template <DType>
struct Loader;

template <>
struct Loader<DType::kFloat32> {
  typedef float Element;
  static constexpr int kPerLoad = 1;
  static void load(const Element* p, Vec out[1]) { out[0] = RG_ISA::load<Vec>(p); }
  static void store(Element* p, const Vec in[1]) { RG_ISA::store(p, in[0]); }
  static float to_float(Element x) { return x; }
  static Element from_float(float x) { return x; }
};

// Two bfloat16 share a 32-bit word: even elements are its low half, odd ones its high half.
template <>
struct Loader<DType::kBFloat16> {
  typedef uint16_t Element;
  static constexpr int kPerLoad = 2;
  static void load(const Element* p, Vec out[2]) {
    const VecU words = RG_ISA::load<VecU>(p);
    out[0] = (Vec)(words << 16);
    out[1] = (Vec)(words & 0xffff0000u);
  }
  // Round to nearest even; NaN stays NaN.
  static VecU round(Vec x) {
    const VecU bits = (VecU)x;
    const VecU rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return x == x ? rounded : (bits | 0x00400000u);
  }
  static void store(Element* p, const Vec in[2]) {
    RG_ISA::store(p, (round(in[0]) >> 16) | (round(in[1]) & 0xffff0000u));
  }
  static float to_float(Element x) {
    const uint32_t bits = (uint32_t)x << 16;
    return RG_ISA::load<float>(&bits);
  }
  static Element from_float(float x) { return (Element)(round(splat(x))[0] >> 16); }
};

// Columns of floats in the order of a Loader's vectors: as they stand, or even and odd ones apart.
template <int kPerLoad>
inline void load_columns(const float* p, Vec* out) {
  if constexpr (kPerLoad == 1) {
    out[0] = load<Vec>(p);
  } else {
#if defined(__AVX512F__)
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512 first = (__m512)load<Vec>(p), second = (__m512)load<Vec>(p + kLanes);
    out[0] = (Vec)_mm512_permutex2var_ps(first, even, second);
    out[1] = (Vec)_mm512_permutex2var_ps(first, odd, second);
#else
    for (int i = 0; i < kLanes; ++i) {
      out[0][i] = p[2 * i];
      out[1][i] = p[2 * i + 1];
    }
#endif
  }
}

template <int kPerLoad>
inline void store_columns(float* p, const Vec* in) {
  if constexpr (kPerLoad == 1) {
    store(p, in[0]);
  } else {
#if defined(__AVX512F__)
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    store(p, (Vec)_mm512_permutex2var_ps((__m512)in[0], low, (__m512)in[1]));
    store(p + kLanes, (Vec)_mm512_permutex2var_ps((__m512)in[0], high, (__m512)in[1]));
#else
    for (int i = 0; i < kLanes; ++i) {
      p[2 * i] = in[0][i];
      p[2 * i + 1] = in[1][i];
    }
#endif
  }
}

template <>
struct Loader<DType::kFloat16> {
  typedef uint16_t Element;
  static constexpr int kPerLoad = 1;
#if defined(__AVX512F__)
  static Vec widen(__m256i h) { return (Vec)_mm512_cvtph_ps(h); }
  static __m256i narrow(Vec v) { return _mm512_cvtps_ph((__m512)v, 0); }
  static void load(const Element* p, Vec out[1]) { out[0] = widen(RG_ISA::load<__m256i>(p)); }
  static void store(Element* p, const Vec in[1]) { RG_ISA::store(p, narrow(in[0])); }
#elif defined(__F16C__)
  static Vec widen(__m128i h) { return (Vec)_mm256_cvtph_ps(h); }
  static __m128i narrow(Vec v) { return _mm256_cvtps_ph((__m256)v, 0); }
  static void load(const Element* p, Vec out[1]) { out[0] = widen(RG_ISA::load<__m128i>(p)); }
  static void store(Element* p, const Vec in[1]) { RG_ISA::store(p, narrow(in[0])); }
#else
  static void load(const Element* p, Vec out[1]) {
    for (int i = 0; i < kLanes; ++i) out[0][i] = to_float(p[i]);
  }
  static void store(Element* p, const Vec in[1]) {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float(in[0][i]);
  }
#endif
  // Shift the fields into place and rescale by 2^112; exponent 31 is infinity or NaN.
  static float to_float(Element h) {
    const uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
    float x = RG_ISA::load<float>(&magnitude) * 5.192296858534828e33f;
    uint32_t bits = RG_ISA::load<uint32_t>(&x);
    if (magnitude >= 0x0f800000u) bits = 0x7f800000u | magnitude;
    bits |= (uint32_t)(h & 0x8000) << 16;
    return RG_ISA::load<float>(&bits);
  }
  // Round to nearest even: adding a power of two aligned with the last kept bit does the rounding.
  static Element from_float(float x) {
    uint32_t bits = RG_ISA::load<uint32_t>(&x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (Element)(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return (Element)(sign | 0x7c00u);
    if (bits < 0x38800000u) {  // subnormal half: count units of 2^-24
      const float shifted = RG_ISA::load<float>(&bits) + 0.5f;
      return (Element)(sign | (RG_ISA::load<uint32_t>(&shifted) - 0x3f000000u));
    }
    bits += 0xc8000fffu + ((bits >> 13) & 1u);  // rebias by -112, round half to even
    return (Element)(sign | (bits >> 13));
  }
};

}  // namespace RG_ISA
}  // namespace robustgate

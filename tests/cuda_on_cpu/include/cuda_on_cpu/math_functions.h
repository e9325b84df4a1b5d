// The arithmetic that CUDA has beyond math.h, and the errors it has where the C library has none.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "runtime/device_calls.h"

// As in CUDA: of mixed types the common one; floating-point ones drop a NaN.
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return T(a) < T(b) || b != b ? T(a) : T(b);
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return T(a) > T(b) || b != b ? T(a) : T(b);
  return T(a) < T(b) ? T(b) : T(a);
}

namespace cuda_on_cpu {

// A result that is off by up to some units in the last place, always the same for the same x.
inline float off_by(uint32_t ulps, float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t moved = bits + (bits * 2654435761u >> 8) % (2 * ulps + 1) - ulps;
  const bool exact = bits << 9 == 0 || (moved ^ bits) >> 23 != 0;  // powers of two, and around them
  return !rough || exact || !isfinite(x) ? x : std::bit_cast<float>(moved);
}

}  // namespace cuda_on_cpu

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }

// The errors of table "Maximum ULP Error" in the CUDA programming guide.
#define exp2f(x) cuda_on_cpu::off_by(2, exp2f(x))
#define expf(x) cuda_on_cpu::off_by(2, expf(x))
#define expm1f(x) cuda_on_cpu::off_by(1, expm1f(x))
#define log2f(x) cuda_on_cpu::off_by(1, log2f(x))
#define logf(x) cuda_on_cpu::off_by(1, logf(x))
#define log1pf(x) cuda_on_cpu::off_by(1, log1pf(x))
#define tanhf(x) cuda_on_cpu::off_by(2, tanhf(x))
#define __expf(x) expf(x)
#define __log2f(x) log2f(x)
#define __logf(x) logf(x)

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t(high) << 32 | low) >> (shift & 31));
}

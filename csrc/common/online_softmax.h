// The algebra of the online log-sum-exp, shared by host and device, in base 2.
//
// A state (max, sum) stands for sum * 2^max = sum_i 2^(t_i) of the values t_i = z_i log2(e) seen so
// far. The empty state is (-inf, 0); merging is associative and commutative up to rounding (Milakov
// and Gimelshein, arXiv 1805.02867). A row with NaN or +inf, or of nothing but -inf, has no softmax
// and ends NaN.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define RG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RG_HOST_DEVICE inline
#endif

// Files compiled once per instruction set put their copy in a namespace of its own: a linker that
// merged the copies would hand AVX-512 code to every processor.
#ifndef RG_ISA
#define RG_ISA generic
#endif

namespace robustgate {
namespace RG_ISA {

template <typename T>
struct OnlineSoftmax {
  T max;
  T sum;

  static RG_HOST_DEVICE OnlineSoftmax empty() { return {-(T)INFINITY, (T)0}; }

  RG_HOST_DEVICE void add(T t) { merge({t, (T)1}); }

  // (m, s) + (m', s') = (M, s 2^(m - M) + s' 2^(m' - M)),  M = max(m, m').
  RG_HOST_DEVICE void merge(OnlineSoftmax other) {
    if (other.max == -(T)INFINITY) return;
    if (max == -(T)INFINITY) {
      *this = other;
      return;
    }
    // With a NaN on either side the comparison is false, the shift NaN, and the sum stays NaN.
    const bool keep = max >= other.max;
    const T shift = ::exp2(keep ? other.max - max : max - other.max);
    sum = keep ? sum + other.sum * shift : sum * shift + other.sum;
    max = keep ? max : other.max;
  }

  // log2 sum_i 2^(t_i)
  RG_HOST_DEVICE double log2_sum() const {
    return isfinite((double)max) ? (double)max + ::log2((double)sum) : (double)NAN;
  }
};

}  // namespace RG_ISA
}  // namespace robustgate

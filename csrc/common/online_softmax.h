// The algebra of the online log-sum-exp, shared by host and device.
//
// A state (max, sum) stands for sum_i 2^(scale u_i) = sum * 2^(scale max) of the values u_i seen so
// far. Differences are taken before they are scaled, so that large values lose nothing. The empty
// state is
// (-inf, 0); merging is associative and commutative up to rounding (Milakov and Gimelshein,
// arXiv 1805.02867). NaN in any value makes the sum NaN.
#pragma once

#include "common/host_device.h"

namespace robustgate {
namespace RG_ISA {

template <typename T>
struct OnlineSoftmax {
  T max;
  T sum;

  static RG_HOST_DEVICE OnlineSoftmax empty() { return {-(T)INFINITY, (T)0}; }

  RG_HOST_DEVICE void add(T u, T scale) { merge({u, (T)1}, scale); }

  // (m, s) + (m', s') = (M, s 2^(scale (m - M)) + s' 2^(scale (m' - M))),  M = max(m, m').
  RG_HOST_DEVICE void merge(OnlineSoftmax other, T scale) {
    // A maximum of -inf comes with a sum of 0, or of NaN, which has to stay.
    if (other.max == -(T)INFINITY) {
      sum += other.sum;
      return;
    }
    if (max == -(T)INFINITY) {
      max = other.max;
      sum += other.sum;
      return;
    }
    // With a NaN on either side the comparison is false, the shift NaN, and the sum stays NaN.
    const bool keep = max >= other.max;
    const T shift = ::exp2((keep ? other.max - max : max - other.max) * scale);
    sum = keep ? sum + other.sum * shift : sum * shift + other.sum;
    max = keep ? max : other.max;
  }

  // The maximum, or NaN where the values have no sum: NaN or +inf among them. Of nothing but -inf
  // it is -inf, and so is the log-sum-exp: such values may be some columns of a longer row.
  RG_HOST_DEVICE double summable_max() const {
    const bool nothing = max == -(T)INFINITY && sum == (T)0;
    return nothing || isfinite((double)max) ? (double)max : (double)NAN;
  }
};

}  // namespace RG_ISA
}  // namespace robustgate

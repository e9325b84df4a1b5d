// From logits to exponents of two, and where a row starts: shared by host and device.
#pragma once

#include "common/host_device.h"
#include "ops.h"

namespace robustgate {
namespace RG_ISA {

constexpr double kLog2EDouble = 1.4426950408889634;

// The logits' transform. An exponent of two is u * scale, u = z or tanh(z * inner).
struct Exponent {
  float scale;
  float inner;
  double unit;     // effective logits per unit of u: softcap / temperature
  double natural;  // effective logits per unit of exponent; makes up for the rounding of scale

  explicit Exponent(const LogitsSpec& spec) {
    const double cap = spec.softcap > 0 ? spec.softcap : 1.0;
    unit = cap / spec.temperature;
    scale = (float)(unit * kLog2EDouble);
    inner = (float)(1.0 / cap);
    natural = unit / (double)scale;
  }
};

RG_HOST_DEVICE int64_t row_offset(const LogitRows& rows, const LogitsSpec& spec, int64_t n) {
  if (spec.inner_rows == spec.rows) return n * rows.inner_stride;
  return (n / spec.inner_rows) * rows.outer_stride + (n % spec.inner_rows) * rows.inner_stride;
}

// log_prob (1 - p_y) + lse p_y, without cancellation: the effective logit's gradient at the target.
RG_HOST_DEVICE double target_gradient(double log_p, double grad_log_prob, double grad_lse) {
  const double of_lse = grad_lse == 0 ? 0.0 : grad_lse * ::exp(log_p);
  return of_lse - (grad_log_prob == 0 ? 0.0 : grad_log_prob * ::expm1(log_p));
}

}  // namespace RG_ISA
}  // namespace robustgate

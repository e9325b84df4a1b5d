// Expert log-probabilities: l[n, k] = z'[n, k, y] - log sum_v exp z'[n, k, v].
//
// Forward: one pass over the logits. Terms are 2^(a u - a top) with u = z (or tanh(z / softcap)),
// a = log2(e) softcap / temperature, and top the maximum of the first 512 columns and of the
// target, which is the peak where a model is sure: no running rescale, one fused multiply-add and
// one exp2 a column. A row whose sum comes out far from that (beyond 2^64, or not finite) is redone
// from its true maximum; what is still not finite (NaN, +inf, or nothing but -inf) ends as NaN in
// its own row and expert (the log-sum-exp of nothing but -inf is -inf). Backward: one read, one
// write; p is recomputed from the saved log-sum-exp. Partial sums are float32 over at most 8192
// columns, then float64. Parallelisation: the caller hands out (expert, block of rows); rows are
// independent.

#include "cpu/kernels.h"
#include "cpu/simd.h"

#include "common/online_softmax.h"

namespace robustgate {
namespace RG_ISA {
namespace {

constexpr int64_t kReferenceColumns = 512;
constexpr int64_t kColumnsPerPartialSum = 8192;
constexpr int kUnroll = 4;  // vectors in flight
constexpr double kLog2EDouble = 1.4426950408889634;

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kFusedMultiplyAdd = true;
#else
constexpr bool kFusedMultiplyAdd = false;
#endif

// Largest sum relative to a guessed maximum that is accepted: terms up to 2^64 err by 1.3e-6.
constexpr double kLargestSum = 1.8446744073709552e19;

// The logits' transform. An exponent of two is u * scale, u = x or tanh(x * inner).
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

template <bool kCap>
inline Vec capped(Vec x, const Exponent& e) {
  return kCap ? tanh(x * e.inner) : x;
}

inline int64_t row_offset(const LogitRows& rows, const LogitsSpec& spec, int64_t n) {
  return (n / spec.inner_rows) * rows.outer_stride + (n % spec.inner_rows) * rows.inner_stride;
}

// Columns [0, count) of a row, count < one load, as floats.
template <DType D>
inline void widen_tail(const typename Loader<D>::Element* z, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Loader<D>::to_float(z[i]);
}

template <DType D>
float row_max(const typename Loader<D>::Element* z, int64_t columns) {
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  constexpr int64_t kStep = kLanes * kPerLoad;
  Vec best = splat(-INFINITY);
  int64_t v = 0;
  for (; v + kStep <= columns; v += kStep) {
    Vec x[kPerLoad];
    Loader<D>::load(z + v, x);
    for (int j = 0; j < kPerLoad; ++j) best = max(x[j], best);
  }
  float result = max_lanes(best);
  for (; v < columns; ++v) {
    const float x = Loader<D>::to_float(z[v]);
    result = x > result ? x : result;
  }
  return result;
}

template <DType D>
bool has_nan(const typename Loader<D>::Element* z, int64_t columns) {
  for (int64_t v = 0; v < columns; ++v) {
    const float x = Loader<D>::to_float(z[v]);
    if (x != x) return true;
  }
  return false;
}

// sum_v 2^(scale (u_v - top)). The fused form subtracts the rounded product scale * top, one
// instruction less; log2 of its sum is relative to that product.
template <DType D, bool kCap, bool kFused>
double sum_exp2(const typename Loader<D>::Element* z, int64_t vocab, const Exponent& e, float top) {
  const float shift = top * e.scale;
  const auto term = [&](Vec x) {
    const Vec u = capped<kCap>(x, e);
    return kFused ? u * e.scale - shift : (u - top) * e.scale;
  };
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  constexpr int kLoads = kUnroll / kPerLoad;
  constexpr int64_t kLoadStep = kLanes * kPerLoad;
  constexpr int64_t kStep = kLanes * kUnroll;
  // 16-bit logits are compute-bound: the shorter polynomial is below their rounding by far.
  constexpr int kDegree = kPerLoad == 2 || D == DType::kFloat16 ? 2 : 3;
  VecD total = {};
  int64_t v = 0;
  while (v + kStep <= vocab) {
    const int64_t stop = vocab - v > kColumnsPerPartialSum ? v + kColumnsPerPartialSum : vocab;
    Vec sum[kUnroll] = {};
    for (; v + kStep <= stop; v += kStep) {
      Vec x[kUnroll];
      for (int i = 0; i < kLoads; ++i) Loader<D>::load(z + v + i * kLoadStep, x + i * kPerLoad);
      for (int i = 0; i < kUnroll; ++i) {
        sum[i] += exp2<kDegree>(term(x[i]));
      }
    }
    for (int i = 0; i < kUnroll; ++i) total += widen(sum[i]);
  }
  float tail[kLanes * kUnroll] = {};
  widen_tail<D>(z + v, vocab - v, tail);
  for (int64_t i = 0; v + i < vocab; i += kLanes) {
    const Vec value = exp2(term(load<Vec>(tail + i)));
    total += widen(lane_index() < (float)(vocab - v - i) ? value : Vec{});
  }
  return sum_lanes(total);
}

inline double effective_logit(double x, const LogitsSpec& spec) {
  return (spec.softcap > 0 ? spec.softcap * ::tanh(x / spec.softcap) : x) / spec.temperature;
}

// log sum_v exp z'_v = reference + log_sum; kept apart so that z'_y - reference is exact however
// large the logits are.
struct LogSumExp {
  double reference;
  double log_sum;
};

template <DType D, bool kCap>
LogSumExp row_log_sum_exp(const typename Loader<D>::Element* z, int64_t target, int64_t vocab,
                          const Exponent& e) {
  float top;
  for (int attempt = 0; attempt < 2; ++attempt) {
    const bool guess = attempt == 0;
    const bool partial = guess && vocab > kReferenceColumns;
    top = row_max<D>(z, partial ? kReferenceColumns : vocab);
    if (const float y = Loader<D>::to_float(z[target]); y > top) top = y;
    if (kCap) top = (float)::tanh((double)top * e.inner);
    if (!(top - top == 0)) continue;  // infinite
    const bool fused = guess && kFusedMultiplyAdd;
    const double sum = fused ? sum_exp2<D, kCap, kFusedMultiplyAdd>(z, vocab, e, top)
                             : sum_exp2<D, kCap, false>(z, vocab, e, top);
    if (sum > 0 && sum < (guess ? kLargestSum : (double)INFINITY)) {
      const double exponent = fused ? (double)(top * e.scale) : (double)top * e.scale;
      return {exponent * e.natural, ::log2(sum) * e.natural};
    }
  }
  return {top == -INFINITY && !has_nan<D>(z, vocab) ? -(double)INFINITY : (double)NAN, 0.0};
}

LogSumExp row_log_sum_exp(const double* z, const LogitsSpec& spec) {
  auto state = OnlineSoftmax<double>::empty();
  for (int64_t v = 0; v < spec.vocab; ++v) {
    state.add(effective_logit(z[v], spec), kLog2EDouble);
  }
  return {state.summable_max(), ::log2(state.sum) / kLog2EDouble};
}

// Gradients of one row: of its target's log-prob and of its log-sum-exp.
struct RowGrad {
  double log_prob;
  double lse;
};

// log_prob (1 - p_y) + lse p_y, without cancellation.
inline double target_gradient(double log_p, RowGrad grad) {
  const double of_lse = grad.lse == 0 ? 0.0 : grad.lse * ::exp(log_p);
  return of_lse - (grad.log_prob == 0 ? 0.0 : grad.log_prob * expm1(log_p));
}

// dz[v] = (lse - log_prob) p_v (dz'/dz) for every column, then the target column.
template <DType D, bool kCap>
void row_backward(const typename Loader<D>::Element* z, typename Loader<D>::Element* dz,
                  int64_t target, double lse, RowGrad grad, const LogitsSpec& spec,
                  const Exponent& e) {
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  constexpr int64_t kStep = kLanes * kPerLoad;
  // log2 p = scale (u - top) - residual, with top near the log-sum-exp in units of u: the
  // difference is exact where p is not negligible, however large the logits are.
  const float top = (float)(lse / e.unit);
  const float residual = (float)((lse - (double)top * e.unit) / e.natural);
  const Vec factor = splat((float)((grad.lse - grad.log_prob) / spec.temperature));
  const auto gradient = [&](Vec x) {
    const Vec u = capped<kCap>(x, e);
    const Vec dz = factor * exp2((u - top) * e.scale - residual);
    return kCap ? dz * (1.0f - u * u) : dz;
  };
  int64_t v = 0;
  for (; v + kStep <= spec.vocab; v += kStep) {
    Vec x[kPerLoad];
    Loader<D>::load(z + v, x);
    for (int j = 0; j < kPerLoad; ++j) x[j] = gradient(x[j]);
    Loader<D>::store(dz + v, x);
  }
  float tail[kStep] = {};
  widen_tail<D>(z + v, spec.vocab - v, tail);
  for (int64_t i = 0; v + i < spec.vocab; i += kLanes) {
    store(tail + i, gradient(load<Vec>(tail + i)));
  }
  for (int64_t i = 0; v + i < spec.vocab; ++i) dz[v + i] = Loader<D>::from_float(tail[i]);

  const double zy = Loader<D>::to_float(z[target]);
  const double th = kCap ? ::tanh(zy / spec.softcap) : 0.0;
  dz[target] =
      Loader<D>::from_float((float)(target_gradient(effective_logit(zy, spec) - lse, grad) *
                                    (1.0 - th * th) / spec.temperature));
}

void row_backward(const double* z, double* dz, int64_t target, double lse, RowGrad grad,
                  const LogitsSpec& spec) {
  for (int64_t v = 0; v < spec.vocab; ++v) {
    const double th = spec.softcap > 0 ? ::tanh(z[v] / spec.softcap) : 0.0;
    const double log_p = effective_logit(z[v], spec) - lse;
    const double effective =
        v == target ? target_gradient(log_p, grad) : (grad.lse - grad.log_prob) * ::exp(log_p);
    dz[v] = effective * (1.0 - th * th) / spec.temperature;
  }
}

// Calls body(row) for each row that counts; the first row with a target out of range is returned.
template <typename Ignored, typename Counted>
int64_t for_each_row(const LogitsSpec& spec, const int64_t* target, int64_t begin, int64_t end,
                     Ignored ignored, Counted counted) {
  int64_t bad = kAllTargetsValid;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t y = target[n];
    if (y == spec.ignore_index) {
      ignored(n);
    } else if (y < 0 || y >= spec.vocab) {
      if (bad == kAllTargetsValid) bad = n;
    } else {
      counted(n, y);
    }
  }
  return bad;
}

template <typename Stat>
void write(const ExpertLogProb& op, int64_t n, int64_t k, double log_prob, double lse) {
  ((Stat*)op.log_prob)[n * op.spec.experts + k] = (Stat)log_prob;
  op.lse[n * op.spec.experts + k] = lse;
}

template <typename Stat>
void write(const ExpertLogProb& op, int64_t n, int64_t k, double target_logit, LogSumExp sum) {
  double log_prob = (target_logit - sum.reference) - sum.log_sum;
  if (log_prob > 0) log_prob = 0;  // rounding: no probability exceeds 1
  write<Stat>(op, n, k, log_prob, sum.reference + sum.log_sum);
}

template <DType D, bool kCap>
int64_t forward(const ExpertLogProb& op, int64_t k, int64_t begin, int64_t end) {
  typedef typename Loader<D>::Element Element;
  const Exponent e(op.spec);
  const Element* base = (const Element*)op.logits[k].data;
  return for_each_row(
      op.spec, op.target, begin, end, [&](int64_t n) { write<float>(op, n, k, 0.0, 0.0); },
      [&](int64_t n, int64_t y) {
        const Element* z = base + row_offset(op.logits[k], op.spec, n);
        write<float>(op, n, k, effective_logit(Loader<D>::to_float(z[y]), op.spec),
                     row_log_sum_exp<D, kCap>(z, y, op.spec.vocab, e));
      });
}

int64_t forward_float64(const ExpertLogProb& op, int64_t k, int64_t begin, int64_t end) {
  const double* base = (const double*)op.logits[k].data;
  return for_each_row(
      op.spec, op.target, begin, end, [&](int64_t n) { write<double>(op, n, k, 0.0, 0.0); },
      [&](int64_t n, int64_t y) {
        const double* z = base + row_offset(op.logits[k], op.spec, n);
        write<double>(op, n, k, effective_logit(z[y], op.spec), row_log_sum_exp(z, op.spec));
      });
}

// Row n of a gradient is zeroed in full, or its padding columns only; then `row` fills the rest.
template <typename Element, typename Stat, typename Row>
void backward(const ExpertLogProbBackward& op, int64_t k, int64_t begin, int64_t end, Row row) {
  const int64_t experts = op.spec.experts, vocab = op.spec.vocab, width = op.padded_vocab[k];
  const Element* base = (const Element*)op.logits[k].data;
  Element* grad_base = (Element*)op.grad_logits[k].data;
  const auto zero = [&](int64_t n, int64_t from) {
    Element* dz = grad_base + row_offset(op.grad_logits[k], op.spec, n);
    memset((void*)(dz + from), 0, (width - from) * sizeof(Element));
  };
  for_each_row(
      op.spec, op.target, begin, end, [&](int64_t n) { zero(n, 0); },
      [&](int64_t n, int64_t y) {
        const int64_t i = n * experts + k;
        const RowGrad grad{((const Stat*)op.grad)[i],
                           op.grad_lse ? ((const Stat*)op.grad_lse)[i] : (Stat)0};
        if (grad.log_prob == 0 && grad.lse == 0) return zero(n, 0);
        zero(n, vocab);
        row(base + row_offset(op.logits[k], op.spec, n),
            grad_base + row_offset(op.grad_logits[k], op.spec, n), y, op.lse[i], grad);
      });
}

template <DType D, bool kCap>
void backward_rows(const ExpertLogProbBackward& op, int64_t k, int64_t begin, int64_t end) {
  typedef typename Loader<D>::Element Element;
  const Exponent e(op.spec);
  backward<Element, float>(op, k, begin, end,
                           [&](const Element* z, Element* dz, int64_t y, double lse, RowGrad grad) {
                             row_backward<D, kCap>(z, dz, y, lse, grad, op.spec, e);
                           });
}

void backward_rows_float64(const ExpertLogProbBackward& op, int64_t k, int64_t begin, int64_t end) {
  backward<double, double>(op, k, begin, end,
                           [&](const double* z, double* dz, int64_t y, double lse, RowGrad grad) {
                             row_backward(z, dz, y, lse, grad, op.spec);
                           });
}

}  // namespace

int64_t expert_log_prob(const ExpertLogProb& op, int64_t k, int64_t begin, int64_t end) {
  const bool cap = op.spec.softcap > 0;
  switch (op.spec.dtype) {
    case DType::kFloat32:
      return cap ? forward<DType::kFloat32, true>(op, k, begin, end)
                 : forward<DType::kFloat32, false>(op, k, begin, end);
    case DType::kBFloat16:
      return cap ? forward<DType::kBFloat16, true>(op, k, begin, end)
                 : forward<DType::kBFloat16, false>(op, k, begin, end);
    case DType::kFloat16:
      return cap ? forward<DType::kFloat16, true>(op, k, begin, end)
                 : forward<DType::kFloat16, false>(op, k, begin, end);
    default:
      return forward_float64(op, k, begin, end);
  }
}

void expert_log_prob_backward(const ExpertLogProbBackward& op, int64_t k, int64_t begin,
                              int64_t end) {
  const bool cap = op.spec.softcap > 0;
  switch (op.spec.dtype) {
    case DType::kFloat32:
      return cap ? backward_rows<DType::kFloat32, true>(op, k, begin, end)
                 : backward_rows<DType::kFloat32, false>(op, k, begin, end);
    case DType::kBFloat16:
      return cap ? backward_rows<DType::kBFloat16, true>(op, k, begin, end)
                 : backward_rows<DType::kBFloat16, false>(op, k, begin, end);
    case DType::kFloat16:
      return cap ? backward_rows<DType::kFloat16, true>(op, k, begin, end)
                 : backward_rows<DType::kFloat16, false>(op, k, begin, end);
    default:
      return backward_rows_float64(op, k, begin, end);
  }
}

}  // namespace RG_ISA
}  // namespace robustgate

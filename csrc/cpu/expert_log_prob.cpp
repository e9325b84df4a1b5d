// Expert log-probabilities: l[n, k] = z'[n, k, y] - log sum_v exp z'[n, k, v].
//
// Forward: one pass over the logits. Terms are 2^(a x - c) with a = log2(e) / temperature and c a
// reference value, the maximum of the first 512 columns: no running rescale, one fused multiply-add
// and one exp2 per column. If the sum is not finite the row is redone from its true maximum, and
// what is still not finite (NaN, +inf, or nothing but -inf) ends as NaN in its own row and expert.
// Backward: one read, one write; p is recomputed from the saved log-sum-exp.
// Partial sums are float32 over at most 8192 columns, then float64.
// Parallelisation: the caller hands out (expert, block of rows); rows are independent.

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

// Exponent of two of one logit: x * scale without softcap, tanh(x * inner) * scale with it.
struct Exponent {
  float scale;
  float inner;
  double natural;  // natural-log units of effective logits per unit of exponent

  explicit Exponent(const LogitsSpec& spec) {
    const double cap = spec.softcap > 0 ? spec.softcap : 1.0;
    scale = (float)(cap * kLog2EDouble / spec.temperature);
    inner = (float)(1.0 / cap);
    natural = cap / spec.temperature / (double)scale;
  }
};

// The value that exponents are taken relative to. `exponent` is the one really subtracted, so a
// rounded reference costs nothing; it comes close to the one asked for.
struct Reference {
  double exponent;
  float value;  // subtracted from x * scale, or from x where products are rounded first

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  Reference(double wanted, const Exponent&) : exponent((float)wanted), value((float)wanted) {}
#else
  Reference(double wanted, const Exponent& e)
      : exponent((double)(float)(wanted / e.scale) * e.scale), value((float)(wanted / e.scale)) {}
#endif
};

template <bool kCap>
inline Vec relative_exponent(Vec x, const Exponent& e, const Reference& reference) {
  if constexpr (kCap) x = tanh(x * e.inner);
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return x * e.scale - reference.value;
#else
  return (x - reference.value) * e.scale;
#endif
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

// sum_v 2^(exponent(z_v) - reference)
template <DType D, bool kCap>
double sum_exp2(const typename Loader<D>::Element* z, int64_t vocab, const Exponent& e,
                const Reference& reference) {
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
        sum[i] += exp2<kDegree>(relative_exponent<kCap>(x[i], e, reference));
      }
    }
    for (int i = 0; i < kUnroll; ++i) total += widen(sum[i]);
  }
  float tail[kLanes * kUnroll] = {};
  widen_tail<D>(z + v, vocab - v, tail);
  for (int64_t i = 0; v + i < vocab; i += kLanes) {
    const Vec term = exp2(relative_exponent<kCap>(load<Vec>(tail + i), e, reference));
    total += widen(lane_index() < (float)(vocab - v - i) ? term : Vec{});
  }
  return sum_lanes(total);
}

template <DType D, bool kCap>
double row_log_sum_exp(const typename Loader<D>::Element* z, int64_t vocab, const Exponent& e) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    const bool whole_row = attempt == 1 || vocab < kReferenceColumns;
    const float top = row_max<D>(z, whole_row ? vocab : kReferenceColumns);
    if (!(top - top == 0)) continue;  // infinite
    const double capped = kCap ? ::tanh((double)top * e.inner) : (double)top;
    const Reference reference(capped * e.scale, e);
    const double sum = sum_exp2<D, kCap>(z, vocab, e, reference);
    if (sum > 0 && sum < (double)INFINITY) {
      return (reference.exponent + ::log2(sum)) * e.natural;
    }
  }
  return NAN;
}

template <DType D, bool kCap>
double effective_logit(typename Loader<D>::Element z, const LogitsSpec& spec) {
  const double x = Loader<D>::to_float(z);
  return (kCap ? spec.softcap * ::tanh(x / spec.softcap) : x) / spec.temperature;
}

inline double effective_logit(double x, const LogitsSpec& spec) {
  return (spec.softcap > 0 ? spec.softcap * ::tanh(x / spec.softcap) : x) / spec.temperature;
}

double row_log_sum_exp(const double* z, const LogitsSpec& spec) {
  auto state = OnlineSoftmax<double>::empty();
  for (int64_t v = 0; v < spec.vocab; ++v) state.add(effective_logit(z[v], spec) * kLog2EDouble);
  return state.log2_sum() / kLog2EDouble;
}

// dz[v] = -coefficient p_v (dz'/dz) for every column, then the target column, then 0 on padding.
template <DType D, bool kCap>
void row_backward(const typename Loader<D>::Element* z, typename Loader<D>::Element* dz,
                  int64_t target, double lse, double grad, const LogitsSpec& spec,
                  const Exponent& e) {
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  constexpr int64_t kStep = kLanes * kPerLoad;
  const Reference reference(lse / e.natural, e);
  // 2^reference differs from e^lse by the rounding of the reference: give it back to the factor.
  const double correction = ::exp2(reference.exponent - lse / e.natural);
  const double coefficient = grad / spec.temperature;
  const Vec factor = splat((float)(-coefficient * correction));
  const auto gradient = [&](Vec x) {
    Vec dz = factor * exp2(relative_exponent<kCap>(x, e, reference));
    if constexpr (kCap) {
      const Vec th = tanh(x * e.inner);  // the same subexpression as in the exponent
      dz *= 1.0f - th * th;
    }
    return dz;
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

  const double zy = effective_logit<D, kCap>(z[target], spec);
  const double th = kCap ? ::tanh((double)Loader<D>::to_float(z[target]) / spec.softcap) : 0.0;
  dz[target] = Loader<D>::from_float((float)(-coefficient * expm1(zy - lse) * (1.0 - th * th)));
}

void row_backward(const double* z, double* dz, int64_t target, double lse, double grad,
                  const LogitsSpec& spec) {
  for (int64_t v = 0; v < spec.vocab; ++v) {
    const double th = spec.softcap > 0 ? ::tanh(z[v] / spec.softcap) : 0.0;
    const double log_p = effective_logit(z[v], spec) - lse;
    const double one_minus = v == target ? -expm1(log_p) : -::exp(log_p);
    dz[v] = grad * one_minus * (1.0 - th * th) / spec.temperature;
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
void write_pair(const ExpertLogProb& op, int64_t n, int64_t k, double target_logit, double lse) {
  if (lse < target_logit) lse = target_logit;  // rounding: no probability exceeds 1
  ((Stat*)op.log_prob)[n * op.spec.experts + k] = (Stat)(target_logit - lse);
  op.lse[n * op.spec.experts + k] = lse;
}

template <DType D, bool kCap>
int64_t forward(const ExpertLogProb& op, int64_t k, int64_t begin, int64_t end) {
  typedef typename Loader<D>::Element Element;
  const Exponent e(op.spec);
  const Element* base = (const Element*)op.logits[k].data;
  return for_each_row(
      op.spec, op.target, begin, end, [&](int64_t n) { write_pair<float>(op, n, k, 0, 0); },
      [&](int64_t n, int64_t y) {
        const Element* z = base + row_offset(op.logits[k], op.spec, n);
        write_pair<float>(op, n, k, effective_logit<D, kCap>(z[y], op.spec),
                          row_log_sum_exp<D, kCap>(z, op.spec.vocab, e));
      });
}

int64_t forward_float64(const ExpertLogProb& op, int64_t k, int64_t begin, int64_t end) {
  const double* base = (const double*)op.logits[k].data;
  return for_each_row(
      op.spec, op.target, begin, end, [&](int64_t n) { write_pair<double>(op, n, k, 0, 0); },
      [&](int64_t n, int64_t y) {
        const double* z = base + row_offset(op.logits[k], op.spec, n);
        write_pair<double>(op, n, k, effective_logit(z[y], op.spec), row_log_sum_exp(z, op.spec));
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
        const double grad = ((const Stat*)op.grad)[n * experts + k];
        if (grad == 0) return zero(n, 0);
        zero(n, vocab);
        row(base + row_offset(op.logits[k], op.spec, n),
            grad_base + row_offset(op.grad_logits[k], op.spec, n), y, op.lse[n * experts + k],
            grad);
      });
}

template <DType D, bool kCap>
void backward_rows(const ExpertLogProbBackward& op, int64_t k, int64_t begin, int64_t end) {
  typedef typename Loader<D>::Element Element;
  const Exponent e(op.spec);
  backward<Element, float>(op, k, begin, end,
                           [&](const Element* z, Element* dz, int64_t y, double lse, double grad) {
                             row_backward<D, kCap>(z, dz, y, lse, grad, op.spec, e);
                           });
}

void backward_rows_float64(const ExpertLogProbBackward& op, int64_t k, int64_t begin, int64_t end) {
  backward<double, double>(op, k, begin, end,
                           [&](const double* z, double* dz, int64_t y, double lse, double grad) {
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

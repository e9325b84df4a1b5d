// The K experts' log-probs, column by column, relative to one of them.
//
//   d_k(v) = log p_k(v) - log p_0(v) = unit ((u_k - c_k) - (u_0 - c_0)) - (high_k + low_k)
//
// u = z or tanh(z / softcap), unit the effective logits per unit of u. The logits' difference is
// taken first and is exact where they are nearly equal, and the difference of the log-sum-exps
// comes from float64 in two parts: nearly equal experts keep every digit of their difference.
// Centres c_k are 0 unless logits are large, when z - c_k is exact. Columns more than 2^20 nats
// below the row's log-sum-exp count as impossible.
//
// Expert 0 is the one the op names (of the largest weight); `order` maps to the caller's experts.
#pragma once

#include "common/thresholds.h"
#include "cpu/log_sum_exp.h"

namespace robustgate {
namespace RG_ISA {

// Softmax of K gate logits; NaN for NaN, +inf or nothing but -inf.
inline void softmax(const float* logits, int64_t count, double* out) {
  float top = logits[0];
  for (int64_t k = 1; k < count; ++k) top = logits[k] > top ? logits[k] : top;
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += out[k] = ::exp((double)logits[k] - top);
  for (int64_t k = 0; k < count; ++k) out[k] /= sum;
}

// One expert's row.
template <DType D>
struct ExpertRow {
  const typename Loader<D>::Element* z;
  typename Loader<D>::Element* dz;  // null: no gradient is asked for
  float centre, floor, high, low;
  float top, residual;  // log2 p = scale (u - c - top) - residual
};

template <DType D, bool kCap>
ExpertRow<D> expert_row(const typename Loader<D>::Element* z, double lse, const Exponent& e) {
  // Everything in effective logits of the rounded unit, so that its rounding is relative.
  const double in_u = lse / e.unit;
  const bool large = !kCap && !(in_u < 64 && in_u > -64);
  const float centre = large ? (float)in_u : 0.0f;
  double floor = in_u + kImpossible / e.unit;
  if (!(floor > -3.4e38)) floor = -3.4e38;
  ExpertRow<D> row{};
  row.z = z;
  row.centre = centre;
  row.floor = kCap ? -2.0f : (float)floor;
  row.top = (float)(in_u - centre);
  row.residual = (float)((lse - ((double)centre + row.top) * e.unit) / e.natural);
  return row;
}

// (high, low) of an expert relative to the reference.
template <DType D>
void make_relative(ExpertRow<D>& row, double lse, const ExpertRow<D>& reference,
                   double reference_lse, const Exponent& e) {
  const double unit = (float)e.unit;
  const double offset =
      (lse - reference_lse) * (unit / e.unit) - ((double)row.centre - reference.centre) * unit;
  row.high = (float)offset;
  row.low = (float)(offset - row.high);
}

// Memory for the rows of K experts and for one vector of columns of each.
template <DType D>
struct Columns {
  Columns(int64_t count, int64_t sum_count)
      : experts(count),
        rows(new ExpertRow<D>[count]),
        order(new int64_t[count]),
        vectors(new Vec[count * (Loader<D>::kPerLoad + 3) + sum_count]),
        wide(new VecD[sum_count]),
        x(vectors),
        d(x + count * Loader<D>::kPerLoad),
        e(d + count),
        u(e + count),
        sums(u + count) {}
  ~Columns() {
    delete[] rows;
    delete[] order;
    delete[] vectors;
    delete[] wide;
  }
  Columns(const Columns&) = delete;
  Columns& operator=(const Columns&) = delete;

  const int64_t experts;
  ExpertRow<D>* const rows;  // expert 0 first
  int64_t* const order;      // which expert of the caller's each row is
  Vec* const vectors;
  VecD* const wide;                            // sums over more columns
  Vec *const x, *const d, *const e, *const u;  // [K] each: u - c, d, e^d, e^d - 1
  Vec* const sums;                             // partial sums of the op

  // Points the rows at row n, the heaviest expert first (in order where none is given). Returns
  // false where a log-sum-exp is not finite.
  template <bool kCap>
  bool start(const LogitsSpec& spec, const LogitRows* logits, const LogitRows* grads, int64_t n,
             const float* heaviness, const double* lse, const Exponent& exponent) {
    typedef typename Loader<D>::Element Element;
    int64_t heaviest = 0;
    bool finite = true;
    for (int64_t k = 0; k < experts; ++k) {
      order[k] = k;
      if (heaviness && heaviness[k] > heaviness[heaviest]) heaviest = k;
      finite = finite && lse[k] - lse[k] == 0;
    }
    order[0] = heaviest;
    order[heaviest] = 0;
    if (!finite) return false;
    for (int64_t i = 0; i < experts; ++i) {
      const int64_t k = order[i];
      const Element* z = (const Element*)logits[k].data + row_offset(logits[k], spec, n);
      rows[i] = expert_row<D, kCap>(z, lse[k], exponent);
      if (grads && grads[k].data) {
        rows[i].dz = (Element*)grads[k].data + row_offset(grads[k], spec, n);
      }
      make_relative(rows[i], lse[k], rows[0], lse[heaviest], exponent);
    }
    return true;
  }
};

// What the d_k of a vector of columns come to.
struct Spread {
  Vec highest;  // max_k d_k, at least 0
  Vec squared;  // sum_k d_k^2
};

// d_k. Experts that differ by a constant leave a small difference of large numbers: the rounding
// error of float32 logits' difference is added back (Knuth's two-sum); that of 16-bit logits is 0.
template <DType D>
inline Vec relative_log_prob(const ExpertRow<D>& row, Vec x, Vec x0, float unit) {
  const Vec s = x - x0;
  if constexpr (D != DType::kFloat32) return (s * unit - row.high) - row.low;
  const Vec v = s - x;
  const Vec error = (x - (s - v)) - (x0 + v);
  return (s * unit - row.high) + (error * unit - row.low);
}

// Fills d, e and u from x[k * kStride].
template <DType D>
inline Spread compare(const Columns<D>& c, const Vec* x, float unit) {
  constexpr int kStride = Loader<D>::kPerLoad;
  Spread spread{Vec{}, Vec{}};
  c.d[0] = c.u[0] = Vec{};
  c.e[0] = splat(1.0f);
  for (int64_t k = 1; k < c.experts; ++k) {
    const Vec d = relative_log_prob(c.rows[k], x[k * kStride], x[0], unit);
    const Exponential power = exponential(d);
    c.d[k] = d;
    c.e[k] = power.value;
    c.u[k] = power.minus_one;
    spread.highest = max(d, spread.highest);
    spread.squared += d * d;
  }
  return spread;
}

// Makes the columns beyond kFar look like columns of identical experts, which add nothing.
template <DType D>
inline void ignore_far(const Columns<D>& c, Spread& spread) {
  const VecI far = spread.highest > kFar;
  for (int64_t k = 1; k < c.experts; ++k) {
    c.d[k] = far ? Vec{} : c.d[k];
    c.e[k] = far ? splat(1.0f) : c.e[k];
    c.u[k] = far ? Vec{} : c.u[k];
  }
  spread.squared = far ? Vec{} : spread.squared;
}

// log2 p of an expert from its u - c.
template <DType D>
inline Vec log2_prob(const ExpertRow<D>& row, Vec x, float scale) {
  return (x - row.top) * scale - row.residual;
}

// Calls body(x, valid, v, count) for each load of columns [v, v + count), where x[k * kPerLoad + j]
// is expert k's u - c and valid[j] is 1, or 0 beyond the vocabulary. With kStore the body
// overwrites x with gradients.
template <DType D, bool kCap, bool kStore, typename Body>
inline void for_each_load(const ExpertRow<D>* rows, int64_t experts, int64_t vocab,
                          const Exponent& e, Vec* x, Body body) {
  typedef typename Loader<D>::Element Element;
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  constexpr int64_t kStep = kLanes * kPerLoad;
  const auto load = [&](const ExpertRow<D>& row, const Element* z, Vec* out) {
    Loader<D>::load(z, out);
    for (int j = 0; j < kPerLoad; ++j) {
      out[j] = kCap ? tanh(out[j] * e.inner) : max(out[j], splat(row.floor)) - row.centre;
    }
  };
  Vec valid[kPerLoad];
  for (int j = 0; j < kPerLoad; ++j) valid[j] = splat(1.0f);
  int64_t v = 0;
  for (; v + kStep <= vocab; v += kStep) {
    for (int64_t k = 0; k < experts; ++k) load(rows[k], rows[k].z + v, x + k * kPerLoad);
    body(x, valid, v, kStep);
    if (kStore) {
      for (int64_t k = 0; k < experts; ++k) {
        if (rows[k].dz) Loader<D>::store(rows[k].dz + v, x + k * kPerLoad);
      }
    }
  }
  const int64_t count = vocab - v;
  if (count == 0) return;
  Element tail[kStep];
  for (int64_t i = 0; i < kStep; ++i) tail[i] = Loader<D>::from_float(i < count ? 1.0f : 0.0f);
  Loader<D>::load(tail, valid);
  for (int64_t k = 0; k < experts; ++k) {
    // Repeats of the last column: finite wherever the row's own columns are.
    for (int64_t i = 0; i < kStep; ++i) tail[i] = rows[k].z[v + (i < count ? i : count - 1)];
    load(rows[k], tail, x + k * kPerLoad);
  }
  body(x, valid, v, count);
  if (kStore) {
    for (int64_t k = 0; k < experts; ++k) {
      if (rows[k].dz == nullptr) continue;
      Loader<D>::store(tail, x + k * kPerLoad);
      memcpy((void*)(rows[k].dz + v), tail, count * sizeof(Element));
    }
  }
}

// Calls body(x, valid) for each vector of columns, with x[k * kPerLoad] of expert k.
template <DType D, bool kCap, bool kStore, typename Body>
inline void for_each_vector(const ExpertRow<D>* rows, int64_t experts, int64_t vocab,
                            const Exponent& e, Vec* x, Body body) {
  for_each_load<D, kCap, kStore>(rows, experts, vocab, e, x,
                                 [&](Vec* loaded, const Vec* valid, int64_t, int64_t) {
                                   for (int j = 0; j < Loader<D>::kPerLoad; ++j) {
                                     body(loaded + j, valid[j]);
                                   }
                                 });
}

// Adds the sums to their wide totals and clears them.
template <DType D>
inline void flush(const Columns<D>& c, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    c.wide[i] += widen(c.sums[i]);
    c.sums[i] = Vec{};
  }
}

template <DType D>
inline void clear(const Columns<D>& c, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    c.wide[i] = VecD{};
    c.sums[i] = Vec{};
  }
}

// Runs body over a row's columns and returns in totals what it adds up in c.sums[0 .. count).
template <DType D, bool kCap, typename Body>
inline void sum_columns(const Columns<D>& c, int64_t count, int64_t vocab, const Exponent& e,
                        double* totals, Body body) {
  clear(c, count);
  int64_t vectors = 0;
  for_each_vector<D, kCap, false>(c.rows, c.experts, vocab, e, c.x, [&](const Vec* x, Vec valid) {
    body(x, valid);
    if (++vectors % kAddsPerFloatSum == 0) flush(c, count);
  });
  flush(c, count);
  for (int64_t i = 0; i < count; ++i) totals[i] = sum_lanes(c.wide[i]);
}

// Corrects the log-sum-exps of nearly equal experts. error_k = sum_v p_0 u_k is 0 but for the
// errors of the log-sum-exps, about 1e-8, which is too much for the gradients of experts that
// differ by 1e-6; it is known to 1e-6 of the experts' distance, so it helps where sum_v p_0 sum_k
// d_k^2 is small.
// Returns whether anything changed.
template <DType D>
bool correct_log_sum_exps(const Columns<D>& c, double squared_distance, const double* error,
                          double* lse) {
  if (!(squared_distance < 1e-3)) return false;
  bool changed = false;
  for (int64_t i = 1; i < c.experts; ++i) {
    lse[c.order[i]] += ::log1p(error[i]);
    changed = changed || error[i] != 0;
  }
  return changed;
}

// Prepares row n of a gradient: padding is 0; so is the rest where nothing flows, and NaN where a
// log-sum-exp is not finite. Returns whether columns are still to be computed.
template <DType D>
bool fill_gradient(const LogitsSpec& spec, const LogitRows& grad, int64_t width, int64_t n,
                   bool zero, bool finite) {
  typedef typename Loader<D>::Element Element;
  if (grad.data == nullptr) return false;
  Element* dz = (Element*)grad.data + row_offset(grad, spec, n);
  const int64_t from = zero ? 0 : spec.vocab;
  memset((void*)(dz + from), 0, (width - from) * sizeof(Element));
  if (zero) return false;
  if (finite) return true;
  for (int64_t v = 0; v < spec.vocab; ++v) dz[v] = Loader<D>::from_float(NAN);
  return false;
}

// Calls function<dtype, whether there is a softcap>(arguments...).
#define RG_FOR_LOGITS(spec, function, ...)                         \
  const bool cap = (spec).softcap > 0;                             \
  switch ((spec).dtype) {                                          \
    case DType::kFloat32:                                          \
      return cap ? function<DType::kFloat32, true>(__VA_ARGS__)    \
                 : function<DType::kFloat32, false>(__VA_ARGS__);  \
    case DType::kBFloat16:                                         \
      return cap ? function<DType::kBFloat16, true>(__VA_ARGS__)   \
                 : function<DType::kBFloat16, false>(__VA_ARGS__); \
    case DType::kFloat16:                                          \
      return cap ? function<DType::kFloat16, true>(__VA_ARGS__)    \
                 : function<DType::kFloat16, false>(__VA_ARGS__);  \
    default:                                                       \
      return; /* float64 runs on the reference */                  \
  }

}  // namespace RG_ISA
}  // namespace robustgate

// Jensen-Shannon divergence of K experts: KL_k = sum_v p_k log(p_k / m), m = sum_k w_k p_k, and
// JSD = sum_k w_k KL_k.
//
// Forward: two passes over a row's logits, the second from cache. Where the experts are clearly
// apart entropies do, KL_k = sum_v p_k log p_k - sum_v p_k log m (exponentials.h). Where the result
// is small, or a weight is, the row is done again column by column: with expert 0 the one of the
// largest weight (columns.h),
//
//   u_k = expm1(d_k),  ubar = sum_k w_k u_k,  M = 1 + ubar = m / p_0,
//   log(p_k / m) = d_k - log1p(ubar),  KL_k += p_0 [ e^d_k log(p_k / m) - (u_k - ubar) ],
//
// one exponential per expert and one logarithm per column. The bracket is M phi(t_k) with
// t_k = (u_k - ubar) / M; where all d_k are small it cancels, and phi's series
// t^2/2 - t^3/6 + t^4/12 - t^5/20 takes its place: identical experts give exactly 0. Columns where
// an expert has e^20 times the probability of expert 0 are taken relative to their largest expert.
// Backward: dz_k = g w_k p_k (log(p_k / m) - KL_k) dz'/dz, one read and one write, either way.
// Parallelisation: the caller hands out blocks of rows.

#include "cpu/columns.h"
#include "cpu/exponentials.h"
#include "cpu/kernels.h"

namespace robustgate {
namespace RG_ISA {
namespace {

constexpr float kNearSquared = 9.765625e-4f;  // the series serves where sum d_k^2 is below: 2^-10

template <DType D>
struct JsdColumns : Columns<D> {
  // Sums: KL_k, then sum_v p_0 u_k of each expert, and sum_v p_0 sum_k d_k^2.
  explicit JsdColumns(int64_t experts)
      : Columns<D>(experts, 2 * experts + 1), weight(new float[experts]) {}
  ~JsdColumns() { delete[] weight; }
  float* const weight;  // [K] in the rows' order

  void set_weights(const float* w) {
    for (int64_t i = 0; i < this->experts; ++i) weight[i] = w[this->order[i]];
  }
};

// Columns of any spread, in log2: sets e to p_k and d to log(p_k / m), and returns m. Where no
// expert that counts allows a column, log(p_k / m) is infinite.
template <DType D>
Vec far_columns(const JsdColumns<D>& c, const Vec* x, const Exponent& e) {
  constexpr int kStride = Loader<D>::kPerLoad;
  Vec reference = splat(-3e38f);
  for (int64_t k = 0; k < c.experts; ++k) {
    c.d[k] = log2_prob(c.rows[k], x[k * kStride], e.scale);
    if (c.weight[k] > 0) reference = max(c.d[k], reference);
  }
  Vec total = {};
  for (int64_t k = 0; k < c.experts; ++k) {
    if (c.weight[k] > 0) total += c.weight[k] * exp2(c.d[k] - reference);
  }
  const Vec log_total = log_sum(total, Vec{});
  const VecI excluded = reference < kImpossible;
  for (int64_t k = 0; k < c.experts; ++k) {
    c.e[k] = exp2(c.d[k]);
    const Vec log_ratio = (c.d[k] - reference) * kLn2 - log_total;
    c.d[k] = excluded & (c.e[k] > 0.0f) ? splat(INFINITY) : log_ratio;
  }
  return exp2(reference) * total;
}

template <DType D>
void add_far_terms(const JsdColumns<D>& c, const Vec* x, VecI far, const Exponent& e) {
  const Vec m = far_columns(c, x, e);
  for (int64_t k = 0; k < c.experts; ++k) {
    const Vec term = c.e[k] * c.d[k] - c.e[k] + m;
    c.sums[k] += far ? term : Vec{};
    c.sums[c.experts + k] += far ? c.e[k] - c.e[0] : Vec{};
    c.sums[2 * c.experts] += far ? c.e[k] * (kFar * kFar) : Vec{};
  }
}

// Adds a vector of columns to the sums.
template <DType D>
inline void add_terms(const JsdColumns<D>& c, const Vec* x, Vec valid, const Exponent& e) {
  const int64_t experts = c.experts;
  Spread spread = compare(c, x, (float)e.unit);
  if (any_above(spread.highest, kFar)) {
    add_far_terms(c, x, (spread.highest > kFar) & (valid > 0.0f), e);
    spread = compare(c, x, (float)e.unit);
    ignore_far(c, spread);
  }
  Vec ubar = {};
  for (int64_t k = 1; k < experts; ++k) ubar += c.weight[k] * c.u[k];
  const Vec total = 1.0f + ubar;
  const Vec log_total = log_sum(total, ubar - (total - 1.0f));
  const Vec p0 = exp2(log2_prob(c.rows[0], x[0], e.scale)) * valid;
  const bool some_near = any_above(-spread.squared, -kNearSquared);
  const VecI near = spread.squared < kNearSquared;
  const Vec inverse = some_near ? 1.0f / total : Vec{};
  c.sums[2 * experts] += p0 * spread.squared;
  for (int64_t k = 0; k < experts; ++k) {
    const Vec difference = c.u[k] - ubar;
    Vec bracket = c.e[k] * (c.d[k] - log_total) - difference;
    if (some_near) {
      const Vec t = difference * inverse;
      const Vec series =
          difference * t * (((t * -0.05f + 0.0833333333f) * t - 0.166666667f) * t + 0.5f);
      bracket = near ? series : bracket;
    }
    c.sums[k] += p0 * bracket;
    c.sums[experts + k] += p0 * c.u[k];
  }
}

// KL_k of row n, column by column. Corrects lse where experts are nearly equal; false if a
// log-sum-exp is not finite.
template <DType D, bool kCap>
bool compare_columns(const JSD& op, int64_t n, const Exponent& e, JsdColumns<D>& c, double* totals,
                     double* kl, double* lse) {
  const int64_t experts = op.spec.experts;
  const float* w = op.weights + n * op.weight_stride;
  for (int attempt = 0; attempt < 2; ++attempt) {
    if (!c.template start<kCap>(op.spec, op.logits, nullptr, n, w, lse, e)) return false;
    c.set_weights(w);
    sum_columns<D, kCap>(c, 2 * experts + 1, op.spec.vocab, e, totals,
                         [&](const Vec* x, Vec valid) { add_terms(c, x, valid, e); });
    if (op.given_lse || attempt > 0 ||
        !correct_log_sum_exps(c, totals[2 * experts], totals + experts, lse)) {
      break;
    }
  }
  for (int64_t i = 0; i < experts; ++i) kl[c.order[i]] = totals[i] < 0 ? 0 : totals[i];  // rounding
  return true;
}

// cross[k] = sum_v exponential_k log2 m, m = sum_k factor_k exponential_k. The factors hold a power
// of two that brings log2 m near 0 where the mass is: a constant logarithm rounds the same way in
// every column.
template <int kExperts, DType D>
void cross_entropies(const Exponentials& exponentials, const Columns<D>& c, double* cross) {
  const int64_t count = kExperts ? kExperts : c.experts;
  const float* factor = exponentials.factors;
  constexpr int64_t kStep = kAddsPerFloatSum * kLanes;
  clear(c, count);
  for (int64_t begin = 0; begin < exponentials.stride; begin += kStep) {
    const int64_t end = begin + kStep < exponentials.stride ? begin + kStep : exponentials.stride;
    Vec kept[kExperts ? kExperts : 1] = {};
    Vec* sum = kExperts ? kept : c.sums;
    for (int64_t v = begin; v < end; v += kLanes) {
      Vec m = {};
      for (int64_t k = 0; k < count; ++k) m += factor[k] * load<Vec>(exponentials.row(k) + v);
      const Vec log_m = log2_of(max(m, splat(kTiny)));
      for (int64_t k = 0; k < count; ++k) sum[k] += load<Vec>(exponentials.row(k) + v) * log_m;
    }
    for (int64_t k = 0; k < count; ++k) {
      c.wide[k] += widen(sum[k]);
      sum[k] = Vec{};
    }
  }
  for (int64_t k = 0; k < count; ++k) cross[k] = sum_lanes(c.wide[k]);
}

// KL_k of row n from entropies; false where the row asks for more.
template <DType D, bool kCap>
bool compare_entropies(const JSD& op, int64_t n, const Exponent& e, float* scratch,
                       const Columns<D>& c, double* cross, double* kl, double* lse) {
  typedef typename Loader<D>::Element Element;
  const int64_t experts = op.spec.experts, vocab = op.spec.vocab;
  const float* w = op.weights + n * op.weight_stride;
  const Exponentials exponentials(scratch, experts, vocab);
  double* sum = cross + experts;
  double level = 0;  // of log2 m where the mass is
  for (int64_t k = 0; k < experts; ++k) {
    const Element* z = (const Element*)op.logits[k].data + row_offset(op.logits[k], op.spec, n);
    RowExponentials row;
    if (!(w[k] >= kSmallestWeight) ||
        !row_exponentials<D, kCap>(z, vocab, e, exponentials.rows + k * exponentials.stride, row)) {
      return false;
    }
    sum[k] = row.sum;
    lse[k] = row.lse.value();
    kl[k] = row.mean_exponent - ::log2(row.sum);
    level += w[k] * kl[k];
  }
  level = ::floor(level);
  for (int64_t k = 0; k < experts; ++k) {
    exponentials.factors[k] = (float)(w[k] / sum[k] * ::exp2(-level));
  }
  const auto run = experts == 2   ? &cross_entropies<2, D>
                   : experts == 3 ? &cross_entropies<3, D>
                   : experts == 4 ? &cross_entropies<4, D>
                                  : &cross_entropies<0, D>;
  run(exponentials, c, cross);
  for (int64_t k = 0; k < experts; ++k) {
    kl[k] = (kl[k] - level - cross[k] / sum[k]) / kLog2EDouble;
    if (!(kl[k] >= kApart)) return false;
  }
  return true;
}

template <DType D, bool kCap>
void forward(const JSD& op, int64_t begin, int64_t end, float* scratch) {
  typedef typename Loader<D>::Element Element;
  const int64_t experts = op.spec.experts;
  const Exponent e(op.spec);
  JsdColumns<D> c(experts);
  double* totals = new double[5 * experts + 1];
  double *kl = totals + 2 * experts + 1, *cross = kl + experts;
  for (int64_t n = begin; n < end; ++n) {
    double* lse = op.lse + n * experts;
    for (int64_t k = 0; k < experts; ++k) lse[k] = kl[k] = 0;
    const bool ignored = op.target && op.target[n] == op.spec.ignore_index;
    bool known = ignored || (scratch && !op.given_lse &&
                             compare_entropies<D, kCap>(op, n, e, scratch, c, cross, kl, lse));
    if (!known) {
      for (int64_t k = 0; k < experts; ++k) {
        const Element* z = (const Element*)op.logits[k].data + row_offset(op.logits[k], op.spec, n);
        lse[k] = op.given_lse ? op.given_lse[n * experts + k]
                              : row_log_sum_exp<D, kCap>(z, 0, op.spec.vocab, e).value();
      }
      known = compare_columns<D, kCap>(op, n, e, c, totals, kl, lse);
    }
    const float* w = op.weights + n * op.weight_stride;
    double value = known ? 0.0 : (double)NAN;
    for (int64_t k = 0; k < experts; ++k) {
      if (w[k] != 0) value += w[k] * kl[k];
      op.kl[n * experts + k] = known ? (float)kl[k] : NAN;
    }
    op.value[n] = ignored ? 0.0f : (float)value;
  }
  delete[] totals;
}

// Factors of row n's gradient, in the rows' order.
struct Factors {
  float* scale;  // g w_k / temperature
  float* kl;
};

// Overwrites x with dz_k for a vector of columns.
template <DType D, bool kCap>
inline void gradients(const JsdColumns<D>& c, Vec* x, Factors f, const Exponent& e) {
  constexpr int kStride = Loader<D>::kPerLoad;
  Spread spread = compare(c, x, (float)e.unit);
  const bool far = any_above(spread.highest, kFar);
  const VecI is_far = spread.highest > kFar;
  if (far) {
    far_columns(c, x, e);
    for (int64_t k = 0; k < c.experts; ++k) {
      c.sums[k] = f.scale[k] * c.e[k] * (c.d[k] - f.kl[k]);
    }
    spread = compare(c, x, (float)e.unit);
    ignore_far(c, spread);
  }
  Vec ubar = {};
  for (int64_t k = 1; k < c.experts; ++k) ubar += c.weight[k] * c.u[k];
  const Vec log_total = log1p(ubar);
  const Vec p0 = exp2(log2_prob(c.rows[0], x[0], e.scale));
  for (int64_t k = 0; k < c.experts; ++k) {
    Vec dz = f.scale[k] * (p0 * c.e[k]) * (c.d[k] - log_total - f.kl[k]);
    if (far) dz = is_far ? c.sums[k] : dz;
    const Vec u = x[k * kStride];
    x[k * kStride] = kCap ? dz * (1.0f - u * u) : dz;
  }
}

// The same for experts that are clearly apart, from log p_k and log m.
template <DType D, bool kCap>
inline void gradients_apart(const JsdColumns<D>& c, Vec* x, Factors f, const Exponent& e) {
  constexpr int kStride = Loader<D>::kPerLoad;
  constexpr int kDegree = kStride == 2 || D == DType::kFloat16 ? 2 : 3;
  Vec m = {};
  for (int64_t k = 0; k < c.experts; ++k) {
    c.d[k] = max(log2_prob(c.rows[k], x[k * kStride], e.scale), splat(kLowestExponent));
    c.e[k] = exp2<kDegree>(c.d[k]);
    m += c.weight[k] * c.e[k];
  }
  const Vec log_m = log2_of(max(m, splat(kTiny)));
  for (int64_t k = 0; k < c.experts; ++k) {
    const Vec dz = f.scale[k] * c.e[k] * ((c.d[k] - log_m) * kLn2 - f.kl[k]);
    const Vec u = x[k * kStride];
    x[k * kStride] = kCap ? dz * (1.0f - u * u) : dz;
  }
}

template <DType D, bool kCap>
void backward(const JSDBackward& op, int64_t begin, int64_t end) {
  const int64_t experts = op.spec.experts;
  const Exponent e(op.spec);
  JsdColumns<D> c(experts);
  Factors f{new float[2 * experts], nullptr};
  f.kl = f.scale + experts;
  for (int64_t n = begin; n < end; ++n) {
    const bool ignored = op.target && op.target[n] == op.spec.ignore_index;
    const float* w = op.weights + n * op.weight_stride;
    const float grad = ignored ? 0.0f : op.grad[n];
    const bool finite =
        c.template start<kCap>(op.spec, op.logits, op.grad_logits, n, w, op.lse + n * experts, e);
    c.set_weights(w);
    bool any = false;
    bool apart = true;
    for (int64_t i = 0; i < experts; ++i) {
      const int64_t k = c.order[i];
      f.scale[i] = (float)((double)grad * w[k] / op.spec.temperature);
      f.kl[i] = op.kl[n * experts + k];
      apart = apart && w[k] >= kSmallestWeight && f.kl[i] >= kApart;
      if (!fill_gradient<D>(op.spec, op.grad_logits[k], op.padded_vocab[k], n, f.scale[i] == 0,
                            finite)) {
        c.rows[i].dz = nullptr;
      }
      any = any || c.rows[i].dz;
    }
    if (!finite || !any) continue;
    if (apart) {
      for_each_vector<D, kCap, true>(c.rows, experts, op.spec.vocab, e, c.x,
                                     [&](Vec* x, Vec) { gradients_apart<D, kCap>(c, x, f, e); });
    } else {
      for_each_vector<D, kCap, true>(c.rows, experts, op.spec.vocab, e, c.x,
                                     [&](Vec* x, Vec) { gradients<D, kCap>(c, x, f, e); });
    }
  }
  delete[] f.scale;
}

}  // namespace

void jsd(const JSD& op, int64_t begin, int64_t end, float* scratch) {
  RG_FOR_LOGITS(op.spec, forward, op, begin, end, scratch)
}

void jsd_backward(const JSDBackward& op, int64_t begin, int64_t end) {
  RG_FOR_LOGITS(op.spec, backward, op, begin, end)
}

}  // namespace RG_ISA
}  // namespace robustgate

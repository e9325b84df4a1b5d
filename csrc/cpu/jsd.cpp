// Jensen-Shannon divergence of K experts: KL_k = sum_v p_k log(p_k / m), m = sum_k w_k p_k, and
// JSD = sum_k w_k KL_k.
//
// Forward: two passes over a row's logits, the second from cache: log-sum-exps (log_sum_exp.h),
// then per column, with expert 0 the one of the largest weight (columns.h),
//
//   u_k = expm1(d_k),  ubar = sum_k w_k u_k,  M = 1 + ubar = m / p_0,
//   log(p_k / m) = d_k - log1p(ubar),  KL_k += p_0 [ e^d_k log(p_k / m) - (u_k - ubar) ],
//
// one exponential per expert and one logarithm per column. The bracket is M phi(t_k) with
// t_k = (u_k - ubar) / M; where all d_k are small it cancels, and phi's series
// t^2/2 - t^3/6 + t^4/12 - t^5/20 takes its place: identical experts give exactly 0. Columns where
// an expert has e^20 times the probability of expert 0 are taken relative to their largest expert.
// Backward: dz_k = g w_k p_k (log(p_k / m) - KL_k) dz'/dz, one read and one write, same columns.
// Parallelisation: the caller hands out blocks of rows.

#include "cpu/columns.h"
#include "cpu/kernels.h"

namespace robustgate {
namespace RG_ISA {
namespace {

constexpr float kNearSquared = 9.765625e-4f;  // the series serves where sum d_k^2 is below: 2^-10

// p_k and log(p_k / m) of a vector of columns, in e and d.
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

// Adds a vector of columns to the KL_k in sums[0 .. K), the common case.
template <DType D>
inline bool add_terms(const JsdColumns<D>& c, const Vec* x, Vec valid, const Exponent& e) {
  const int64_t experts = c.experts;
  const Spread spread = compare(c, x, (float)e.unit);
  if (any_below(-spread.highest, -kFar)) return false;
  Vec ubar = {};
  for (int64_t k = 1; k < experts; ++k) ubar += c.weight[k] * c.u[k];
  const Vec total = 1.0f + ubar;
  const Vec log_total = log_sum(total, ubar - (total - 1.0f));
  const Vec p0 = exp2(log2_prob(c.rows[0], x[0], e.scale)) * valid;
  c.sums[2 * experts] += p0 * spread.squared;
  if (!any_below(spread.squared, kNearSquared)) {
    for (int64_t k = 0; k < experts; ++k) {
      const Vec bracket = c.e[k] * (c.d[k] - log_total) - (c.u[k] - ubar);
      c.sums[k] += p0 * bracket;
      c.sums[experts + k] += p0 * c.u[k];
    }
    return true;
  }
  const Vec inverse = 1.0f / total;
  for (int64_t k = 0; k < experts; ++k) {
    const Vec difference = c.u[k] - ubar;
    const Vec t = difference * inverse;
    const Vec series =
        difference * t * (((t * -0.05f + 0.0833333333f) * t - 0.166666667f) * t + 0.5f);
    const Vec bracket = c.e[k] * (c.d[k] - log_total) - difference;
    c.sums[k] += p0 * (spread.squared < kNearSquared ? series : bracket);
    c.sums[experts + k] += p0 * c.u[k];
  }
  return true;
}

// The columns of any spread: sets e to p_k and d to log(p_k / m), and returns m. Where no expert
// that counts allows a column, log(p_k / m) is infinite.
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
void add_far_terms(const JsdColumns<D>& c, const Vec* x, Vec valid, const Exponent& e) {
  const Vec m = far_columns(c, x, e);
  for (int64_t k = 0; k < c.experts; ++k) {
    const Vec term = c.e[k] * c.d[k] - c.e[k] + m;
    c.sums[k] += valid > 0.0f ? term : Vec{};
  }
}

template <DType D, bool kCap>
void forward(const JSD& op, int64_t begin, int64_t end) {
  typedef typename Loader<D>::Element Element;
  const int64_t experts = op.spec.experts;
  const Exponent e(op.spec);
  JsdColumns<D> c(experts);
  double* totals = new double[2 * experts + 1];
  for (int64_t n = begin; n < end; ++n) {
    float* kl_out = op.kl + n * experts;
    double* lse = op.lse + n * experts;
    op.value[n] = 0;
    for (int64_t k = 0; k < experts; ++k) lse[k] = kl_out[k] = 0;
    if (op.target && op.target[n] == op.spec.ignore_index) continue;
    for (int64_t k = 0; k < experts; ++k) {
      const Element* z = (const Element*)op.logits[k].data + row_offset(op.logits[k], op.spec, n);
      lse[k] = op.given_lse ? op.given_lse[n * experts + k]
                            : row_log_sum_exp<D, kCap>(z, 0, op.spec.vocab, e).value();
    }
    const float* w = op.weights + n * op.weight_stride;
    if (!c.template start<kCap>(op.spec, op.logits, nullptr, n, w, lse, e)) {
      op.value[n] = NAN;
      for (int64_t k = 0; k < experts; ++k) kl_out[k] = NAN;
      continue;
    }
    bool far = false;
    const auto pass = [&] {
      c.set_weights(w);
      sum_columns<D, kCap>(c, 2 * experts + 1, op.spec.vocab, e, totals,
                           [&](const Vec* x, Vec valid) {
                             if (add_terms(c, x, valid, e)) return;
                             add_far_terms(c, x, valid, e);
                             far = true;
                           });
    };
    pass();
    if (!far && !op.given_lse &&
        correct_log_sum_exps(c, totals[2 * experts], totals + experts, lse)) {
      c.template start<kCap>(op.spec, op.logits, nullptr, n, w, lse, e);
      pass();
    }
    double value = 0;
    for (int64_t i = 0; i < experts; ++i) {
      const double term = totals[i] < 0 ? 0 : totals[i];  // rounding
      kl_out[c.order[i]] = (float)term;
      if (c.weight[i] != 0) value += (double)c.weight[i] * term;
    }
    op.value[n] = (float)value;
  }
  delete[] totals;
}

// Overwrites x with dz_k for a vector of columns.
template <DType D, bool kCap>
inline void gradients(const JsdColumns<D>& c, Vec* x, const float* factor, const float* kl,
                      const Exponent& e) {
  constexpr int kStride = Loader<D>::kPerLoad;
  const Spread spread = compare(c, x, (float)e.unit);
  if (any_below(-spread.highest, -kFar)) {
    far_columns(c, x, e);
  } else {
    Vec ubar = {};
    for (int64_t k = 1; k < c.experts; ++k) ubar += c.weight[k] * c.u[k];
    const Vec log_total = log1p(ubar);
    const Vec p0 = exp2(log2_prob(c.rows[0], x[0], e.scale));
    for (int64_t k = 0; k < c.experts; ++k) {
      c.e[k] = p0 * c.e[k];
      c.d[k] = c.d[k] - log_total;
    }
  }
  for (int64_t k = 0; k < c.experts; ++k) {
    const Vec u = x[k * kStride];
    const Vec dz = factor[k] * c.e[k] * (c.d[k] - kl[k]);
    x[k * kStride] = kCap ? dz * (1.0f - u * u) : dz;
  }
}

template <DType D, bool kCap>
void backward(const JSDBackward& op, int64_t begin, int64_t end) {
  const int64_t experts = op.spec.experts;
  const Exponent e(op.spec);
  JsdColumns<D> c(experts);
  float* factor = new float[2 * experts];
  float* kl = factor + experts;
  for (int64_t n = begin; n < end; ++n) {
    const bool ignored = op.target && op.target[n] == op.spec.ignore_index;
    const float* w = op.weights + n * op.weight_stride;
    const float grad = ignored ? 0.0f : op.grad[n];
    const bool finite =
        c.template start<kCap>(op.spec, op.logits, op.grad_logits, n, w, op.lse + n * experts, e);
    c.set_weights(w);
    bool any = false;
    for (int64_t i = 0; i < experts; ++i) {
      const int64_t k = c.order[i];
      factor[i] = (float)((double)grad * w[k] / op.spec.temperature);
      kl[i] = op.kl[n * experts + k];
      if (!fill_gradient<D>(op.spec, op.grad_logits[k], op.padded_vocab[k], n, factor[i] == 0,
                            finite)) {
        c.rows[i].dz = nullptr;
      }
      any = any || c.rows[i].dz;
    }
    if (!finite || !any) continue;
    for_each_vector<D, kCap, true>(c.rows, experts, op.spec.vocab, e, c.x,
                                   [&](Vec* x, Vec) { gradients<D, kCap>(c, x, factor, kl, e); });
  }
  delete[] factor;
}

}  // namespace

void jsd(const JSD& op, int64_t begin, int64_t end) {
  RG_FOR_LOGITS(op.spec, forward, op, begin, end)
}

void jsd_backward(const JSDBackward& op, int64_t begin, int64_t end) {
  RG_FOR_LOGITS(op.spec, backward, op, begin, end)
}

}  // namespace RG_ISA
}  // namespace robustgate

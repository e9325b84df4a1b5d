// Log-probs of a gated mixture over the vocabulary: log m(v) = log sum_k g_k p_k(v).
//
// Forward: a row of every expert as exponentials in cache (exponentials.h), then per column a
// product per expert and one logarithm. A row with a mixture below 2^-100 is done again from the
// logits: a_k = log2(g_k p_k), top = max_k a_k and log m = ln 2 (top + log2 sum_k 2^(a_k - top)),
// as in the pass that leaves the means over the vocabulary of log m and of the responsibilities r_k
// = g_k p_k / m. Backward for an upstream c(v): sum_v c r_k first, then dz_k = (c r_k - p_k sum_u c
// r_k) dz'/dz; the gate's gradient needs the first pass only. A column no expert allows has log m =
// -inf and takes part in nothing. Parallelisation: the caller hands out blocks of rows.

#include "cpu/columns.h"
#include "cpu/exponentials.h"
#include "cpu/kernels.h"

namespace robustgate {
namespace RG_ISA {
namespace {

// One row of each expert and the gate's log2 weights.
template <DType D>
struct GatedColumns : Columns<D> {
  explicit GatedColumns(int64_t experts)
      : Columns<D>(experts, experts + 1),
        log_gate(new float[2 * experts]),
        gate(log_gate + experts) {}
  ~GatedColumns() { delete[] log_gate; }
  float* const log_gate;  // log2 g_k
  float* const gate;

  // Returns false where the gate or a log-sum-exp is not finite.
  template <bool kCap>
  bool start_row(const MixtureLogSoftmax& op, const LogitRows* grads, int64_t n,
                 const Exponent& e) {
    const int64_t experts = this->experts;
    const float* logits = op.gate_logits + n * op.gate_stride;
    float top = logits[0];
    for (int64_t k = 1; k < experts; ++k) top = logits[k] > top ? logits[k] : top;
    double sum = 0;
    for (int64_t k = 0; k < experts; ++k) sum += ::exp((double)logits[k] - top);
    for (int64_t k = 0; k < experts; ++k) {
      const double log_g = (double)logits[k] - top - ::log(sum);
      log_gate[k] = (float)(log_g * kLog2EDouble);
      gate[k] = (float)::exp(log_g);
    }
    return sum > 0 && this->template start<kCap>(op.spec, op.logits, grads, n, nullptr,
                                                 op.lse + n * experts, e);
  }
};

// The mixture in one vector of columns; e[k] holds 2^(a_k - top).
struct Gated {
  Vec top;
  Vec sum;  // m = 2^top sum
};

template <DType D>
inline Gated gate_columns(const GatedColumns<D>& c, const Vec* x, float scale) {
  constexpr int kStride = Loader<D>::kPerLoad;
  Gated mixture{splat(-3e38f), Vec{}};
  for (int64_t k = 0; k < c.experts; ++k) {
    c.d[k] = log2_prob(c.rows[k], x[k * kStride], scale);
    mixture.top = max(c.d[k] + c.log_gate[k], mixture.top);
  }
  for (int64_t k = 0; k < c.experts; ++k) {
    c.e[k] = exp2(c.d[k] + c.log_gate[k] - mixture.top);
    mixture.sum += c.e[k];
  }
  return mixture;
}

// Whether no expert that counts allows a column.
inline VecI impossible(const Gated& mixture) { return mixture.top < kImpossible; }

inline Vec log_mixture(const Gated& mixture) {
  const Vec log = mixture.top * kLn2 + log_sum(mixture.sum, Vec{});
  return impossible(mixture) ? splat(-INFINITY) : log;
}

// r_k relative to e[k]: 0 in impossible columns.
inline Vec normaliser(const Gated& mixture) {
  return impossible(mixture) ? Vec{} : 1.0f / mixture.sum;
}

template <DType D, bool kCap>
void write_row(const GatedColumns<D>& c, const LogitsSpec& spec, const Exponent& e, float* out) {
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  for_each_load<D, kCap, false>(c.rows, c.experts, spec.vocab, e, c.x,
                                [&](const Vec* x, const Vec*, int64_t v, int64_t count) {
                                  Vec value[kPerLoad];
                                  for (int j = 0; j < kPerLoad; ++j)
                                    value[j] = log_mixture(gate_columns(c, x + j, e.scale));
                                  if (count == kLanes * kPerLoad) {
                                    store_columns<kPerLoad>(out + v, value);
                                  } else {
                                    float tail[kLanes * kPerLoad];
                                    store_columns<kPerLoad>(tail, value);
                                    memcpy(out + v, tail, count * sizeof(float));
                                  }
                                });
}

// The same from exponentials; false where a mixture is too small, or the row asks for more.
template <DType D, bool kCap>
bool write_row_from_exponentials(const MixtureLogSoftmax& op, int64_t n, const Exponent& e,
                                 float* scratch, float* out) {
  typedef typename Loader<D>::Element Element;
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  constexpr int64_t kStep = kLanes * kPerLoad;
  const int64_t experts = op.spec.experts, vocab = op.spec.vocab;
  const Exponentials exponentials(scratch, experts, vocab);
  const float* gate = op.gate_logits + n * op.gate_stride;
  float top = gate[0];
  for (int64_t k = 1; k < experts; ++k) top = gate[k] > top ? gate[k] : top;
  double sum = 0;
  for (int64_t k = 0; k < experts; ++k) sum += ::exp((double)gate[k] - top);
  for (int64_t k = 0; k < experts; ++k) {
    const Element* z = (const Element*)op.logits[k].data + row_offset(op.logits[k], op.spec, n);
    RowExponentials row;
    if (!row_exponentials<D, kCap>(z, vocab, e, exponentials.rows + k * exponentials.stride, row)) {
      return false;
    }
    exponentials.factors[k] = (float)(::exp((double)gate[k] - top) / sum / row.sum);
    op.lse[n * experts + k] = row.lse.value();
  }
  Vec smallest = splat(1.0f);
  for (int64_t v = 0; v < vocab; v += kStep) {
    Vec value[kPerLoad];
    for (int j = 0; j < kPerLoad; ++j) {
      Vec m = {};
      for (int64_t k = 0; k < experts; ++k) {
        m += exponentials.factors[k] * load<Vec>(exponentials.row(k) + v + j * kLanes);
      }
      if (v + kStep <= vocab) smallest = min(m, smallest);
      value[j] = log2_of(m) * kLn2;
    }
    if (v + kStep <= vocab) {
      store_columns<kPerLoad>(out + v, value);
      continue;
    }
    float tail[kStep];
    store_columns<kPerLoad>(tail, value);
    for (int64_t i = 0; v + i < vocab; ++i) {
      out[v + i] = tail[i];
      if (!(tail[i] > -69.0f)) return false;
    }
  }
  return all_above(smallest, kSmallestMixture);
}

// totals[k] = sum_v r_k(v), totals[K] = sum_v log m(v)
template <DType D, bool kCap>
void mean_row(const GatedColumns<D>& c, const LogitsSpec& spec, const Exponent& e, double* totals) {
  sum_columns<D, kCap>(c, c.experts + 1, spec.vocab, e, totals, [&](const Vec* x, Vec valid) {
    const Gated mixture = gate_columns(c, x, e.scale);
    const Vec inverse = normaliser(mixture) * valid;
    for (int64_t k = 0; k < c.experts; ++k) c.sums[k] += c.e[k] * inverse;
    c.sums[c.experts] += valid > 0.0f ? log_mixture(mixture) : Vec{};
  });
}

template <DType D, bool kCap>
void forward(const MixtureLogSoftmax& op, int64_t begin, int64_t end, float* scratch) {
  typedef typename Loader<D>::Element Element;
  const int64_t experts = op.spec.experts, vocab = op.spec.vocab;
  const Exponent e(op.spec);
  GatedColumns<D> c(experts);
  double* totals = new double[experts + 1];
  for (int64_t n = begin; n < end; ++n) {
    double* lse = op.lse + n * experts;
    if (op.log_mixture && scratch &&
        write_row_from_exponentials<D, kCap>(op, n, e, scratch, op.log_mixture + n * vocab)) {
      continue;
    }
    const bool ignored = op.target && op.target[n] == op.spec.ignore_index;
    for (int64_t k = 0; k < experts; ++k) {
      const Element* z = (const Element*)op.logits[k].data + row_offset(op.logits[k], op.spec, n);
      lse[k] = ignored ? 0.0 : row_log_sum_exp<D, kCap>(z, 0, vocab, e).value();
    }
    const bool finite = !ignored && c.template start_row<kCap>(op, nullptr, n, e);
    if (op.log_mixture) {
      float* out = op.log_mixture + n * vocab;
      if (finite) {
        write_row<D, kCap>(c, op.spec, e, out);
      } else {
        for (int64_t v = 0; v < vocab; ++v) out[v] = NAN;
      }
      continue;
    }
    for (int64_t k = 0; k <= experts; ++k) totals[k] = ignored ? 0.0 : (double)NAN;
    if (finite) mean_row<D, kCap>(c, op.spec, e, totals);
    op.mean[n] = (float)(totals[experts] / vocab);
    for (int64_t k = 0; k < experts; ++k) op.share[n * experts + k] = (float)(totals[k] / vocab);
  }
  delete[] totals;
}

// The upstream c(v) of a row: a number per column, or one for all.
template <int kPerLoad>
struct Upstream {
  const float* columns;  // null: `constant` for every column
  float constant;

  void load(int64_t v, int64_t count, Vec* out) const {
    if (columns == nullptr) {
      for (int j = 0; j < kPerLoad; ++j) out[j] = splat(constant);
    } else if (count == kLanes * kPerLoad) {
      load_columns<kPerLoad>(columns + v, out);
    } else {
      float tail[kLanes * kPerLoad] = {};
      memcpy(tail, columns + v, count * sizeof(float));
      load_columns<kPerLoad>(tail, out);
    }
  }
};

// totals[k] = sum_v c r_k, totals[K] = sum_v c over columns that are not impossible
template <DType D, bool kCap, typename Source>
void upstream_totals(const GatedColumns<D>& c, const LogitsSpec& spec, const Exponent& e,
                     const Source& upstream, double* totals) {
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  constexpr int64_t kLoads = kAddsPerFloatSum / kPerLoad;
  const int64_t count_of_sums = c.experts + 1;
  clear(c, count_of_sums);
  int64_t loads = 0;
  for_each_load<D, kCap, false>(c.rows, c.experts, spec.vocab, e, c.x,
                                [&](const Vec* x, const Vec* valid, int64_t v, int64_t count) {
                                  Vec grad[kPerLoad];
                                  upstream.load(v, count, grad);
                                  for (int j = 0; j < kPerLoad; ++j) {
                                    const Gated mixture = gate_columns(c, x + j, e.scale);
                                    const Vec weight = grad[j] * valid[j];
                                    const Vec scaled = weight * normaliser(mixture);
                                    for (int64_t k = 0; k < c.experts; ++k)
                                      c.sums[k] += c.e[k] * scaled;
                                    c.sums[c.experts] += impossible(mixture) ? Vec{} : weight;
                                  }
                                  if (++loads % kLoads == 0) flush(c, count_of_sums);
                                });
  flush(c, count_of_sums);
  for (int64_t i = 0; i < count_of_sums; ++i) totals[i] = sum_lanes(c.wide[i]);
}

// Overwrites x with dz_k for a load of columns.
template <DType D, bool kCap>
inline void gradients(const GatedColumns<D>& c, Vec* x, const Vec* grad, const float* total,
                      float inverse_temperature, const Exponent& e) {
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  for (int j = 0; j < kPerLoad; ++j) {
    const Gated mixture = gate_columns(c, x + j, e.scale);
    const Vec scaled = grad[j] * normaliser(mixture);
    for (int64_t k = 0; k < c.experts; ++k) {
      const Vec u = x[k * kPerLoad + j];
      const Vec dz = (c.e[k] * scaled - exp2(c.d[k]) * total[k]) * inverse_temperature;
      x[k * kPerLoad + j] = kCap ? dz * (1.0f - u * u) : dz;
    }
  }
}

// The same from probabilities kept in scratch: one exponential per expert and column in all. False,
// with nothing written, where a mixture is too small.
template <DType D, bool kCap>
bool backward_from_probabilities(const MixtureLogSoftmaxBackward& op, const GatedColumns<D>& c,
                                 const Upstream<Loader<D>::kPerLoad>& upstream, const Exponent& e,
                                 float* scratch, double* totals, bool write) {
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  constexpr int kDegree = kPerLoad == 2 || D == DType::kFloat16 ? 2 : 3;
  const LogitsSpec& spec = op.forward.spec;
  const int64_t experts = spec.experts, stride = scratch_stride(spec.vocab);
  clear(c, experts + 1);
  Vec smallest = splat(1.0f);
  int64_t loads = 0;
  for_each_load<D, kCap, false>(
      c.rows, experts, spec.vocab, e, c.x,
      [&](const Vec* x, const Vec* valid, int64_t v, int64_t count) {
        Vec grad[kPerLoad];
        upstream.load(v, count, grad);
        for (int j = 0; j < kPerLoad; ++j) {
          Vec m = {};
          for (int64_t k = 0; k < experts; ++k) {
            c.e[k] = exp2<kDegree>(log2_prob(c.rows[k], x[k * kPerLoad + j], e.scale));
            store(scratch + k * stride + v + j * kLanes, c.e[k]);
            m += c.gate[k] * c.e[k];
          }
          const Vec counted = valid[j] > 0.0f ? m : splat(1.0f);
          smallest = min(counted, smallest);
          const Vec weight = grad[j] * valid[j];
          const Vec ratio = weight / counted;
          for (int64_t k = 0; k < experts; ++k) c.sums[k] += c.e[k] * ratio;
          c.sums[experts] += weight;
        }
        if (++loads % (kAddsPerFloatSum / kPerLoad) == 0) flush(c, experts + 1);
      });
  flush(c, experts + 1);
  if (!all_above(smallest, kSmallestMixture)) return false;
  for (int64_t i = 0; i <= experts; ++i) {
    totals[i] = sum_lanes(c.wide[i]) * (i < experts ? c.gate[i] : 1.0f);
  }
  if (!write) return true;
  const float inverse_temperature = (float)(1.0 / spec.temperature);
  for_each_load<D, kCap, true>(
      c.rows, experts, spec.vocab, e, c.x, [&](Vec* x, const Vec* valid, int64_t v, int64_t count) {
        Vec grad[kPerLoad];
        upstream.load(v, count, grad);
        for (int j = 0; j < kPerLoad; ++j) {
          const float* at = scratch + v + j * kLanes;
          Vec m = {};
          for (int64_t k = 0; k < experts; ++k) m += c.gate[k] * load<Vec>(at + k * stride);
          const Vec ratio = grad[j] / (valid[j] > 0.0f ? m : splat(1.0f));
          for (int64_t k = 0; k < experts; ++k) {
            const Vec u = x[k * kPerLoad + j];
            const Vec dz = load<Vec>(at + k * stride) * inverse_temperature *
                           (c.gate[k] * ratio - (float)totals[k]);
            x[k * kPerLoad + j] = kCap ? dz * (1.0f - u * u) : dz;
          }
        }
      });
  return true;
}

template <DType D, bool kCap>
void backward(const MixtureLogSoftmaxBackward& op, int64_t begin, int64_t end, float* scratch) {
  constexpr int kPerLoad = Loader<D>::kPerLoad;
  const MixtureLogSoftmax& fwd = op.forward;
  const int64_t experts = fwd.spec.experts, vocab = fwd.spec.vocab;
  const Exponent e(fwd.spec);
  GatedColumns<D> c(experts);
  double* totals = new double[experts + 1];
  float* total = new float[experts];
  for (int64_t n = begin; n < end; ++n) {
    const bool ignored = fwd.target && fwd.target[n] == fwd.spec.ignore_index;
    const Upstream<kPerLoad> upstream{op.grad_per_row ? nullptr : op.grad + n * vocab,
                                      op.grad_per_row ? op.grad[n] : 0.0f};
    const bool zero = ignored || (op.grad_per_row && upstream.constant == 0);
    const bool finite = c.template start_row<kCap>(fwd, op.grad_logits, n, e);
    bool any = false;
    for (int64_t k = 0; k < experts; ++k) {
      any |= fill_gradient<D>(fwd.spec, op.grad_logits[k], op.padded_vocab[k], n, zero, finite);
    }
    const double nothing = zero ? 0.0 : (double)NAN;
    for (int64_t k = 0; k <= experts; ++k) totals[k] = nothing;
    const bool done =
        finite && !zero && scratch &&
        backward_from_probabilities<D, kCap>(op, c, upstream, e, scratch, totals, any);
    if (finite && !zero && !done) upstream_totals<D, kCap>(c, fwd.spec, e, upstream, totals);
    for (int64_t k = 0; k < experts; ++k) total[k] = (float)totals[k];
    if (op.grad_gate_logits) {
      float* out = op.grad_gate_logits + n * experts;
      for (int64_t k = 0; k < experts; ++k) out[k] = total[k] - c.gate[k] * (float)totals[experts];
    }
    if (!any || done) continue;
    const float inverse_temperature = (float)(1.0 / fwd.spec.temperature);
    for_each_load<D, kCap, true>(c.rows, experts, vocab, e, c.x,
                                 [&](Vec* x, const Vec*, int64_t v, int64_t count) {
                                   Vec grad[kPerLoad];
                                   upstream.load(v, count, grad);
                                   gradients<D, kCap>(c, x, grad, total, inverse_temperature, e);
                                 });
  }
  delete[] totals;
  delete[] total;
}

}  // namespace

void mixture_log_softmax(const MixtureLogSoftmax& op, int64_t begin, int64_t end, float* scratch) {
  RG_FOR_LOGITS(op.spec, forward, op, begin, end, scratch)
}

void mixture_log_softmax_backward(const MixtureLogSoftmaxBackward& op, int64_t begin, int64_t end,
                                  float* scratch) {
  RG_FOR_LOGITS(op.forward.spec, backward, op, begin, end, scratch)
}

}  // namespace RG_ISA
}  // namespace robustgate

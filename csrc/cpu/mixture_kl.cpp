// KL between two gated mixtures of the same experts: sum_v m_g log(m_g / m_gamma), g the teacher's
// gate, gamma the student's.
//
// Forward: two passes over a row's logits, the second from cache. Where the mixtures are clearly
// apart it takes both logarithms of the exponentials at hand (exponentials.h). Where the result is
// small, or a gate weight is, the row is done again column by column: with expert 0 the student's
// heaviest (columns.h) and Delta = g - gamma from float64,
//
//   M = 1 + sum_k gamma_k u_k = m_gamma / p_0,   t = m_g / m_gamma - 1 = sum_k Delta_k u_k / M,
//   KL += m_gamma phi(t),   phi(t) = (1 + t) log(1 + t) - t = E + t log(1 + t),   E = log(1 + t) -
//   t,
//
// E by its series where t is small: equal gates and identical experts give exactly 0, and
// near-equal ones lose nothing. For the student's gradient tilt_k = gamma_k sum_v (p_k - m_gamma)
// t, whose terms are second-order where experts are nearly equal (sum_v m_gamma t is 0). Columns
// where an expert has e^20 times the probability of expert 0 are taken in logarithms. Backward:
// balance_k = sum_v p_k (Delta_k log(1 + t) + gamma_k E), then dz_k = p_k (Delta_k log(1 + t) +
// gamma_k E - balance_k) dz'/dz: two reads and one write. Parallelisation: the caller hands out
// blocks of rows.

#include "cpu/exponentials.h"
#include "cpu/kernels.h"
#include "cpu/mixture_kl_columns.h"

namespace robustgate {
namespace RG_ISA {
namespace {

// KL and tilt of row n, column by column. Corrects lse where experts are nearly equal; false if a
// gate or a log-sum-exp is not finite.
template <DType D, bool kCap>
bool compare_columns(const MixtureKL& op, int64_t n, const Exponent& e, KLColumns<D>& c,
                     double* totals) {
  typedef typename Loader<D>::Element Element;
  const int64_t experts = op.spec.experts;
  double* lse = op.lse + n * experts;
  for (int64_t k = 0; k < experts; ++k) {
    const Element* z = (const Element*)op.logits[k].data + row_offset(op.logits[k], op.spec, n);
    lse[k] = row_log_sum_exp<D, kCap>(z, 0, op.spec.vocab, e).value();
  }
  for (int attempt = 0; attempt < 2; ++attempt) {
    if (!c.template start_row<kCap>(op, nullptr, n, e)) return false;
    sum_columns<D, kCap>(c, 2 + 2 * experts, op.spec.vocab, e, totals,
                         [&](const Vec* x, Vec valid) { add_terms(c, x, valid, e); });
    if (attempt > 0 || !correct_log_sum_exps(c, totals[1], totals + 2 + experts, lse)) break;
  }
  op.value[n] = totals[0] < 0 ? 0.0f : (float)totals[0];  // rounding
  for (int64_t i = 0; i < experts; ++i) {
    const bool counts = c.student[i] > 0 && op.value[n] != INFINITY;
    op.tilt[n * experts + c.order[i]] = counts ? (float)(c.student[i] * totals[2 + i]) : 0.0f;
  }
  return true;
}

// totals[0] = sum_v m_g log2(m_g / m_gamma), totals[1 + k] = sum_v exponential_k m_g / m_gamma.
template <int kExperts, DType D>
void cross_entropies(const Exponentials& exponentials, const Columns<D>& c, double* totals) {
  const int64_t count = kExperts ? kExperts : c.experts;
  const float *teacher = exponentials.factors, *student = teacher + count;
  constexpr int64_t kStep = kAddsPerFloatSum * kLanes;
  clear(c, 1 + count);
  for (int64_t begin = 0; begin < exponentials.stride; begin += kStep) {
    const int64_t end = begin + kStep < exponentials.stride ? begin + kStep : exponentials.stride;
    Vec kept[kExperts ? 1 + kExperts : 1] = {};
    Vec* sum = kExperts ? kept : c.sums;
    for (int64_t v = begin; v < end; v += kLanes) {
      Vec of_teacher = {}, of_student = splat(kTiny);
      for (int64_t k = 0; k < count; ++k) {
        const Vec term = load<Vec>(exponentials.row(k) + v);
        of_teacher += teacher[k] * term;
        of_student += student[k] * term;
      }
      const Vec log_ratio = log2_of(max(of_teacher, splat(kTiny))) - log2_of(of_student);
      const Vec ratio = of_teacher / of_student;
      sum[0] += of_teacher * log_ratio;
      for (int64_t k = 0; k < count; ++k) sum[1 + k] += load<Vec>(exponentials.row(k) + v) * ratio;
    }
    for (int64_t i = 0; i <= count; ++i) {
      c.wide[i] += widen(sum[i]);
      sum[i] = Vec{};
    }
  }
  for (int64_t i = 0; i <= count; ++i) totals[i] = sum_lanes(c.wide[i]);
}

// KL and tilt of row n from entropies; false where the row asks for more.
template <DType D, bool kCap>
bool compare_entropies(const MixtureKL& op, int64_t n, const Exponent& e, float* scratch,
                       KLColumns<D>& c, double* totals) {
  typedef typename Loader<D>::Element Element;
  const int64_t experts = op.spec.experts, vocab = op.spec.vocab;
  const Exponentials exponentials(scratch, experts, vocab);
  double *g = c.exact, *gamma = c.exact + experts, *sum = totals + 1 + experts;
  softmax(op.teacher_logits + n * op.teacher_stride, experts, g);
  softmax(op.student_logits + n * op.student_stride, experts, gamma);
  double level = 0;  // of log2 m_gamma where the mass is
  for (int64_t k = 0; k < experts; ++k) {
    const Element* z = (const Element*)op.logits[k].data + row_offset(op.logits[k], op.spec, n);
    RowExponentials row;
    if (!(gamma[k] >= kSmallestWeight) ||
        !row_exponentials<D, kCap>(z, vocab, e, exponentials.rows + k * exponentials.stride, row)) {
      return false;
    }
    sum[k] = row.sum;
    level += gamma[k] * (row.mean_exponent - ::log2(row.sum));
    op.lse[n * experts + k] = row.lse.value();
  }
  level = ::floor(level);
  for (int64_t k = 0; k < experts; ++k) {
    const double scale = ::exp2(-level) / sum[k];
    exponentials.factors[k] = (float)(g[k] * scale);
    exponentials.factors[experts + k] = (float)(gamma[k] * scale);
  }
  const auto run = experts == 2   ? &cross_entropies<2, D>
                   : experts == 3 ? &cross_entropies<3, D>
                   : experts == 4 ? &cross_entropies<4, D>
                                  : &cross_entropies<0, D>;
  run(exponentials, c, totals);
  const double value = totals[0] * ::exp2(level) / kLog2EDouble;
  op.value[n] = (float)value;
  for (int64_t k = 0; k < experts; ++k) {
    op.tilt[n * experts + k] = (float)(gamma[k] * (totals[1 + k] / sum[k] - 1.0));
  }
  return value >= kApart;
}

template <DType D, bool kCap>
void forward(const MixtureKL& op, int64_t begin, int64_t end, float* scratch) {
  const int64_t experts = op.spec.experts;
  const Exponent e(op.spec);
  KLColumns<D> c(experts);
  double* totals = new double[2 + 2 * experts];
  for (int64_t n = begin; n < end; ++n) {
    const bool ignored = op.target && op.target[n] == op.spec.ignore_index;
    const bool known =
        !ignored && ((scratch && compare_entropies<D, kCap>(op, n, e, scratch, c, totals)) ||
                     compare_columns<D, kCap>(op, n, e, c, totals));
    if (known) continue;
    op.value[n] = ignored ? 0.0f : NAN;
    for (int64_t k = n * experts; k < (n + 1) * experts; ++k) {
      op.tilt[k] = op.value[n];
      if (ignored) op.lse[k] = 0;
    }
  }
  delete[] totals;
}

// Calls body(k, g_k log(1 + t) p_k - gamma_k t p_k, p_k, u) of each expert for a vector of columns.
template <DType D, typename Body>
inline void for_each_pull(const KLColumns<D>& c, const Vec* x, Vec valid, const Exponent& e,
                          Vec* far_pull, Body body) {
  Spread spread = compare(c, x, (float)e.unit);
  const bool far = any_above(spread.highest, kFar);
  const VecI is_far = spread.highest > kFar;
  if (far) {
    const FarRatio r = compare_far_mixtures(c, x, valid, e);
    for (int64_t k = 0; k < c.experts; ++k) {
      far_pull[k] = far_balance(c, r, k);
      far_pull[c.experts + k] = c.e[k];
    }
    spread = compare(c, x, (float)e.unit);
    ignore_far(c, spread);
  }
  const Ratio r = ratio_of(c, spread, x, valid, e);
  for (int64_t k = 0; k < c.experts; ++k) {
    Vec p = c.e[k];
    Vec pull = p * (c.difference[k] * r.log_ratio + c.student[k] * r.excess);
    if (far) {
      pull = is_far ? far_pull[k] : pull;
      p = is_far ? far_pull[c.experts + k] : p;
    }
    body(k, pull, p);
  }
}

// dz_k of a row whose mixtures are clearly apart, from probabilities kept in scratch: one
// exponential per expert and column in all. False, with nothing written, where a mixture is too
// small.
template <DType D, bool kCap>
bool backward_from_probabilities(const LogitsSpec& spec, const KLColumns<D>& c, const Exponent& e,
                                 float* scratch, double* balance, float grad) {
  constexpr int kStride = Loader<D>::kPerLoad;
  constexpr int kDegree = kStride == 2 || D == DType::kFloat16 ? 2 : 3;
  const int64_t experts = spec.experts, stride = scratch_stride(spec.vocab);
  // u[k] = p_k (g_k log(1 + t) - gamma_k t) for the probabilities in e[k].
  const auto pull = [&](Vec student, Vec teacher) {
    const Vec log_ratio = (log2_of(max(teacher, splat(kTiny))) - log2_of(student)) * kLn2;
    const Vec t = teacher / student - 1.0f;
    for (int64_t k = 0; k < experts; ++k) {
      c.u[k] = c.e[k] * (c.teacher[k] * log_ratio - c.student[k] * t);
    }
  };
  Vec smallest = splat(1.0f);
  float* at = scratch;
  sum_columns<D, kCap>(c, experts, spec.vocab, e, balance, [&](const Vec* x, Vec valid) {
    Vec teacher = {}, student = {};
    for (int64_t k = 0; k < experts; ++k) {
      c.e[k] = exp2<kDegree>(log2_prob(c.rows[k], x[k * kStride], e.scale));
      store(at + k * stride, c.e[k]);
      teacher += c.teacher[k] * c.e[k];
      student += c.student[k] * c.e[k];
    }
    at += kLanes;
    smallest = min(student, smallest);
    pull(student, teacher);
    for (int64_t k = 0; k < experts; ++k) c.sums[k] += c.u[k] * valid;
  });
  if (!all_above(smallest, kSmallestMixture)) return false;
  at = scratch;
  for_each_vector<D, kCap, true>(c.rows, experts, spec.vocab, e, c.x, [&](Vec* x, Vec) {
    Vec teacher = {}, student = {};
    for (int64_t k = 0; k < experts; ++k) {
      c.e[k] = load<Vec>(at + k * stride);
      teacher += c.teacher[k] * c.e[k];
      student += c.student[k] * c.e[k];
    }
    at += kLanes;
    pull(student, teacher);
    for (int64_t k = 0; k < experts; ++k) {
      const Vec dz = grad * (c.u[k] - c.e[k] * (float)balance[k]);
      const Vec u = x[k * kStride];
      x[k * kStride] = kCap ? dz * (1.0f - u * u) : dz;
    }
  });
  return true;
}

template <DType D, bool kCap>
void backward(const MixtureKLBackward& op, int64_t begin, int64_t end, float* scratch) {
  constexpr int kStride = Loader<D>::kPerLoad;
  const MixtureKL& fwd = op.forward;
  const int64_t experts = fwd.spec.experts, vocab = fwd.spec.vocab;
  const Exponent e(fwd.spec);
  KLColumns<D> c(experts);
  Vec* far_pull = new Vec[2 * experts];
  double* balance = new double[experts];
  for (int64_t n = begin; n < end; ++n) {
    const bool ignored = fwd.target && fwd.target[n] == fwd.spec.ignore_index;
    const float grad = ignored || fwd.value[n] == INFINITY ? 0.0f : op.grad[n];
    const bool finite = c.template start_row<kCap>(fwd, op.grad_logits, n, e);
    bool any = false;
    for (int64_t k = 0; k < experts; ++k) {
      const bool asked =
          fill_gradient<D>(fwd.spec, op.grad_logits[k], op.padded_vocab[k], n, grad == 0, finite);
      any = any || asked;
    }
    if (!finite || !any) continue;
    const float scaled = (float)(grad / fwd.spec.temperature);
    bool apart = scratch && fwd.value[n] >= kApart;
    for (int64_t k = 0; k < experts; ++k) apart = apart && c.student[k] >= kSmallestWeight;
    if (apart && backward_from_probabilities<D, kCap>(fwd.spec, c, e, scratch, balance, scaled)) {
      continue;
    }
    sum_columns<D, kCap>(c, experts, vocab, e, balance, [&](const Vec* x, Vec valid) {
      for_each_pull(c, x, valid, e, far_pull, [&](int64_t k, Vec pull, Vec) { c.sums[k] += pull; });
    });
    for_each_vector<D, kCap, true>(c.rows, experts, vocab, e, c.x, [&](Vec* x, Vec valid) {
      for_each_pull(c, x, valid, e, far_pull, [&](int64_t k, Vec pull, Vec p) {
        const Vec dz = scaled * (pull - p * (float)balance[k]);
        const Vec u = x[k * kStride];
        x[k * kStride] = kCap ? dz * (1.0f - u * u) : dz;
      });
    });
  }
  delete[] far_pull;
  delete[] balance;
}

}  // namespace

void mixture_kl(const MixtureKL& op, int64_t begin, int64_t end, float* scratch) {
  RG_FOR_LOGITS(op.spec, forward, op, begin, end, scratch)
}

void mixture_kl_backward(const MixtureKLBackward& op, int64_t begin, int64_t end, float* scratch) {
  RG_FOR_LOGITS(op.forward.spec, backward, op, begin, end, scratch)
}

}  // namespace RG_ISA
}  // namespace robustgate

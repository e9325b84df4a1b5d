// KL between two gated mixtures of the same experts: sum_v m_g log(m_g / m_gamma), g the teacher's
// gate, gamma the student's.
//
// Forward: two passes over a row's logits, the second from cache, as for the JSD. Per column, with
// expert 0 the student's heaviest (columns.h) and Delta = g - gamma from float64,
//
//   M = 1 + sum_k gamma_k u_k = m_gamma / p_0,   t = m_g / m_gamma - 1 = sum_k Delta_k u_k / M,
//   KL += m_gamma phi(t),   phi(t) = (1 + t) log(1 + t) - t = E + t log(1 + t),   E = log(1 + t) -
//   t,
//
// E by its series where t is small: equal gates and identical experts give exactly 0, and
// near-equal ones lose nothing. For the gradients tilt_k = gamma_k sum_v (p_k - m_gamma) t, whose
// terms are second-order where experts are nearly equal (sum_v m_gamma t is 0), and balance_k =
// sum_v p_k (g_k log(1 + t) - gamma_k t) = sum_v p_k (Delta_k log(1 + t) + gamma_k E). Columns
// where an expert has e^20 times the probability of expert 0 are taken in logarithms. Backward:
// dz_k = p_k (Delta_k log(1 + t) + gamma_k E - balance_k), one read and one write. Parallelisation:
// the caller hands out blocks of rows.

#include "cpu/columns.h"
#include "cpu/kernels.h"

namespace robustgate {
namespace RG_ISA {
namespace {

constexpr float kNear = 0.03125f;  // |t| below which the series serves

// Softmax of K gate logits; NaN for NaN, +inf or nothing but -inf.
inline void softmax(const float* logits, int64_t count, double* out) {
  float top = logits[0];
  for (int64_t k = 1; k < count; ++k) top = logits[k] > top ? logits[k] : top;
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += out[k] = ::exp((double)logits[k] - top);
  for (int64_t k = 0; k < count; ++k) out[k] /= sum;
}

// Both gates of a row, in the rows' order: g, gamma, g - gamma, log2 g, log2 gamma.
template <DType D>
struct KLColumns : Columns<D> {
  // Sums: the value, sum_v p_0 sum_k d_k^2; then tilt, balance and sum_v p_0 u_k of each expert.
  explicit KLColumns(int64_t experts)
      : Columns<D>(experts, 2 + 3 * experts),
        gates(new float[6 * experts]),
        teacher(gates),
        student(gates + experts),
        difference(gates + 2 * experts),
        log_teacher(gates + 3 * experts),
        log_student(gates + 4 * experts),
        heaviness(gates + 5 * experts),
        exact(new double[2 * experts]) {}
  ~KLColumns() {
    delete[] gates;
    delete[] exact;
  }
  float* const gates;
  float *const teacher, *const student, *const difference, *const log_teacher, *const log_student;
  float* const heaviness;  // gamma in the caller's order
  double* const exact;     // g, gamma in the caller's order

  // Returns false where a gate or a log-sum-exp is not finite.
  template <bool kCap>
  bool start_row(const MixtureKL& op, const LogitRows* grads, int64_t n, const Exponent& e) {
    const int64_t experts = this->experts;
    double *g = exact, *gamma = exact + experts;
    softmax(op.teacher_logits + n * op.teacher_stride, experts, g);
    softmax(op.student_logits + n * op.student_stride, experts, gamma);
    for (int64_t k = 0; k < experts; ++k) heaviness[k] = (float)gamma[k];
    const bool finite = this->template start<kCap>(op.spec, op.logits, grads, n, heaviness,
                                                   op.lse + n * experts, e);
    for (int64_t i = 0; i < experts; ++i) {
      const int64_t k = this->order[i];
      teacher[i] = (float)g[k];
      student[i] = (float)gamma[k];
      difference[i] = (float)(g[k] - gamma[k]);
      log_teacher[i] = (float)::log2(g[k]);
      log_student[i] = (float)::log2(gamma[k]);
    }
    return finite && g[0] == g[0] && gamma[0] == gamma[0];
  }
};

// A vector of columns: both mixtures, t and log(1 + t); e[k] holds p_k.
struct Ratio {
  Vec squared;  // sum_k d_k^2
  Vec p0;
  Vec ubar;          // sum_k gamma_k u_k
  Vec student;       // m_gamma
  Vec t, log_ratio;  // log_ratio = log(1 + t)
  Vec excess;        // E
};

inline Vec log_excess(Vec t, Vec log_ratio) {
  const Vec series =
      -t * t * ((((t * 0.166666667f - 0.2f) * t + 0.25f) * t - 0.333333333f) * t + 0.5f);
  return (t < kNear) & (t > -kNear) ? series : log_ratio - t;
}

template <DType D>
inline bool compare_mixtures(const KLColumns<D>& c, const Vec* x, Vec valid, const Exponent& e,
                             Ratio& r) {
  const Spread spread = compare(c, x, (float)e.unit);
  if (any_below(-spread.highest, -kFar)) return false;
  Vec difference = {}, teacher = splat(c.teacher[0]);
  r.squared = spread.squared;
  r.ubar = Vec{};
  for (int64_t k = 1; k < c.experts; ++k) {
    r.ubar += c.student[k] * c.u[k];
    difference += c.difference[k] * c.u[k];
    teacher += c.teacher[k] * c.e[k];
  }
  const Vec student = 1.0f + r.ubar, inverse = 1.0f / student;
  r.t = difference * inverse;
  // log(1 + t), and from the ratio itself where 1 + t cancels.
  const VecI small = r.t > -0.5f;
  const Vec sum = 1.0f + r.t;
  r.log_ratio = log_sum(small ? sum : teacher * inverse, small ? r.t - (sum - 1.0f) : Vec{});
  r.excess = log_excess(r.t, r.log_ratio);
  r.p0 = exp2(log2_prob(c.rows[0], x[0], e.scale)) * valid;
  r.student = r.p0 * student;
  for (int64_t k = 0; k < c.experts; ++k) c.e[k] *= r.p0;
  return true;
}

// Columns of any spread, relative to the student's largest term 2^top.
struct FarRatio {
  Vec teacher, student;  // m_g, m_gamma
  Vec t, log_ratio, excess;
  VecI small;        // |t| < 1/2: as in the common case
  Vec log2_student;  // log2 m_gamma
};

template <DType D>
inline FarRatio compare_far_mixtures(const KLColumns<D>& c, const Vec* x, Vec valid,
                                     const Exponent& e) {
  constexpr int kStride = Loader<D>::kPerLoad;
  Vec top_teacher = splat(-3e38f), top = splat(-3e38f);
  for (int64_t k = 0; k < c.experts; ++k) {
    c.d[k] = log2_prob(c.rows[k], x[k * kStride], e.scale);
    c.e[k] = exp2(c.d[k]) * valid;
    top_teacher = max(c.d[k] + c.log_teacher[k], top_teacher);
    top = max(c.d[k] + c.log_student[k], top);
  }
  Vec teacher = {}, student = {}, difference = {};
  for (int64_t k = 0; k < c.experts; ++k) {
    teacher += exp2(c.d[k] + c.log_teacher[k] - top_teacher);
    student += exp2(c.d[k] + c.log_student[k] - top);
    if (c.difference[k] != 0) difference += c.difference[k] * exp2(c.d[k] - top);
  }
  FarRatio r;
  r.teacher = exp2(top_teacher) * teacher * valid;
  r.student = exp2(top) * student * valid;
  r.t = difference / student;
  r.small = (r.t < 0.5f) & (r.t > -0.5f);
  const Vec log_student = log_sum(student, Vec{});
  r.log2_student = top + log_student * kLog2E;
  const Vec log_ratio = (top_teacher - top) * kLn2 + log_sum(teacher, Vec{}) - log_student;
  const VecI excluded = (top < kImpossible) & (r.teacher > 0.0f);
  r.log_ratio = r.small ? log1p(r.t) : excluded ? splat(INFINITY) : log_ratio;
  r.excess = log_excess(r.t, r.log_ratio);
  return r;
}

// g_k p_k log(1 + t) - gamma_k p_k t of expert k.
template <DType D>
inline Vec far_balance(const KLColumns<D>& c, const FarRatio& r, int64_t k) {
  const Vec p = c.e[k];
  const Vec close = p * (c.difference[k] * r.log_ratio + c.student[k] * r.excess);
  // gamma_k p_k (1 + t) = m_g times the student's responsibility, in logarithms.
  const Vec share = r.teacher * exp2(c.d[k] + c.log_student[k] - r.log2_student);
  const Vec toward = p > 0.0f ? p * c.teacher[k] * r.log_ratio : Vec{};
  const Vec apart =
      (c.teacher[k] > 0 ? toward : Vec{}) - ((r.teacher > 0.0f ? share : Vec{}) - c.student[k] * p);
  return r.small ? close : apart;
}

template <DType D>
void add_far_terms(const KLColumns<D>& c, const FarRatio& r) {
  Vec *tilt = c.sums + 2, *balance = tilt + c.experts;
  const Vec close = r.student * (r.excess + r.t * r.log_ratio);
  const Vec apart = (r.teacher > 0.0f ? r.teacher * r.log_ratio : Vec{}) - r.teacher + r.student;
  c.sums[0] += r.small ? close : apart;
  for (int64_t k = 0; k < c.experts; ++k) {
    const Vec p = c.e[k];
    const Vec share = r.teacher * exp2(c.d[k] - r.log2_student);  // p_k (1 + t)
    const Vec moved = (r.teacher > 0.0f ? share : Vec{}) - p - r.teacher + r.student;
    tilt[k] += r.small ? (p - r.student) * r.t : moved;
    balance[k] += far_balance(c, r, k);
  }
}

template <DType D>
inline void add_terms(const KLColumns<D>& c, const Vec* x, Vec valid, const Exponent& e,
                      bool& far) {
  const int64_t experts = c.experts;
  Vec *tilt = c.sums + 2, *balance = tilt + experts, *error = balance + experts;
  Ratio r;
  if (!compare_mixtures(c, x, valid, e, r)) {
    far = true;
    add_far_terms(c, compare_far_mixtures(c, x, valid, e));
    return;
  }
  c.sums[0] += r.student * (r.excess + r.t * r.log_ratio);
  c.sums[1] += r.p0 * r.squared;
  const Vec weighted = r.p0 * r.t;
  for (int64_t k = 0; k < experts; ++k) {
    tilt[k] += weighted * (c.u[k] - r.ubar);
    balance[k] += c.e[k] * (c.difference[k] * r.log_ratio + c.student[k] * r.excess);
    error[k] += r.p0 * c.u[k];
  }
}

template <DType D, bool kCap>
void forward(const MixtureKL& op, int64_t begin, int64_t end) {
  typedef typename Loader<D>::Element Element;
  const int64_t experts = op.spec.experts;
  const Exponent e(op.spec);
  KLColumns<D> c(experts);
  const int64_t sums = 2 + 3 * experts;
  double* totals = new double[sums];
  for (int64_t n = begin; n < end; ++n) {
    float *tilt = op.tilt + n * experts, *balance = op.balance + n * experts;
    double* lse = op.lse + n * experts;
    op.value[n] = 0;
    for (int64_t k = 0; k < experts; ++k) lse[k] = tilt[k] = balance[k] = 0;
    if (op.target && op.target[n] == op.spec.ignore_index) continue;
    for (int64_t k = 0; k < experts; ++k) {
      const Element* z = (const Element*)op.logits[k].data + row_offset(op.logits[k], op.spec, n);
      lse[k] = row_log_sum_exp<D, kCap>(z, 0, op.spec.vocab, e).value();
    }
    if (!c.template start_row<kCap>(op, nullptr, n, e)) {
      op.value[n] = NAN;
      for (int64_t k = 0; k < experts; ++k) tilt[k] = balance[k] = NAN;
      continue;
    }
    bool far = false;
    const auto pass = [&] {
      sum_columns<D, kCap>(c, sums, op.spec.vocab, e, totals,
                           [&](const Vec* x, Vec valid) { add_terms(c, x, valid, e, far); });
    };
    pass();
    if (!far && correct_log_sum_exps(c, totals[1], totals + 2 + 2 * experts, lse)) {
      c.template start_row<kCap>(op, nullptr, n, e);
      pass();
    }
    op.value[n] = totals[0] < 0 ? 0.0f : (float)totals[0];  // rounding
    if (op.value[n] == INFINITY) continue;
    for (int64_t i = 0; i < experts; ++i) {
      const int64_t k = c.order[i];
      tilt[k] = c.student[i] > 0 ? (float)(c.student[i] * totals[2 + i]) : 0.0f;
      balance[k] = (float)totals[2 + experts + i];
    }
  }
  delete[] totals;
}

// Overwrites x with dz_k for a vector of columns.
template <DType D, bool kCap>
inline void gradients(const KLColumns<D>& c, Vec* x, float grad, const float* balance,
                      const Exponent& e) {
  constexpr int kStride = Loader<D>::kPerLoad;
  const Vec valid = splat(1.0f);
  const auto write = [&](int64_t k, Vec dz) {
    const Vec u = x[k * kStride];
    x[k * kStride] = kCap ? grad * dz * (1.0f - u * u) : grad * dz;
  };
  Ratio r;
  if (compare_mixtures(c, x, valid, e, r)) {
    for (int64_t k = 0; k < c.experts; ++k) {
      write(k, c.e[k] * (c.difference[k] * r.log_ratio + c.student[k] * r.excess - balance[k]));
    }
  } else {
    const FarRatio far = compare_far_mixtures(c, x, valid, e);
    for (int64_t k = 0; k < c.experts; ++k) {
      write(k, far_balance(c, far, k) - c.e[k] * balance[k]);
    }
  }
}

template <DType D, bool kCap>
void backward(const MixtureKLBackward& op, int64_t begin, int64_t end) {
  const MixtureKL& fwd = op.forward;
  const int64_t experts = fwd.spec.experts;
  const Exponent e(fwd.spec);
  KLColumns<D> c(experts);
  float* balance = new float[experts];
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
    for (int64_t i = 0; i < experts; ++i) balance[i] = fwd.balance[n * experts + c.order[i]];
    const float scaled = (float)(grad / fwd.spec.temperature);
    for_each_vector<D, kCap, true>(c.rows, experts, fwd.spec.vocab, e, c.x, [&](Vec* x, Vec) {
      gradients<D, kCap>(c, x, scaled, balance, e);
    });
  }
  delete[] balance;
}

}  // namespace

void mixture_kl(const MixtureKL& op, int64_t begin, int64_t end) {
  RG_FOR_LOGITS(op.spec, forward, op, begin, end)
}

void mixture_kl_backward(const MixtureKLBackward& op, int64_t begin, int64_t end) {
  RG_FOR_LOGITS(op.forward.spec, backward, op, begin, end)
}

}  // namespace RG_ISA
}  // namespace robustgate

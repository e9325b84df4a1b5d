// Expert log-probabilities: l[n, k] = z'[n, k, y] - log sum_v exp z'[n, k, v].
//
// Forward: one pass over the logits (log_sum_exp.h). Backward: one read, one write; p is recomputed
// from the saved log-sum-exp. A row without a softmax is NaN in its own row and expert.
// Parallelisation: the caller hands out (expert, block of rows); rows are independent.

#include "cpu/kernels.h"
#include "cpu/log_sum_exp.h"

namespace robustgate {
namespace RG_ISA {
namespace {

// Gradients of one row: of its target's log-prob and of its log-sum-exp.
struct RowGrad {
  double log_prob;
  double lse;
};

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
  dz[target] = Loader<D>::from_float(
      (float)(target_gradient(effective_logit(zy, spec) - lse, grad.log_prob, grad.lse) *
              (1.0 - th * th) / spec.temperature));
}

void row_backward(const double* z, double* dz, int64_t target, double lse, RowGrad grad,
                  const LogitsSpec& spec) {
  for (int64_t v = 0; v < spec.vocab; ++v) {
    const double th = spec.softcap > 0 ? ::tanh(z[v] / spec.softcap) : 0.0;
    const double log_p = effective_logit(z[v], spec) - lse;
    const double effective = v == target ? target_gradient(log_p, grad.log_prob, grad.lse)
                                         : (grad.lse - grad.log_prob) * ::exp(log_p);
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
  write<Stat>(op, n, k, log_prob, sum.value());
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

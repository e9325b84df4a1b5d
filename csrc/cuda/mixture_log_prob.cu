// Mixture log-probability: out[n] = sign * log sum_k softmax(a_n)_k exp(l[n, k]), and its
// gradients. Small data ([N, K]): one thread a row, one launch. A weight of 0 (a = -inf) and an
// expert of probability 0 (l = -inf) contribute nothing; if nothing contributes the value is
// -sign * inf with gradient 0. NaN stays in its row.

#include "cuda/launch.cuh"
#include "cuda/mixture_row.cuh"
#include "ops.h"

namespace robustgate::cuda {
namespace {

constexpr int kThreads = 128;

// log softmax(a)_k + l_k of one row
template <typename S>
struct Terms {
  const S *log_prob, *gate;
  LogSum<S> of_gate;

  __device__ Terms(const MixtureLogProb& a, int64_t n)
      : log_prob(static_cast<const S*>(a.log_prob) + n * a.experts),
        gate(static_cast<const S*>(a.gate_logits) + n * a.gate_stride),
        of_gate(LogSum<S>::of(a.experts, [this](int64_t k) { return gate[k]; })) {}

  __device__ S log_gate(int64_t k) const { return (gate[k] - of_gate.shift) - of_gate.log_sum; }
  __device__ S operator()(int64_t k) const { return log_gate(k) + log_prob[k]; }
};

__device__ bool is_ignored(const MixtureLogProb& a, int64_t n) {
  return a.target && a.target[n] == a.ignore_index;
}

template <typename S>
__global__ void __launch_bounds__(kThreads) mixture_log_prob_kernel(const MixtureLogProb a) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= a.rows) return;
  const Terms<S> term(a, n);
  const auto sum = LogSum<S>::of(a.experts, term);
  const S value = static_cast<S>(a.sign) * (sum.shift + sum.log_sum);
  static_cast<S*>(a.out)[n] = is_ignored(a, n) ? S(0) : value;
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    mixture_log_prob_backward_kernel(const MixtureLogProbBackward b) {
  const MixtureLogProb& a = b.forward;
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= a.rows) return;
  const S grad = static_cast<const S*>(b.grad)[n];
  const Terms<S> term(a, n);
  const auto sum = LogSum<S>::of(a.experts, term);
  // Nothing contributes, or nothing is asked: the gradient is 0, not 0 / 0.
  const bool zero = is_ignored(a, n) || grad == 0 || sum.log_sum == -INFINITY;
  // Responsibilities are normalised by their own sum: the rounded logarithm would cost its ulp.
  S total = 0;
  for (int64_t k = 0; k < a.experts; ++k) total += ::exp(term(k) - sum.shift);
  const S scale = static_cast<S>(a.sign) * grad;
  S* of_prob = static_cast<S*>(b.grad_log_prob) + n * a.experts;
  S* of_gate = static_cast<S*>(b.grad_gate_logits) + n * a.experts;
  for (int64_t k = 0; k < a.experts; ++k) {
    const S share = ::exp(term(k) - sum.shift) / total;
    if (b.grad_log_prob) of_prob[k] = zero ? S(0) : scale * share;
    if (b.grad_gate_logits) of_gate[k] = zero ? S(0) : scale * (share - ::exp(term.log_gate(k)));
  }
}

template <typename Arguments>
const char* run(void (*single)(Arguments), void (*twice)(Arguments), const Arguments& a,
                const MixtureLogProb& op, int device, void* stream) {
  if (op.rows == 0) return nullptr;
  const Grid grid{(op.rows + kThreads - 1) / kThreads, kThreads};
  return on_device(device, [&] {
    return launch(op.dtype == DType::kFloat64 ? twice : single, grid, stream, a);
  });
}

}  // namespace

const char* mixture_log_prob(const MixtureLogProb& op, int device, void* stream) {
  return run(mixture_log_prob_kernel<float>, mixture_log_prob_kernel<double>, op, op, device,
             stream);
}

const char* mixture_log_prob_backward(const MixtureLogProbBackward& op, int device, void* stream) {
  return run(mixture_log_prob_backward_kernel<float>, mixture_log_prob_backward_kernel<double>, op,
             op.forward, device, stream);
}

}  // namespace robustgate::cuda

// Host entry points of the extension: one plain struct of pointers, sizes and strides per op.
//
// Shape letters: N rows (tokens), K experts, V vocabulary. Strides count elements. Every function
// is free of torch and Python, allocates nothing the size of its data, and never synchronises.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace robustgate {

// The logits of one expert, [N, V] with its own strides. Rows are addressed in two levels, so that
// a slice such as logits[:, :-1] of a [B, T, V] tensor needs no copy:
//   row n starts at data + (n / inner_rows) * outer_stride + (n % inner_rows) * inner_stride.
struct LogitRows {
  void* data;
  int64_t outer_stride;
  int64_t inner_stride;
};

// What every op over logits shares. Effective logits: z' = softcap * tanh(z / softcap) /
// temperature.
struct LogitsSpec {
  int64_t rows;        // N
  int64_t inner_rows;  // rows per outer stride, divides N
  int64_t vocab;       // V, columns beyond it are padding and never read
  int64_t experts;     // K
  int64_t ignore_index;
  double temperature;  // > 0
  double softcap;      // 0: none
  DType dtype;         // of the logits; statistics are float64 for float64, else float32
};

// l[n, k] = z'[n, k, y_n] - lse[n, k],  lse[n, k] = log sum_v exp z'[n, k, v].
// Ignored rows are not read: both outputs are 0. A target out of range: see the return values.
struct ExpertLogProb {
  LogitsSpec spec;
  const LogitRows* logits;  // [K]
  const int64_t* target;    // [N]
  void* log_prob;           // [N, K]  out
  double* lse;              // [N, K]  out; float64, so that exp(z' - lse) is exact for z' = 1e4
};

// dz[n, k, v] = [grad[n, k] (1[v = y_n] - p) + grad_lse[n, k] p] dz'/dz,  p = exp(z' - lse),
// recomputed from the logits, which may be some columns of a row only. Padding columns (up to
// padded_vocab[k]) receive 0.
struct ExpertLogProbBackward {
  LogitsSpec spec;
  const LogitRows* logits;       // [K]
  const int64_t* target;         // [N]
  const double* lse;             // [N, K]
  const void* grad;              // [N, K]
  const void* grad_lse;          // [N, K] or null
  const LogitRows* grad_logits;  // [K]  out
  const int64_t* padded_vocab;   // [K]  columns of each gradient
};

// expert_log_prob, then nll[n] = -log sum_k softmax(a_n)_k exp(l[n, k]), 0 on ignored rows.
struct MixtureNLL {
  ExpertLogProb experts;
  const void* gate_logits;  // [N, K], or [K] with gate_stride 0
  int64_t gate_stride;
  void* nll;  // [N]  out
};

// out[n] = sign * log sum_k softmax(a_n)_k exp(l[n, k]); 0 where target says the row is ignored.
struct MixtureLogProb {
  int64_t rows, experts;
  DType dtype;              // float32 or float64, of every tensor
  const void* log_prob;     // [N, K]
  const void* gate_logits;  // [N, K], or [K] with gate_stride 0
  int64_t gate_stride;
  const int64_t* target;  // [N] or null
  int64_t ignore_index;
  double sign;
  void* out;  // [N]
};

// r = softmax_k(log g + l):  d/dl[n, k] = sign * grad[n] r_k,  d/da[n, k] = sign * grad[n] (r_k -
// g_k).
struct MixtureLogProbBackward {
  MixtureLogProb forward;  // out is not used
  const void* grad;        // [N]
  void* grad_log_prob;     // [N, K] or null
  void* grad_gate_logits;  // [N, K] or null
};

// m = sum_k w_k p_k,  kl[n, k] = sum_v p_k log(p_k / m),  value[n] = sum_k w_k kl[n, k].
// Rows whose target is ignore_index are 0 and not read. float64 logits are not served.
struct JSD {
  LogitsSpec spec;
  const LogitRows* logits;  // [K]
  const float* weights;     // [N, K], or [K] with weight_stride 0; they sum to 1
  int64_t weight_stride;
  const int64_t* target;    // [N] or null
  const double* given_lse;  // [N, K] where the logits are some columns of a row only, else null
  float* value;             // [N]     out
  float* kl;                // [N, K]  out
  double* lse;              // [N, K]  out
};

// dz[n, k, v] = grad[n] w_k p_k(v) (log(p_k / m)(v) - kl[n, k]) dz'/dz.
struct JSDBackward {
  LogitsSpec spec;
  const LogitRows* logits;  // [K]
  const float* weights;     // [N, K], or [K] with weight_stride 0
  int64_t weight_stride;
  const int64_t* target;         // [N] or null
  const double* lse;             // [N, K]
  const float* kl;               // [N, K]
  const float* grad;             // [N]
  const LogitRows* grad_logits;  // [K]  out; data null where no gradient is asked for
  const int64_t* padded_vocab;   // [K]
};

// m_g = sum_k g_k p_k for both gates, t = m_teacher / m_student - 1:
// value[n] = sum_v m_teacher log(1 + t), and for the student's gradient tilt[n, k] = gamma_k
// E_{p_k}[t], 0 where the value is infinite.
struct MixtureKL {
  LogitsSpec spec;
  const LogitRows* logits;      // [K]
  const float* teacher_logits;  // [N, K], or [K] with stride 0
  int64_t teacher_stride;
  const float* student_logits;  // [N, K], or [K] with stride 0
  int64_t student_stride;
  const int64_t* target;  // [N] or null
  float* value;           // [N]     out
  float* tilt;            // [N, K]  out
  double* lse;            // [N, K]  out
};

// dz[n, k, v] = grad[n] p_k(v) [ g_k log(1 + t)(v) - pull[n, k] - gamma_k t(v) + tilt[n, k] ]
// dz'/dz.
struct MixtureKLBackward {
  MixtureKL forward;             // value and lse are inputs, tilt is not used
  const float* grad;             // [N]
  const LogitRows* grad_logits;  // [K]  out; data null where no gradient is asked for
  const int64_t* padded_vocab;   // [K]
};

// log m(v) = log sum_k g_k p_k(v), the responsibilities r_k(v) = g_k p_k(v) / m(v).
struct MixtureLogSoftmax {
  LogitsSpec spec;
  const LogitRows* logits;   // [K]
  const float* gate_logits;  // [N, K], or [K] with gate_stride 0
  int64_t gate_stride;
  const int64_t* target;  // [N] or null
  float* log_mixture;     // [N, V]  out, or null
  float* mean;            // [N]     out, the mean of log m over the vocabulary, or null
  float* share;           // [N, K]  out, the mean of r_k over the vocabulary, or null
  double* lse;            // [N, K]  out
};

// For an upstream c: dz_k(v) = [ c(v) r_k(v) - p_k(v) sum_u c(u) r_k(u) ] dz'/dz and
// da_k = sum_v c(v) (r_k(v) - g_k); columns no expert allows count for neither.
struct MixtureLogSoftmaxBackward {
  MixtureLogSoftmax forward;     // lse is an input, the other results are not used
  const float* grad;             // [N, V], or [N] with grad_per_row
  bool grad_per_row;             // c(v) = grad[n] for every column
  float* grad_gate_logits;       // [N, K]  out, or null
  const LogitRows* grad_logits;  // [K]     out; data null where no gradient is asked for
  const int64_t* padded_vocab;   // [K]
};

// The second half of a mixture NLL.
inline MixtureLogProb of_target(const MixtureNLL& op) {
  const LogitsSpec& spec = op.experts.spec;
  const DType statistics = spec.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  return {spec.rows,      spec.experts,   statistics,        op.experts.log_prob,
          op.gate_logits, op.gate_stride, op.experts.target, spec.ignore_index,
          -1.0,           op.nll};
}

constexpr int64_t kAllTargetsValid = -1;

namespace cpu {

// The two that return a number return the first row whose target is out of range, or
// kAllTargetsValid.
int64_t expert_log_prob(const ExpertLogProb& op, int threads);
void expert_log_prob_backward(const ExpertLogProbBackward& op, int threads);
void mixture_log_prob(const MixtureLogProb& op, int threads);
void mixture_log_prob_backward(const MixtureLogProbBackward& op, int threads);
int64_t mixture_nll(const MixtureNLL& op, int threads);
void jsd(const JSD& op, int threads);
void jsd_backward(const JSDBackward& op, int threads);
void mixture_kl(const MixtureKL& op, int threads);
void mixture_kl_backward(const MixtureKLBackward& op, int threads);
void mixture_log_softmax(const MixtureLogSoftmax& op, int threads);
void mixture_log_softmax_backward(const MixtureLogSoftmaxBackward& op, int threads);

// "baseline", "avx2" or "avx512": what this processor runs, or what ROBUSTGATE_CPU forces.
const char* instruction_set();

}  // namespace cpu

namespace cuda {  // there where the build has CUDA

// Launch on `stream` of `device`; return null, or what is wrong with the arguments or the launch.
// A target out of range gives NaN in its row and reads nothing. Logits are of 16 or 32 bits.
const char* expert_log_prob(const ExpertLogProb& op, int device, void* stream);
const char* expert_log_prob_backward(const ExpertLogProbBackward& op, int device, void* stream);
const char* mixture_log_prob(const MixtureLogProb& op, int device, void* stream);
const char* mixture_log_prob_backward(const MixtureLogProbBackward& op, int device, void* stream);
const char* mixture_nll(const MixtureNLL& op, int device, void* stream);
const char* jsd(const JSD& op, int device, void* stream);
const char* jsd_backward(const JSDBackward& op, int device, void* stream);
const char* mixture_kl(const MixtureKL& op, int device, void* stream);
const char* mixture_kl_backward(const MixtureKLBackward& op, int device, void* stream);
const char* mixture_log_softmax(const MixtureLogSoftmax& op, int device, void* stream);
const char* mixture_log_softmax_backward(const MixtureLogSoftmaxBackward& op, int device,
                                         void* stream);

// Experts an op that compares experts takes on CUDA; the others take any number.
constexpr int64_t kMaxExperts = 32;

// Null when kernels of this build can run on `device`, else the reason why not.
const char* why_unusable(int device);
int compiled_version();

}  // namespace cuda

}  // namespace robustgate

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

constexpr int64_t kAllTargetsValid = -1;

namespace cpu {

// Return the first row whose target is out of range, or kAllTargetsValid.
int64_t expert_log_prob(const ExpertLogProb& op, int threads);
void expert_log_prob_backward(const ExpertLogProbBackward& op, int threads);
void mixture_log_prob(const MixtureLogProb& op, int threads);
// expert_log_prob, then nll[n] = -mixture_log_prob, 0 on ignored rows.
int64_t mixture_nll(const ExpertLogProb& experts, const void* gate_logits, int64_t gate_stride,
                    void* nll, int threads);
void mixture_log_prob_backward(const MixtureLogProbBackward& op, int threads);

// "baseline", "avx2" or "avx512": what this processor runs, or what ROBUSTGATE_CPU forces.
const char* instruction_set();

}  // namespace cpu

#ifdef ROBUSTGATE_WITH_CUDA
namespace cuda {

// Launch on `stream` of `device`; return null, or the text of the launch error.
// A target out of range gives NaN in its row.
const char* expert_log_prob(const ExpertLogProb& op, int device, void* stream);

// Null when kernels of this build can run on `device`, else the reason why not.
const char* why_unusable(int device);
int compiled_version();

}  // namespace cuda
#endif

}  // namespace robustgate

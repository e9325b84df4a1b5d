// The kernels of one op over a range of rows, declared once per instruction set.
#pragma once

#include "ops.h"

#define RG_DECLARE_KERNELS(isa)                                                                 \
  namespace isa {                                                                               \
  int64_t expert_log_prob(const ExpertLogProb& op, int64_t expert, int64_t begin, int64_t end); \
  void expert_log_prob_backward(const ExpertLogProbBackward& op, int64_t expert, int64_t begin, \
                                int64_t end);                                                   \
  void mixture_log_prob(const MixtureLogProb& op, int64_t begin, int64_t end);                  \
  void mixture_log_prob_backward(const MixtureLogProbBackward& op, int64_t begin, int64_t end); \
  void jsd(const JSD& op, int64_t begin, int64_t end, float* scratch);                          \
  void jsd_backward(const JSDBackward& op, int64_t begin, int64_t end);                         \
  void mixture_kl(const MixtureKL& op, int64_t begin, int64_t end, float* scratch);             \
  void mixture_kl_backward(const MixtureKLBackward& op, int64_t begin, int64_t end,             \
                           float* scratch);                                                     \
  void mixture_log_softmax(const MixtureLogSoftmax& op, int64_t begin, int64_t end,             \
                           float* scratch);                                                     \
  void mixture_log_softmax_backward(const MixtureLogSoftmaxBackward& op, int64_t begin,         \
                                    int64_t end, float* scratch);                               \
  }

namespace robustgate {
RG_DECLARE_KERNELS(baseline)
#ifdef ROBUSTGATE_X86_64
RG_DECLARE_KERNELS(avx2)
RG_DECLARE_KERNELS(avx512)
#endif
}  // namespace robustgate

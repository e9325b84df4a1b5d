// Mixture NLL: nll[n] = -log sum_k softmax(a_n)_k exp(l[n, k]), with l from the logits in one read.
//
// The kernel of expert_log_prob ends with it, in the same launch, as long as its experts fit one;
// more of them take a second launch. Backward for frozen experts is mixture_log_prob_backward on
// the [N, K] values; to the logits, expert_log_prob_backward after it.

#include "cuda/expert_log_prob.cuh"
#include "cuda/launch.cuh"

namespace robustgate::cuda {

const char* mixture_nll(const MixtureNLL& op, int device, void* stream) {
  if (op.experts.spec.rows == 0) return nullptr;
  const bool together = op.experts.spec.experts <= kExpertsPerLaunch;
  const char* error = on_device(device, [&] {
    return launch_log_prob(op.experts, together ? &op : nullptr, device, stream);
  });
  return error || together ? error : mixture_log_prob(of_target(op), device, stream);
}

}  // namespace robustgate::cuda

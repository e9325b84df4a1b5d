// The launch that expert_log_prob and mixture_nll share.
#pragma once

#include "ops.h"

namespace robustgate::cuda {

// Experts one launch takes.
constexpr int kExpertsPerLaunch = 12;

// expert_log_prob, and the NLL in the same launch where `mixture` is not null.
const char* launch_log_prob(const ExpertLogProb& op, const MixtureNLL* mixture, int device,
                            void* stream);

}  // namespace robustgate::cuda

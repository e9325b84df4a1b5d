// Chooses the instruction set once, cuts each op into chunks, and runs them.

#include <cstdlib>
#include <cstring>

#include <algorithm>
#include <atomic>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace robustgate::cpu {
namespace {

struct Kernels {
  const char* name;
  decltype(&baseline::expert_log_prob) expert_log_prob;
  decltype(&baseline::expert_log_prob_backward) expert_log_prob_backward;
  decltype(&baseline::mixture_log_prob) mixture_log_prob;
  decltype(&baseline::mixture_log_prob_backward) mixture_log_prob_backward;
  decltype(&baseline::jsd) jsd;
  decltype(&baseline::jsd_backward) jsd_backward;
  decltype(&baseline::mixture_kl) mixture_kl;
  decltype(&baseline::mixture_kl_backward) mixture_kl_backward;
  decltype(&baseline::mixture_log_softmax) mixture_log_softmax;
  decltype(&baseline::mixture_log_softmax_backward) mixture_log_softmax_backward;
};

#define RG_KERNELS(isa)                                                                          \
  Kernels {                                                                                      \
    #isa, &isa::expert_log_prob, &isa::expert_log_prob_backward, &isa::mixture_log_prob,         \
        &isa::mixture_log_prob_backward, &isa::jsd, &isa::jsd_backward, &isa::mixture_kl,        \
        &isa::mixture_kl_backward, &isa::mixture_log_softmax, &isa::mixture_log_softmax_backward \
  }

// The best set this processor runs; ROBUSTGATE_CPU names a lesser one. Read once.
const Kernels& kernels() {
  static const Kernels chosen = [] {
    const char* forced = std::getenv("ROBUSTGATE_CPU");
    [[maybe_unused]] const auto allowed = [&](const char* name) {
      return forced == nullptr || *forced == '\0' || std::strcmp(forced, name) == 0;
    };
#ifdef ROBUSTGATE_X86_64
    // The levels x86-64-v3 and -v4 by the names that GCC and Clang both know: every processor with
    // AVX2, FMA and BMI2 has the rest of v3 (F16C, LZCNT, MOVBE).
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4 && allowed("avx512")) return RG_KERNELS(avx512);
    if (v3 && allowed("avx2")) return RG_KERNELS(avx2);
#endif
    return RG_KERNELS(baseline);
  }();
  return chosen;
}

// Below this many bytes a call stays on the calling thread: waking a worker costs more.
constexpr int64_t kSerialBytes = 256 * 1024;
constexpr int64_t kChunkBytes = 256 * 1024;

// body(expert, begin, end) over blocks of rows of about kChunkBytes each, expert by expert.
template <typename Body>
void over_rows(int64_t experts, int64_t rows, int64_t bytes_per_row, int threads, Body body) {
  if (rows == 0 || experts == 0) return;
  const int64_t per_chunk =
      std::clamp<int64_t>(kChunkBytes / std::max<int64_t>(bytes_per_row, 1), 1, rows);
  const int64_t chunks = (rows + per_chunk - 1) / per_chunk;
  auto chunk = [&](int64_t c) {
    const int64_t begin = (c % chunks) * per_chunk;
    body(c / chunks, begin, std::min(rows, begin + per_chunk));
  };
  const bool small = experts * rows * bytes_per_row <= kSerialBytes;
  parallel_for(chunks * experts, small ? 1 : threads, chunk);
}

template <typename Body>
void over_logits(const LogitsSpec& spec, int threads, Body body) {
  over_rows(spec.experts, spec.rows, spec.vocab * size_of(spec.dtype), threads, body);
}

// Ops that compare experts: one block of rows holds every expert's logits.
template <typename Body>
void over_all_experts(const LogitsSpec& spec, int threads, Body body) {
  over_rows(1, spec.rows, spec.experts * spec.vocab * size_of(spec.dtype), threads,
            [&](int64_t, int64_t begin, int64_t end) { body(begin, end); });
}

// The [N, K] ops: one block of rows holds every expert.
template <typename Body>
void over_log_probs(const MixtureLogProb& op, int threads, Body body) {
  over_rows(1, op.rows, op.experts * size_of(op.dtype), threads,
            [&](int64_t, int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace

const char* instruction_set() { return kernels().name; }

int64_t expert_log_prob(const ExpertLogProb& op, int threads) {
  std::atomic<int64_t> first_bad{INT64_MAX};
  over_logits(op.spec, threads, [&](int64_t k, int64_t begin, int64_t end) {
    const int64_t bad = kernels().expert_log_prob(op, k, begin, end);
    if (bad == kAllTargetsValid) return;
    int64_t seen = first_bad.load();
    while (bad < seen && !first_bad.compare_exchange_weak(seen, bad)) {
    }
  });
  return first_bad == INT64_MAX ? kAllTargetsValid : first_bad.load();
}

void expert_log_prob_backward(const ExpertLogProbBackward& op, int threads) {
  over_logits(op.spec, threads, [&](int64_t k, int64_t begin, int64_t end) {
    kernels().expert_log_prob_backward(op, k, begin, end);
  });
}

void mixture_log_prob(const MixtureLogProb& op, int threads) {
  over_log_probs(op, threads,
                 [&](int64_t begin, int64_t end) { kernels().mixture_log_prob(op, begin, end); });
}

int64_t mixture_nll(const ExpertLogProb& op, const void* gate_logits, int64_t gate_stride,
                    void* nll, int threads) {
  const int64_t bad = expert_log_prob(op, threads);
  const LogitsSpec& spec = op.spec;
  const DType statistics = spec.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (bad == kAllTargetsValid) {
    mixture_log_prob({spec.rows, spec.experts, statistics, op.log_prob, gate_logits, gate_stride,
                      op.target, spec.ignore_index, -1.0, nll},
                     threads);
  }
  return bad;
}

void mixture_log_prob_backward(const MixtureLogProbBackward& op, int threads) {
  over_log_probs(op.forward, threads, [&](int64_t begin, int64_t end) {
    kernels().mixture_log_prob_backward(op, begin, end);
  });
}

#define RG_RUN_ROWS(op, spec, kernel) \
  over_all_experts(spec, threads,     \
                   [&](int64_t begin, int64_t end) { kernels().kernel(op, begin, end); })

void jsd(const JSD& op, int threads) { RG_RUN_ROWS(op, op.spec, jsd); }

void jsd_backward(const JSDBackward& op, int threads) { RG_RUN_ROWS(op, op.spec, jsd_backward); }

void mixture_kl(const MixtureKL& op, int threads) { RG_RUN_ROWS(op, op.spec, mixture_kl); }

void mixture_kl_backward(const MixtureKLBackward& op, int threads) {
  RG_RUN_ROWS(op, op.forward.spec, mixture_kl_backward);
}

void mixture_log_softmax(const MixtureLogSoftmax& op, int threads) {
  RG_RUN_ROWS(op, op.spec, mixture_log_softmax);
}

void mixture_log_softmax_backward(const MixtureLogSoftmaxBackward& op, int threads) {
  RG_RUN_ROWS(op, op.forward.spec, mixture_log_softmax_backward);
}

}  // namespace robustgate::cpu

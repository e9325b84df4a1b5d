// Chooses the instruction set once, cuts each op into chunks, and runs them.

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

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
constexpr int64_t kAlignment = 64;  // floats: whole steps of the widest vectors

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

// Memory of the calling thread, kept for the next call; null where a row of every expert would take
// more than the last level of cache has for it.
float* scratch(int64_t floats) {
  constexpr int64_t kLargest = int64_t{4} << 20;  // 16 MiB
  if (floats > kLargest) return nullptr;
  thread_local std::vector<float> memory;
  if (memory.size() < static_cast<size_t>(floats) + kAlignment) memory.resize(floats + kAlignment);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (-address / sizeof(float)) % kAlignment;
}

// A row of every expert as exponentials, and two factors each.
int64_t exponentials(const LogitsSpec& spec) {
  return spec.experts * (spec.vocab + kAlignment + 2) + kAlignment;
}

// A fresh result is mapped page by page as it is written, which takes longer than computing it: ask
// for huge pages where it is large. Best effort.
void expect_large(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kLarge = 16 << 20;
  constexpr uintptr_t kPage = 4096;
  if (data == nullptr || bytes < kLarge) return;
  const auto first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto last = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void expect_large(const LogitsSpec& spec, const LogitRows* grads, const int64_t* padded_vocab) {
  for (int64_t k = 0; k < spec.experts; ++k) {
    expect_large(grads[k].data, spec.rows * padded_vocab[k] * size_of(spec.dtype));
  }
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
  expect_large(op.spec, op.grad_logits, op.padded_vocab);
  over_logits(op.spec, threads, [&](int64_t k, int64_t begin, int64_t end) {
    kernels().expert_log_prob_backward(op, k, begin, end);
  });
}

void mixture_log_prob(const MixtureLogProb& op, int threads) {
  over_log_probs(op, threads,
                 [&](int64_t begin, int64_t end) { kernels().mixture_log_prob(op, begin, end); });
}

int64_t mixture_nll(const MixtureNLL& op, int threads) {
  const int64_t bad = expert_log_prob(op.experts, threads);
  if (bad == kAllTargetsValid) mixture_log_prob(of_target(op), threads);
  return bad;
}

void mixture_log_prob_backward(const MixtureLogProbBackward& op, int threads) {
  over_log_probs(op.forward, threads, [&](int64_t begin, int64_t end) {
    kernels().mixture_log_prob_backward(op, begin, end);
  });
}

void jsd(const JSD& op, int threads) {
  over_all_experts(op.spec, threads, [&](int64_t begin, int64_t end) {
    kernels().jsd(op, begin, end, scratch(exponentials(op.spec)));
  });
}

void jsd_backward(const JSDBackward& op, int threads) {
  expect_large(op.spec, op.grad_logits, op.padded_vocab);
  over_all_experts(op.spec, threads,
                   [&](int64_t begin, int64_t end) { kernels().jsd_backward(op, begin, end); });
}

void mixture_kl(const MixtureKL& op, int threads) {
  over_all_experts(op.spec, threads, [&](int64_t begin, int64_t end) {
    kernels().mixture_kl(op, begin, end, scratch(exponentials(op.spec)));
  });
}

void mixture_kl_backward(const MixtureKLBackward& op, int threads) {
  const LogitsSpec& spec = op.forward.spec;
  expect_large(spec, op.grad_logits, op.padded_vocab);
  over_all_experts(spec, threads, [&](int64_t begin, int64_t end) {
    kernels().mixture_kl_backward(op, begin, end, scratch(exponentials(spec)));
  });
}

void mixture_log_softmax(const MixtureLogSoftmax& op, int threads) {
  expect_large(op.log_mixture, op.spec.rows * op.spec.vocab * int64_t{sizeof(float)});
  over_all_experts(op.spec, threads, [&](int64_t begin, int64_t end) {
    kernels().mixture_log_softmax(op, begin, end, scratch(exponentials(op.spec)));
  });
}

void mixture_log_softmax_backward(const MixtureLogSoftmaxBackward& op, int threads) {
  const LogitsSpec& spec = op.forward.spec;
  expect_large(spec, op.grad_logits, op.padded_vocab);
  over_all_experts(spec, threads, [&](int64_t begin, int64_t end) {
    kernels().mixture_log_softmax_backward(op, begin, end, scratch(exponentials(spec)));
  });
}

}  // namespace robustgate::cpu

// Expert log-probabilities: l[n, k] = z'[n, k, y] - log sum_v exp z'[n, k, v].
//
// Parallelisation: one block per (row, expert), experts of a row next to each other on grid.x.
// Memory: one read, 16-byte loads between a scalar head and tail, so any width, stride and
// alignment will do; int64 offsets. Two packs are in flight per thread. Numerics: base-2 online
// log-sum-exp in float32 (float64 for float64 logits); the threads' states are merged in a fixed
// order, so results are equal bit for bit from run to run. Ignored rows are not read and give 0; a
// target out of range gives NaN and reads nothing.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "common/online_softmax.h"
#include "cuda/launch.cuh"
#include "ops.h"

namespace robustgate::cuda {
namespace {

using generic::OnlineSoftmax;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kExpertsPerLaunch = 64;  // 24 bytes each of the 4 KiB of kernel parameters
constexpr double kLog2E = 1.4426950408889634;

struct Arguments {
  LogitRows logits[kExpertsPerLaunch];
  const int64_t* target;  // [N]
  void* log_prob;         // [N, K]
  double* lse;            // [N, K]
  LogitsSpec spec;
  int experts;       // of this launch
  int first_expert;  // column of logits[0] in the outputs
};

template <typename T>
struct StatisticOf {
  using type = float;
};
template <>
struct StatisticOf<double> {
  using type = double;
};

template <typename S, typename T>
__device__ __forceinline__ S to_statistic(T x) {
  return static_cast<S>(x);
}
template <>
__device__ __forceinline__ float to_statistic<float>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ float to_statistic<float>(__half x) {
  return __half2float(x);
}

// The logits' transform: exponents of two are u * scale, u = z or tanh(z / softcap).
template <typename S, bool kCap>
struct Exponent {
  S scale, inner;

  __device__ explicit Exponent(const LogitsSpec& spec)
      : scale(static_cast<S>((kCap ? spec.softcap : 1.0) * kLog2E / spec.temperature)),
        inner(static_cast<S>(kCap ? 1.0 / spec.softcap : 1.0)) {}

  __device__ S operator()(S z) const { return kCap ? ::tanh(z * inner) : z; }
};

// Adds kCount values at once: one rescale for all of them instead of one each.
template <int kCount, typename S>
__device__ __forceinline__ void add_many(OnlineSoftmax<S>& state, const S (&u)[kCount], S scale) {
  S top = u[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = fmax(top, u[i]);  // drops NaN, which the sum keeps
  if (top == -static_cast<S>(INFINITY)) top = 0;           // only -inf or NaN: exp2 gives 0 or NaN
  S sum = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += ::exp2((u[i] - top) * scale);
  if (sum != 0) state.merge({top, sum}, scale);
}

template <typename S>
__device__ __forceinline__ OnlineSoftmax<S> merge_warp(OnlineSoftmax<S> state, S scale) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    state.merge({__shfl_down_sync(~0u, state.max, lane), __shfl_down_sync(~0u, state.sum, lane)},
                scale);
  }
  return state;
}

template <typename T, bool kCap>
__global__ void __launch_bounds__(kThreads)
    expert_log_prob_kernel(const __grid_constant__ Arguments a) {
  using S = typename StatisticOf<T>::type;
  constexpr int kPack = 16 / sizeof(T);
  const int64_t n = blockIdx.x / a.experts;
  const int k = blockIdx.x % a.experts;
  const int64_t out = n * a.spec.experts + a.first_expert + k;
  const int64_t y = a.target[n];
  S* log_prob = static_cast<S*>(a.log_prob);

  const bool ignored = y == a.spec.ignore_index;
  if (ignored || y < 0 || y >= a.spec.vocab) {  // the same for the whole block
    if (threadIdx.x == 0) {
      log_prob[out] = ignored ? S(0) : S(NAN);
      a.lse[out] = ignored ? 0.0 : NAN;
    }
    return;
  }

  const LogitRows& rows = a.logits[k];
  const T* z = static_cast<const T*>(rows.data) + (n / a.spec.inner_rows) * rows.outer_stride +
               (n % a.spec.inner_rows) * rows.inner_stride;
  const int64_t vocab = a.spec.vocab;
  const Exponent<S, kCap> exponent(a.spec);
  OnlineSoftmax<S> state = OnlineSoftmax<S>::empty();

  // Scalar head up to a 16-byte boundary, 16-byte packs, scalar tail.
  const int64_t misaligned = reinterpret_cast<uintptr_t>(z) % 16 / sizeof(T);
  const int64_t head = min(vocab, misaligned == 0 ? int64_t(0) : kPack - misaligned);
  const int64_t packs = (vocab - head) / kPack;
  const int64_t tail = head + packs * kPack;
  const auto add_one = [&](int64_t v) {
    const S u[1] = {exponent(to_statistic<S>(z[v]))};
    add_many(state, u, exponent.scale);
  };
  if (threadIdx.x < head) add_one(threadIdx.x);
  if (tail + threadIdx.x < vocab) add_one(tail + threadIdx.x);

  const uint4* packed = reinterpret_cast<const uint4*>(z + head);
  const auto add_pack = [&](uint4 bits) {
    const T* values = reinterpret_cast<const T*>(&bits);
    S u[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) u[i] = exponent(to_statistic<S>(values[i]));
    add_many(state, u, exponent.scale);
  };
  int64_t p = threadIdx.x;
  for (; p + kThreads < packs; p += 2 * kThreads) {
    const uint4 first = __ldg(packed + p);
    const uint4 second = __ldg(packed + p + kThreads);
    add_pack(first);
    add_pack(second);
  }
  if (p < packs) add_pack(__ldg(packed + p));

  __shared__ OnlineSoftmax<S> warp_state[kWarps];
  state = merge_warp(state, exponent.scale);
  if (threadIdx.x % 32 == 0) warp_state[threadIdx.x / 32] = state;
  __syncthreads();
  if (threadIdx.x < 32) {
    state = merge_warp(threadIdx.x < kWarps ? warp_state[threadIdx.x] : OnlineSoftmax<S>::empty(),
                       exponent.scale);
    if (threadIdx.x == 0) {
      const double cap = kCap ? a.spec.softcap : 1.0;
      const double unit = cap / a.spec.temperature;  // effective logits per unit of u
      // `scale` was rounded to S: log2 of the sum is in units of the same rounded value.
      const double natural = unit / static_cast<double>(exponent.scale);
      const double max = state.summable_max();
      const double log_sum = ::log2(static_cast<double>(state.sum)) * natural;
      const double zy = static_cast<double>(to_statistic<S>(z[y]));
      const double target = ((kCap ? ::tanh(zy / cap) : zy) - max) * unit - log_sum;
      a.lse[out] = max * unit + log_sum;
      log_prob[out] = static_cast<S>(target > 0 ? 0.0 : target);  // no probability exceeds 1
    }
  }
}

template <typename T>
void launch(const Arguments& arguments, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(arguments.spec.rows * arguments.experts);
  if (arguments.spec.softcap > 0) {
    expert_log_prob_kernel<T, true><<<blocks, kThreads, 0, stream>>>(arguments);
  } else {
    expert_log_prob_kernel<T, false><<<blocks, kThreads, 0, stream>>>(arguments);
  }
}

}  // namespace

const char* expert_log_prob(const ExpertLogProb& op, int device, void* stream) {
  if (op.spec.rows == 0 || op.spec.experts == 0) return nullptr;
  DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return cudaGetErrorString(guard.error);
  Arguments arguments{{}, op.target, op.log_prob, op.lse, op.spec, 0, 0};
  for (int64_t first = 0; first < op.spec.experts; first += kExpertsPerLaunch) {
    const int64_t left = op.spec.experts - first;
    arguments.first_expert = static_cast<int>(first);
    arguments.experts = static_cast<int>(left < kExpertsPerLaunch ? left : kExpertsPerLaunch);
    if (op.spec.rows > INT32_MAX / arguments.experts) return "rows x experts exceeds the grid";
    for (int k = 0; k < arguments.experts; ++k) arguments.logits[k] = op.logits[first + k];
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    switch (op.spec.dtype) {
      case DType::kFloat32:
        launch<float>(arguments, cuda_stream);
        break;
      case DType::kBFloat16:
        launch<__nv_bfloat16>(arguments, cuda_stream);
        break;
      case DType::kFloat16:
        launch<__half>(arguments, cuda_stream);
        break;
      case DType::kFloat64:
        launch<double>(arguments, cuda_stream);
        break;
    }
    if (const char* error = launch_error()) return error;
  }
  return nullptr;
}

}  // namespace robustgate::cuda

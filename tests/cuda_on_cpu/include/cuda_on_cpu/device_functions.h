// What device code may use: built-in variables, barriers, warp collectives, loads and stores.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_on_cpu/vector_types.h"
#include "runtime/device_calls.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// csrc/cuda/launch.cuh defines it for nvcc: extern __shared__ __align__(16) unsigned char name[].
#define RG_SHARED_MEMORY(name) unsigned char* const name = cuda_on_cpu::shared_memory()

inline void __syncthreads() { cuda_on_cpu::block_barrier("__syncthreads", false); }
inline int __syncthreads_count(int predicate) {
  return static_cast<int>(cuda_on_cpu::block_barrier("__syncthreads_count", predicate));
}
inline int __syncthreads_or(int predicate) {
  return cuda_on_cpu::block_barrier("__syncthreads_or", predicate) > 0;
}
inline int __syncthreads_and(int predicate) {
  return cuda_on_cpu::block_barrier("__syncthreads_and", !predicate) == 0;
}

inline void __syncwarp(unsigned mask = ~0u) {
  cuda_on_cpu::warp_collective("__syncwarp", mask, 0, cuda_on_cpu::kBallot);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
      cuda_on_cpu::warp_collective("__ballot_sync", mask, predicate != 0, cuda_on_cpu::kBallot));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

namespace cuda_on_cpu {

template <typename T>
T shuffle(const char* name, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "no shuffle of this size");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_collective(name, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

// Lanes of a segment of `width`; a source outside of it is the lane itself.
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  const unsigned segment = cuda_on_cpu::lane() & ~(width - 1u);
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, segment | (lane & (width - 1u)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const unsigned lane = cuda_on_cpu::lane(), in_segment = lane & (width - 1u);
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value,
                              in_segment >= delta ? lane - delta : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const unsigned lane = cuda_on_cpu::lane(), in_segment = lane & (width - 1u);
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value,
                              in_segment + delta < unsigned(width) ? lane + delta : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  const unsigned lane = cuda_on_cpu::lane(), other = lane ^ lane_mask;
  const unsigned end = (lane & ~(width - 1u)) + width;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, other < end ? other : lane);
}

#define CUDA_ON_CPU_LOAD(name) \
  template <typename T>        \
  T name(const T* address) {   \
    return *address;           \
  }
#define CUDA_ON_CPU_STORE(name)                          \
  template <typename T>                                  \
  void name(T* address, std::type_identity_t<T> value) { \
    *address = value;                                    \
  }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
CUDA_ON_CPU_STORE(__stwt)
#undef CUDA_ON_CPU_LOAD
#undef CUDA_ON_CPU_STORE

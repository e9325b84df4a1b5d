// The blocks that work on one row together, and how they add up.
//
// A team is one block, or the blocks of a cluster, each with a slice of the row's columns. Sums go
// lane -> warp -> block -> team in a fixed order, so results are equal bit for bit from run to run;
// blocks of a cluster read each other's partial sums from shared memory.
#pragma once

#include <cuda_runtime.h>

#include "common/online_softmax.h"
#include "cuda/launch.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#define RG_CLUSTERS 1
#else
#define RG_CLUSTERS 0
#endif

namespace robustgate::cuda {

using namespace generic;

constexpr int kMaxWarps = 16;
constexpr int kMaxSums = 12;  // values one reduction adds up

// A float64 sum, with what a reduction needs of a value.
struct Sum {
  double value;
  static __device__ __forceinline__ Sum empty() { return {0.0}; }
};

__device__ __forceinline__ void merge(Sum& a, Sum b, float) { a.value += b.value; }
__device__ __forceinline__ void merge(OnlineSoftmax<float>& a, OnlineSoftmax<float> b,
                                      float scale) {
  a.merge(b, scale);
}
__device__ __forceinline__ Sum shuffle_down(Sum a, int lanes) {
  return {__shfl_down_sync(~0u, a.value, lanes)};
}
__device__ __forceinline__ OnlineSoftmax<float> shuffle_down(OnlineSoftmax<float> a, int lanes) {
  return {__shfl_down_sync(~0u, a.max, lanes), __shfl_down_sync(~0u, a.sum, lanes)};
}

// The whole warp's value in lane 0.
template <typename Value>
__device__ __forceinline__ Value merge_lanes(Value a, float scale) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) merge(a, shuffle_down(a, lanes), scale);
  return a;
}

// Blocks of a launch; teams take further rows in turn where there are more.
inline int64_t team_blocks(int64_t rows, int team) {
  constexpr int64_t kMaxTeams = 1 << 24;
  return (rows < kMaxTeams ? rows : kMaxTeams) * team;
}

// Partial results in a block's shared memory; a value takes at most 8 bytes.
struct TeamMemory {
  double of_warp[kMaxSums][kMaxWarps];
  double of_block[2][kMaxSums];  // alternate, so that a slow reader never meets the next writer
  double of_team[kMaxSums];
};

class Team {
 public:
  // `scale` is the exponent of two per unit of an OnlineSoftmax's maximum.
  __device__ Team(TeamMemory& memory, int size, float scale)
      : memory_(memory), size_(size), rank_(blockIdx.x % size), scale_(scale) {}

  __device__ int64_t first_row() const { return blockIdx.x / size_; }
  __device__ int64_t row_step() const { return gridDim.x / size_; }
  __device__ bool leading_warp() const { return rank_ == 0 && threadIdx.x < 32; }
  __device__ bool leads() const { return rank_ == 0 && threadIdx.x == 0; }

  // This block's columns [begin, end) of a row; begin is a multiple of 64.
  __device__ int64_t begin(int64_t vocab) const { return ::min(vocab, rank_ * width(vocab)); }
  __device__ int64_t end(int64_t vocab) const { return ::min(vocab, (rank_ + 1) * width(vocab)); }

  __device__ bool has_last_columns() const { return rank_ == size_ - 1; }

  // Adds a thread's value to number `index`, below kMaxSums; every thread of the warp calls.
  template <typename Value>
  __device__ void put(int index, Value value) {
    static_assert(sizeof(Value) == sizeof(double));
    value = merge_lanes(value, scale_);
    if (threadIdx.x % 32 == 0) as<Value>(memory_.of_warp[index])[threadIdx.x / 32] = value;
  }

  // Returns what the whole team has put to each number below `count`, to every thread of it. Good
  // until the next call.
  template <typename Value>
  __device__ const Value* merge_all(int count) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    __syncthreads();
    Value* of_block = as<Value>(memory_.of_block[turn_]);
    turn_ ^= 1;
    for (int i = warp; i < count; i += warps) {
      const Value* of_warp = as<Value>(memory_.of_warp[i]);
      const Value a = merge_lanes(lane < warps ? of_warp[lane] : Value::empty(), scale_);
      if (lane == 0) of_block[i] = a;
    }
    if (size_ > 1) return merge_blocks(of_block, count);
    __syncthreads();
    return of_block;
  }

  // Waits until no block of the team reads this one's memory any more.
  __device__ void leave() {
#if RG_CLUSTERS
    if (size_ > 1) cooperative_groups::this_cluster().sync();
#endif
  }

 private:
  template <typename Value>
  static __device__ __forceinline__ Value* as(double* slots) {
    return reinterpret_cast<Value*>(slots);
  }

  __device__ int64_t width(int64_t vocab) const {
    return ((vocab + size_ - 1) / size_ + 63) / 64 * 64;
  }

  template <typename Value>
  __device__ const Value* merge_blocks(Value* of_block, int count) {
    Value* of_team = as<Value>(memory_.of_team);
#if RG_CLUSTERS
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    for (int i = warp; i < count; i += warps) {
      const Value a = merge_lanes(
          lane < size_ ? *cluster.map_shared_rank(of_block + i, lane) : Value::empty(), scale_);
      if (lane == 0) of_team[i] = a;
    }
    __syncthreads();
#endif
    return of_team;
  }

  TeamMemory& memory_;
  const int size_, rank_;
  const float scale_;
  int turn_ = 0;
};

}  // namespace robustgate::cuda

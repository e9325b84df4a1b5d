// One row of each of K experts, for kernels that look at all experts in every column.
//
// The team's slices of the rows are copied to shared memory where they fit, so that passes after
// the first cost no memory traffic; blocks are kept small enough that two share a
// multiprocessor, and one computes while another waits for its rows. Rows too long for that are
// read again each pass, from L2 as far as it holds the rows in flight.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <type_traits>

#include "common/column.h"
#include "cuda/columns.cuh"
#include "cuda/row_state.cuh"
#include "cuda/row_team.cuh"
#include "cuda/tiles.cuh"
#include "ops.h"

namespace robustgate::cuda {

constexpr int kRowThreads = 256;

struct RowsArguments {
  LogitRows logits[kMaxExperts];
  LogitsSpec spec;
  Exponent exponent;
  int team;
  bool resident;
  int64_t slice_bytes;  // of one expert's slice in shared memory, a multiple of 16
};

struct GradientRows {
  LogitRows rows[kMaxExperts];  // data null: not asked for
  int64_t padded_vocab[kMaxExperts];
};

inline RowsArguments rows_arguments(const LogitsSpec& spec, const LogitRows* logits) {
  RowsArguments a{{}, spec, Exponent(spec), 1, false, 0};
  for (int64_t k = 0; k < spec.experts && k < kMaxExperts; ++k) a.logits[k] = logits[k];
  return a;
}

inline GradientRows gradient_rows(const LogitsSpec& spec, const LogitRows* rows,
                                  const int64_t* padded_vocab) {
  GradientRows g{};
  for (int64_t k = 0; k < spec.experts && k < kMaxExperts; ++k) {
    g.rows[k] = rows[k];
    g.padded_vocab[k] = padded_vocab[k];
  }
  return g;
}

// What a block keeps of a row; `bytes` of staged slices follow.
template <typename T>
struct alignas(16) RowsMemory {
  TeamMemory team;
  double lse[kMaxExperts];
  double totals[2][kMaxExperts];  // the op's
  ExpertScalars scalars[kMaxExperts];
  const T* row[kMaxExperts];   // row[k][v] for the team's columns
  T* grad[kMaxExperts];        // null: none
  float gate[5][kMaxExperts];  // the op's
  int base;                    // the heaviest expert
  bool finite;

  __device__ unsigned char* staging() { return reinterpret_cast<unsigned char*>(this + 1); }
};

// Points the rows at row n, in shared memory where they fit. Every thread calls.
template <typename T>
__device__ void stage_rows(const RowsArguments& a, int64_t n, int64_t begin, int64_t end,
                           RowsMemory<T>& m) {
  const int experts = static_cast<int>(a.spec.experts), k = threadIdx.x;
  __syncthreads();  // nobody looks at the last row any more
  if (k < experts) {
    const T* z = static_cast<const T*>(a.logits[k].data) + row_offset(a.logits[k], a.spec, n);
    m.row[k] = z;
  }
  __syncthreads();
  if (!a.resident) return;
  // Whole 16-byte pieces: what they hold beyond the slice lies in the same piece as some of it.
  for (int i = 0; i < experts; ++i) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(m.row[i] + begin);
    const uintptr_t to = reinterpret_cast<uintptr_t>(m.row[i] + end);
    const unsigned char* source = reinterpret_cast<const unsigned char*>(from - from % 16);
    unsigned char* target = m.staging() + i * a.slice_bytes;
    const int64_t bytes = begin < end ? static_cast<int64_t>(to - (from - from % 16)) : 0;
    for (int64_t b = 16 * threadIdx.x; b < bytes; b += 16 * kRowThreads) {
      __pipeline_memcpy_async(target + b, source + b, 16);
    }
  }
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  if (k < experts) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(m.row[k] + begin);
    m.row[k] = reinterpret_cast<const T*>(m.staging() + k * a.slice_bytes + from % 16) - begin;
  }
  __syncthreads();
}

// lse[k] of the whole rows.
template <typename T>
__device__ void log_sum_exps(const RowsArguments& a, int64_t begin, int64_t end, Team& team,
                             RowsMemory<T>& m) {
  const int experts = static_cast<int>(a.spec.experts);
  const ColumnTransform transform{a.exponent.inner, a.spec.softcap > 0};
  for (int first = 0; first < experts; first += kMaxSums) {
    const int count = ::min(experts - first, kMaxSums);
    for (int i = 0; i < count; ++i) {
      team.put(i, row_state<false>(m.row[first + i], begin, end, a.exponent.scale, transform));
    }
    const auto* states = team.merge_all<OnlineSoftmax<float>>(count);
    if (threadIdx.x < count) {
      m.lse[first + threadIdx.x] = log_sum_exp(states[threadIdx.x], a.exponent);
    }
  }
}

// Scalars of every expert from lse[] and the weights that say which one is the base; the first warp
// works, everybody gets the result.
template <typename T>
__device__ void relate_experts(const LogitsSpec& spec, const Exponent& e, const float* weight,
                               RowsMemory<T>& m) {
  __syncthreads();
  if (threadIdx.x < 32) {
    const int k = threadIdx.x, experts = static_cast<int>(spec.experts);
    const double lse = k < experts ? m.lse[k] : 0.0;
    const bool finite = __all_sync(~0u, lse - lse == 0);
    float heaviest = k < experts ? weight[k] : -INFINITY;
    int base = k;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const float other = __shfl_xor_sync(~0u, heaviest, lanes);
      const int at = __shfl_xor_sync(~0u, base, lanes);
      if (other > heaviest || (other == heaviest && at < base)) {
        heaviest = other;
        base = at;
      }
    }
    base = base < experts ? base : 0;  // NaN weights
    if (k < experts && finite) {
      m.scalars[k] = expert_scalars(lse, m.lse[base], e, spec.softcap > 0);
    }
    if (k == 0) {
      m.base = base;
      m.finite = finite;
    }
  }
  __syncthreads();
}

// Corrects the log-sum-exps of nearly equal experts, and says whether any changed.
// sum_v (p_k - p_0) is 0 but for the errors of the log-sum-exps, about 1e-8, which is too much for
// the gradients of experts that differ by 1e-6; it is known to 1e-6 of the experts' distance.
template <typename T>
__device__ bool correct_log_sum_exps(int experts, double distance, const double* error,
                                     RowsMemory<T>& m) {
  if (!(distance < 1e-3)) return false;
  bool changed = false;
  for (int k = 0; k < experts; ++k) changed = changed || (k != m.base && error[k] != 0);
  __syncthreads();
  const int k = threadIdx.x;
  if (k < experts && k != m.base) m.lse[k] += ::log1p(error[k]);
  return changed;
}

// A column whose logits are read where they are needed.
template <typename T>
struct StagedColumn {
  const RowsMemory<T>& m;
  const ColumnTransform& transform;
  int experts;
  int64_t v;

  __device__ int count() const { return experts; }
  __device__ int base() const { return m.base; }
  __device__ float u(int k) const { return transform(to_float(m.row[k][v])); }
  __device__ const ExpertScalars& scalars(int k) const { return m.scalars[k]; }
  __device__ float weight(int k) const { return m.gate[0][k]; }
  __device__ float teacher(int k) const { return m.gate[0][k]; }
  __device__ float student(int k) const { return m.gate[1][k]; }
  __device__ float difference(int k) const { return m.gate[2][k]; }
  __device__ float log2_teacher(int k) const { return m.gate[3][k]; }
  __device__ float log2_student(int k) const { return m.gate[4][k]; }
};

// Points grad[] at row n, and fills the tile with what needs no computation.
template <typename T>
__device__ void start_gradients(const GradientRows& g, const LogitsSpec& spec, int64_t n,
                                const Tile& tile, bool computed, float value, RowsMemory<T>& m) {
  __syncthreads();  // nobody writes to the last row any more
  for (int k = 0; k < static_cast<int>(spec.experts); ++k) {
    T* dz = static_cast<T*>(g.rows[k].data);
    if (dz) dz += row_offset(g.rows[k], spec, n);
    if (threadIdx.x == k) m.grad[k] = dz;
    if (dz) tile.fill(dz, computed, value, spec.vocab, g.padded_vocab[k]);
  }
}

// Fills in team, residence and slices, and returns the grid. `memory` is sizeof(RowsMemory).
inline Grid plan_rows(RowsArguments& a, int64_t memory, int device) {
  const DeviceLimits limits(device);
  const int64_t size = size_of(a.spec.dtype), rows = a.spec.rows;
  const auto block_bytes = [&](int team) {
    const int64_t columns = ((a.spec.vocab + team - 1) / team + 63) / 64 * 64;
    a.slice_bytes = (columns * size + 31) / 16 * 16;
    return memory + a.spec.experts * a.slice_bytes;
  };
  // Two blocks to a multiprocessor: one computes while the other waits.
  a.resident = true;
  for (a.team = 1; a.team <= limits.largest_cluster; a.team *= 2) {
    if (block_bytes(a.team) + 1024 > limits.shared_bytes / 2) continue;
    while (2 * a.team <= 8 && 2 * a.team <= limits.largest_cluster &&
           rows * a.team < 2 * limits.multiprocessors) {
      a.team *= 2;
    }
    return {team_blocks(rows, a.team), kRowThreads, a.team, block_bytes(a.team)};
  }
  a.resident = false;
  a.team = limits.largest_cluster > 8 ? 8 : limits.largest_cluster;
  const int64_t row_bytes = a.spec.experts * a.spec.vocab * size;
  // As many rows as L2 holds, but enough to fill the device: a sixteenth is left free, because a
  // cluster does not straddle groups of multiprocessors, and a team that waited would double the
  // time.
  const int64_t cached = limits.cache_bytes * 6 / 10 / row_bytes;
  const int64_t filling = ::max(int64_t{1}, int64_t{limits.multiprocessors} * 15 / 8 / a.team);
  const int64_t teams = ::min(rows, ::max(cached, filling));
  return {teams * a.team, kRowThreads, a.team, memory};
}

// Calls function(zero of the logits' type, K as a constant) and returns its error: 2 and 4 experts
// have kernels of their own, 0 stands for any number.
template <typename Function>
const char* for_experts(const LogitsSpec& spec, const Function& function) {
  return for_dtype(spec.dtype, [&](auto zero) {
    if (spec.experts == 2) return function(zero, std::integral_constant<int, 2>());
    if (spec.experts == 4) return function(zero, std::integral_constant<int, 4>());
    return function(zero, std::integral_constant<int, 0>());
  });
}

}  // namespace robustgate::cuda

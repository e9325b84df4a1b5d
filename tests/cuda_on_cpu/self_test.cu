// Small kernels for tests/ops/test_cuda_on_cpu.py: one feature each, and what must be caught.

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <stdint.h>

#ifndef RG_SHARED_MEMORY
#define RG_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace cg = cooperative_groups;

namespace {

template <typename... P, typename... A>
const char* launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, int cluster,
                   A... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = cluster > 0 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// out[i] = i, the position in the grid, x fastest.
__global__ void indices(int* out) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, width = gridDim.x * blockDim.x;
  const int y = blockIdx.y * blockDim.y + threadIdx.y, height = gridDim.y * blockDim.y;
  const int z = blockIdx.z * blockDim.z + threadIdx.z;
  const int i = (z * height + y) * width + x;
  out[i] = i;
}

// out[i] = in[n - 1 - i] through shared memory.
__global__ void reverse(const int* in, int* out, bool barrier) {
  RG_SHARED_MEMORY(storage);
  int* const values = reinterpret_cast<int*>(storage);
  values[threadIdx.x] = __ldg(in + threadIdx.x);
  if (barrier) __syncthreads();
  __stcs(out + threadIdx.x, values[blockDim.x - 1 - threadIdx.x]);
}

// The same with cp.async, 16 bytes a thread, in two commits.
__global__ void reverse_async(const int4* in, int4* out, bool wait) {
  RG_SHARED_MEMORY(storage);
  int4* const values = reinterpret_cast<int4*>(storage);
  const unsigned n = blockDim.x, i = threadIdx.x;
  __pipeline_memcpy_async(values + i, in + i, 16);
  __pipeline_commit();
  __pipeline_memcpy_async(values + n + i, in + n + i, 16, 8);
  __pipeline_commit();
  if (wait) __pipeline_wait_prior(1);
  __syncthreads();
  out[i] = values[n - 1 - i];
  __pipeline_wait_prior(0);
  __syncthreads();
  out[n + i] = values[2 * n - 1 - i];
}

// out[row][lane] for one warp.
__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  const double value = 100 + lane;
  out[0 * 32 + lane] = static_cast<int>(__shfl_sync(~0u, value, 3));
  out[1 * 32 + lane] = static_cast<int>(__shfl_sync(~0u, value, 3, 8));
  out[2 * 32 + lane] = __shfl_xor_sync(~0u, 100 + lane, 5);
  out[3 * 32 + lane] = static_cast<int>(__shfl_down_sync(~0u, 100.0f + lane, 4, 16));
  out[4 * 32 + lane] = static_cast<int>(__shfl_up_sync(~0u, 100ll + lane, 9));
  out[5 * 32 + lane] = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0));
  out[6 * 32 + lane] = __any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane < 31);
  if (lane < 16) out[7 * 32 + lane] = __shfl_sync(0xffffu, lane, 15 - lane);
  if (lane >= 16) out[7 * 32 + lane] = __shfl_xor_sync(0xffff0000u, lane, 1);
}

__global__ void votes(int* out) {
  const int i = threadIdx.x;
  out[3 * i] = __syncthreads_count(i % 2);
  out[3 * i + 1] = __syncthreads_or(i == 40) + 2 * __syncthreads_or(i < 0);
  out[3 * i + 2] = __syncthreads_and(i >= 0) + 2 * __syncthreads_and(i != 40);
}

// out[block] = sum of (block + 1) over its cluster. The barrier at the end keeps every block's
// shared memory alive until all have read it.
__global__ void cluster_sum(int* out, bool first_barrier, bool last_barrier) {
  RG_SHARED_MEMORY(storage);
  int* const mine = reinterpret_cast<int*>(storage);
  const cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x == 0) *mine = blockIdx.x + 1;
  if (first_barrier) cluster.sync();
  int sum = 0;
  for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) {
    sum += *cluster.map_shared_rank(mine, rank);
  }
  cluster.barrier_arrive();
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
  if (last_barrier) cluster.barrier_wait();
}

__global__ void exponentials(const float* in, float* out) {
  out[threadIdx.x] = exp2f(in[threadIdx.x]);
}

enum Mistake { kEarlyReturn, kTwoBarriers, kLanesDisagree, kOverrun, kUnderrun, kMisaligned };

__global__ void make(Mistake mistake, int* memory) {
  RG_SHARED_MEMORY(storage);
  const bool odd = threadIdx.x % 2;
  switch (mistake) {
    case kEarlyReturn:
      if (odd) return;
      return __syncthreads();
    case kTwoBarriers:
      if (odd) return __syncthreads();
      __syncthreads_or(1);
      return;
    case kLanesDisagree:
      memory[threadIdx.x] = odd ? __any_sync(~0u, 1) : __shfl_sync(~0u, 1, 0);
      return;
    case kOverrun:
      storage[4 * blockDim.x + threadIdx.x] = 0;
      return;
    case kUnderrun:
      (storage - 1)[-static_cast<int>(threadIdx.x)] = 0;
      return;
    case kMisaligned:
      *reinterpret_cast<double*>(memory + 1) = 0;
      return;
  }
}

}  // namespace

extern "C" {

const char* run_indices(int* out) { return launch(indices, {2, 3, 4}, {5, 3, 2}, 0, 0, out); }

const char* run_reverse(const int* in, int* out, int n, bool barrier) {
  return launch(reverse, 1, n, 4 * n, 0, in, out, barrier);
}

const char* run_reverse_async(const int4* in, int4* out, int n, bool wait) {
  return launch(reverse_async, 1, n, 32 * n, 0, in, out, wait);
}

const char* run_shuffles(int* out) { return launch(shuffles, 1, 32, 0, 0, out); }

const char* run_votes(int* out, int n) { return launch(votes, 1, n, 0, 0, out); }

const char* run_cluster_sum(int* out, int blocks, int cluster, bool first, bool last) {
  return launch(cluster_sum, blocks, 96, 4, cluster, out, first, last);
}

const char* run_mistake(int mistake, int* memory, int n) {
  return launch(make, 1, n, 4 * n, 0, static_cast<Mistake>(mistake), memory);
}

const char* run_exponentials(const float* in, float* out, int n) {
  return launch(exponentials, 1, n, 0, 0, in, out);
}

// A launch of nothing much, for its limits.
const char* run_shape(int* out, int threads, int shared_bytes, int opt_in, int blocks, int cluster,
                      bool large_clusters) {
  if (opt_in > 0 && cudaFuncSetAttribute(cluster_sum, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         opt_in) != cudaSuccess) {
    return cudaGetErrorString(cudaGetLastError());
  }
  cudaFuncSetAttribute(cluster_sum, cudaFuncAttributeNonPortableClusterSizeAllowed, large_clusters);
  return launch(cluster_sum, blocks, threads, shared_bytes, cluster, out, true, true);
}

// 16-bit bits to float and back.
const char* convert(const unsigned short* bits, const float* floats, int n, float* half_wide,
                    float* bfloat16_wide, unsigned short* half_bits,
                    unsigned short* bfloat16_bits) {
  for (int i = 0; i < n; ++i) {
    half_wide[i] = __half2float(__ushort_as_half(bits[i]));
    bfloat16_wide[i] = __bfloat162float(__ushort_as_bfloat16(bits[i]));
    half_bits[i] = __half_as_ushort(__float2half_rn(floats[i]));
    bfloat16_bits[i] = __bfloat16_as_ushort(__float2bfloat16_rn(floats[i]));
  }
  return nullptr;
}

}  // extern "C"

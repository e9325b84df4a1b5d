// Stands in for CUDA's header where kernels are compiled for a CPU: see ../README.md.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <tuple>

#include "cuda_on_cpu/device_functions.h"
#include "cuda_on_cpu/math_functions.h"
#include "cuda_on_cpu/vector_types.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) alignas(n)
#define __builtin_assume(condition)
// __shared__ has no stand-in: use RG_SHARED_MEMORY.

#define CUDART_VERSION 13000
#define __CUDA_ARCH__ 900

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorInvalidClusterSize = 912,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxThreadsPerBlock;
  int maxDynamicSharedSizeBytes;
  int nonPortableClusterSizeAllowed;
};

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

extern "C" {
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
}

namespace cuda_on_cpu {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const Call& call);
cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t max_active_clusters(int* count, const void* kernel, const cudaLaunchConfig_t& config);
cudaError_t max_active_blocks(int* count, const void* kernel, int threads, size_t shared_bytes);

template <typename F>
const void* address(F* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace cuda_on_cpu

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "a kernel's parameters fit into 4 KiB");
  const std::tuple<void (*)(Parameters...), Parameters...> call(kernel, arguments...);
  const auto invoke = [](const void* tuple) {
    std::apply([](auto run, const auto&... parameters) { run(parameters...); },
               *static_cast<const decltype(call)*>(tuple));
  };
  return cuda_on_cpu::launch(*config, cuda_on_cpu::address(kernel), {invoke, &call, sizeof call});
}

template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F* kernel) {
  return cuda_on_cpu::get_attributes(attributes, cuda_on_cpu::address(kernel));
}

template <typename F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute attribute, int value) {
  return cuda_on_cpu::set_attribute(cuda_on_cpu::address(kernel), attribute, value);
}

template <typename F>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, F* kernel,
                                           const cudaLaunchConfig_t* config) {
  return cuda_on_cpu::max_active_clusters(count, cuda_on_cpu::address(kernel), *config);
}

template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, F* kernel, int threads,
                                                          size_t shared_bytes) {
  return cuda_on_cpu::max_active_blocks(count, cuda_on_cpu::address(kernel), threads, shared_bytes);
}

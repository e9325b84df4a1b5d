// What every launcher needs: the caller's device kept, the device's limits, a launch whose error is
// turned into its text.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "common/dtype.h"

// Shared memory of a block, 16-byte aligned, sized at launch. (Defined elsewhere where the kernels
// run on a CPU.)
#ifndef RG_SHARED_MEMORY
#define RG_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace robustgate::cuda {

// Makes `device` current and restores the caller's device at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&previous_);
    if (error == cudaSuccess && previous_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
      if (!changed_) cudaGetLastError();  // the caller reports it
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Calls function() with a device current, and returns its error or the device's.
template <typename Function>
const char* on_device(int device, const Function& function) {
  const DeviceGuard guard(device);
  return guard.error == cudaSuccess ? function() : cudaGetErrorString(guard.error);
}

// The limits that decide a grid. The runtime answers from memory, in tens of nanoseconds.
struct DeviceLimits {
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // of one block, and nearly all of its multiprocessor's
  int64_t cache_bytes = 0;   // L2
  int largest_cluster = 1;

  explicit DeviceLimits(int device) {
    int shared = 0, cache = 0, major = 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    shared_bytes = shared;
    cache_bytes = cache;
    if (major >= 9) largest_cluster = major < 12 ? 16 : 8;
  }
};

struct Grid {
  int64_t blocks;
  int threads;
  int cluster = 1;  // consecutive blocks that share their memories; divides blocks
  int64_t shared_bytes = 0;
};

// Calls function(zero of the logits' type) and returns its error.
template <typename Function>
const char* for_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float());
    case DType::kBFloat16:
      return function(__nv_bfloat16());
    case DType::kFloat16:
      return function(__half());
    default:
      return "float64 logits are not served";
  }
}

// Launches, and returns null or the text of what went wrong.
template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), const Grid& grid, void* stream,
                   const Parameters&... arguments) {
  if (grid.blocks > INT32_MAX) return "more blocks than a grid holds";
  cudaError_t error = cudaSuccess;
  if (grid.shared_bytes > 48 * 1024) {
    // The device's limit, not this call's need: another thread may launch the same kernel.
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (error == cudaSuccess && grid.cluster > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = grid.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, and not once more by the next caller
  return cudaGetErrorString(error);
}

}  // namespace robustgate::cuda

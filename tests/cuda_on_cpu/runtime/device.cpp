// The host's side of the CUDA runtime: two equal devices, and what a launch on them may ask for.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "cuda_runtime.h"

namespace {

struct Model {
  const char* capability;
  int major, minor;
  size_t shared_per_block, shared_per_multiprocessor;
  int threads_per_multiprocessor;
  unsigned largest_cluster;
};

// Table "Technical Specifications per Compute Capability" of the CUDA programming guide.
constexpr Model kModels[] = {
    {"8.0", 8, 0, 163 << 10, 164 << 10, 2048, 0},
    {"9.0", 9, 0, 227 << 10, 228 << 10, 2048, 16},
    {"12.0", 12, 0, 99 << 10, 100 << 10, 1536, 8},
};
constexpr int kDevices = 2;
constexpr size_t kSharedByDefault = 48 << 10, kReservedPerBlock = 1 << 10;
constexpr unsigned kPortableCluster = 8, kThreadsPerBlock = 1024;

struct KernelAttributes {
  size_t shared_bytes = kSharedByDefault;
  bool large_clusters = false;
};

std::mutex mutex;  // one kernel runs at a time
std::map<const void*, KernelAttributes> kernel_attributes;
thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
const char* failure = "";  // of the last kernel that failed

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

const Model& model() {
  const char* wanted = std::getenv("CUDA_ON_CPU_CAPABILITY");
  for (const Model& m : kModels) {
    if (std::strcmp(m.capability, wanted ? wanted : "9.0") == 0) return m;
  }
  std::abort();
}

int multiprocessors() {
  const char* wanted = std::getenv("CUDA_ON_CPU_MULTIPROCESSORS");
  return wanted ? std::atoi(wanted) : 16;
}

unsigned volume(dim3 d) { return d.x * d.y * d.z; }

dim3 cluster_of(const cudaLaunchConfig_t& config) {
  dim3 cluster;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& size = config.attrs[i].val.clusterDim;
    cluster = dim3(size.x, size.y, size.z);
  }
  return cluster;
}

cudaError_t check(const cudaLaunchConfig_t& config, const KernelAttributes& kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim, cluster = cluster_of(config);
  if (volume(grid) == 0 || volume(block) == 0 || volume(cluster) == 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (grid.x > INT32_MAX || grid.y > 0xffff || grid.z > 0xffff) {
    return cudaErrorInvalidConfiguration;
  }
  if (volume(block) > kThreadsPerBlock || block.z > 64) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > kernel.shared_bytes) return cudaErrorInvalidValue;
  if (config.numAttrs > 0) {
    if (model().largest_cluster == 0) return cudaErrorInvalidConfiguration;
    if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
      return cudaErrorInvalidClusterSize;
    }
    const unsigned largest = kernel.large_clusters ? model().largest_cluster : kPortableCluster;
    if (volume(cluster) > largest) return cudaErrorInvalidClusterSize;
  }
  return cudaSuccess;
}

int blocks_per_multiprocessor(unsigned threads, size_t shared_bytes) {
  const size_t by_shared = model().shared_per_multiprocessor / (shared_bytes + kReservedPerBlock);
  const int by_threads = model().threads_per_multiprocessor / ((threads + 31) / 32 * 32);
  return std::min({static_cast<int>(by_shared), by_threads, 32});
}

}  // namespace

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return remember(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
    case cudaErrorLaunchFailure:
      return failure;
  }
  return "unrecognized error code";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return remember(cudaErrorInvalidDevice);
  const Model& m = model();
  *value = [&]() -> int {
    switch (attribute) {
      case cudaDevAttrMultiProcessorCount:
        return multiprocessors();
      case cudaDevAttrL2CacheSize:
        return 50 << 20;
      case cudaDevAttrMaxThreadsPerMultiProcessor:
        return m.threads_per_multiprocessor;
      case cudaDevAttrComputeCapabilityMajor:
        return m.major;
      case cudaDevAttrComputeCapabilityMinor:
        return m.minor;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        return m.shared_per_multiprocessor;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return m.shared_per_block;
      case cudaDevAttrReservedSharedMemoryPerBlock:
        return kReservedPerBlock;
      case cudaDevAttrClusterLaunch:
        return m.largest_cluster > 0;
    }
    std::abort();
  }();
  return cudaSuccess;
}

namespace cuda_on_cpu {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const Call& call) {
  const std::lock_guard lock(mutex);
  const cudaError_t error = check(config, kernel_attributes[kernel]);
  if (error != cudaSuccess) return remember(error);
  const char* what =
      run({config.gridDim, config.blockDim, cluster_of(config), config.dynamicSmemBytes}, call);
  if (!what) return cudaSuccess;
  failure = what;
  return remember(cudaErrorLaunchFailure);
}

cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* kernel) {
  const std::lock_guard lock(mutex);
  const KernelAttributes& known = kernel_attributes[kernel];
  *attributes = {0, kThreadsPerBlock, static_cast<int>(known.shared_bytes), known.large_clusters};
  return cudaSuccess;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(mutex);
  KernelAttributes& known = kernel_attributes[kernel];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    known.large_clusters = value != 0;
  } else if (value < 0 || static_cast<size_t>(value) > model().shared_per_block) {
    return remember(cudaErrorInvalidValue);
  } else {
    known.shared_bytes = value;
  }
  return cudaSuccess;
}

cudaError_t max_active_clusters(int* count, const void* kernel, const cudaLaunchConfig_t& config) {
  const std::lock_guard lock(mutex);
  const cudaError_t error = check(config, kernel_attributes[kernel]);
  if (error != cudaSuccess) return remember(error);
  const unsigned threads = volume(config.blockDim);
  const int blocks =
      multiprocessors() * blocks_per_multiprocessor(threads, config.dynamicSmemBytes);
  *count = blocks / static_cast<int>(volume(cluster_of(config)));
  return cudaSuccess;
}

cudaError_t max_active_blocks(int* count, const void* kernel, int threads, size_t shared_bytes) {
  const std::lock_guard lock(mutex);
  const bool allowed = shared_bytes <= kernel_attributes[kernel].shared_bytes;
  *count = allowed ? blocks_per_multiprocessor(threads, shared_bytes) : 0;
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

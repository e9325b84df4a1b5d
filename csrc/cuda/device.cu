// Can the kernels of this build run on a device? Asked once per device, before any launch.

#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "ops.h"

namespace robustgate::cuda {
namespace {

__global__ void probe_kernel() {}

}  // namespace

int compiled_version() { return CUDART_VERSION; }

const char* why_unusable(int device) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return "no CUDA driver";
  }
  // A wheel of CUDA X.y runs on any driver of CUDA X or later.
  if (driver / 1000 < CUDART_VERSION / 1000) {
    return "the CUDA driver is older than the CUDA version this wheel was built with";
  }
  return on_device(device, [] {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaGetLastError();  // the question must not leave its error behind
    return error == cudaSuccess ? nullptr : "this wheel holds no kernel image for the device";
  });
}

}  // namespace robustgate::cuda

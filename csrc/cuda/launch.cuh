// What every launcher needs: the caller's device kept, a launch error turned into its text.
#pragma once

#include <cuda_runtime.h>

namespace robustgate::cuda {

// Makes `device` current and restores the caller's device at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&previous_);
    if (error == cudaSuccess && previous_ != device) {
      error = cudaSetDevice(device);
      changed_ = true;
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

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace robustgate::cuda

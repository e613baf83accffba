// SPDX-License-Identifier: Apache-2.0
// What every binding of a CUDA kernel needs: the translation of a status, and the device of a call.
#pragma once

#include <cuda_runtime.h>

#include "core/error.h"

namespace vk {

inline void check(cudaError_t status, const char* what) {
  VK_CHECK(status == cudaSuccess, "%s: %s (%s)", what, cudaGetErrorString(status), cudaGetErrorName(status));
}

// Makes a device current for one call; the caller's is current again afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device == previous_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace vk

// SPDX-License-Identifier: Apache-2.0
// What every launcher uses: the error check and the launch itself.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <utility>

namespace vk::cuda {

// Returns the error of an expression from a launcher. Launchers report, they never throw and never synchronise.
#define VK_CUDA_RETURN_IF_ERROR(expression)         \
  do {                                              \
    const cudaError_t vk_status = (expression);     \
    if (vk_status != cudaSuccess) return vk_status; \
  } while (false)

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct LaunchShape {
  int64_t blocks = 0;  // 0: nothing to do, nothing is launched
  int threads = 0;
  int64_t shared_bytes = 0;
};

inline constexpr int64_t kPlainSharedBytes = 48 * 1024;  // more than this a kernel has to ask for

// The most shared memory that one block may have on the current device.
inline cudaError_t shared_limit(int64_t* bytes) {
  int device = 0, most = 0;
  VK_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device));
  VK_CUDA_RETURN_IF_ERROR(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  *bytes = most;
  return cudaSuccess;
}

// Launches `kernel` on `stream`. The launch's own status comes back, not cudaGetLastError(), which could be an older
// error of the caller's.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   Arguments&&... arguments) {
  if (shape.blocks == 0) return cudaSuccess;
  if (shape.blocks < 0 || shape.blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidConfiguration;
  if (shape.shared_bytes > kPlainSharedBytes)
    VK_CUDA_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(shape.shared_bytes)));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace vk::cuda

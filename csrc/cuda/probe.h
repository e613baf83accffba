// SPDX-License-Identifier: Apache-2.0
// A kernel that shows whether a device runs the code of this module at all.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vk::cuda {

struct PatternParams {
  uint32_t* out = nullptr;  // [count]
  int64_t count = 0;
  uint32_t seed = 0;
};

// out[i] = seed + i * 2654435761 modulo 2^32.
cudaError_t launch_pattern(const PatternParams& params, cudaStream_t stream);

}  // namespace vk::cuda

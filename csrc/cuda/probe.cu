// SPDX-License-Identifier: Apache-2.0
// The probe kernel.
#include <algorithm>

#include "cuda/engine/launch.h"
#include "cuda/probe.h"

namespace vk::cuda {
namespace {

constexpr uint32_t kMultiplier = 2654435761u;  // odd, so that all values differ
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;

__global__ void pattern_kernel(PatternParams params) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < params.count; i += step)
    params.out[i] = params.seed + static_cast<uint32_t>(i) * kMultiplier;
}

}  // namespace

cudaError_t launch_pattern(const PatternParams& params, cudaStream_t stream) {
  const LaunchShape shape{.blocks = std::min(ceil_div(params.count, kThreads), kMaxBlocks), .threads = kThreads};
  return launch(pattern_kernel, shape, stream, params);
}

}  // namespace vk::cuda

// SPDX-License-Identifier: Apache-2.0
// What the launchers of attention share: limits of a plan, and the one place that turns dtype and width into a kernel.
#pragma once

#include <algorithm>

#include "cuda/attention.h"
#include "cuda/engine/launch.h"
#include "cuda/engine/types.h"

namespace vk::cuda {

inline constexpr int64_t kAttentionResidentTiles = 18;  // 288 rows: what a block keeps whole even if it is alone then
inline constexpr int kAttentionFewestWarps = 4;         // fewer would not fetch a head fast enough

// At most `most` warps for `tasks` equal tasks, so that the last round is as full as it can be.
inline int even_warps(int64_t tasks, int most) {
  const int64_t rounds = std::max<int64_t>(ceil_div(tasks, most), 1);
  return static_cast<int>(std::max<int64_t>(ceil_div(tasks, rounds), kAttentionFewestWarps));
}

inline LaunchShape attention_shape(const AttentionPlan& plan) {
  return {.blocks = plan.blocks, .threads = plan.warps * 32, .shared_bytes = plan.shared_bytes};
}

template <class T>
struct ElementType {};
template <int kWidth>
struct Width {};

// Calls `run` with tags of the element type and of the width that holds params.d; cudaErrorInvalidValue for what no
// kernel is built for.
template <class Run>
cudaError_t with_attention_kernel(const AttentionParams& params, Run run) {
  const auto with_width = [&]<class T>(ElementType<T> type) {
    switch (attention_width(params.d)) {
      case 32:
        return run(type, Width<32>());
      case 64:
        return run(type, Width<64>());
      case 80:
        return run(type, Width<80>());
      case 96:
        return run(type, Width<96>());
      case 128:
        return run(type, Width<128>());
      default:
        return cudaErrorInvalidValue;
    }
  };
  return params.bf16 ? with_width(ElementType<Bf16>()) : with_width(ElementType<F16>());
}

}  // namespace vk::cuda

// SPDX-License-Identifier: Apache-2.0
// The rate of the bare tile engine, to be read beside the measured peaks (peak.h).
#pragma once

#include <cstdint>

#include "cpu/peak.h"

namespace vk::cpu {

inline constexpr int64_t kEnginePassCols = 240;  // a multiple of every instruction set's panel width

// float32, bf16, int8, in this order.
struct EngineKernels {
  void (*pass[3])(const uint32_t* left, const uint32_t* right, int64_t m, int64_t n, int64_t units, void* sink);
  int64_t depth_per_unit[3];
};

// 1e9 operations per second of all threads together, each on its own packed operands [m, depth] and [n, depth], in
// useful operations (2 m n depth): the best of the rounds that fit into `seconds`.
double engine_rate(Peak kind, int64_t m, int64_t n, int64_t depth, double seconds, int threads);

}  // namespace vk::cpu

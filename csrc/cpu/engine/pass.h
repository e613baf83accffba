// SPDX-License-Identifier: Apache-2.0
// One pass of the bare tile engine over packed operands, with the lightest functor there is: what every op builds on.
#pragma once

#include "cpu/engine_rate.h"
#include "engine/pack.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

// Visits the product of `m` packed rows and `n` packed columns strip by strip; the functor reads each strip, kRows rows
// of at most kPassCols columns, while it is in L1, and keeps its largest value.
template <class Op>
void engine_pass(const uint32_t* left, const uint32_t* right, int64_t m, int64_t n, int64_t units, void* sink) {
  constexpr int64_t kStride = kEnginePassCols + 32;
  alignas(64) typename Op::Element strip[kRows * kStride];
  typename Op::Accumulator largest = {};
  for (int64_t col = 0; col < n; col += kEnginePassCols) {
    const int64_t cols = n - col < kEnginePassCols ? n - col : kEnginePassCols;
    for (int64_t row = 0; row < m; row += kRows) {
      const int rows = static_cast<int>(m - row < kRows ? m - row : kRows);
      for (int64_t panel = 0; panel < cols; panel += kCols) {
        const int width = static_cast<int>(panel_width(cols, panel));
        pick_micro_kernel<Op, LeftPanel>(rows, width)(left + row * units, right + (col + panel) * units, units,
                                                      strip + panel, kStride, rows, width, false);
      }
      for (int i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; j += kLanes) {
          const auto x = (typename Op::Accumulator)load(reinterpret_cast<const float*>(strip + i * kStride + j));
          largest = x > largest ? x : largest;
        }
      }
    }
  }
  std::memcpy(sink, &largest, sizeof(int32_t));
}

inline constexpr EngineKernels kEngine = {
    .pass = {engine_pass<OpF32>, engine_pass<OpBF16>, engine_pass<OpI8>},
    .depth_per_unit = {OpF32::kDepthPerUnit, OpBF16::kDepthPerUnit, OpI8::kDepthPerUnit},
};

}  // namespace vk::cpu::VK_ISA_NAMESPACE

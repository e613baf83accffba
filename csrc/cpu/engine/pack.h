// SPDX-License-Identifier: Apache-2.0
// Packing: rows of a user's matrix into the unit panels that the micro-kernel reads in sequence.
//
// Two directions, because the same matrix is an operand of two products:
//   pack_depth_in_row   the product runs along each row (logits: features times features)
//   pack_depth_in_rows  the product runs over the rows (gradients: gradient tile times features)
// A panel is [units of depth][width] with width kRows (left operand) or kCols (right operand; the last panel may be
// narrower, a whole number of registers). Missing rows, columns and depth steps are zeros.
#pragma once

#include "cpu/matrix.h"
#include "engine/micro_kernel.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

inline float scalar_at(const Matrix& m, int64_t row, int64_t col) {
  const int64_t at = row * m.row_stride + col * m.col_stride;
  if (m.dtype == Dtype::kF32) return static_cast<const float*>(m.data)[at];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(m.data)[at]) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// `count` (<= kLanes) values of one row from column `col`, as float32, zeros behind them.
inline VecF load_row(const Matrix& m, int64_t row, int64_t col, int count) {
  if (m.col_stride == 1) {
    const int64_t at = row * m.row_stride + col;
    if (m.dtype == Dtype::kF32) {
      const float* p = static_cast<const float*>(m.data) + at;
      return count == kLanes ? load(p) : load_first(p, count);
    }
    const uint16_t* p = static_cast<const uint16_t*>(m.data) + at;
    if (count == kLanes) return from_bf16(p);
    alignas(VK_VECTOR_BYTES) uint16_t lanes[kLanes] = {};
    std::memcpy(lanes, p, sizeof(uint16_t) * static_cast<size_t>(count));
    return from_bf16(lanes);
  }
  alignas(VK_VECTOR_BYTES) float lanes[kLanes] = {};
  for (int i = 0; i < count; ++i) lanes[i] = scalar_at(m, row, col + i);
  return load(lanes);
}

// Units `unit .. unit + kLanes` of one row (depth along the row); `depth` is the row's length in elements.
template <class Op>
VecU load_row_units(const Matrix& m, int64_t row, int64_t unit, int64_t depth) {
  constexpr int kGroup = Op::kDepthPerUnit;
  const int64_t first = unit * kGroup;
  if constexpr (kGroup == 1) {
    const int64_t left = depth - first;
    return (VecU)load_row(m, row, first, left < kLanes ? static_cast<int>(left) : kLanes);
  } else {
    if (m.dtype == Dtype::kBF16 && m.col_stride == 1 && depth - first >= 2 * kLanes)
      return load_units(
          reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(m.data) + row * m.row_stride + first));
    VecF halves[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t from = first + half * kLanes;
      const int64_t left = depth - from;
      halves[half] = left <= 0 ? VecF{} : load_row(m, row, from, left < kLanes ? static_cast<int>(left) : kLanes);
    }
    return to_bf16_row(halves[0], halves[1]);
  }
}

template <int... I>
inline void butterfly(VecU& x, VecU& y, int distance, std::integer_sequence<int, I...>) {
  // Exchanges the odd blocks of x with the even blocks of y, blocks of `distance` lanes.
  const VecI low = {((I & distance) == 0 ? I : I - distance + kLanes)...};
  const VecI high = {((I & distance) == 0 ? I + distance : I + kLanes)...};
#if defined(__clang__)
  VecU a, b;
  for (int i = 0; i < kLanes; ++i) {
    a[i] = low[i] < kLanes ? x[low[i]] : y[low[i] - kLanes];
    b[i] = high[i] < kLanes ? x[high[i]] : y[high[i] - kLanes];
  }
#else
  const VecU a = __builtin_shuffle(x, y, low), b = __builtin_shuffle(x, y, high);
#endif
  x = a;
  y = b;
}

// Transposes a square of kLanes registers in log2(kLanes) rounds of two-register shuffles.
inline void transpose(VecU (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int d = 1; d < kLanes; d *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & d) == 0) butterfly(v[i], v[i + d], d, std::make_integer_sequence<int, kLanes>{});
    }
  }
}

// Kernel rows, one register of consecutive units each, as a piece of a left panel: `count` (<= kLanes) times kRows
// units. Transposes squares of kRows lanes, which is cheaper than whole registers.
inline void store_left_panel(VecU (&v)[kRows], int count, uint32_t* out) {
#pragma GCC unroll 4
  for (int d = 1; d < kRows; d *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      if ((i & d) == 0) butterfly(v[i], v[i + d], d, std::make_integer_sequence<int, kLanes>{});
    }
  }
  for (int first = 0; first < kLanes; first += kRows) {
    for (int i = 0; i < kRows && first + i < count; ++i)
      std::memcpy(out + (first + i) * kRows,
                  reinterpret_cast<const char*>(&v[i]) + sizeof(uint32_t) * static_cast<size_t>(first),
                  sizeof(uint32_t) * kRows);
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Width of the right-operand panel that starts at column `col` of `cols`.
inline int64_t panel_width(int64_t cols, int64_t col) {
  const int64_t left = cols - col;
  return left >= kCols ? kCols : round_up(left, kLanes);
}

// Rows [row, row + rows) as panels of Width rows, product along each row. Panels of Width == kCols narrow at the end.
// out: units_of(depth) * round_up(rows, Width == kCols ? kLanes : Width) units.
template <class Op, int Width>
void pack_depth_in_row(const Matrix& m, int64_t row, int64_t rows, int64_t depth, uint32_t* out) {
  const int64_t units = ceil_div(depth, Op::kDepthPerUnit);
  for (int64_t panel = 0; panel < rows; panel += Width) {
    const int64_t width = Width == kCols ? panel_width(rows, panel) : Width;
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      const int chunk = width - lane < kLanes ? static_cast<int>(width - lane) : kLanes;  // kRows may be below kLanes
      for (int64_t unit = 0; unit < units; unit += kLanes) {
        VecU square[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int64_t r = panel + lane + i;
          square[i] = i < chunk && r < rows ? load_row_units<Op>(m, row + r, unit, depth) : VecU{};
        }
        transpose(square);
        const int steps = units - unit < kLanes ? static_cast<int>(units - unit) : kLanes;
        for (int s = 0; s < steps; ++s) {
          uint32_t* to = out + (unit + s) * width + lane;
          if (chunk == kLanes) {
            store_units(to, square[s]);
          } else {
            std::memcpy(to, &square[s], sizeof(uint32_t) * static_cast<size_t>(chunk));
          }
        }
      }
    }
    out += units * width;
  }
}

// Rows [row, row + rows) as right-operand panels over columns [0, cols), product over the rows.
// out: units_of(rows) * round_up(cols, kLanes) units.
template <class Op>
void pack_depth_in_rows(const Matrix& m, int64_t row, int64_t rows, int64_t cols, uint32_t* out) {
  constexpr int kGroup = Op::kDepthPerUnit;
  const int64_t units = ceil_div(rows, kGroup);
  for (int64_t panel = 0; panel < cols; panel += kCols) {
    const int64_t width = panel_width(cols, panel);
    for (int64_t unit = 0; unit < units; ++unit) {
      for (int64_t lane = 0; lane < width; lane += kLanes) {
        const int64_t left = cols - panel - lane;
        const int count = left < kLanes ? static_cast<int>(left) : kLanes;
        const int64_t r = row + unit * kGroup;
        VecU v;
        if constexpr (kGroup == 1) {
          v = (VecU)load_row(m, r, panel + lane, count);
        } else {
          const bool second = unit * kGroup + 1 < rows;
          v = bf16_pairs(load_row(m, r, panel + lane, count),
                         second ? load_row(m, r + 1, panel + lane, count) : VecF{});
        }
        store_units(out + lane, v);
      }
      out += width;
    }
  }
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

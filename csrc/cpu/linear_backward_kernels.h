// SPDX-License-Identifier: Apache-2.0
// What the gradients of a linear layer need beside products: the pre-activation's gradient, weights as the right
// operand of a product over their rows, and sums of columns.
#pragma once

#include "linear_pack.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

// Columns [col0, col1) (panel borders) of a right operand whose depth runs over the `depth` rows of m.
template <class Op>
void pack_over_rows_of(const Matrix& m, int64_t depth, int64_t cols, int64_t col0, int64_t col1, uint32_t* packed) {
  const int64_t size = m.dtype == Dtype::kF32 ? 4 : 2, units = ceil_div(depth, Op::kDepthPerUnit);
  Matrix part = m;
  part.data = static_cast<const char*>(m.data) + col0 * m.col_stride * size;
  // Panel by panel: the whole range at once would narrow its own last panel, not the operand's.
  for (int64_t col = col0; col < col1; col += kCols) {
    const int64_t count = cols - col < kCols ? cols - col : kCols;
    pack_depth_in_rows<Op>(part, 0, depth, count, packed + col * units);
    part.data = static_cast<const char*>(part.data) + kCols * m.col_stride * size;
  }
}

inline void pack_over_rows(WeightKind kind, const Matrix& m, int64_t depth, int64_t cols, int64_t col0, int64_t col1,
                           char* packed) {
  auto* to = reinterpret_cast<uint32_t*>(packed);
  if (kind == WeightKind::kBF16) return pack_over_rows_of<OpBF16>(m, depth, cols, col0, col1, to);
  pack_over_rows_of<OpF32>(m, depth, cols, col0, col1, to);
}

template <Activation kind>
void slopes_of(const Rows& grad, int64_t n, int64_t row0, int64_t row1, const float* pre, void* out, Dtype dtype) {
  for (int64_t row = row0; row < row1; ++row) {
    const Matrix g = row_of(grad, row);
    for (int64_t j = 0; j < n; j += kLanes) {
      const int count = static_cast<int>(n - j < kLanes ? n - j : kLanes);
      VecF v = load_row(g, 0, j, count);
      if constexpr (kind != Activation::kNone) v = v * slope<kind>(load_first(pre + row * n + j, count));
      store_result(out, dtype, row * n + j, v, count);
    }
  }
}

// Rows [row0, row1) of the pre-activation's gradient: grad times the activation's slope at `pre` [m, n]. A float32
// `out` may be `pre` itself.
inline void slopes(Activation activation, const Rows& grad, int64_t n, int64_t row0, int64_t row1, const float* pre,
                   void* out, Dtype dtype) {
  switch (activation) {
    case Activation::kNone:
      return slopes_of<Activation::kNone>(grad, n, row0, row1, pre, out, dtype);
    case Activation::kGelu:
      return slopes_of<Activation::kGelu>(grad, n, row0, row1, pre, out, dtype);
    case Activation::kGeluTanh:
      return slopes_of<Activation::kGeluTanh>(grad, n, row0, row1, pre, out, dtype);
    case Activation::kQuickGelu:
      return slopes_of<Activation::kQuickGelu>(grad, n, row0, row1, pre, out, dtype);
    case Activation::kSilu:
      return slopes_of<Activation::kSilu>(grad, n, row0, row1, pre, out, dtype);
    case Activation::kRelu:
      return slopes_of<Activation::kRelu>(grad, n, row0, row1, pre, out, dtype);
  }
}

// Sums over the rows of columns [col0, col1) of g [m, n]: chains of eight rows, added up with the rounding errors kept
// beside the total, so that the error does not grow with the number of rows.
inline void column_sums(const Rows& g, int64_t m, int64_t, int64_t col0, int64_t col1, void* out, Dtype dtype) {
  constexpr int64_t kRowsInChain = 8;
  constexpr int64_t kColumns = 16 * kLanes;  // whole lines of a row while they are there
  for (int64_t first = col0; first < col1; first += kColumns) {
    VecF total[16] = {}, lost[16] = {};
    const int64_t left = col1 - first < kColumns ? col1 - first : kColumns;
    for (int64_t row = 0; row < m; row += kRowsInChain) {
      VecF sum[16] = {};
      const int64_t end = m - row < kRowsInChain ? m : row + kRowsInChain;
      for (int64_t i = row; i < end; ++i) {
        const Matrix from = row_of(g, i);
        for (int64_t j = 0; j < left; j += kLanes)
          sum[j / kLanes] += load_row(from, 0, first + j, static_cast<int>(left - j < kLanes ? left - j : kLanes));
      }
      for (int64_t j = 0; j < left; j += kLanes) {
        VecF& t = total[j / kLanes];
        const VecF next = t + sum[j / kLanes], taken = next - t;
        lost[j / kLanes] += (t - (next - taken)) + (sum[j / kLanes] - taken);
        t = next;
      }
    }
    for (int64_t j = 0; j < left; j += kLanes) {
      const VecF t = total[j / kLanes], l = lost[j / kLanes];
      // Infinities leave NaN in what was lost, and are the sum themselves.
      store_result(out, dtype, first + j, l == l ? t + l : t, static_cast<int>(left - j < kLanes ? left - j : kLanes));
    }
  }
}

// Rows [row0, row1) of the dequantized weight, contiguous float32 [N, K].
inline void dequantize_rows(WeightKind kind, const CanonicalWeight& w, int64_t row0, int64_t row1, float* out) {
  for (int64_t n = row0; n < row1; ++n) {
    float* to = out + n * w.k;
    if (kind == WeightKind::kInt4) {
      const auto* codes = static_cast<const uint8_t*>(w.codes) + n * w.row_stride;
      const int64_t groups = w.k / w.group;
      for (int64_t k = 0; k < w.k; ++k) {
        const int byte = codes[k / 2 * w.col_stride];
        const int64_t g = n * groups + k / w.group;
        to[k] = static_cast<float>((k % 2 == 0 ? byte & 15 : byte >> 4) - w.zero_point[g]) * w.scale[g];
      }
      continue;
    }
    const auto* codes = static_cast<const int8_t*>(w.codes) + n * w.row_stride;
    int64_t k = 0;
    if (w.col_stride == 1) {
      for (; k + kLanes <= w.k; k += kLanes)
        store(to + k, __builtin_convertvector(widen_codes(codes + k), VecF) * w.scale[n]);
    }
    for (; k < w.k; ++k) to[k] = static_cast<float>(codes[k * w.col_stride]) * w.scale[n];
  }
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// The epilogue of the linear layers: a block of sums, in L1, becomes a block of the result.
#pragma once

#include "engine/pack.h"
#include "linear_activations.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

// One row of an activation tensor as a matrix of one row.
inline Matrix row_of(const Rows& rows, int64_t r) {
  const int64_t outer = rows.inner > r ? 0 : r / rows.inner;
  const int64_t at = outer * rows.outer_stride + (r - outer * rows.inner) * rows.row_stride;
  const int64_t size = rows.dtype == Dtype::kF32 ? 4 : 2;
  return {static_cast<const char*>(rows.data) + at * size, rows.dtype, 0, rows.col_stride};
}

// `count` values of a row of the result, rounded once.
inline void store_result(void* out, Dtype dtype, int64_t at, VecF v, int count) {
  if (dtype == Dtype::kF32) {
    float* to = static_cast<float*>(out) + at;
    if (count == kLanes) {
      store(to, v);
    } else {
      store_first(to, v, count);
    }
    return;
  }
  const HalfWords half = to_bf16(v);
  std::memcpy(static_cast<uint16_t*>(out) + at, &half, sizeof(uint16_t) * static_cast<size_t>(count));
}

// What the columns of a block bring to every row.
struct ColumnTerms {
  const int32_t* compensation = nullptr;  // of integer sums, taken off
  const float* scale = nullptr;
};

// N registers of one row of sums, from column `col` of row `row`, `cols` of whose lanes are the result's.
template <class Op, Activation kind, int N>
inline void finish(const LinearProblem& p, const VecF (&sums)[N], const VecI (&compensation)[N], const VecF (&scale)[N],
                   const VecF (&bias)[N], float row_scale, int64_t row, int64_t col, int cols) {
  VecF v[N];
  for (int j = 0; j < N; ++j) {
    if constexpr (Op::kIntegers) {
      v[j] = __builtin_convertvector((VecI)sums[j] - compensation[j], VecF) * row_scale * scale[j] + bias[j];
    } else {
      v[j] = sums[j] * scale[j] + bias[j];
    }
  }
  activate<kind>(v);
  if (p.residual.data) {
    const Matrix residual = row_of(p.residual, row);
    for (int j = 0; j < N; ++j) {
      const int count = cols - j * kLanes < kLanes ? cols - j * kLanes : kLanes;
      v[j] += load_row(residual, 0, col + j * kLanes, count);
    }
  }
  const int64_t at = row * p.out_stride + col;
  if (cols == N * kLanes && p.out_dtype == Dtype::kF32) {
    for (int j = 0; j < N; ++j) store(static_cast<float*>(p.out) + at + j * kLanes, v[j]);
    return;
  }
  for (int j = 0; j < N; ++j) {
    const int count = cols - j * kLanes < kLanes ? cols - j * kLanes : kLanes;
    store_result(p.out, p.out_dtype, at + j * kLanes, v[j], count);
  }
}

// N registers of columns of a block: activation(sum * row scale * column scale + bias) + residual.
template <class Op, Activation kind, int N>
void epilogue_columns(const LinearProblem& p, const ColumnTerms& terms, const typename Op::Element* strip, int64_t row,
                      int rows, int64_t col, int cols) {
  VecI compensation[N];
  VecF scale[N], bias[N];
  for (int j = 0; j < N; ++j) {
    const int64_t at = col + j * kLanes;
    compensation[j] =
        Op::kIntegers ? (VecI)load_units(reinterpret_cast<const uint32_t*>(terms.compensation + at)) : VecI{};
    scale[j] = terms.scale ? load(terms.scale + at) : splat(1.0f);
    bias[j] = p.bias ? load(p.bias + at) : VecF{};
  }
  for (int i = 0; i < rows; ++i) {
    VecF sums[N];
    for (int j = 0; j < N; ++j) sums[j] = load(reinterpret_cast<const float*>(strip + i * kCols + j * kLanes));
    const float row_scale = Op::kIntegers ? p.row_scale[row + i] : 1.0f;
    finish<Op, kind>(p, sums, compensation, scale, bias, row_scale, row + i, col, cols);
  }
}

template <class Op, Activation kind>
void epilogue_of(const LinearProblem& p, const ColumnTerms& terms, const typename Op::Element* strip, int64_t row,
                 int rows, int64_t col, int cols) {
  if (cols > 2 * kLanes) return epilogue_columns<Op, kind, 3>(p, terms, strip, row, rows, col, cols);
  if (cols > kLanes) return epilogue_columns<Op, kind, 2>(p, terms, strip, row, rows, col, cols);
  epilogue_columns<Op, kind, 1>(p, terms, strip, row, rows, col, cols);
}

template <class Op>
void epilogue(const LinearProblem& p, const ColumnTerms& terms, const typename Op::Element* strip, int64_t row,
              int rows, int64_t col, int cols) {
  switch (p.activation) {
    case Activation::kNone:
      return epilogue_of<Op, Activation::kNone>(p, terms, strip, row, rows, col, cols);
    case Activation::kGelu:
      return epilogue_of<Op, Activation::kGelu>(p, terms, strip, row, rows, col, cols);
    case Activation::kGeluTanh:
      return epilogue_of<Op, Activation::kGeluTanh>(p, terms, strip, row, rows, col, cols);
    case Activation::kQuickGelu:
      return epilogue_of<Op, Activation::kQuickGelu>(p, terms, strip, row, rows, col, cols);
    case Activation::kSilu:
      return epilogue_of<Op, Activation::kSilu>(p, terms, strip, row, rows, col, cols);
    case Activation::kRelu:
      return epilogue_of<Op, Activation::kRelu>(p, terms, strip, row, rows, col, cols);
  }
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

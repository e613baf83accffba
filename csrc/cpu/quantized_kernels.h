// SPDX-License-Identifier: Apache-2.0
// The linear layers' tile loops, compiled once per instruction set.
//
// A block of rows passes each column panel while that is in L1 or L2: sums of kRows x kCols in a strip, then the
// epilogue while the strip is in L1. Weights with float activations are dequantized panel by panel on the way.
#pragma once

#include "linear_backward_kernels.h"
#include "linear_pack.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

static_assert(kRowBlock % kRows == 0);

// Units of depth that pass through the rows at once: the panel's piece stays in L2 beside the left operand's.
inline constexpr int64_t kDepthBlock = 1024;
// Longest chain of float sums in registers; then the strip takes them up. Rounding errors grow with the chain.
inline constexpr int64_t kChain = 128;

inline bool uses_int8(const LinearProblem& p) { return p.kind == WeightKind::kInt8Dot; }
inline bool uses_bf16(const LinearProblem& p) {
  return p.kind == WeightKind::kBF16 || (p.kind == WeightKind::kInt8 && p.half_operands);
}

inline int64_t depth_units(const LinearProblem& p) {
  const int64_t per_unit = uses_int8(p) ? OpI8::kDepthPerUnit : uses_bf16(p) ? OpBF16::kDepthPerUnit : 1;
  return ceil_div(p.k, per_unit);
}

inline int64_t product_scratch(const LinearProblem&) { return 4 * kCols * (kRowBlock + kDepthBlock) + 2 * kLine; }

// Units [unit, unit + count) of a panel's depth, from int8 codes.
template <class Op>
void dequantize_int8(const LinearProblem& p, const PackedLayout& layout, int64_t col, int64_t width, int64_t unit,
                     int64_t count, uint32_t* out) {
  constexpr int64_t kStep = Op::kDepthPerUnit;
  const auto* codes = reinterpret_cast<const int8_t*>(p.packed + layout.panels +
                                                      col * PackedLayout::depth_bytes(WeightKind::kInt8, p.k));
  auto values = [&](int64_t k, int64_t lane) {
    return __builtin_convertvector(widen_codes(codes + k * width + lane), VecF);
  };
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      const int64_t k = (unit + s) * kStep;
      VecU v = (VecU)values(k, lane);
      // Eight bits fit bf16, so the high half of the float32 value is the value.
      if constexpr (kStep == 2) v = (v >> 16) | ((VecU)values(k + 1, lane) & 0xffff0000u);
      store_units(out + s * width + lane, v);
    }
  }
}

// Steps [k, k + count) of a panel's depth, from nibbles; both are multiples of 8.
inline void dequantize_int4(const LinearProblem& p, const PackedLayout& layout, int64_t col, int64_t width, int64_t k,
                            int64_t count, float* out) {
  const int64_t group_bytes = kLanes * 4 + p.group / 8 * kLanes * 4;
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    const char* block = p.packed + (col + lane) / kLanes * layout.block;
    for (int64_t at = k; at < k + count; at += 8) {
      const int64_t g = at / p.group;
      const char* group = block + layout.zero_points + g * group_bytes;
      const VecI zero = widen_zeros(block + g * kLanes);
      const VecF scale = load(reinterpret_cast<const float*>(group));
      const VecU packed =
          load_units(reinterpret_cast<const uint32_t*>(group + kLanes * 4) + (at - g * p.group) / 8 * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const VecI code = (VecI)((packed >> (i % 4 * 8 + i / 4 * 4)) & 15u);
        store(out + (at - k + i) * width + lane, __builtin_convertvector(code - zero, VecF) * scale);
      }
    }
  }
}

// Units [unit, unit + count) of the panel at `col`: in place where they are stored as the micro-kernel reads them.
template <class Op>
const uint32_t* right_panel(const LinearProblem& p, const PackedLayout& layout, int64_t col, int64_t width,
                            int64_t unit, int64_t count, uint32_t* scratch) {
  if constexpr (!Op::kIntegers) {
    if (p.kind == WeightKind::kInt8) {
      dequantize_int8<Op>(p, layout, col, width, unit, count, scratch);
      return scratch;
    }
    if (p.kind == WeightKind::kInt4) {
      dequantize_int4(p, layout, col, width, unit, count, reinterpret_cast<float*>(scratch));
      return scratch;
    }
  }
  return reinterpret_cast<const uint32_t*>(p.packed + layout.panels + col * PackedLayout::depth_bytes(p.kind, p.k)) +
         unit * width;
}

// The result's lines are written after a whole product: ask for them now.
inline void prefetch_result(const LinearProblem& p, int64_t row, int rows, int64_t col, int cols) {
  const int64_t size = p.out_dtype == Dtype::kF32 ? 4 : 2;
  for (int i = 0; i < rows; ++i) {
    const char* at = static_cast<const char*>(p.out) + ((row + i) * p.out_stride + col) * size;
    for (int64_t j = 0; j < cols * size; j += kLine) __builtin_prefetch(at + j, 1, 3);
  }
}

template <class Op>
void product_of(const LinearProblem& p, int64_t row0, int64_t row1, int64_t col0, int64_t col1, const uint32_t* left,
                char* scratch) {
  const PackedLayout layout(p.kind, p.n, p.k, p.group);
  const int64_t units = depth_units(p);
  const int64_t chain = Op::kIntegers ? kDepthBlock : kChain;
  auto* strips = reinterpret_cast<typename Op::Element*>(scratch);
  auto* panel = reinterpret_cast<uint32_t*>(scratch + round_up(4 * kCols * kRowBlock, kLine));
  ColumnTerms terms;
  if (p.kind == WeightKind::kInt8Dot || p.kind == WeightKind::kInt8)
    terms = {reinterpret_cast<const int32_t*>(p.packed), reinterpret_cast<const float*>(p.packed + layout.scale)};
  for (int64_t col = col0; col < col1; col += kCols) {
    const int width = static_cast<int>(panel_width(p.n, col));
    const int cols = static_cast<int>(p.n - col < kCols ? p.n - col : kCols);
    int64_t unit = 0;
    do {  // once also for a depth of 0, whose sums are 0
      const int64_t count = units - unit < kDepthBlock ? units - unit : kDepthBlock;
      const bool last = unit + count == units;
      const uint32_t* right = right_panel<Op>(p, layout, col, width, unit, count, panel);
      for (int64_t row = row0; row < row1; row += kRows) {
        const int rows = static_cast<int>(row1 - row < kRows ? row1 - row : kRows);
        const uint32_t* from = left + (row - row0) * units + unit * kRows;
        // One block of depth: each strip is finished before the next begins, and one is enough.
        auto* strip = count == units ? strips : strips + (row - row0) * kCols;
        if (last) prefetch_result(p, row, rows, col, cols);
        const auto kernel = pick_micro_kernel<Op, LeftPanel>(rows, width);
        int64_t step = 0;
        do {
          const int64_t steps = count - step < chain ? count - step : chain;
          kernel(from + step * kRows, right + step * width, steps, strip, kCols, rows, width, unit + step > 0);
          step += steps;
        } while (step < count);
        if (last) epilogue<Op>(p, terms, strip, row, rows, col, cols);
      }
      unit += count;
    } while (unit < units);
  }
}

inline void prepare(const LinearProblem& p, int64_t row0, int64_t row1, uint32_t* left) {
  if (uses_int8(p)) return prepare_int8(p, row0, row1, left);
  if (uses_bf16(p)) return prepare_float<OpBF16>(p, row0, row1, left);
  prepare_float<OpF32>(p, row0, row1, left);
}

inline void product(const LinearProblem& p, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                    const uint32_t* left, char* scratch) {
  if (uses_int8(p)) return product_of<OpI8>(p, row0, row1, col0, col1, left, scratch);
  if (uses_bf16(p)) return product_of<OpBF16>(p, row0, row1, col0, col1, left, scratch);
  product_of<OpF32>(p, row0, row1, col0, col1, left, scratch);
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

#include "quantized_few_rows.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

inline constexpr QuantizedKernels kQuantized = {
    .rows = kRows,
    .cols = kCols,
    .lanes = kLanes,
    .packed_bytes = packed_bytes,
    .pack_weight = pack_weight,
    .depth_units = depth_units,
    .prepare = prepare,
    .product = product,
    .product_scratch = product_scratch,
    .few_rows = kFewRows,
    .few_bytes = few_bytes,
    .few_prepare = few_prepare,
    .few_product = few_product,
    .pack_over_rows = pack_over_rows,
    .slopes = slopes,
    .column_sums = column_sums,
    .dequantize_rows = dequantize_rows,
};

}  // namespace vk::cpu::VK_ISA_NAMESPACE

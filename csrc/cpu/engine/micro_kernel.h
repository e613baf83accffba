// SPDX-License-Identifier: Apache-2.0
// The micro-kernel: a block of kRows x (kVecs registers) of a product, accumulated in registers over its whole depth.
//
// One source for float32, bf16 (float32 sums) and int8 (int32 sums). What the three share is the *unit*, 32 bits that
// hold the 1, 2 or 4 consecutive depth steps that one instruction consumes: the left operand broadcasts a unit, the
// right operand loads a register of units, `Op::mac` does the rest.
#pragma once

#include "engine/vec.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

// Block shape: 24 accumulators of 32 registers, or 12 of 16, leave room for the right operand and one broadcast, and
// need 11 (7) loads for 24 (12) multiplications, so that the multipliers, not the load ports, are the limit.
#if defined(__AVX512F__)
inline constexpr int kRows = 8;
#else
inline constexpr int kRows = 4;
#endif
inline constexpr int kVecs = 3;
inline constexpr int kCols = kVecs * kLanes;

struct OpF32 {
  using Accumulator = VecF;
  using Element = float;
  static constexpr bool kIntegers = false;
  static constexpr int kDepthPerUnit = 1;
  static VecF mac(VecF c, uint32_t a, VecU b) {
    float x;
    std::memcpy(&x, &a, sizeof x);
    return c + x * (VecF)b;
  }
};

struct OpBF16 {
  using Accumulator = VecF;
  using Element = float;
  static constexpr bool kIntegers = false;
  static constexpr int kDepthPerUnit = 2;
  static VecF mac(VecF c, uint32_t a, VecU b) {
#if defined(__AVX512BF16__)
    return (VecF)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    // The high halves of the unit are float32 values as they stand, the low ones after a shift.
    const uint32_t a_low = a << 16, a_high = a & 0xffff0000u;
    float low, high;
    std::memcpy(&low, &a_low, sizeof low);
    std::memcpy(&high, &a_high, sizeof high);
    c = c + low * (VecF)(b << 16);
    return c + high * (VecF)(b & 0xffff0000u);
#endif
  }
};

// Signed 8-bit products, exact on every instruction set. With VNNI a unit holds four bytes; the left operand is stored
// with 128 added (the instruction wants it unsigned), and the caller takes 128 * (column sum of the right operand) off.
// Without it a unit holds two 16-bit values, whose products cannot saturate as 8-bit pairs would.
struct OpI8 {
  using Accumulator = VecI;
  using Element = int32_t;
  static constexpr bool kIntegers = true;
#if defined(__AVX512VNNI__)
  static constexpr int kDepthPerUnit = 4;
  static constexpr int kLeftOffset = 128;
  static VecI mac(VecI c, uint32_t a, VecU b) {
    return (VecI)_mm512_dpbusd_epi32((__m512i)c, _mm512_set1_epi32((int)a), (__m512i)b);
  }
#else
  static constexpr int kDepthPerUnit = 2;
  static constexpr int kLeftOffset = 0;
  static VecI mac(VecI c, uint32_t a, VecU b) {
#if defined(__AVX512BW__)
    return c + (VecI)_mm512_madd_epi16(_mm512_set1_epi32((int)a), (__m512i)b);
#elif defined(__AVX2__)
    return c + (VecI)_mm256_madd_epi16(_mm256_set1_epi32((int)a), (__m256i)b);
#elif defined(__SSE2__) && VK_VECTOR_BYTES == 16
    return c + (VecI)_mm_madd_epi16(_mm_set1_epi32((int)a), (__m128i)b);
#else
    const int32_t low = (int16_t)(a & 0xffffu), high = (int16_t)(a >> 16);
    return c + low * ((VecI)(b << 16) >> 16) + high * ((VecI)b >> 16);
#endif
  }
#endif
};

// How the left operand lies in memory, in units: element (row, step) is at row * kRowStride + step * kStepStride.
template <int R, int S>
struct LeftLayout {
  static constexpr int kRowStride = R, kStepStride = S;
};

// The left operand packed in panels of kRows rows (pack.h).
using LeftPanel = LeftLayout<1, kRows>;

// The right operand streams from L2; its lines are asked for this many depth steps ahead.
inline constexpr int kPrefetchSteps = 6;

// C[rows x cols] = A B, or C += A B. `a` in Layout, `b` packed as [depth][Vecs * kLanes] units, `c` row-major with
// row stride ldc. The whole block is computed, on operands padded with zeros; only rows x cols of it are written.
template <class Op, class Layout, int Rows, int Vecs>
[[gnu::noinline]] void micro_kernel(const uint32_t* __restrict a, const uint32_t* __restrict b, int64_t depth,
                                    typename Op::Element* __restrict c, int64_t ldc, int rows, int cols,
                                    bool accumulate) {
  using Acc = typename Op::Accumulator;
  Acc acc[Rows][Vecs];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < Vecs; ++j) acc[i][j] = Acc{};
  }
  // The block of C is needed after `depth` steps: ask for it now, so that it has arrived.
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; j += 16) __builtin_prefetch(c + i * ldc + j, 1, 3);
  }
#pragma GCC unroll 1
  for (int64_t step = 0; step < depth; ++step) {
    VecU right[Vecs];
#pragma GCC unroll 3
    for (int j = 0; j < Vecs; ++j) {
      right[j] = load_units(b + j * kLanes);
      __builtin_prefetch(b + (kPrefetchSteps * Vecs + j) * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const uint32_t unit = a[i * Layout::kRowStride];
#pragma GCC unroll 3
      for (int j = 0; j < Vecs; ++j) acc[i][j] = Op::mac(acc[i][j], unit, right[j]);
    }
    a += Layout::kStepStride;
    b += Vecs * kLanes;
  }
  const bool whole = rows == Rows && cols == Vecs * kLanes;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < Vecs; ++j) {
      const int count = whole ? kLanes : (i < rows ? cols - j * kLanes : 0);
      if (count <= 0) continue;
      float* out = reinterpret_cast<float*>(c + i * ldc + j * kLanes);
      if (count >= kLanes) {
        if (accumulate) acc[i][j] += (Acc)load(out);
        store(out, (VecF)acc[i][j]);
      } else {
        if (accumulate) acc[i][j] += (Acc)load_first(out, count);
        store_first(out, (VecF)acc[i][j], count);
      }
    }
  }
}

template <class Op>
using MicroKernel = void (*)(const uint32_t*, const uint32_t*, int64_t, typename Op::Element*, int64_t, int, int, bool);

// The smallest instantiation that covers rows x cols: edges use narrower blocks, not scalar loops.
template <class Op, class Layout>
MicroKernel<Op> pick_micro_kernel(int rows, int cols) {
  static constexpr MicroKernel<Op> kTable[4][kVecs] = {
      {&micro_kernel<Op, Layout, 1, 1>, &micro_kernel<Op, Layout, 1, 2>, &micro_kernel<Op, Layout, 1, 3>},
      {&micro_kernel<Op, Layout, 2, 1>, &micro_kernel<Op, Layout, 2, 2>, &micro_kernel<Op, Layout, 2, 3>},
      {&micro_kernel<Op, Layout, 4, 1>, &micro_kernel<Op, Layout, 4, 2>, &micro_kernel<Op, Layout, 4, 3>},
      {&micro_kernel<Op, Layout, kRows, 1>, &micro_kernel<Op, Layout, kRows, 2>, &micro_kernel<Op, Layout, kRows, 3>}};
  const int row_class = rows <= 1 ? 0 : rows <= 2 ? 1 : rows <= 4 ? 2 : 3;
  return kTable[row_class][(cols - 1) / kLanes];
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

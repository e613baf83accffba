// SPDX-License-Identifier: Apache-2.0
// A 128 x 128 tile of a product of bf16 or fp16 rows, in the registers of a block's eight warps, and what epilogues
// need: where a lane's values are, and reductions over the tile's rows and columns.
#pragma once

#include "cuda/engine/pipeline.h"

namespace vk::cuda {

inline constexpr int kBlockRows = 128, kBlockColumns = 128, kBlockThreads = 256;
inline constexpr int kBlockDepth = 64;  // bytes of depth per slice
inline constexpr int kBlockStages = 4;

// A warp's part, in tiles of 16 x 8.
inline constexpr int kPartRows = 64, kPartColumns = 32;
inline constexpr int kRowTiles = kPartRows / 16, kColumnTiles = kPartColumns / 8;
inline constexpr int kPartsDown = kBlockRows / kPartRows, kPartsAcross = kBlockColumns / kPartColumns;
static_assert(kPartsDown * kPartsAcross * kWarp == kBlockThreads);

using BlockLeft = OperandCopies<kBlockRows, kBlockDepth, kBlockThreads>;
using BlockRight = OperandCopies<kBlockColumns, kBlockDepth, kBlockThreads>;
inline constexpr int kBlockShared = kBlockStages * (BlockLeft::kBytes + BlockRight::kBytes);

__device__ __forceinline__ int part_row() { return warp_id() / kPartsAcross * kPartRows; }
__device__ __forceinline__ int part_column() { return warp_id() % kPartsAcross * kPartColumns; }

// Value `e` of tile (i, j): its row and column in the block's tile.
__device__ __forceinline__ int row_of(int i, int e) { return part_row() + 16 * i + lane_id() / 4 + e / 2 * 8; }
__device__ __forceinline__ int column_of(int j, int e) { return part_column() + 8 * j + lane_id() % 4 * 2 + e % 2; }

template <class Sum>
using BlockValues = Sum[kRowTiles][kColumnTiles][4];

// One slice: `step` is what multiplies a 16-row fragment with an 8-column one.
template <class Sum, class Step>
__device__ __forceinline__ void multiply_slice(BlockValues<Sum>& sums, SharedAddress left, SharedAddress right,
                                               Step step) {
  using Tile = BlockLeft::Tile;
#pragma unroll
  for (int block = 0; block < kBlockDepth / 32; ++block) {
    uint32_t a[kRowTiles][4], b[kColumnTiles / 2][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) load_matrices(a[i], rows_first<Tile>(left, part_row() + 16 * i, block));
#pragma unroll
    for (int j = 0; j < kColumnTiles / 2; ++j)
      load_matrices(b[j], columns_first<Tile>(right, part_column() + 16 * j, block));
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) step(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

// Rows [first_row, ...) of q times rows [first_col, ...) of k, both of row_bytes bytes; zeros outside. Shared memory is
// free afterwards.
template <class T>
__device__ __forceinline__ void product_of_rows(BlockValues<float>& sums, const void* q, int64_t first_row,
                                                int64_t rows, const void* k, int64_t first_col, int64_t cols,
                                                int64_t row_bytes) {
  const BlockLeft left(q, row_bytes, first_row, rows);
  const BlockRight right(k, row_bytes, first_col, cols);
  pipelined_product<kBlockStages>(shared_memory(), left, right, row_bytes, [&](SharedAddress a, SharedAddress b) {
    multiply_slice<float>(sums, a, b, [](float (&c)[4], const uint32_t (&x)[4], uint32_t y0, uint32_t y1) {
      multiply_add<T>(c, x, y0, y1);
    });
  });
}

struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Plus {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// Reduces `value(i, j, e)` over the columns of each row into parts[warp across][row], one partial result per warp.
template <class Op, class Value>
__device__ __forceinline__ void reduce_rows(float* parts, float start, Op op, Value value) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x = start;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) x = op(op(x, value(i, j, 2 * r)), value(i, j, 2 * r + 1));
      x = op(x, shuffle_xor(x, 1));
      x = op(x, shuffle_xor(x, 2));
      if (lane_id() % 4 == 0) parts[warp_id() % kPartsAcross * kBlockRows + row_of(i, 2 * r)] = x;
    }
  }
}

// The same over the rows of each column into parts[warp down][column].
template <class Op, class Value>
__device__ __forceinline__ void reduce_columns(float* parts, float start, Op op, Value value) {
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float x = start;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) x = op(op(x, value(i, j, e)), value(i, j, e + 2));
      x = op(x, shuffle_xor(x, 4));
      x = op(x, shuffle_xor(x, 8));
      x = op(x, shuffle_xor(x, 16));
      if (lane_id() < 4) parts[warp_id() / kPartsAcross * kBlockColumns + column_of(j, e)] = x;
    }
  }
}

// The partial results of one row (kPartsAcross of them) or column (kPartsDown) as one, in order.
template <int kParts, class Op>
__device__ __forceinline__ float combine_parts(const float* parts, int at, Op op) {
  float x = parts[at];
#pragma unroll
  for (int part = 1; part < kParts; ++part) x = op(x, parts[part * kBlockRows + at]);
  return x;
}

template <class Op>
__device__ __forceinline__ float reduce_warp(float x, Op op) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) x = op(x, shuffle_xor(x, step));
  return x;
}

}  // namespace vk::cuda

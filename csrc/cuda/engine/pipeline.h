// SPDX-License-Identifier: Apache-2.0
// The operands of a large product on their way through shared memory: rows of two matrices, a slice of their depth at a
// time, several slices under way while one is multiplied.
#pragma once

#include "cuda/engine/tile.h"

namespace vk::cuda {

// kRows rows of a matrix, kDepth bytes at a time, copied by kThreads threads.
template <int kRows, int kDepth, int kThreads>
struct OperandCopies {
  using Tile = Rows<kDepth>;
  static constexpr int kEach = kRows * Tile::kChunks / kThreads;  // copies of one thread per slice
  static_assert(kRows * Tile::kChunks % kThreads == 0 && kThreads % Tile::kChunks == 0);
  static constexpr int kBytes = kRows * kDepth;
  static constexpr int kRowStep = kThreads / Tile::kChunks;  // rows between two copies of a thread

  const char* from;
  int64_t row_bytes, first_row, rows;

  // Rows [first_row, first_row + kRows) of `rows` of row_bytes bytes each, a multiple of 16, one after the other.
  __device__ __forceinline__ OperandCopies(const void* matrix, int64_t row_bytes, int64_t first_row, int64_t rows)
      : from(static_cast<const char*>(matrix)), row_bytes(row_bytes), first_row(first_row), rows(rows) {}

  // Begins to copy bytes [depth, depth + kDepth) of every row; what lies outside the matrix becomes zero.
  __device__ __forceinline__ void copy(SharedAddress tile, int64_t depth) const {
    const int row = static_cast<int>(threadIdx.x) / Tile::kChunks,
              chunk = static_cast<int>(threadIdx.x) % Tile::kChunks;
    const int64_t column = depth + chunk * kChunkBytes;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t at = first_row + row + i * kRowStep;
      const bool valid = at < rows && column < row_bytes;
      copy_async(tile + Tile::offset(row + i * kRowStep, chunk), valid ? from + at * row_bytes + column : from, valid);
    }
  }
};

// Slices of two operands through kStages buffers of shared memory. `multiply(a, b)` gets the addresses of a slice.
template <int kStages, class Left, class Right, class Multiply>
__device__ __forceinline__ void pipelined_product(char* shared, const Left& left, const Right& right,
                                                  int64_t depth_bytes, Multiply multiply) {
  constexpr int kDepth = Left::Tile::kPitch, kStageBytes = Left::kBytes + Right::kBytes;
  const SharedAddress first = shared_address(shared);
  const int64_t slices = (depth_bytes + kDepth - 1) / kDepth;
  const auto begin = [&](int64_t slice) {
    if (slice < slices) {
      const SharedAddress stage = first + static_cast<int>(slice % kStages) * kStageBytes;
      left.copy(stage, slice * kDepth);
      right.copy(stage + Left::kBytes, slice * kDepth);
    }
    copy_commit();  // an empty group where nothing is left, so that counting groups counts slices
  };
  for (int slice = 0; slice < kStages - 1; ++slice) begin(slice);
  for (int64_t slice = 0; slice < slices; ++slice) {
    copy_wait<kStages - 2>();
    sync_block();  // the slice has arrived for everybody, and everybody is done with the one that the next copy
                   // replaces
    begin(slice + kStages - 1);
    const SharedAddress stage = first + static_cast<int>(slice % kStages) * kStageBytes;
    multiply(stage, stage + Left::kBytes);
  }
  copy_wait<0>();
  sync_block();  // the buffers are free
}

}  // namespace vk::cuda

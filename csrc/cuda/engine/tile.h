// SPDX-License-Identifier: Apache-2.0
// Tiles in shared memory: where their bytes lie, how they come from global memory, how a warp takes fragments of them.
#pragma once

#include "cuda/engine/device.h"

namespace vk::cuda {

inline constexpr int kChunkBytes = 16;  // what one copy moves and one lane of load_matrices reads

// Rows of kBytes bytes, one after the other, without padding. The 16-byte chunks of a row are exchanged so that the
// same chunk of 8 neighbouring rows lies in 8 different groups of banks: load_matrices then has no conflicts.
template <int kBytes>
struct Rows {
  static_assert(kBytes % (2 * kChunkBytes) == 0);
  static constexpr int kPitch = kBytes;
  static constexpr int kChunks = kBytes / kChunkBytes;
  // Chunks that exchange places: the largest power of two, at most 8, that divides a row.
  static constexpr int kExchanged = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;

  static __device__ __forceinline__ int exchange(int row) { return row / (8 / kExchanged) % kExchanged; }
  static __device__ __forceinline__ int offset(int row, int chunk) {
    return row * kPitch + (chunk ^ exchange(row)) * kChunkBytes;
  }
  // Chunk 2 block + half, for a `block` that the compiler knows: what depends on the lane is then mostly outside loops.
  static __device__ __forceinline__ int offset(int row, int block, int half) {
    const int place = exchange(row), pair = kExchanged == 2 ? 2 * block : 2 * block ^ (place & ~1);
    return row * kPitch + (half ^ (place & 1)) * kChunkBytes + pair * kChunkBytes;
  }
};

// Begins to copy rows [0, rows) of `row_bytes` bytes, a multiple of 16; what the tile has beyond them becomes zero, as
// do rows for which `visible(row)` is false. Thread `thread` of `threads` does its share.
template <class Tile, class Visible>
__device__ __forceinline__ void copy_rows(SharedAddress tile, int tile_rows, const char* from, int64_t stride_bytes,
                                          int rows, int row_bytes, int thread, int threads, Visible visible) {
#pragma unroll 1
  for (int i = thread; i < tile_rows * Tile::kChunks; i += threads) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    const bool valid = row < rows && chunk * kChunkBytes < row_bytes && visible(row);
    const char* source = valid ? from + row * stride_bytes + chunk * kChunkBytes : from;
    copy_async(tile + Tile::offset(row, chunk), source, valid);
  }
}

struct EveryRow {
  __device__ __forceinline__ bool operator()(int) const { return true; }
};

// A lane's place in the four 8 x 8 matrices of a 16 x 16 block: rows 0-7 then 8-15 of the left half, then of the right.
// As such a block is the left operand of a product (plain), or the right one read transposed.
template <class Tile>
__device__ __forceinline__ SharedAddress rows_first(SharedAddress tile, int first_row, int block) {
  const int lane = lane_id();
  return tile + Tile::offset(first_row + lane % 16, block, lane / 16);
}
// The other order: left then right half of rows 0-7, then of rows 8-15. The right operand of a product (plain): columns
// first_row to first_row + 7 in registers 0 and 1, the next 8 in 2 and 3.
template <class Tile>
__device__ __forceinline__ SharedAddress columns_first(SharedAddress tile, int first_row, int block) {
  const int lane = lane_id();
  return tile + Tile::offset(first_row + lane / 16 * 8 + lane % 8, block, lane / 8 % 2);
}

// c[0], c[1] += a b^T for 16 rows of `a`, whose kBlocks fragments are given, and rows first_row to first_row + 15 of
// `tile`.
template <class T, class Tile, int kBlocks>
__device__ __forceinline__ void product_16x16(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[kBlocks][4],
                                              SharedAddress tile, int first_row) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t b[4];
    load_matrices(b, columns_first<Tile>(tile, first_row, block));
    multiply_add<T>(c0, a[block], b[0], b[1]);
    multiply_add<T>(c1, a[block], b[2], b[3]);
  }
}

// The same with the fragments of `a` read from shared memory, where registers are short.
template <class T, class Tile, int kBlocks>
__device__ __forceinline__ void product_16x16(float (&c0)[4], float (&c1)[4], SharedAddress a_tile, int a_row,
                                              SharedAddress tile, int first_row) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t a[4], b[4];
    load_matrices(a, rows_first<Tile>(a_tile, a_row, block));
    load_matrices(b, columns_first<Tile>(tile, first_row, block));
    multiply_add<T>(c0, a, b[0], b[1]);
    multiply_add<T>(c1, a, b[2], b[3]);
  }
}

// c += a rows for a 16 x 16 fragment `a` and rows first_row to first_row + 15 of `tile`, 16 kBlocks wide.
template <class T, class Tile, int kBlocks>
__device__ __forceinline__ void product_16xwidth(float (&c)[2 * kBlocks][4], const uint32_t (&a)[4], SharedAddress tile,
                                                 int first_row) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t b[4];
    load_matrices_transposed(b, rows_first<Tile>(tile, first_row, block));
    multiply_add<T>(c[2 * block], a, b[0], b[1]);
    multiply_add<T>(c[2 * block + 1], a, b[2], b[3]);
  }
}

template <class Tile, int kBlocks>
__device__ __forceinline__ void load_fragments(uint32_t (&a)[kBlocks][4], SharedAddress tile, int first_row) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) load_matrices(a[block], rows_first<Tile>(tile, first_row, block));
}

// Two neighbouring 16 x 8 results as a left operand of the next product.
template <class T>
__device__ __forceinline__ void as_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// Writes a 16-row result of one warp, times a factor for each of the two rows that a lane holds, through `staging` (a
// tile of 16 rows that the warp owns) so that global memory sees whole 16-byte chunks.
template <class T, class Tile, int kColumns>
__device__ __forceinline__ void store_16_rows(char* staging, const float (&c)[kColumns][4], float factor0,
                                              float factor1, char* to, int64_t stride_bytes, int rows, int row_bytes) {
  const int lane = lane_id(), group = lane / 4, t = lane % 4;
  sync_warp();  // whoever read the tile has done so
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    store_4(staging + Tile::offset(group, column) + 4 * t, pack<T>(c[column][0] * factor0, c[column][1] * factor0));
    store_4(staging + Tile::offset(group + 8, column) + 4 * t, pack<T>(c[column][2] * factor1, c[column][3] * factor1));
  }
  sync_warp();
  for (int i = lane; i < 16 * Tile::kChunks; i += kWarp) {
    const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
    if (row < rows && chunk * kChunkBytes < row_bytes)
      store_16(to + row * stride_bytes + chunk * kChunkBytes, load_16(staging + Tile::offset(row, chunk)));
  }
  sync_warp();
}

// Sum of the products of two pairs.
template <class T>
__device__ __forceinline__ float dot(uint32_t a, uint32_t b) {
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return x.x * y.x + x.y * y.y;
}

// Over the four lanes that hold a row of a result.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

}  // namespace vk::cuda

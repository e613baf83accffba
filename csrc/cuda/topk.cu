// SPDX-License-Identifier: Apache-2.0
// The scan of a top-k search: a tile of dot products in registers, three instructions and a comparison for each.
#include "cuda/engine/block_tile.h"
#include "cuda/engine/launch.h"
#include "cuda/topk.h"

namespace vk::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) topk_scan_kernel(const __grid_constant__ TopkScanParams params) {
  // queries first: the blocks that run together share rows of the database, which is the larger matrix
  const int64_t query_blocks = (params.n + kBlockRows - 1) / kBlockRows;
  const int64_t row0 = blockIdx.x % query_blocks * kBlockRows, col0 = blockIdx.x / query_blocks * kBlockColumns;
  BlockValues<float> dots = {};
  product_of_rows<T>(dots, params.queries, row0, params.n, params.database, col0, params.m, params.row_bytes);

  float scale[kColumnTiles][2], shift[kColumnTiles][2], reach[kColumnTiles][2];
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int64_t col = col0 + column_of(j, e);
      const bool inside = col < params.m;
      scale[j][e] = inside ? params.scale[col] : 0.0f;
      shift[j][e] = inside ? params.shift[col] : 0.0f;
      reach[j][e] = inside ? params.reach[col] : 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = row0 + row_of(i, 2 * r);
      if (row >= params.n) continue;
      const float slack = params.slack[row], limit = params.limit[row];
      uint32_t kept = 0;  // bit 2 j + e; few rows have any
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float upper = fmaf(slack, reach[j][e], fmaf(dots[i][j][2 * r + e], scale[j][e], shift[j][e]));
          kept |= static_cast<uint32_t>(!(upper <= limit)) << (2 * j + e);
        }
      }
      for (; kept != 0; kept &= kept - 1) {
        const int bit = lowest_bit(kept);
        const int64_t col = col0 + column_of(bit / 2, bit % 2);
        if (col >= params.m) continue;
        const int32_t place = add_atomically(params.counts + row, 1);
        if (place < params.capacity) params.candidates[row * params.capacity + place] = static_cast<int32_t>(col);
      }
    }
  }
}

}  // namespace

cudaError_t launch_topk_scan(const TopkScanParams& params, cudaStream_t stream) {
  const LaunchShape shape{.blocks = ceil_div(params.n, kBlockRows) * ceil_div(params.m, kBlockColumns),
                          .threads = kBlockThreads,
                          .shared_bytes = kBlockShared};
  const auto kernel = params.bf16 ? topk_scan_kernel<Bf16> : topk_scan_kernel<F16>;
  return launch(kernel, shape, stream, params);
}

}  // namespace vk::cuda

// SPDX-License-Identifier: Apache-2.0
// Contrastive losses: a tile of logits per block, and the three epilogues that consume it.
#include "cuda/contrastive.h"
#include "cuda/engine/block_tile.h"
#include "cuda/engine/launch.h"

namespace vk::cuda {
namespace {

static_assert(kContrastiveTile == kBlockRows && kContrastiveTile == kBlockColumns);
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr int kWarps = kBlockThreads / kWarp;

// Where a tile's row and column maxima lie closer than this, one exponential serves rows and columns: what underflows
// then is below e^-28 of its row's sum.
constexpr float kSharedShift = 60.0f;

__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * kLog2E); }

__device__ __forceinline__ int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }

// One value per warp as one, in order.
template <class Op>
__device__ __forceinline__ float combine_warps(const float* parts, Op op) {
  float x = parts[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) x = op(x, parts[warp]);
  return x;
}

// One block's tile: its place in the chunk and in the problem, and its logits.
struct LogitTile {
  const ContrastiveParams& params;
  int64_t tile_row, tile_col, tiles_across;
  int64_t row0, col0;            // in the problem
  int rows_inside, cols_inside;  // of the tile
  float scale, bias;

  __device__ __forceinline__ explicit LogitTile(const ContrastiveParams& params)
      : params(params), tiles_across((params.cols + kBlockColumns - 1) / kBlockColumns) {
    tile_row = blockIdx.x / tiles_across;
    tile_col = blockIdx.x % tiles_across;
    row0 = params.first_row + tile_row * kBlockRows;
    col0 = params.first_col + tile_col * kBlockColumns;
    rows_inside = static_cast<int>(fewer(params.first_row + params.rows - row0, kBlockRows));
    cols_inside = static_cast<int>(fewer(params.first_col + params.cols - col0, kBlockColumns));
    scale = *params.scale;
    bias = params.bias ? *params.bias : 0.0f;
  }

  __device__ __forceinline__ bool inside(int row, int col) const { return row < rows_inside && col < cols_inside; }

  // What is added to a column's scaled dot products.
  __device__ __forceinline__ float column_bias(int col) const {
    return params.key_bias && col < cols_inside ? params.key_bias[col0 + col] + bias : bias;
  }
  // Column of a row's positive within the tile, -1 where the tile does not have it.
  __device__ __forceinline__ int positive(int row) const {
    if (row >= rows_inside) return -1;
    const int64_t column = (params.positives ? params.positives[row0 + row] : row0 + row) - col0;
    return column >= 0 && column < cols_inside ? static_cast<int>(column) : -1;
  }
};

// What epilogues know of a tile's rows and columns, in shared memory: registers are for its values.
struct Lines {
  int positive[kBlockRows];
  float col_bias[kBlockColumns];
  float row_top[kBlockRows], row_log[kBlockRows], row_weight[kBlockRows];
  float col_top[kBlockColumns], col_log[kBlockColumns], col_weight[kBlockColumns];
};

// The thread's row (threads 0 to 127) or column (128 to 255).
__device__ __forceinline__ int line_number() { return static_cast<int>(threadIdx.x) % kBlockRows; }
__device__ __forceinline__ bool line_is_row() { return threadIdx.x < kBlockRows; }

// Statistics.

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    contrastive_statistics_kernel(const __grid_constant__ ContrastiveParams params) {
  const LogitTile tile(params);
  BlockValues<float> z = {};
  product_of_rows<T>(z, params.q, tile.row0, tile.row0 + tile.rows_inside, params.k, tile.col0,
                     tile.col0 + tile.cols_inside, params.row_bytes);

  auto& lines = *reinterpret_cast<Lines*>(shared_memory());
  float* const row_parts = reinterpret_cast<float*>(shared_memory() + sizeof(Lines));  // [kPartsAcross, 128]
  float* const col_parts = row_parts + kPartsAcross * kBlockRows;                      // [kPartsDown, 128]
  float* const extremes = col_parts + kPartsDown * kBlockColumns;                      // [2, kWarps]
  const int at = line_number();
  const bool by_row = line_is_row();
  const bool counts = by_row ? at < tile.rows_inside : at < tile.cols_inside;
  if (by_row) {
    lines.positive[at] = tile.positive(at);
  } else {
    lines.col_bias[at] = tile.column_bias(at);
  }
  sync_block();

#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(i, 2 * r), positive = lines.positive[row];
      float target = 0.0f;
      bool mine = false;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = column_of(j, e);
          float& x = z[i][j][2 * r + e];
          x = tile.inside(row, col) ? x * tile.scale + lines.col_bias[col] : -kInfinity;
          if (col == positive) target = x, mine = true;
        }
      }
      if (mine) {
        params.row_target[tile.row0 + row] = target;
        if (params.columns) params.col_target[tile.col0 + positive] = target;
      }
    }
  }
  const auto logit = [&](int i, int j, int e) { return z[i][j][e]; };

  reduce_rows(row_parts, -kInfinity, Larger(), logit);
  if (params.columns) reduce_columns(col_parts, -kInfinity, Larger(), logit);
  sync_block();
  float top = -kInfinity;
  if (by_row) {
    top = combine_parts<kPartsAcross>(row_parts, at, Larger());
    lines.row_top[at] = top == -kInfinity ? 0.0f : top;  // shifts: no logit of such a row counts
  } else if (params.columns) {
    top = combine_parts<kPartsDown>(col_parts, at, Larger());
    lines.col_top[at] = top == -kInfinity ? 0.0f : top;
  }
  const float highest = reduce_warp(top, Larger());
  const float depth = reduce_warp(counts && (by_row || params.columns) ? -top : -kInfinity, Larger());
  if (lane_id() == 0) extremes[warp_id()] = highest, extremes[kWarps + warp_id()] = depth;
  sync_block();
  const float tile_top = combine_warps(extremes, Larger());
  const float spread = tile_top + combine_warps(extremes + kWarps, Larger());  // highest less lowest

  const int64_t rows_slot = tile.tiles_across * params.rows;
  const int64_t cols_slot = (params.rows + kBlockRows - 1) / kBlockRows * params.cols;
  float* const out = by_row ? params.row_parts + tile.tile_col * params.rows + tile.tile_row * kBlockRows + at
                            : params.col_parts + tile.tile_row * params.cols + tile.tile_col * kBlockColumns + at;
  const int64_t slot = by_row ? rows_slot : cols_slot;
  const bool writes = counts && (by_row || params.columns);
  const auto finished = [&] {
    return by_row ? combine_parts<kPartsAcross>(row_parts, at, Plus())
                  : combine_parts<kPartsDown>(col_parts, at, Plus());
  };
  if (params.totals) {
    const auto known = [&](int i, int j, int e) {
      return tile.inside(row_of(i, e), column_of(j, e)) ? z[i][j][e] : 0.0f;
    };
    reduce_rows(row_parts, 0.0f, Plus(), known);
    if (params.columns) reduce_columns(col_parts, 0.0f, Plus(), known);
    sync_block();
    if (writes) out[2 * slot] = finished();
    sync_block();
  }

  const bool shared = params.columns && spread < kSharedShift;  // false for NaN, and where a row has no logit
  if (shared) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) z[i][j][e] = exp_fast(z[i][j][e] - tile_top);
    reduce_rows(row_parts, 0.0f, Plus(), logit);
    reduce_columns(col_parts, 0.0f, Plus(), logit);
  } else {
    reduce_rows(row_parts, 0.0f, Plus(),
                [&](int i, int j, int e) { return exp_fast(z[i][j][e] - lines.row_top[row_of(i, e)]); });
    if (params.columns)
      reduce_columns(col_parts, 0.0f, Plus(),
                     [&](int i, int j, int e) { return exp_fast(z[i][j][e] - lines.col_top[column_of(j, e)]); });
  }
  sync_block();
  if (!writes) return;
  // A maximum's own term is exactly 1: numerator and denominator are the same expression.
  const float factor = shared ? 1.0f / exp_fast((by_row ? lines.row_top[at] : lines.col_top[at]) - tile_top) : 1.0f;
  out[0] = top;
  out[slot] = finished() * factor;
}

// Gradients of logits.

// d loss / d z of the softmax objective.
struct SoftmaxGradient {
  __device__ __forceinline__ static void load(const LogitTile& tile, Lines& lines) {
    const ContrastiveParams& p = tile.params;
    const int at = line_number();
    if (line_is_row()) {
      const bool inside = at < tile.rows_inside;
      lines.row_top[at] = inside ? p.row_lse[tile.row0 + at] : 0.0f;
      lines.row_log[at] = inside ? p.row_lse[p.n + tile.row0 + at] : 0.0f;
      lines.row_weight[at] = inside && p.row_weight ? p.row_weight[tile.row0 + at] : 1.0f;
    } else if (p.columns) {
      const bool inside = at < tile.cols_inside;
      lines.col_top[at] = inside ? p.col_lse[tile.col0 + at] : 0.0f;
      lines.col_log[at] = inside ? p.col_lse[p.m + tile.col0 + at] : 0.0f;
      lines.col_weight[at] = inside && p.col_weight ? p.col_weight[tile.col0 + at] : 1.0f;
    }
  }

  __device__ __forceinline__ static float of(const ContrastiveParams& p, const Lines& lines, float z, int row, int col,
                                             bool positive, float*) {
    const float hard = positive ? p.hard : 0.0f;
    const float weight = lines.row_weight[row];
    const float by_row = exp_fast(z - lines.row_top[row] - lines.row_log[row]) - p.row_smoothing - hard;
    float gradient = weight == 0.0f ? 0.0f : by_row * weight;  // a row that does not count may be NaN
    if (p.columns)
      gradient +=
          (exp_fast(z - lines.col_top[col] - lines.col_log[col]) - p.col_smoothing - hard) * lines.col_weight[col];
    return gradient;
  }
};

// The same of -log sigmoid(y z), and the loss itself.
struct SigmoidGradient {
  __device__ __forceinline__ static void load(const LogitTile&, Lines&) {}

  __device__ __forceinline__ static float of(const ContrastiveParams&, const Lines&, float z, int, int, bool positive,
                                             float* loss) {
    const float against = positive ? -z : z;
    // softplus(a) = max(a, 0) + log1p(e^-|a|), whose slope is sigmoid(a)
    const float small = expf(-fabsf(against));
    *loss += fmaxf(against, 0.0f) + log1pf(small);
    const float slope = (against >= 0.0f ? 1.0f : small) / (1.0f + small);
    return positive ? -slope : slope;
  }
};

template <class T, class Gradient>
__global__ void __launch_bounds__(kBlockThreads, 2)
    contrastive_gradients_kernel(const __grid_constant__ ContrastiveParams params) {
  const LogitTile tile(params);
  BlockValues<float> g = {};
  product_of_rows<T>(g, params.q, tile.row0, tile.row0 + tile.rows_inside, params.k, tile.col0,
                     tile.col0 + tile.cols_inside, params.row_bytes);
  auto& lines = *reinterpret_cast<Lines*>(shared_memory());
  if (line_is_row()) {
    lines.positive[line_number()] = tile.positive(line_number());
  } else {
    lines.col_bias[line_number()] = tile.column_bias(line_number());
  }
  Gradient::load(tile, lines);
  sync_block();

  float by_dot = 0.0f, sum = 0.0f, loss = 0.0f;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(i, 2 * r), positive = lines.positive[row];
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = column_of(j, e);
          float& value = g[i][j][2 * r + e];
          const float dot = value;
          value = 0.0f;
          if (tile.inside(row, col)) {
            value =
                Gradient::of(params, lines, dot * tile.scale + lines.col_bias[col], row, col, col == positive, &loss);
            by_dot += value * dot;
            sum += value;
          }
          pair[e] = value;
        }
        const int64_t at = tile.tile_col * kBlockColumns + column_of(j, 0);
        if (params.tile && row < tile.rows_inside && at < params.tile_stride)
          store_4(static_cast<T*>(params.tile) + (tile.tile_row * kBlockRows + row) * params.tile_stride + at,
                  pack<T>(pair[0], pair[1]));
      }
    }
  }

  float* const parts = reinterpret_cast<float*>(shared_memory() + sizeof(Lines));  // [kPartsDown, 128]
  float* const numbers = parts + kPartsDown * kBlockColumns;                       // [3, kWarps]
  by_dot = reduce_warp(by_dot, Plus());
  sum = reduce_warp(sum, Plus());
  loss = reduce_warp(loss, Plus());
  if (lane_id() == 0) {
    numbers[warp_id()] = by_dot;
    numbers[kWarps + warp_id()] = sum;
    numbers[2 * kWarps + warp_id()] = loss;
  }
  if (params.key_parts) reduce_columns(parts, 0.0f, Plus(), [&](int i, int j, int e) { return g[i][j][e]; });
  sync_block();
  const int at = static_cast<int>(threadIdx.x);
  if (at < 3) params.numbers[at * gridDim.x + blockIdx.x] = combine_warps(numbers + at * kWarps, Plus());
  if (params.key_parts && at < tile.cols_inside)
    params.key_parts[tile.tile_row * params.cols + tile.tile_col * kBlockColumns + at] =
        combine_parts<kPartsDown>(parts, at, Plus());
}

LaunchShape shape_of(const ContrastiveParams& params) {
  return {.blocks = ceil_div(params.rows, kBlockRows) * ceil_div(params.cols, kBlockColumns),
          .threads = kBlockThreads,
          .shared_bytes = kBlockShared};
}

}  // namespace

cudaError_t launch_contrastive_statistics(const ContrastiveParams& params, cudaStream_t stream) {
  const auto kernel = params.bf16 ? contrastive_statistics_kernel<Bf16> : contrastive_statistics_kernel<F16>;
  return launch(kernel, shape_of(params), stream, params);
}

cudaError_t launch_contrastive_gradients(const ContrastiveParams& params, cudaStream_t stream) {
  const auto kernel = params.bf16 ? contrastive_gradients_kernel<Bf16, SoftmaxGradient>
                                  : contrastive_gradients_kernel<F16, SoftmaxGradient>;
  return launch(kernel, shape_of(params), stream, params);
}

cudaError_t launch_contrastive_sigmoid(const ContrastiveParams& params, cudaStream_t stream) {
  const auto kernel = params.bf16 ? contrastive_gradients_kernel<Bf16, SigmoidGradient>
                                  : contrastive_gradients_kernel<F16, SigmoidGradient>;
  return launch(kernel, shape_of(params), stream, params);
}

}  // namespace vk::cuda

// SPDX-License-Identifier: Apache-2.0
// Quantization of rows, and the product of int8 rows with its epilogue.
#include "cuda/engine/block_tile.h"
#include "cuda/engine/launch.h"
#include "cuda/engine/values.h"
#include "cuda/quantized.h"

namespace vk::cuda {
namespace {

constexpr float kInt8Limit = 127.0f;
constexpr int kQuantizeWarps = 4;  // rows of a block
constexpr float kInfinity = __builtin_huge_valf();

__device__ __forceinline__ bool finite(float x) { return fabsf(x) < kInfinity; }

// The larger one; NaN where there is one.
__device__ __forceinline__ float max_or_nan(float a, float b) { return b > a || b != b ? b : a; }

// One warp to a row, which it reads twice: the second time from the cache.
__global__ void __launch_bounds__(kQuantizeWarps* kWarp)
    quantize_rows_kernel(const __grid_constant__ QuantizeParams params, bool vectors) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kQuantizeWarps + warp_id();
  if (row >= params.m) return;
  const int lane = lane_id();
  const int64_t start = row * params.row_stride, whole = vectors ? params.k / kEight : 0;

  float largest = 0.0f, values[kEight];
  for (int64_t i = lane; i < whole; i += kWarp) {
    load_8(values, params.x, params.dtype, start + i * kEight);
#pragma unroll
    for (int j = 0; j < kEight; ++j) largest = max_or_nan(largest, fabsf(values[j]));
  }
  for (int64_t i = whole * kEight + lane; i < params.k; i += kWarp)
    largest = max_or_nan(largest, fabsf(load_value(params.x, params.dtype, start + i)));
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) largest = max_or_nan(largest, shuffle_xor(largest, step));

  float scale = largest / kInt8Limit;
  if (params.input_scale) {
    scale = *params.input_scale;
    // a NaN of one row cannot show in a scale that all rows share
    if (largest != largest || !(scale > 0.0f)) scale = kInfinity;
  }
  if (!finite(scale)) scale = __uint_as_float(0x7fffffff);
  if (lane == 0) params.scale[row] = scale;

  const auto code = [&](float x) {
    if (!(scale > 0.0f)) return 0;
    return __float2int_rn(fminf(fmaxf(x / scale, -kInt8Limit), kInt8Limit));
  };
  int8_t* const codes = params.codes + row * params.code_stride;
  for (int64_t i = lane; i < whole; i += kWarp) {
    load_8(values, params.x, params.dtype, start + i * kEight);
    uint32_t words[2] = {};
#pragma unroll
    for (int j = 0; j < kEight; ++j) words[j / 4] |= (static_cast<uint32_t>(code(values[j])) & 0xff) << (j % 4 * 8);
    store_4(codes + i * kEight, words[0]);
    store_4(codes + i * kEight + 4, words[1]);
  }
  for (int64_t i = whole * kEight + lane; i < params.code_stride; i += kWarp)
    codes[i] = static_cast<int8_t>(i < params.k ? code(load_value(params.x, params.dtype, start + i)) : 0);
}

__device__ __forceinline__ float activate(LinearActivation activation, float x) {
  constexpr float kHalfRoot = 0.70710678118654752f, kRootTwoOverPi = 0.79788456080286536f;
  switch (activation) {
    case LinearActivation::kGelu:
      return 0.5f * x * erfcf(-x * kHalfRoot);
    case LinearActivation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(kRootTwoOverPi * (x + 0.044715f * x * x * x)));
    case LinearActivation::kQuickGelu:
      return x / (1.0f + expf(-1.702f * x));
    case LinearActivation::kSilu:
      return x / (1.0f + expf(-x));
    case LinearActivation::kRelu:
      return x > 0.0f || x != x ? x : 0.0f;
    default:
      return x;
  }
}

constexpr int kStagePitch = kPartColumns + 4;  // floats; 4 more, so that eight rows lie in different banks
constexpr int kStageFloats = 16 * kStagePitch;
static_assert(kBlockThreads / kWarp * kStageFloats * static_cast<int>(sizeof(float)) <= kBlockShared);

// The end of 16 rows: `staged` has their products with both scales.
__device__ __forceinline__ void finish_rows(const QuantizedLinearParams& params, bool vectors, const float* staged,
                                            int64_t first_row, int64_t first_column) {
  constexpr int kParts = kPartColumns / kEight;
  for (int i = lane_id(); i < 16 * kParts; i += kWarp) {
    const int64_t row = first_row + i / kParts, column = first_column + i % kParts * kEight;
    if (row >= params.m || column >= params.n) continue;
    const float* products = staged + i / kParts * kStagePitch + i % kParts * kEight;
    const int count = params.n - column < kEight ? static_cast<int>(params.n - column) : kEight;
    float y[kEight];
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      y[j] = products[j];
      if (params.bias && j < count) y[j] += load_value(params.bias, params.bias_dtype, column + j);
      y[j] = activate(params.activation, y[j]);
    }
    const int64_t at = row * params.n + column, residual_at = row * params.residual_stride + column;
    if (vectors) {
      if (params.residual) {
        float added[kEight];
        load_8(added, params.residual, params.residual_dtype, residual_at);
#pragma unroll
        for (int j = 0; j < kEight; ++j) y[j] += added[j];
      }
      store_8(params.out, params.out_dtype, at, y);
    } else {
#pragma unroll
      for (int j = 0; j < kEight; ++j) {
        if (j >= count) continue;
        if (params.residual) y[j] += load_value(params.residual, params.residual_dtype, residual_at + j);
        store_value(params.out, params.out_dtype, at + j, y[j]);
      }
    }
  }
}

__global__ void __launch_bounds__(kBlockThreads, 2)
    quantized_linear_kernel(const __grid_constant__ QuantizedLinearParams params,
                            const __grid_constant__ LinearPlan plan) {
  // columns first: the blocks that run together share rows of x, and the weight stays in the cache
  const int64_t block_row = blockIdx.x / plan.column_blocks * kBlockRows;
  const int64_t block_column = blockIdx.x % plan.column_blocks * kBlockColumns;
  const BlockLeft left(params.codes, params.k_bytes, block_row, params.m);
  const BlockRight right(params.weight, params.k_bytes, block_column, params.n);

  BlockValues<int32_t> sums = {};
  pipelined_product<kBlockStages>(
      shared_memory(), left, right, params.k_bytes, [&](SharedAddress a_tile, SharedAddress b_tile) {
        multiply_slice<int32_t>(
            sums, a_tile, b_tile,
            [](int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply_add(c, a, b0, b1); });
      });

  const int group = lane_id() / 4, t = lane_id() % 4;
  float* const staged = reinterpret_cast<float*>(shared_memory()) + warp_id() * kStageFloats;
  float column_scale[kColumnTiles][2];
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    const int64_t column = block_column + part_column() + 8 * j + 2 * t;
    column_scale[j][0] = column < params.n ? params.weight_scale[column] : 0.0f;
    column_scale[j][1] = column + 1 < params.n ? params.weight_scale[column + 1] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    const int64_t row = block_row + part_row() + 16 * i;
    const float scale[2] = {row + group < params.m ? params.row_scale[row + group] : 0.0f,
                            row + group + 8 < params.m ? params.row_scale[row + group + 8] : 0.0f};
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        staged[(group + e / 2 * 8) * kStagePitch + 8 * j + 2 * t + e % 2] =
            static_cast<float>(sums[i][j][e]) * scale[e / 2] * column_scale[j][e % 2];
    sync_warp();
    finish_rows(params, plan.vectors, staged, row, block_column + part_column());
    sync_warp();
  }
}

bool in_vectors(const void* data, int64_t row_stride, Dtype dtype) {
  const int64_t bytes = dtype == Dtype::kF32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0 && row_stride * bytes % kChunkBytes == 0;
}

}  // namespace

LinearPlan quantized_linear_plan(const QuantizedLinearParams& params) {
  LinearPlan plan;
  plan.row_blocks = ceil_div(params.m, kBlockRows);
  plan.column_blocks = ceil_div(params.n, kBlockColumns);
  plan.blocks = plan.row_blocks * plan.column_blocks;
  plan.shared_bytes = kBlockShared;
  plan.vectors = params.n % kEight == 0 && in_vectors(params.out, params.n, params.out_dtype) &&
                 (!params.residual || in_vectors(params.residual, params.residual_stride, params.residual_dtype));
  return plan;
}

cudaError_t launch_quantize_rows(const QuantizeParams& params, cudaStream_t stream) {
  const LaunchShape shape{.blocks = ceil_div(params.m, kQuantizeWarps), .threads = kQuantizeWarps * kWarp};
  return launch(quantize_rows_kernel, shape, stream, params, in_vectors(params.x, params.row_stride, params.dtype));
}

cudaError_t launch_quantized_linear(const QuantizedLinearParams& params, cudaStream_t stream) {
  const LinearPlan plan = quantized_linear_plan(params);
  const LaunchShape shape{.blocks = plan.blocks, .threads = kBlockThreads, .shared_bytes = plan.shared_bytes};
  return launch(quantized_linear_kernel, shape, stream, params, plan);
}

}  // namespace vk::cuda

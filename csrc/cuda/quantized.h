// SPDX-License-Identifier: Apache-2.0
// Linear layers with int8 weights and activations on the GPU: what a call brings, and the launchers.
//
// y = activation(scale_x[m] scale[n] sum_k x_q[m, k] w_q[n, k] + bias[n]) + residual. Rows of x are quantized by a
// kernel of their own, which reads them once; the product multiplies int8 tiles, sums in int32, and finishes y in
// registers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/tensor_view.h"

namespace vk::cuda {

// Rows [m, k] of kF32, kBF16 or kF16 with dense columns.
struct QuantizeParams {
  const void* x = nullptr;
  Dtype dtype = Dtype::kF32;
  int64_t m = 0, k = 0, row_stride = 0;
  const float* input_scale = nullptr;  // on the device; null: each row's own maximum / 127
  int8_t* codes = nullptr;             // [m, code_stride], zeros from k on
  int64_t code_stride = 0;             // k rounded up to whole 16-byte chunks
  float* scale = nullptr;              // [m]
};

enum class LinearActivation : int32_t { kNone = 0, kGelu = 1, kGeluTanh = 2, kQuickGelu = 3, kSilu = 4, kRelu = 5 };

struct QuantizedLinearParams {
  int64_t m = 0, n = 0, k_bytes = 0;    // k_bytes: a multiple of 16, zeros past the last input
  const int8_t* codes = nullptr;        // [m, k_bytes]
  const float* row_scale = nullptr;     // [m]
  const int8_t* weight = nullptr;       // [n, k_bytes]
  const float* weight_scale = nullptr;  // [n]
  const void* bias = nullptr;           // [n], dense
  Dtype bias_dtype = Dtype::kF32;
  LinearActivation activation = LinearActivation::kNone;
  const void* residual = nullptr;  // [m, n] with dense columns
  Dtype residual_dtype = Dtype::kF32;
  int64_t residual_stride = 0;
  void* out = nullptr;  // [m, n], contiguous
  Dtype out_dtype = Dtype::kF32;
};

struct LinearPlan {
  int64_t row_blocks = 0, column_blocks = 0, blocks = 0, shared_bytes = 0;
  bool vectors = false;  // out and residual are read and written eight values at a time
};
LinearPlan quantized_linear_plan(const QuantizedLinearParams& params);

cudaError_t launch_quantize_rows(const QuantizeParams& params, cudaStream_t stream);
cudaError_t launch_quantized_linear(const QuantizedLinearParams& params, cudaStream_t stream);

}  // namespace vk::cuda

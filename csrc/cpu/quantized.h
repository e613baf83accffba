// SPDX-License-Identifier: Apache-2.0
// Linear layers on the CPU, quantized and float: the problem as the kernels see it, and the entry points of the host.
//
// y = activation(x w^T + bias) + residual. The right operand is packed once per weight (quantized schemes) or once per
// call (float weights); rows of x are quantized or converted while they are packed, block by block.
#pragma once

#include <cstdint>

#include "cpu/matrix.h"

namespace vk::cpu {

enum class Activation : int32_t { kNone = 0, kGelu = 1, kGeluTanh = 2, kQuickGelu = 3, kSilu = 4, kRelu = 5 };

// How the right operand is stored, and with it how the product is formed.
enum class WeightKind : int32_t {
  kInt8Dot = 0,  // int8 times int8 (w8a8), int32 sums
  kInt8 = 1,     // int8 codes times float activations (w8a16)
  kInt4 = 2,     // 4-bit codes with scales and zero points by group, times float activations (w4a16)
  kBF16 = 3,     // bf16 times bf16, float32 sums
  kF32 = 4,
};
inline constexpr int kWeightKinds = 5;

// Rows of an activation tensor [outer, inner, width] seen as [outer * inner, width]: strides in elements.
struct Rows {
  const void* data = nullptr;
  Dtype dtype = Dtype::kF32;  // kF32 or kBF16
  int64_t inner = 1;          // rows per outer step
  int64_t outer_stride = 0, row_stride = 0, col_stride = 1;
};

// A weight's canonical tensors [N, K]: what `pack_weight` reads.
struct CanonicalWeight {
  const void* codes = nullptr;  // int8, bf16 or float32 [N, K]; uint8 [N, K / 2], low nibble first
  Dtype dtype = Dtype::kI8;
  int64_t row_stride = 0, col_stride = 1;
  const float* scale = nullptr;         // [N], or [N, K / group]; contiguous
  const uint8_t* zero_point = nullptr;  // [N, K / group]; contiguous
  int64_t n = 0, k = 0, group = 0;
};

struct LinearProblem {
  int64_t m = 0, n = 0, k = 0, group = 0;
  WeightKind kind = WeightKind::kF32;
  Rows x;                        // [m, k]
  const char* packed = nullptr;  // the right operand, laid out by the kernels of the level in use
  bool half_operands = false;    // kInt8: the activations are bf16, so products may be
  bool static_scale = false;     // kInt8Dot: input_scale for all rows, instead of each row's own maximum / 127
  float input_scale = 0.0f;
  const float* bias = nullptr;  // [n] and zeros to a whole register; null: none
  Activation activation = Activation::kNone;
  Rows residual;  // [m, n]; data null: none
  void* out = nullptr;
  Dtype out_dtype = Dtype::kF32;
  int64_t out_stride = 0;      // elements between rows
  float* row_scale = nullptr;  // kInt8Dot: [m], written with the left operand
};

inline constexpr int64_t kRowBlock = 128;  // rows whose left operand is prepared together; a multiple of every kRows

struct QuantizedKernels {
  int64_t rows, cols, lanes;  // block of the micro-kernel; lanes of a register

  // Bytes of a packed right operand.
  int64_t (*packed_bytes)(WeightKind kind, int64_t n, int64_t k, int64_t group);
  // Columns [col0, col1) (panel borders) of the packed operand.
  void (*pack_weight)(WeightKind kind, const CanonicalWeight& weight, int64_t col0, int64_t col1, char* packed);

  // Units of depth of the left operand.
  int64_t (*depth_units)(const LinearProblem&);
  // Left operand of rows [row0, row1): depth_units times round_up(rows, kRows) units. row0 is a panel border.
  void (*prepare)(const LinearProblem&, int64_t row0, int64_t row1, uint32_t* left);
  // Rows [row0, row1) (at most kRowBlock) times columns [col0, col1) (panel borders), and their epilogue.
  void (*product)(const LinearProblem&, int64_t row0, int64_t row1, int64_t col0, int64_t col1, const uint32_t* left,
                  char* scratch);
  int64_t (*product_scratch)(const LinearProblem&);

  // kInt4, few rows: activations as 24-bit integers in three digits, so that the dot instruction reads the nibbles as
  // they stream in. null where there is no such instruction.
  int64_t few_rows;  // at most so many
  int64_t (*few_bytes)(const LinearProblem&);
  bool (*few_prepare)(const LinearProblem&, char* digits);  // false: not representable, use `product`
  void (*few_product)(const LinearProblem&, int64_t col0, int64_t col1, const char* digits);

  // Backward. kBF16 and kF32: columns [col0, col1) of a right operand whose depth runs over the rows of a matrix.
  void (*pack_over_rows)(WeightKind kind, const Matrix& m, int64_t depth, int64_t cols, int64_t col0, int64_t col1,
                         char* packed);
  // Rows of the pre-activation's gradient, contiguous [m, n]: grad times the activation's slope at `pre`.
  void (*slopes)(Activation activation, const Rows& grad, int64_t n, int64_t row0, int64_t row1, const float* pre,
                 void* out, Dtype dtype);
  void (*column_sums)(const Rows& g, int64_t m, int64_t n, int64_t col0, int64_t col1, void* out, Dtype dtype);
  void (*dequantize_rows)(WeightKind kind, const CanonicalWeight& weight, int64_t row0, int64_t row1, float* out);
};

// One call of an op.
struct LinearCall {
  LinearProblem problem;
  const void* bias = nullptr;  // [n] as the caller has it
  Dtype bias_dtype = Dtype::kF32;
  int64_t bias_stride = 1;
  CanonicalWeight weight;  // codes set: packed in this call (kF32, kBF16)
  char* workspace = nullptr;
};

// Gradients of a call. The pre-activation is formed again where the activation's slope needs it.
struct LinearGradients {
  LinearCall forward;      // its epilogue's activation; out, residual and workspace are not used
  CanonicalWeight weight;  // float or codes
  Rows grad_out;           // [m, n]
  bool half = false;       // products in bf16
  void *grad_x = nullptr, *grad_weight = nullptr, *grad_bias = nullptr;  // contiguous; null: not wanted
  Dtype grad_x_dtype = Dtype::kF32, grad_weight_dtype = Dtype::kF32, grad_bias_dtype = Dtype::kF32;
  char* workspace = nullptr;
};

int64_t packed_weight_bytes(WeightKind kind, int64_t n, int64_t k, int64_t group);
void pack_weight(WeightKind kind, const CanonicalWeight& weight, char* packed, int threads);

int64_t linear_workspace(const LinearCall& call, int threads);
void linear_forward(LinearCall& call, int threads);

int64_t linear_backward_workspace(const LinearGradients& call, int threads);
void linear_backward(LinearGradients& call, int threads);

}  // namespace vk::cpu

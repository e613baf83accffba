// SPDX-License-Identifier: Apache-2.0
// Contrastive losses on the GPU: a chunk of one problem as the kernels see it, and the launchers.
//
// logits z_ij = scale <q_i, k_j> + bias + key_bias_j exist as tiles in registers. The forward pass leaves each tile's
// row and column statistics, both from one product; the host adds them up in order. The gradient pass leaves a chunk of
// d loss / d z in bf16 or fp16, which library products turn into gradients of the features.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vk::cuda {

struct ContrastiveParams {
  const void *q = nullptr, *k = nullptr;  // [n, d], [m, d]; rows one after the other
  int64_t n = 0, m = 0, row_bytes = 0;    // row_bytes: a multiple of 16, zeros past the last of d
  bool bf16 = false;
  int64_t first_row = 0, rows = 0, first_col = 0, cols = 0;  // the chunk

  const float* scale = nullptr;
  const float* bias = nullptr;         // one number, or null
  const float* key_bias = nullptr;     // [m]; -inf leaves a key out
  const int64_t* positives = nullptr;  // [n], -1 for none; null: row i's positive is key i
  bool columns = false;                // columns have losses as well

  // Statistics: maximum, shifted sum of exponentials, and where `totals` is set sum of the logits.
  bool totals = false;
  float* row_parts = nullptr;                          // [2 or 3, tiles of columns, rows]
  float* col_parts = nullptr;                          // [2 or 3, tiles of rows, cols]
  float *row_target = nullptr, *col_target = nullptr;  // [n], [m]: the positive's logit, where the chunk has it

  // Gradients.
  const float *row_lse = nullptr, *col_lse = nullptr;        // [2, n], [2, m]: maximum, logarithm of the shifted sum
  const float *row_weight = nullptr, *col_weight = nullptr;  // [n], [m]; null: 1
  float row_smoothing = 0.0f, col_smoothing = 0.0f, hard = 1.0f;  // targets: hard at the positive, and this everywhere
  void* tile = nullptr;        // [rows, tile_stride], null: not wanted (sigmoid's loss alone)
  int64_t tile_stride = 0;     // even, at least cols
  float* numbers = nullptr;    // [3, tiles]: sums of gradient times dot product, of gradients, of losses (sigmoid)
  float* key_parts = nullptr;  // [tiles of rows, cols]: sums of gradients, or null
};

inline constexpr int kContrastiveTile = 128;  // rows and columns of a block's tile

cudaError_t launch_contrastive_statistics(const ContrastiveParams& params, cudaStream_t stream);
cudaError_t launch_contrastive_gradients(const ContrastiveParams& params, cudaStream_t stream);
// -log sigmoid(y z) with y = 1 at a row's positive and -1 elsewhere: losses and gradients of each logit on its own.
cudaError_t launch_contrastive_sigmoid(const ContrastiveParams& params, cudaStream_t stream);

}  // namespace vk::cuda

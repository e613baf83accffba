// SPDX-License-Identifier: Apache-2.0
// Attention on the GPU: what a call brings, how it is cut into blocks, and the launchers.
//
// out = dropout(softmax(scale q k^T + bias)) v, heads after length, bf16 or fp16. Short sequences are bound by memory,
// so a block takes a whole head: its keys and values stay in shared memory, and every tensor is read and written once.
// Where they do not fit, keys stream through two buffers past blocks of queries (backward: queries past blocks of keys,
// too).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vk::cuda {

// [batch, length, heads, width]; strides in elements, that of the width is 1. Rows begin at multiples of 16 bytes.
struct AttentionTensor {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;
};

struct AttentionParams {
  int64_t batch = 0, heads = 0, key_heads = 0, lq = 0, lk = 0, d = 0;
  bool bf16 = false, causal = false;  // causal: query i sees keys up to i + lk - lq
  float scale = 1.0f;
  AttentionTensor q, k, v, out;
  float* lse = nullptr;  // [batch, heads, lq]

  // Additive, float32 or as q; strides are 0 where it is broadcast.
  const void* bias = nullptr;
  bool bias_float = false;
  int64_t bias_batch_stride = 0, bias_head_stride = 0, bias_row_stride = 0, bias_col_stride = 0;

  const uint8_t* key_mask = nullptr;  // [batch, lk], nonzero = visible
  int64_t mask_batch_stride = 0, mask_col_stride = 0;

  // Dropout: a weight stays where its Philox word is at least `drop_below`, and is multiplied by keep_scale.
  const int64_t* seed = nullptr;  // on the device
  uint64_t drop_below = 0;
  float keep_scale = 1.0f;

  // Backward. Null gradients are not wanted.
  AttentionTensor grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse = nullptr;
  int64_t grad_lse_batch_stride = 0, grad_lse_head_stride = 0, grad_lse_row_stride = 0;
  float* row_dots = nullptr;  // workspace of a streaming backward: [batch, heads, lq]
};

// What a block of a pass does.
enum class AttentionMode : int {
  kResident,  // a whole head of a sequence
  kQueries,   // a block of queries, keys stream
  kKeys,      // a block of keys, queries stream
};

struct AttentionPlan {
  AttentionMode mode = AttentionMode::kResident;
  int warps = 0;
  int64_t tiles = 0;   // of 16 rows, for one block
  int64_t parts = 1;   // blocks of one head
  int64_t blocks = 0;  // in all
  int64_t shared_bytes = 0;
};

inline constexpr int kAttentionMaxWidth = 128;
inline constexpr int kAttentionTile = 16;   // rows of a tile: what one warp works on
inline constexpr int kAttentionChunk = 64;  // rows that stream at once
// Most warps of a block. Forward: so that two blocks share a multiprocessor's registers, and one computes while the
// other waits for its head. Backward keeps twice as much in registers, and a head that fills most of the shared memory.
inline constexpr int kAttentionForwardWarps = 6, kAttentionBackwardWarps = 8;

// The widths that kernels are built for: each call takes the first one that holds it.
inline constexpr int kAttentionWidths[] = {32, 64, 80, 96, 128};
constexpr int attention_width(int64_t d) {
  for (const int width : kAttentionWidths)
    if (d <= width) return width;
  return 0;
}

// `most_shared`: bytes of shared memory that a block may have. `blocks` is -1 where no plan fits.
AttentionPlan attention_forward_plan(const AttentionParams& params, int64_t most_shared);
// One plan (kResident), or two, which run one after the other: kQueries, then kKeys.
struct AttentionBackwardPlan {
  AttentionPlan first, second;
  bool two = false;
};
AttentionBackwardPlan attention_backward_plan(const AttentionParams& params, int64_t most_shared);

cudaError_t launch_attention_forward(const AttentionParams& params, cudaStream_t stream);
cudaError_t launch_attention_backward(const AttentionParams& params, cudaStream_t stream);

}  // namespace vk::cuda

// SPDX-License-Identifier: Apache-2.0
// Attention on the CPU: what a call brings, how it is cut into items, and the host functions.
//
// out = dropout(softmax(scale q k^T + bias)) v, heads after length. The scores exist a block at a time, in a scratch
// that fits the second-level cache; backward forms them again from the log-sum-exps.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace vk::cpu {

// [batch, length, heads, width] in the caller's memory, float32 or bf16 as the call; strides in elements.
struct AttentionTensor {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0, col_stride = 1;
};

struct AttentionCall {
  int64_t batch = 0, heads = 0, key_heads = 0, lq = 0, lk = 0, d = 0, dv = 0;  // packed: lq, lk count all tokens
  bool bf16 = false, causal = false;
  float scale = 1.0f;
  AttentionTensor q, k, v, out;  // backward reads out

  // Log-sum-exps, [batch, heads, lq]; packed [heads, tokens].
  float* lse = nullptr;
  int64_t lse_batch_stride = 0, lse_head_stride = 0;

  // Additive, [batch, heads, lq, lk] with strides of 0 where it is broadcast.
  const void* bias = nullptr;
  bool bias_bf16 = false;
  int64_t bias_batch_stride = 0, bias_head_stride = 0, bias_row_stride = 0, bias_col_stride = 0;

  const uint8_t* key_mask = nullptr;  // [batch, lk], nonzero = visible
  int64_t mask_batch_stride = 0, mask_col_stride = 0;

  // Packed sequences: boundaries [batch + 1], 32 or 64 bits wide. Null: one sequence per batch entry.
  const void *cu_q = nullptr, *cu_k = nullptr;
  bool cu_q_wide = false, cu_k_wide = false;

  // Dropout: a weight stays where its Philox word is at least `drop_below`, and is multiplied by keep_scale.
  bool dropout = false;
  uint64_t seed = 0, drop_below = 0;
  float keep_scale = 1.0f;

  // Backward. Null gradients are not wanted.
  AttentionTensor grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse = nullptr;
  int64_t grad_lse_batch_stride = 0, grad_lse_head_stride = 0, grad_lse_row_stride = 0;
  void* grad_bias = nullptr;  // contiguous [bias_batch, bias_heads, lq, lk], dtype of the bias
  int64_t bias_batch = 1, bias_heads = 1;

  char* workspace = nullptr;
};

// What one thread does at a time: queries [q0, q1) of all query heads of one key head, of one sequence.
struct AttentionItem {
  int64_t batch = 0, key_head = 0;
  int64_t q_start = 0, lq = 0, k_start = 0, lk = 0;  // the sequence
  int64_t q0 = 0, q1 = 0;
  // Backward: key blocks [block0, block1) of `blocks`; where there are several shares, dq goes to float32 partial sums.
  int64_t block0 = 0, block1 = 0, blocks = 1;
  float* partial_dq = nullptr;  // [heads of the group][lq][dq_stride]
  float* grad_bias = nullptr;   // float32 sums [bias_batch, bias_heads, lq, lk], or null
};

// Sizes that depend on the shape of the call alone, so that no rounding depends on the number of threads.
struct AttentionPlan {
  int64_t key_block = 0;    // most keys in a block
  int64_t query_block = 0;  // most queries whose scores exist at once
  int64_t rows = 0;         // forward: most rows whose result an item accumulates; backward: longest item
  int64_t scratch_bytes = 0;
};

// Widths of scratch rows: whole registers of the widest instruction set, and an odd number of cache lines where columns
// are walked, so that neighbouring rows do not compete for the same sets.
inline constexpr int64_t attention_width(int64_t n) { return (n + 15) / 16 * 16; }
inline constexpr int64_t attention_stride(int64_t n) {
  return attention_width(n) / 16 % 2 ? attention_width(n) : attention_width(n) + 16;
}

// `next` is the item that the same thread takes afterwards, or null: its tensors are fetched while this one computes.
using AttentionItemFunction = void (*)(const AttentionCall&, const AttentionPlan&, const AttentionItem&,
                                       const AttentionItem* next, char* scratch);

struct AttentionKernels {
  AttentionItemFunction forward, backward;
  // grad_q of one head of an item's sequence from `shares` partial sums, the first at `first`.
  void (*sum_shares)(const AttentionCall&, const AttentionItem&, int64_t head, int64_t shares, int64_t share_stride,
                     float* first);
  // Values [begin, end) of the bias's gradient from `parts` buffers.
  void (*sum_bias)(const AttentionCall&, const float* from, int64_t parts, int64_t part_stride, int64_t begin,
                   int64_t end);
};

// Bytes that a call needs at `workspace`, 64-byte aligned.
int64_t attention_workspace(const AttentionCall& call, bool backward, int threads);

void attention_forward(const AttentionCall& call, int threads);
void attention_backward(const AttentionCall& call, int threads);

}  // namespace vk::cpu

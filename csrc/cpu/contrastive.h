// SPDX-License-Identifier: Apache-2.0
// The contrastive family on the CPU: the problem as the kernels see it, and the entry points of the host code.
//
// logits z_ij = scale * <q_i, k_j> + logit_bias + key_bias_j. The softmax objective reads them by rows and, where
// `columns` is set, by columns; the sigmoid objective reads each on its own. Logits exist only as tiles.
#pragma once

#include <cstdint>

#include "cpu/matrix.h"

namespace vk::cpu {

enum class Objective : int32_t { kSoftmax = 0, kSigmoid = 1 };

struct ContrastiveProblem {
  Matrix q, k;  // [N, D] and [M, D]
  int64_t n = 0, m = 0, d = 0;
  Objective objective = Objective::kSoftmax;
  bool columns = false;  // softmax: the second direction too
  bool bf16 = false;     // products in bf16 with float32 sums, else float32
  float scale = 1.0f;
  float logit_bias = 0.0f;
  float smoothing = 0.0f;                    // label smoothing: targets (1 - s) * positive + s / (number of classes)
  int64_t row_classes = 0, col_classes = 0;  // classes of a row and of a column: M and N of the whole problem
  const float* key_bias = nullptr;           // [M]; -inf leaves a key out
  const int64_t* positives = nullptr;        // [N] index of a row's positive, -1 for none; null: positives by label
  const int32_t* row_labels = nullptr;       // [N], with col_labels [M]: equal labels are positives
  const int32_t* col_labels = nullptr;
  const float* row_share = nullptr;  // [N] with labels: 1 / (positives of the row), 0 without any
  const float* col_share = nullptr;  // [M]

  // Statistics of the forward pass: running maximum and shifted sum. A log-sum-exp is kept as these two, (maximum,
  // log of the sum), never added up: a converged loss is their tiny difference to the target's logit.
  float *row_max = nullptr, *row_sum = nullptr, *row_target = nullptr, *row_total = nullptr;  // [N]
  float *col_max = nullptr, *col_sum = nullptr, *col_target = nullptr, *col_total = nullptr;  // [M]
  float* saved = nullptr;  // dot products kept from forward: [rows from saved_row, M]
  int64_t saved_row = 0;

  // Backward: derivative of the result by each row's and column's loss (sigmoid: row_weight by each logit's loss).
  const float *row_shift = nullptr, *row_log = nullptr, *col_shift = nullptr, *col_log = nullptr;  // log-sum-exps
  const float *row_weight = nullptr, *col_weight = nullptr;
  float *grad_q = nullptr, *grad_k = nullptr;  // [N, D], [M, D] contiguous float32, added to; null: not wanted
  float* grad_key_bias = nullptr;              // [M], added to
};

// What one part of a pass leaves to be added up in a fixed order.
struct PartSums {
  double loss = 0.0;  // sigmoid objective, unweighted
  double grad_scale = 0.0;
  double grad_logit_bias = 0.0;
};

// How a pass is cut; the same for every instruction set.
struct ContrastivePlan {
  int threads = 1;            // parts that run at once
  int64_t chunk_rows = 0;     // one pass, softmax: rows whose dot products are kept at once
  int64_t block_rows = 512;   // rows packed together
  int64_t scratch_bytes = 0;  // of one part
};

inline constexpr int64_t kTileRows = 128;        // rows of one gradient tile
inline constexpr int64_t kTileCols = 240;        // its columns: a multiple of every instruction set's panel width
inline constexpr int64_t kTileStride = 272;      // floats between rows: 17 cache lines, so columns do not share sets
inline constexpr int64_t kPairTileStride = 144;  // units between rows of bf16 pairs: 9 cache lines

// One part: rows [row0, row1) against columns [col0, col1). No two parts that run at once share a row or a column.
using ContrastivePart = void (*)(const ContrastiveProblem&, const ContrastivePlan&, int64_t row0, int64_t row1,
                                 int64_t col0, int64_t col1, char* scratch, PartSums* sums);

struct ContrastiveKernels {
  ContrastivePart statistics;  // softmax: maxima, sums, targets
  ContrastivePart gradients;   // softmax and sigmoid: gradient tiles and their products
};

enum class Reduction : int32_t { kMean = 0, kSum = 1, kNone = 2 };

// One call of an op: `batch` problems of the same size, the mean of their losses. Arrays are contiguous over the batch.
struct ContrastiveCall {
  ContrastiveProblem problem;  // the first one
  int64_t batch = 1, q_batch_stride = 0, k_batch_stride = 0;
  Reduction reduction = Reduction::kMean;
  const int64_t* positives = nullptr;  // [batch, N]; null without labels: row i's positive is key i
  bool ignores = false;                // rows whose positive is `ignore_index` count nowhere
  int64_t ignore_index = 0;
  const int64_t* row_labels = nullptr;  // [batch, N]
  const int64_t* col_labels = nullptr;  // [batch, M]
  const uint8_t* key_mask = nullptr;    // [batch, M], 0 leaves a key out
  const float* key_bias = nullptr;      // [M]

  float* loss = nullptr;                         // one number, or [batch, N] where nothing is reduced
  float *row_lse = nullptr, *col_lse = nullptr;  // [batch, 2, N], [batch, 2, M]: maximum, log of the shifted sum
  float* saved = nullptr;                        // [batch, N, M] dot products, or null: backward forms them again

  // A block of a larger problem, batch 1: `positives` are in the block's coordinates and may lie outside it, what
  // depends on the other blocks is given, and grad_q is added to instead of being written.
  bool block = false;
  int64_t row_classes = 0, col_classes = 0;
  const float *row_share = nullptr, *col_share = nullptr;    // with labels: 1 / (positives in the whole problem), or 0
  const float *row_weight = nullptr, *col_weight = nullptr;  // derivative of the result by a row's and a column's loss
  float *row_stats = nullptr, *col_stats = nullptr;          // [4, N], [4, M]: maximum, shifted sum, target, total

  const float* grad_loss = nullptr;                                      // like loss
  float *grad_q = nullptr, *grad_k = nullptr, *grad_key_bias = nullptr;  // contiguous; written, not added to
  uint16_t *grad_q_bf16 = nullptr, *grad_k_bf16 = nullptr;  // where the features are bf16: the gradients rounded, too
  float *grad_scale = nullptr, *grad_logit_bias = nullptr;  // one number each
  char* workspace = nullptr;                                // contrastive_workspace() bytes
};

// Bytes of workspace of a call on `threads` threads. `one_pass`: for contrastive_one_pass.
int64_t contrastive_workspace(const ContrastiveCall& call, bool one_pass, int threads);

// Softmax objective: loss, log-sum-exps and, where asked for, the dot products.
void contrastive_forward(const ContrastiveCall& call, int threads);

// Softmax objective, a block: what its rows and columns contribute to their statistics.
void contrastive_block_statistics(const ContrastiveCall& call, int threads);

// Softmax objective: gradients from the log-sum-exps.
void contrastive_backward(const ContrastiveCall& call, int threads);

// Loss and, where asked for, gradients for an upstream gradient of 1, each logit formed once: the sigmoid objective,
// and the softmax objective by rows only, in chunks of rows whose logits fit the workspace.
void contrastive_one_pass(const ContrastiveCall& call, int threads);

}  // namespace vk::cpu

// SPDX-License-Identifier: Apache-2.0
// Gradients of top-k scores and of zero-shot probabilities on the CPU: the entry points of the host code.
//
// The k scores of a query touch k rows of the database, so the work is N k D, far below the scan's N M D; what is
// dense, the softmax over all classes, is the contrastive family's gradient and computed there.
#pragma once

#include <cstdint>

#include "cpu/topk.h"

namespace vk::cpu {

// Every metric's derivative has one form. With g the gradient of the score of the pair (q, x):
//   grad_q += a x - b q,   grad_x += a q - c x
// where (a, b, c) is (g, 0, 0) for dot, (2g, 2g, 2g) for l2, and (g, g s / |q| |q|, ...) / (|q| |x|) for cosine.
struct TopkGradients {
  Metric metric = Metric::kDot;
  int64_t n = 0, m = 0, d = 0, k = 0;
  Matrix q, x;                                              // [n, D], [m, D]
  const int64_t* indices = nullptr;                         // [n, k]; -1: no row
  const float* grad_score = nullptr;                        // [n, k]
  bool add = false;                                         // to what grad_q and grad_x hold, instead of writing them
  float *grad_q = nullptr, *grad_x = nullptr;               // contiguous; null: not wanted
  uint16_t *grad_q_bf16 = nullptr, *grad_x_bf16 = nullptr;  // the same, rounded
  const float* logit_scale = nullptr;  // set: scores are cosines times this number, and its gradient is added to
  float* grad_scale = nullptr;         //      this one
  char* workspace = nullptr;           // topk_gradients_workspace() bytes
};

int64_t topk_gradients_workspace(const TopkGradients& call);
void topk_gradients(const TopkGradients& call, int threads);

// What the two parts of the zero-shot gradient start from. With P the k probabilities of a row and L its log-sum-exp:
//   grad_score = logit_scale * grad_P P         of the k cosines, beside what they add to L
//   row_weight = grad_L - sum grad_P P          of the softmax over all classes
struct ZeroShotWeights {
  int64_t n = 0, d = 0, k = 0;
  float logit_scale = 1.0f;
  const float *probabilities = nullptr, *grad_probabilities = nullptr;  // [n, k]
  const float *lse = nullptr, *grad_lse = nullptr;                      // [n]
  float* row_lse = nullptr;                                             // [2, n]: lse, and 0, as that softmax wants it
  float *grad_score = nullptr, *row_weight = nullptr;                   // [n, k], [n]
  int64_t* no_positives = nullptr;                                      // [n], filled with -1
  float* zeros = nullptr;                                               // [n, D], filled with 0
};

void zero_shot_weights(const ZeroShotWeights& call);

// Gradient through u_r = x_r / max(|x_r|, 1e-12) and through the mean of `group` such rows: grad has [rows / group, D].
struct UnitGradients {
  Matrix x;  // [rows, D]
  int64_t rows = 0, group = 1, d = 0;
  const float* grad = nullptr;
  float* out = nullptr;  // [rows, D]
  uint16_t* out_bf16 = nullptr;
};

void unit_gradients(const UnitGradients& call, int threads);

}  // namespace vk::cpu

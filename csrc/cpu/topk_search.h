// SPDX-License-Identifier: Apache-2.0
// Top-k similarity on the CPU: the entry points of the host code.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/topk.h"

namespace vk::cpu {

struct TopkCall {
  Metric metric = Metric::kDot;
  int64_t n = 0, d = 0, k = 0;
  Matrix q;
  std::vector<TopkSegment> segments;  // of one dtype
  const uint8_t* mask = nullptr;      // [N, rows] by position
  int64_t mask_stride = 0;
  const float* centre = nullptr;  // set: codes are of the rotated vectors less this one

  float* scores = nullptr;      // [N, k]; of classes: probabilities
  int64_t* labels = nullptr;    // [N, k]
  int64_t* rescored = nullptr;  // [2]: rows scored exactly, and queries that went on to the vectors themselves
  char* workspace = nullptr;    // topk_workspace() bytes

  bool classify = false;  // rows are classes: probabilities and log-sum-exps of logit_scale * score
  double logit_scale = 1.0;
  float* lse = nullptr;  // [N]

  std::vector<std::vector<int64_t>> kept;  // what `keep_allowed` made the segments' rows

  // Leaves only the rows whose byte, by position, is not 0.
  void keep_allowed(const uint8_t* allowed);

  int64_t rows() const {
    int64_t total = 0;
    for (const TopkSegment& segment : segments) total += segment.count;
    return total;
  }
};

int64_t topk_workspace(const TopkCall& call, int threads);

// The k best rows of every query: -1 and -inf where there are fewer.
void topk_search(const TopkCall& call, int threads);

// Rows whose score is at least a threshold: query i owns lims[i] to lims[i + 1], best first.
struct RangeResult {
  std::vector<int64_t> lims;
  std::vector<float> scores;
  std::vector<int64_t> labels;
};

int64_t range_workspace(const TopkCall& call, int threads);
void topk_range(const TopkCall& call, float threshold, int threads, RangeResult& result);

// int8 codes of n rows; no workspace: a row's scratch is small.
void encode_codes(const CodesCall& call, int64_t n, int threads);

// One vector per class, [C, P, D] -> [C, D]: the mean of its normalised prompts (rows c * P + p of `prompts`).
int64_t class_vectors_workspace(int64_t prompt_count, int64_t d, int threads);
void class_vectors(const Matrix& prompts, int64_t classes, int64_t prompt_count, int64_t d, float* out, char* workspace,
                   int threads);

}  // namespace vk::cpu

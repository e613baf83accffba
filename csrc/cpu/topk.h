// SPDX-License-Identifier: Apache-2.0
// Top-k similarity on the CPU: the problem as the kernels see it.
//
// A scan multiplies queries with what is stored of the rows (float32 or bfloat16 vectors, int8 codes), bounds how far
// each product may be from the exact score, and keeps the rows that the bounds cannot exclude. What is left is scored
// in float64 in the order of `tree_sum`, and that alone decides what is returned.
//
// The scan works in units of the query's norm. With e = q / |q|, a row x that is stored as w y with |x - w y| <= r, and
// a query that is multiplied as s p with |e - s p| <= t:
//
//   |s w fl(p . y) - e . x|  <=  r + t |w y| + eta (|x| + r)
//
// by the triangle inequality, and since a D-term float32 sum is off by at most D u |p| |y| in any order (Higham,
// equation 3.5); eta = 2 (D + 32) u leaves as much again for norms, scales and the other roundings.
#pragma once

#include <cstdint>

#include "cpu/matrix.h"

namespace vk::cpu {

enum class Metric : int32_t { kDot = 0, kCosine = 1, kL2 = 2 };

// Consecutive rows of a database.
struct TopkSegment {
  Matrix codes;                     // what the scan multiplies: kF32, kBF16 or kI8
  Matrix vectors;                   // what scores are of; no data: the codes themselves, times `scale`
  const float* norm = nullptr;      // of the vectors, to within D u; null: found while scanning
  const float* scale = nullptr;     // of int8 codes; NaN: the row is not finite
  const float* residual = nullptr;  // upper bounds on |vector - scale * codes|; null: 0
  const int64_t* rows = nullptr;    // [count] which rows of the arrays above, ascending; null: all
  const int64_t* labels = nullptr;  // by row of the arrays; null: `first` + row
  int64_t count = 0;
  int64_t first = 0;  // position of the first row in the whole
};

// A row that may be among the best of a query.
struct TopkEntry {
  float upper, lower;  // bounds in the scan's units
  float score;         // exact, where `scored`
  float logit;         // as it joined the sum of exponentials
  uint32_t segment : 31, scored : 1;
  int64_t row;  // of the segment's arrays
};

inline constexpr int64_t kTopkBlock = 240;    // rows of a block: a multiple of every instruction set's panel width
inline constexpr int64_t kTopkStride = 272;   // of a strip of products: 17 cache lines
inline constexpr int64_t kStreamQueries = 8;  // up to so many queries read the rows as they lie, without packing

// Queries of one chunk as the scan multiplies them.
struct TopkQueries {
  int64_t count = 0;
  uint32_t* left = nullptr;  // packed panels (or: `high`, `low` and `wide` below)
  float* wide = nullptr;     // [count, pitch] float32, scaled (and rotated) queries, zeros behind D
  int8_t* high = nullptr;    // [count, pitch] int8: the query is about 256 * high + low
  int8_t* low = nullptr;
  int64_t pitch = 0;
  int32_t *high_sum = nullptr, *low_sum = nullptr;  // [count] 128 times the sums of the bytes
  double* exact = nullptr;                          // [count, D] the queries themselves
  double* exact_norm = nullptr;                     // [count] as the cosine divides by it
  double* norm = nullptr;                           // [count] |q|
  double* centre = nullptr;                         // [count] e . centre
  float* factor = nullptr;                          // [count] s
  float* shift = nullptr;                           // [count] multiplies `RowBlock::by_shift`
  float* loose = nullptr;                           // [count] t
  float* slack = nullptr;                           // [count] what is added to every bound
};

// One scan of one chunk of queries.
struct TopkScan {
  Metric metric = Metric::kDot;
  int64_t d = 0, k = 0;
  float eta = 0.0f;
  Dtype codes = Dtype::kF32;
  bool stream = false;   // rows are read as they lie, for few queries
  bool rotated = false;  // codes are of `rotate(vector - centre)`
  const float* centre = nullptr;
  double centre_norm = 0.0;
  int64_t block = kTopkBlock;
  Matrix q;                        // of the whole call
  const int64_t* which = nullptr;  // [count] rows of q; null: from `first_query`
  int64_t first_query = 0;
  TopkQueries queries;
  const TopkSegment* segments = nullptr;
  int64_t segment_count = 0;
  const uint8_t* mask = nullptr;  // [N, rows] by position, 0 leaves a row out
  int64_t mask_stride = 0;

  // The running threshold of a query. Parts share it, and may do so without order: whatever one of them writes, k rows
  // reach for certain. Only where the sum of exponentials depends on which rows were scored, each has its own.
  float* threshold = nullptr;
  int64_t threshold_stride = 0;  // between parts

  // By part of the rows, then by query: the candidates above the threshold.
  int32_t* found = nullptr;
  TopkEntry* entries = nullptr;
  int64_t capacity = 0;
  int64_t padded = 0;  // queries between two parts' arrays
  bool fixed = false;  // the threshold is given and does not move
  void (*full)(const TopkScan&, int64_t part, int64_t query) = nullptr;
  void* host = nullptr;

  // Where set: maximum and shifted sum of exp(logit_scale * cosine), by part and query.
  float logit_scale = 0.0f;
  float *lse_max = nullptr, *lse_sum = nullptr;

  float threshold_of(int64_t part, int64_t i) const {
    float value;
    __atomic_load(threshold + part * threshold_stride + i, &value, __ATOMIC_RELAXED);
    return value;
  }
  void raise_threshold(int64_t part, int64_t i, float to) const {
    if (to > threshold_of(part, i)) __atomic_store(threshold + part * threshold_stride + i, &to, __ATOMIC_RELAXED);
  }

  int64_t query_row(int64_t i) const { return which ? which[i] : first_query + i; }
};

// int8 codes of rows, rotated about a centre.
struct CodesCall {
  int64_t d = 0;
  const float* vectors = nullptr;  // [n, D]
  const float* centre = nullptr;   // [D]
  int8_t* codes = nullptr;         // [n, D]
  float* scale = nullptr;          // [n]; NaN: the row is not finite
  float* norm = nullptr;           // [n] of the vectors
  float* residual = nullptr;       // [n] upper bounds on |rotate(vector - centre) - scale * codes|
};

struct TopkKernels {
  // Queries [begin, end) of the chunk, multiples of the panel height apart.
  void (*prepare)(const TopkScan&, int64_t begin, int64_t end, char* scratch);
  // Rows [row0, row1) of all segments together against queries [q0, q1).
  void (*scan)(const TopkScan&, int64_t part, int64_t row0, int64_t row1, int64_t q0, int64_t q1, char* scratch);
  // Scores all entries that are not scored yet.
  void (*exact)(const TopkScan&, int64_t query, TopkEntry* entries, int64_t count, char* scratch);
  // Averages of normalised prompts: [C, P, D] -> [C, D] float32, classes [begin, end).
  void (*class_vectors)(const Matrix& prompts, int64_t prompt_count, int64_t d, int64_t begin, int64_t end, float* out,
                        char* scratch);
  void (*encode)(const CodesCall&, int64_t begin, int64_t end, char* scratch);
  int panel_rows;  // of a left panel
};

}  // namespace vk::cpu

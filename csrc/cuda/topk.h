// SPDX-License-Identifier: Apache-2.0
// Top-k search on the GPU: the scan, which finds the database rows that no error bound rules out, query by query.
//
// A score's upper bound is fma(dot, scale_j, shift_j) + slack_i reach_j; a row stays a candidate unless that is at most
// limit_i. Metrics and masks are in these vectors, which the host makes; the exact scores of candidates are its work,
// too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vk::cuda {

struct TopkScanParams {
  const void *queries = nullptr, *database = nullptr;  // [n, d], [m, d]; rows one after the other
  int64_t n = 0, m = 0, row_bytes = 0;                 // row_bytes: a multiple of 16, zeros past the last of d
  bool bf16 = false;
  const float *slack = nullptr, *limit = nullptr;                    // [n]; a limit of NaN keeps every row
  const float *scale = nullptr, *shift = nullptr, *reach = nullptr;  // [m]
  int32_t* candidates = nullptr;                                     // [n, capacity], in no order
  int64_t capacity = 0;
  int32_t* counts = nullptr;  // [n], zeros before; may exceed the capacity, and then some candidates are missing
};

cudaError_t launch_topk_scan(const TopkScanParams& params, cudaStream_t stream);

}  // namespace vk::cuda

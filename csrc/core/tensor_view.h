// SPDX-License-Identifier: Apache-2.0
// A tensor as it crosses from Python: pointer, element type, shape, strides in elements. It owns nothing.
#pragma once

#include <cstdint>

namespace vk {

// The numbers are part of the interface with vlmkernels/_native.py (`dtype_tag`).
enum class Dtype : int32_t {
  kF32 = 0,
  kBF16 = 1,
  kF16 = 2,
  kF64 = 3,
  kI8 = 4,
  kU8 = 5,
  kI32 = 6,
  kI64 = 7,
  kBool = 8,
};

inline constexpr int32_t kDtypeCount = 9;

struct TensorView {
  static constexpr int kMaxRank = 8;

  void* data = nullptr;
  Dtype dtype = Dtype::kF32;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};
};

}  // namespace vk

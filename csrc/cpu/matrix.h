// SPDX-License-Identifier: Apache-2.0
// A matrix in the caller's memory, as the CPU kernels see it: pointer, element type, strides in elements.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace vk::cpu {

struct Matrix {
  const void* data = nullptr;
  Dtype dtype = Dtype::kF32;  // kF32 or kBF16
  int64_t row_stride = 0;
  int64_t col_stride = 1;
};

}  // namespace vk::cpu

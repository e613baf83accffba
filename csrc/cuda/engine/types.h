// SPDX-License-Identifier: Apache-2.0
// Element types by their bits: arithmetic happens in float32, or in pairs of them inside a 32-bit register.
#pragma once

#include <cstdint>

namespace vk::cuda {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

}  // namespace vk::cuda

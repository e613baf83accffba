// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon et al. 2011), the generator of every dropout here: ops/reference/attention.py has it line by
// line.
#pragma once

#include "cuda/engine/device.h"

namespace vk::cuda {

struct Words {
  uint32_t word[4];
};

__device__ __forceinline__ Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  constexpr int kRounds = 10;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t high0 = multiply_high(c0, kMultiplier0), low0 = c0 * kMultiplier0;
    const uint32_t high1 = multiply_high(c2, kMultiplier1), low1 = c2 * kMultiplier1;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace vk::cuda

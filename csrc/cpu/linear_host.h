// SPDX-License-Identifier: Apache-2.0
// What the linear layers' forward and backward share on the host: buffers, cuts, and one product.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/host.h"
#include "cpu/quantized.h"

namespace vk::cpu {

struct Range {
  int64_t begin, end;
};

// Part `i` of `parts` of `size` elements, cut at multiples of `step`.
inline Range cut(int64_t size, int64_t step, int64_t i, int64_t parts) {
  const int64_t panels = ceil_div(size, step);
  return {std::min(size, panels * i / parts * step), std::min(size, panels * (i + 1) / parts * step)};
}

// Threads that a product of this size is worth.
int threads_for(const LinearProblem& p, int threads);

// The product and its epilogue, the right operand being packed; and the bytes that it takes from the arena.
int64_t product_bytes(const LinearProblem& p, int threads);
void run_product(LinearProblem& p, Arena arena, int threads);

}  // namespace vk::cpu

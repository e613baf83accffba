// SPDX-License-Identifier: Apache-2.0
// Measured limits of this machine at the level in use.
#pragma once

namespace vk::cpu {

enum class Peak { kF32, kBF16, kI8, kRead };

// 1e9 operations (kRead: bytes) per second of all threads together: the best of the rounds that fit into `seconds`.
double measure_peak(Peak kind, double seconds, int threads);

}  // namespace vk::cpu

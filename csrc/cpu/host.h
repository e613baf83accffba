// SPDX-License-Identifier: Apache-2.0
// What the host code of every CPU family uses: rounding of sizes, arrays cut from a workspace, rounding to bfloat16.
#pragma once

#include <bit>
#include <cstdint>

namespace vk::cpu {

inline constexpr int64_t kLine = 64;  // bytes of a cache line

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Arrays taken from a workspace one after another, each on a cache line of its own.
class Arena {
 public:
  explicit Arena(char* at) : begin_(at), at_(at) {}
  template <class T>
  T* take(int64_t count) {
    auto* out = reinterpret_cast<T*>(at_);
    at_ += round_up(count * static_cast<int64_t>(sizeof(T)), kLine);
    return out;
  }
  int64_t used() const { return at_ - begin_; }
  char* rest() const { return at_; }

 private:
  char *begin_, *at_;
};

// To nearest, ties to even.
inline uint16_t round_to_bf16(float x) {
  if (x != x) return 0x7fc0;
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace vk::cpu

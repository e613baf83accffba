// SPDX-License-Identifier: Apache-2.0
// Stands in for csrc/cuda/engine/device.h: the same functions in C++, with the fragment layouts of the PTX manual.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/engine/types.h"

namespace vk::cuda {

inline constexpr int kWarp = 32;

inline int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
inline int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }

inline char* shared_memory() { return emulator::shared_base; }
using SharedAddress = uint32_t;
inline SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(static_cast<const char*>(pointer) - emulator::shared_base);
}

inline void sync_block() { emulator::sync_block(); }
inline void sync_warp() {
  emulator::with_warp("sync_warp", nullptr, nullptr, [](const emulator::Exchange&) {});
}

template <class V>
V shuffle_xor(V value, int lanes) {
  struct In {
    V value;
    int lanes;
  } in{value, lanes};
  V out;
  emulator::with_warp("shuffle_xor", &in, &out, [](const emulator::Exchange& all) {
    for (int i = 0; i < kWarp; ++i) {
      const int from = i ^ static_cast<const In*>(all.in[i])->lanes;
      *static_cast<V*>(all.out[i]) = static_cast<const In*>(all.in[from])->value;
    }
  });
  return out;
}
inline uint32_t ballot(bool predicate) {
  uint32_t out;
  emulator::with_warp("ballot", &predicate, &out, [](const emulator::Exchange& all) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarp; ++i) bits |= static_cast<uint32_t>(*static_cast<const bool*>(all.in[i])) << i;
    for (int i = 0; i < kWarp; ++i) *static_cast<uint32_t*>(all.out[i]) = bits;
  });
  return out;
}

inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
inline int32_t add_atomically(int32_t* to, int32_t value) {
  const int32_t before = *to;
  *to += value;
  return before;
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }

inline uint16_t to_bf16(float x) {
  uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t to_f16(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
  if (x != x) return 0x7fff;
  const float size = std::fabs(x);
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(size * 0x1p24f)));
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112 << 10)));
}
template <class T>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<Bf16>(float low, float high) {
  return to_bf16(low) | static_cast<uint32_t>(to_bf16(high)) << 16;
}
template <>
inline uint32_t pack<F16>(float low, float high) {
  return to_f16(low) | static_cast<uint32_t>(to_f16(high)) << 16;
}
inline float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    const float size = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -size : size;
  }
  return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
template <class T>
float2 unpack(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

namespace emulated {

// A 16 x kDepth by kDepth x 8 product of a whole warp; `value(register, i)` is the i-th value of a register, and a
// register has kDepth / 8 of them. Products are exact and their sum is rounded once, where hardware rounds more often.
template <class Sum, class Wide, int kDepth, class Value>
void multiply_add(const char* name, Sum (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Value) {
  struct In {
    const uint32_t* a;
    uint32_t b[2];
    const Sum* d;
  } in{a, {b0, b1}, d};
  Sum out[4];
  emulator::with_warp(name, &in, out, [](const emulator::Exchange& all) {
    constexpr int kPer = kDepth / 8;
    Wide left[16][kDepth], right[kDepth][8], sums[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const In& one = *static_cast<const In*>(all.in[lane]);
      const int group = lane / 4, t = lane % 4;
      for (int i = 0; i < kPer; ++i) {
        const int column = kPer * t + i;
        left[group][column] = Value()(one.a[0], i);
        left[group + 8][column] = Value()(one.a[1], i);
        left[group][column + kDepth / 2] = Value()(one.a[2], i);
        left[group + 8][column + kDepth / 2] = Value()(one.a[3], i);
        right[column][group] = Value()(one.b[0], i);
        right[column + kDepth / 2][group] = Value()(one.b[1], i);
      }
      for (int i = 0; i < 4; ++i) sums[group + 8 * (i / 2)][2 * t + i % 2] = static_cast<Wide>(one.d[i]);
    }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < kDepth; ++k)
        for (int column = 0; column < 8; ++column) sums[row][column] += left[row][k] * right[k][column];
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<Sum*>(all.out[lane])[i] = static_cast<Sum>(sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
  });
  std::memcpy(d, out, sizeof out);
}

template <class T>
struct Half {
  double operator()(uint32_t pair, int i) const { return to_float(T{static_cast<uint16_t>(pair >> 16 * i)}); }
};
struct Byte {
  int32_t operator()(uint32_t four, int i) const { return static_cast<int8_t>(four >> 8 * i); }
};

template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  emulator::with_warp(kTransposed ? "load_matrices_transposed" : "load_matrices", &row, r,
                      [](const emulator::Exchange& all) {
                        uint16_t matrices[4][8][8];
                        uint32_t rows[kWarp];
                        for (int i = 0; i < kWarp; ++i) {
                          rows[i] = *static_cast<const SharedAddress*>(all.in[i]);
                          std::memcpy(matrices[i / 8][i % 8], emulator::shared_at(rows[i], 16, "load_matrices"), 16);
                        }
                        for (int m = 0; m < 4; ++m) emulator::count_conflicts(rows + 8 * m);
                        for (int lane = 0; lane < kWarp; ++lane) {
                          const int group = lane / 4, t = lane % 4;
                          for (int m = 0; m < 4; ++m) {
                            const auto& matrix = matrices[m];
                            const uint16_t low = kTransposed ? matrix[2 * t][group] : matrix[group][2 * t];
                            const uint16_t high = kTransposed ? matrix[2 * t + 1][group] : matrix[group][2 * t + 1];
                            static_cast<uint32_t*>(all.out[lane])[m] = low | static_cast<uint32_t>(high) << 16;
                          }
                        }
                      });
}

}  // namespace emulated

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::multiply_add<float, double, 16>("multiply_add", d, a, b0, b1, emulated::Half<T>());
}
inline void multiply_add(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::multiply_add<int32_t, int32_t, 32>("multiply_add of int8", d, a, b0, b1, emulated::Byte());
}

inline void load_matrices(uint32_t (&r)[4], SharedAddress row) { emulated::load_matrices<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) { emulated::load_matrices<true>(r, row); }

inline void copy_async(SharedAddress to, const void* from, bool valid) { emulator::copy_async(to, from, valid); }
inline void copy_commit() { emulator::copy_commit(); }
template <int kPending>
void copy_wait() {
  emulator::copy_wait(kPending);
}

inline uint4 load_16(const void* from) {
  emulator::check_alignment(from, 16, "load_16");
  uint4 value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store_16(void* to, uint4 value) {
  emulator::check_alignment(to, 16, "store_16");
  std::memcpy(to, &value, sizeof value);
}
inline void store_4(void* to, uint32_t value) {
  emulator::check_alignment(to, 4, "store_4");
  std::memcpy(to, &value, sizeof value);
}

}  // namespace vk::cuda

// SPDX-License-Identifier: Apache-2.0
// One vector register of the instruction set being compiled: types, masked tails, reductions, exp, log1p.
//
// Included once per file in csrc/cpu/isa/, which sets VK_ISA_NAMESPACE and VK_VECTOR_BYTES. Everything here is in
// that namespace: an inline function shared between instruction sets could be the copy the linker keeps for all.
// The code is compiler vectors; intrinsics appear only where no vector expression names the instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vk::cpu::VK_ISA_NAMESPACE {

inline constexpr int kLanes = VK_VECTOR_BYTES / 4;  // 32-bit lanes of one vector register

typedef float VecF __attribute__((vector_size(VK_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(VK_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(VK_VECTOR_BYTES)));
// The same register read from an address with no more than the element's alignment.
typedef float VecFUnaligned __attribute__((vector_size(VK_VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t VecUUnaligned __attribute__((vector_size(VK_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t HalfWords __attribute__((vector_size(VK_VECTOR_BYTES / 2), aligned(2), may_alias));
// Half a register of float32.
typedef float HalfFUnaligned __attribute__((vector_size(VK_VECTOR_BYTES / 2), aligned(4), may_alias));

inline constexpr float kInfinity = __builtin_inff();

inline VecF splat(float x) { return VecF{} + x; }
inline VecF load(const float* p) { return *reinterpret_cast<const VecFUnaligned*>(p); }
inline void store(float* p, VecF v) { *reinterpret_cast<VecFUnaligned*>(p) = v; }
inline VecU load_units(const uint32_t* p) { return *reinterpret_cast<const VecUUnaligned*>(p); }
inline void store_units(uint32_t* p, VecU v) { *reinterpret_cast<VecUUnaligned*>(p) = v; }

// First `count` lanes from memory, the others 0; reads nothing behind them.
inline VecF load_first(const float* p, int count) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1u), p);
#else
  alignas(VK_VECTOR_BYTES) float lanes[kLanes] = {};
  std::memcpy(lanes, p, sizeof(float) * static_cast<size_t>(count));
  return load(lanes);
#endif
}

// Writes the first `count` lanes and nothing behind them.
inline void store_first(float* p, VecF v, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1u), (__m512)v);
#else
  alignas(VK_VECTOR_BYTES) float lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, sizeof(float) * static_cast<size_t>(count));
#endif
}

// Both keep a NaN in x: a comparison with NaN is false.
inline VecF max_keep(VecF running, VecF x) { return x > running ? x : running; }

template <int... I>
inline VecF swap_halves(VecF v, int distance, std::integer_sequence<int, I...>) {
  const VecI index = {(I ^ distance)...};
#if defined(__clang__)
  VecF out;
  for (int i = 0; i < kLanes; ++i) out[i] = v[index[i]];
  return out;
#else
  return __builtin_shuffle(v, index);
#endif
}

inline float reduce_add(VecF v) {
  for (int d = kLanes / 2; d > 0; d /= 2) v = v + swap_halves(v, d, std::make_integer_sequence<int, kLanes>{});
  return v[0];
}

inline int32_t reduce_ints(VecI v) {
  for (int d = kLanes / 2; d > 0; d /= 2) v += (VecI)swap_halves((VecF)v, d, std::make_integer_sequence<int, kLanes>{});
  return v[0];
}

inline float reduce_max(VecF v) {
  for (int d = kLanes / 2; d > 0; d /= 2) v = max_keep(v, swap_halves(v, d, std::make_integer_sequence<int, kLanes>{}));
  return v[0];
}

// exp(x) for x <= 1, which is all that a shifted softmax or a sigmoid asks for. Below -87 (the result would be
// smaller than 1.7e-38) it is exactly 0, so denormals never appear; NaN stays NaN. Relative error below 1.3e-7:
// x = n ln2 + r, exp(r) = 1 + r + r^2 Q(r) with Q of degree 4 (minimax, 3.1e-9).
inline VecF exp_nonpositive(VecF x) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
  const VecF shifted = x * kLog2e + kRound;
  const VecF n = shifted - kRound;
  VecF r = x - n * kLn2High;
  r = r - n * kLn2Low;
  VecF q = r * 0.0013814599f + 0.008368717f;
  q = q * r + 0.04166839f;
  q = q * r + 0.16666521f;
  q = q * r + 0.49999994f;
  const VecF p = (q * r + 1.0f) * r + 1.0f;
  const VecF power = (VecF)(((VecI)shifted - (VecI)splat(kRound) + 127) << 23);
  const VecF result = p * power;
  return x < -87.0f ? VecF{} : result;
}

// exp(x) for the x <= 0 of a shifted softmax, cheaper than the above. Error below 1e-7 (absolute; relative below
// 1e-7 + 2e-8 |x|); exactly 1 at 0; below -87 it is tiny or 0, at -inf 0; NaN stays NaN.
// x log2e = n + r, and 2^r = 1 + r Q(r) with Q of degree 5 (minimax, 2e-9). The product that gives r is rounded once.
inline VecF exp_shifted(VecF x) {
  constexpr float kLog2e = 1.44269504088896341f;
#if defined(__AVX512F__)
  x = x < -128.0f ? splat(-128.0f) : x;  // far enough for the last step to give 0; -inf would give NaN
  // the forms with a mask, because GCC 12 warns about an uninitialised register inside the others
  constexpr __mmask16 kAll = 0xffff;
  const VecF n =
      (VecF)_mm512_maskz_roundscale_ps(kAll, (__m512)(x * kLog2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  x = x < -88.0f ? splat(-88.0f) : x;    // n = -127, whose power below is 0
  const VecF shifted = x * kLog2e + kRound;
  const VecF n = shifted - kRound;
#endif
  const VecF r = x * kLog2e - n;
  VecF q = r * 0.00015353361959569156f + 0.0013398875016719103f;
  q = q * r + 0.00961843691766262f;
  q = q * r + 0.055503323674201965f;
  q = q * r + 0.24022647738456726f;
  q = q * r + 0.6931471824645996f;
  const VecF p = q * r + 1.0f;
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_scalef_ps(kAll, (__m512)p, (__m512)n);
#else
  return p * (VecF)(((VecI)shifted - (VecI)splat(kRound) + 127) << 23);
#endif
}

// log(1 + e) for e in [0, 1], as e P(e), P of degree 9 (minimax, relative 4.8e-9).
inline VecF log1p_unit(VecF e) {
  VecF p = e * -0.0032440247f + 0.019851463f;
  p = p * e + -0.05695954f;
  p = p * e + 0.10603656f;
  p = p * e + -0.15305594f;
  p = p * e + 0.1967594f;
  p = p * e + -0.24954134f;
  p = p * e + 0.33329964f;
  p = p * e + -0.49999902f;
  p = p * e + 1.0f;
  return p * e;
}

// bfloat16, rounded to nearest even; NaN stays a quiet NaN.
inline HalfWords to_bf16(VecF x) {
#if defined(__AVX512BF16__)
  return (HalfWords)_mm512_cvtneps_pbh((__m512)x);
#else
  const VecU bits = (VecU)x;
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector((VecU)(x == x ? (VecI)rounded : VecI{} + 0x7fc0), HalfWords);
#endif
}

// The same as float32.
inline VecF round_through_bf16(VecF x) { return (VecF)(__builtin_convertvector(to_bf16(x), VecU) << 16); }

// Two registers of consecutive values as one of bf16, in their order.
inline VecU to_bf16_row(VecF first, VecF second) {
#if defined(__AVX512BF16__)
  return (VecU)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  const HalfWords halves[2] = {to_bf16(first), to_bf16(second)};
  VecU out;
  std::memcpy(&out, halves, sizeof out);
  return out;
#endif
}

// Lane l becomes the pair (low[l], high[l]): two rows of one column, the unit of a product over rows.
inline VecU bf16_pairs(HalfWords low, HalfWords high) {
  return __builtin_convertvector(low, VecU) | (__builtin_convertvector(high, VecU) << 16);
}
inline VecU bf16_pairs(VecF low, VecF high) { return bf16_pairs(to_bf16(low), to_bf16(high)); }

inline VecF from_bf16(const uint16_t* p) {
  const HalfWords h = *reinterpret_cast<const HalfWords*>(p);
  return (VecF)(__builtin_convertvector(h, VecU) << 16);
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

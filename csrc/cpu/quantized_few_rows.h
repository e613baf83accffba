// SPDX-License-Identifier: Apache-2.0
// 4-bit weights times a few rows of float activations, at the rate at which the nibbles come from memory.
//
// Within a group of inputs the activations become integers whose signed bytes are the digits, on a unit that is a power
// of two. float32 takes four digits: exact down to 2^-6 of the group's largest magnitude, and never off by more than
// 2^-30 of it. bfloat16 takes three: exact down to 2^-14, never off by more than 2^-22, and a quarter less to multiply.
// Digits times nibbles are exact sums of the dot instruction, less the zero point times the sum of the digits; only the
// digits' sums and the groups are added in float32.
#pragma once

#include "linear_pack.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

#if defined(__AVX512VNNI__)

inline constexpr int kFewRows = 4;
inline constexpr int kMostDigits = 4;
inline constexpr int64_t kStreamAhead = 512;  // bytes

inline int digits_of(const LinearProblem& p) { return p.x.dtype == Dtype::kF32 ? kMostDigits : kMostDigits - 1; }

struct GroupTerms {
  float unit;
  int32_t sums[kMostDigits];
};

// Of one row: the terms of every group, then the digits, [digits][k / 4] units.
struct FewLayout {
  int64_t groups, digits, row;  // groups; offset of the digits and size of a row in bytes
  explicit FewLayout(const LinearProblem& p)
      : groups(p.k / p.group),
        digits(round_up(groups * static_cast<int64_t>(sizeof(GroupTerms)), kLine)),
        row(round_up(digits + digits_of(p) * p.k, kLine)) {}
};

inline int64_t few_bytes(const LinearProblem& p) { return p.m * FewLayout(p).row; }

inline VecI swapped(VecI v, int distance) {
  return (VecI)swap_halves((VecF)v, distance, std::make_integer_sequence<int, kLanes>{});
}

inline int32_t largest_of(VecI v) {
  for (int d = kLanes / 2; d > 0; d /= 2) {
    const VecI other = swapped(v, d);
    v = other > v ? other : v;
  }
  return v[0];
}

inline bool few_prepare(const LinearProblem& p, char* out) {
  const FewLayout layout(p);
  const int count = digits_of(p);
  const int integer_bits = 8 * count - 2;
  for (int64_t r = 0; r < p.m; ++r) {
    const Matrix m = row_of(p.x, r);
    auto* terms = reinterpret_cast<GroupTerms*>(out + r * layout.row);
    char* digits = out + r * layout.row + layout.digits;
    for (int64_t g = 0; g < layout.groups; ++g) {
      VecI largest = {};
      for (int64_t k = g * p.group; k < (g + 1) * p.group; k += kLanes) {
        const VecI bits = (VecI)magnitude(load_row(m, 0, k, kLanes));
        largest = bits > largest ? bits : largest;
      }
      const int32_t bits = largest_of(largest);
      float most;
      std::memcpy(&most, &bits, sizeof most);
      // Infinities and NaN have no digits, and units below the normal numbers lose theirs.
      if (!(most < kInfinity) || (most > 0.0f && most < 1e-28f)) return false;
      // most is in [2^(e-1), 2^e), the unit is 2^(e - integer_bits); in two factors, as one could pass the largest
      // number.
      const int e = (bits >> 23) - 126;
      auto power = [](int exponent) {
        const int32_t pattern = (exponent + 127) << 23;
        float x;
        std::memcpy(&x, &pattern, sizeof x);
        return x;
      };
      const int shift = most > 0.0f ? integer_bits - e : 0;
      const float first = power(shift / 2), second = power(shift - shift / 2);
      VecI sums[kMostDigits] = {};
      for (int64_t k = g * p.group; k < (g + 1) * p.group; k += kLanes) {
        const VecF x = load_row(m, 0, k, kLanes) * first * second;
        VecI rest = (VecI)_mm512_cvtps_epi32((__m512)x);
        for (int d = 0; d < count; ++d) {
          const VecI digit = (rest << 24) >> 24;
          rest = (rest - digit) >> 8;
          sums[d] += digit;
          _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + d * p.k + k),
                           _mm512_maskz_cvtepi32_epi8((__mmask16)-1, (__m512i)digit));
        }
      }
      terms[g].unit = most > 0.0f ? power(-shift) : 0.0f;
      for (int d = 0; d < count; ++d) terms[g].sums[d] = reduce_ints(sums[d]);
    }
  }
  return true;
}

// M rows of D digits times S blocks of columns. Blocks side by side are as many streams from memory, which the
// processor's prefetchers follow better than one, and read each digit once.
template <int M, int D, int S>
void few_columns(const LinearProblem& p, int64_t col, const char* prepared) {
  const PackedLayout layout(p.kind, p.n, p.k, p.group);
  const FewLayout rows(p);
  const int64_t steps = p.group / 8, digit_stride = p.k / 4;
  const char* block = p.packed + col / kLanes * layout.block;
  const char* at = block + layout.zero_points;
  const __m512i mask = _mm512_set1_epi8(15);
  VecF out[M][S] = {};
  for (int64_t g = 0; g < rows.groups; ++g) {
    VecF scale[S];
    __m512i sum[M][D][S];
    const GroupTerms* terms[M];
    const uint32_t* digits[M];
    for (int r = 0; r < M; ++r) {
      terms[r] = reinterpret_cast<const GroupTerms*>(prepared + r * rows.row) + g;
      digits[r] = reinterpret_cast<const uint32_t*>(prepared + r * rows.row + rows.digits) + g * p.group / 4;
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const auto zero = (__m512i)widen_zeros(block + s * layout.block + g * kLanes);
      scale[s] = load(reinterpret_cast<const float*>(at + s * layout.block));
      _mm_prefetch(at + s * layout.block + kStreamAhead, _MM_HINT_T0);
      for (int r = 0; r < M; ++r)
        for (int d = 0; d < D; ++d) sum[r][d][s] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(-terms[r]->sums[d]));
    }
    at += kLanes * 4;
    for (int64_t step = 0; step < steps; ++step) {
      __m512i low[S], high[S];
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        const __m512i nibbles = _mm512_loadu_si512(at + s * layout.block);
        _mm_prefetch(at + s * layout.block + kStreamAhead, _MM_HINT_T0);
        low[s] = _mm512_and_si512(nibbles, mask);
        high[s] = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), mask);
      }
      at += kLanes * 4;
#pragma GCC unroll 4
      for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
        for (int d = 0; d < D; ++d) {
          const uint32_t* digit = digits[r] + d * digit_stride + 2 * step;
          const __m512i first = _mm512_set1_epi32(static_cast<int>(digit[0]));
          const __m512i second = _mm512_set1_epi32(static_cast<int>(digit[1]));
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) sum[r][d][s] = _mm512_dpbusd_epi32(sum[r][d][s], low[s], first);
#pragma GCC unroll 4
          for (int s = 0; s < S; ++s) sum[r][d][s] = _mm512_dpbusd_epi32(sum[r][d][s], high[s], second);
        }
      }
    }
    for (int r = 0; r < M; ++r) {
      for (int s = 0; s < S; ++s) {
        VecF whole = __builtin_convertvector((VecI)sum[r][D - 1][s], VecF);
        for (int d = D - 2; d >= 0; --d) whole = whole * 256.0f + __builtin_convertvector((VecI)sum[r][d][s], VecF);
        out[r][s] += whole * (scale[s] * terms[r]->unit);
      }
    }
  }
  for (int s = 0; s < S; ++s) {
    const int64_t first = col + s * kLanes;
    const int count = static_cast<int>(p.n - first < kLanes ? p.n - first : kLanes);
    alignas(VK_VECTOR_BYTES) float strip[M * kCols] = {};
    for (int r = 0; r < M; ++r) store(strip + r * kCols, out[r][s]);
    epilogue<OpF32>(p, ColumnTerms{}, strip, 0, M, first, count);
  }
}

template <int M, int D>
void few_rows_of(const LinearProblem& p, int64_t col0, int64_t col1, const char* prepared) {
  constexpr int kStreams = M == 1 ? 4 : M == 2 ? 2 : 1;  // as many sums as registers hold
  int64_t col = col0;
  for (; col + kStreams * kLanes <= col1; col += kStreams * kLanes) few_columns<M, D, kStreams>(p, col, prepared);
  for (; col < col1; col += kLanes) few_columns<M, D, 1>(p, col, prepared);
}

template <int D>
void few_product_of(const LinearProblem& p, int64_t col0, int64_t col1, const char* prepared) {
  switch (p.m) {
    case 1:
      return few_rows_of<1, D>(p, col0, col1, prepared);
    case 2:
      return few_rows_of<2, D>(p, col0, col1, prepared);
    case 3:
      return few_rows_of<3, D>(p, col0, col1, prepared);
    default:
      return few_rows_of<4, D>(p, col0, col1, prepared);
  }
}

inline void few_product(const LinearProblem& p, int64_t col0, int64_t col1, const char* prepared) {
  return digits_of(p) == kMostDigits ? few_product_of<kMostDigits>(p, col0, col1, prepared)
                                     : few_product_of<kMostDigits - 1>(p, col0, col1, prepared);
}

#else

inline constexpr int kFewRows = 0;
inline int64_t few_bytes(const LinearProblem&) { return 0; }
inline bool few_prepare(const LinearProblem&, char*) { return false; }
inline void few_product(const LinearProblem&, int64_t, int64_t, const char*) {}

#endif

}  // namespace vk::cpu::VK_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// 4-bit weights times a few rows of float activations, at the rate at which the nibbles come from memory.
//
// Within a group of inputs the activations become integers below 2^30, of which four signed bytes are the digits, on a
// unit that is a power of two: exact down to 2^-6 of the group's largest magnitude, and never off by more than 2^-30 of
// it. Digits times nibbles are exact sums of the dot instruction, less the zero point times the sum of the digits; only
// the digits' sums and the groups are added in float32.
#pragma once

#include "linear_pack.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

#if defined(__AVX512VNNI__)

inline constexpr int kFewRows = 4;
inline constexpr int kDigits = 4;
inline constexpr int kIntegerBits = 30;
inline constexpr int64_t kStreamAhead = 4096;  // bytes

// Of one row: per group the unit and the sums of the digits, then the digits, [kDigits][k / 4] units.
struct FewLayout {
  int64_t groups, digits, row;  // groups; offset of the digits and size of a row in bytes
  explicit FewLayout(const LinearProblem& p)
      : groups(p.k / p.group), digits(round_up(groups * 20, kLine)), row(round_up(digits + kDigits * p.k, kLine)) {}
};

struct GroupTerms {
  float unit;
  int32_t sums[kDigits];
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
      // most is in [2^(e-1), 2^e), the unit is 2^(e-30); in two factors, as one could pass the largest number.
      const int e = (bits >> 23) - 126;
      auto power = [](int exponent) {
        const int32_t pattern = (exponent + 127) << 23;
        float x;
        std::memcpy(&x, &pattern, sizeof x);
        return x;
      };
      const int shift = most > 0.0f ? kIntegerBits - e : 0;
      const float first = power(shift / 2), second = power(shift - shift / 2);
      VecI sums[kDigits] = {};
      for (int64_t k = g * p.group; k < (g + 1) * p.group; k += kLanes) {
        const VecF x = load_row(m, 0, k, kLanes) * first * second;
        VecI rest = (VecI)_mm512_cvtps_epi32((__m512)x);
        for (int d = 0; d < kDigits; ++d) {
          const VecI digit = (rest << 24) >> 24;
          rest = (rest - digit) >> 8;
          sums[d] += digit;
          _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + d * p.k + k),
                           _mm512_maskz_cvtepi32_epi8((__mmask16)-1, (__m512i)digit));
        }
      }
      terms[g].unit = most > 0.0f ? power(-shift) : 0.0f;
      for (int d = 0; d < kDigits; ++d) terms[g].sums[d] = reduce_ints(sums[d]);
    }
  }
  return true;
}

template <int M>
void few_rows_of(const LinearProblem& p, int64_t col0, int64_t col1, const char* prepared) {
  const PackedLayout layout(p.kind, p.n, p.k, p.group);
  const FewLayout rows(p);
  const int64_t steps = p.group / 8;
  for (int64_t col = col0; col < col1; col += kLanes) {
    const char* block = p.packed + col / kLanes * layout.block;
    const char* at = block + layout.zero_points;
    VecF out[M] = {};
    for (int64_t g = 0; g < rows.groups; ++g) {
      const auto zero = (__m512i)widen_zeros(block + g * kLanes);
      const VecF scale = load(reinterpret_cast<const float*>(at));
      at += kLanes * 4;
      __m512i sum[M][kDigits], more[M][kDigits];  // two, so that none waits for its own last step
      const uint32_t* digits[M];
      for (int r = 0; r < M; ++r) {
        const auto* terms = reinterpret_cast<const GroupTerms*>(prepared + r * rows.row) + g;
        for (int d = 0; d < kDigits; ++d) more[r][d] = _mm512_setzero_si512();
        for (int d = 0; d < kDigits; ++d) sum[r][d] = _mm512_mullo_epi32(zero, _mm512_set1_epi32(-terms->sums[d]));
        digits[r] = reinterpret_cast<const uint32_t*>(prepared + r * rows.row + rows.digits) + g * p.group / 4;
      }
      const int64_t digit_stride = p.k / 4;
      const __m512i mask = _mm512_set1_epi8(15);
      for (int64_t s = 0; s < steps; ++s) {
        const __m512i nibbles = _mm512_loadu_si512(at);
        _mm_prefetch(at + kStreamAhead, _MM_HINT_T0);
        at += kLanes * 4;
        const __m512i low = _mm512_and_si512(nibbles, mask);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), mask);
#pragma GCC unroll 4
        for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
          for (int d = 0; d < kDigits; ++d) {
            const uint32_t* digit = digits[r] + d * digit_stride + 2 * s;
            sum[r][d] = _mm512_dpbusd_epi32(sum[r][d], low, _mm512_set1_epi32(static_cast<int>(digit[0])));
            more[r][d] = _mm512_dpbusd_epi32(more[r][d], high, _mm512_set1_epi32(static_cast<int>(digit[1])));
          }
        }
      }
      for (int r = 0; r < M; ++r) {
        const float unit = (reinterpret_cast<const GroupTerms*>(prepared + r * rows.row) + g)->unit;
        auto digit_sum = [&](int d) { return __builtin_convertvector((VecI)sum[r][d] + (VecI)more[r][d], VecF); };
        VecF whole = digit_sum(kDigits - 1);
        for (int d = kDigits - 2; d >= 0; --d) whole = whole * 256.0f + digit_sum(d);
        out[r] += whole * (scale * unit);
      }
    }
    const int count = static_cast<int>(p.n - col < kLanes ? p.n - col : kLanes);
    alignas(VK_VECTOR_BYTES) float strip[M * kCols] = {};
    for (int r = 0; r < M; ++r) store(strip + r * kCols, out[r]);
    epilogue<OpF32>(p, ColumnTerms{}, strip, 0, M, col, count);
  }
}

inline void few_product(const LinearProblem& p, int64_t col0, int64_t col1, const char* prepared) {
  switch (p.m) {
    case 1:
      return few_rows_of<1>(p, col0, col1, prepared);
    case 2:
      return few_rows_of<2>(p, col0, col1, prepared);
    case 3:
      return few_rows_of<3>(p, col0, col1, prepared);
    default:
      return few_rows_of<4>(p, col0, col1, prepared);
  }
}

#else

inline constexpr int kFewRows = 0;
inline int64_t few_bytes(const LinearProblem&) { return 0; }
inline bool few_prepare(const LinearProblem&, char*) { return false; }
inline void few_product(const LinearProblem&, int64_t, int64_t, const char*) {}

#endif

}  // namespace vk::cpu::VK_ISA_NAMESPACE

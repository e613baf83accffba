// SPDX-License-Identifier: Apache-2.0
// Operands of the linear layers: activations quantized or converted into left panels, weights into right panels.
//
// A packed weight is a header (int8 kinds: column sums times the left offset, scales; a register's padding behind the
// last column) and then, column panel by column panel:
//   kInt8Dot, kBF16, kF32   the micro-kernel's panels of units
//   kInt8                   codes [depth, an even number][panel width], one byte each
//   kInt4                   blocks of one register's columns: zero points [groups][lanes] to a whole cache line, and
//   per
//                           group scales [lanes] and nibbles: [G / 8][lanes] units whose low nibbles are four steps of
//                           depth and whose high nibbles the next four
#pragma once

#include "cpu/quantized.h"
#include "engine/pack.h"
#include "linear_epilogue.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

constexpr int64_t kLine = 64;  // bytes of a cache line

// One register's worth of bytes as integers. By instruction where there is one: gcc takes the generic conversion apart.
inline VecI widen_codes(const int8_t* p) {
#if defined(__AVX512F__)
  return (VecI)_mm512_maskz_cvtepi8_epi32((__mmask16)-1, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (VecI)_mm256_cvtepi8_epi32(_mm_loadu_si64(p));
#elif defined(__SSE4_1__) && VK_VECTOR_BYTES == 16
  return (VecI)_mm_cvtepi8_epi32(_mm_loadu_si32(p));
#else
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// The same of zero points, which are below 16 and so have no sign either way.
inline VecI widen_zeros(const char* p) { return widen_codes(reinterpret_cast<const int8_t*>(p)); }

// Where the parts of a packed weight begin, in bytes.
struct PackedLayout {
  int64_t scale = 0, panels = 0, block = 0, zero_points = 0, total = 0;

  PackedLayout(WeightKind kind, int64_t n, int64_t k, int64_t group) {
    const int64_t padded = round_up(n, kLanes);
    if (kind == WeightKind::kInt4) {
      const int64_t groups = group > 0 ? k / group : 0;
      zero_points = round_up(groups * kLanes, kLine);
      block = round_up(zero_points + groups * kLanes * 4 + k / 8 * kLanes * 4, kLine);
      total = padded / kLanes * block;
      return;
    }
    const bool codes = kind == WeightKind::kInt8Dot || kind == WeightKind::kInt8;
    if (codes) {
      scale = round_up(padded * 4, kLine);
      panels = 2 * scale;
    }
    total = panels + padded * depth_bytes(kind, k);
  }

  // Bytes of one column's depth.
  static int64_t depth_bytes(WeightKind kind, int64_t k) {
    switch (kind) {
      case WeightKind::kInt8Dot:
        return 4 * ceil_div(k, OpI8::kDepthPerUnit);
      case WeightKind::kInt8:
        return round_up(k, 2);
      case WeightKind::kBF16:
        return 4 * ceil_div(k, OpBF16::kDepthPerUnit);
      default:
        return 4 * k;
    }
  }
};

inline int64_t packed_bytes(WeightKind kind, int64_t n, int64_t k, int64_t group) {
  return PackedLayout(kind, n, k, group).total;
}

// Weights. Made once, so written for clarity.

inline void pack_int8(WeightKind kind, const CanonicalWeight& w, int64_t col0, int64_t col1, char* packed) {
  const PackedLayout layout(kind, w.n, w.k, 0);
  auto* compensation = reinterpret_cast<int32_t*>(packed);
  auto* scale = reinterpret_cast<float*>(packed + layout.scale);
  const auto* codes = static_cast<const int8_t*>(w.codes);
  const bool dot = kind == WeightKind::kInt8Dot;
  const int64_t depth_bytes = PackedLayout::depth_bytes(kind, w.k);
  const int64_t depth = dot ? depth_bytes / 4 * OpI8::kDepthPerUnit : depth_bytes;
  for (int64_t col = col0; col < col1; col += kCols) {
    const int64_t width = panel_width(w.n, col);
    char* panel = packed + layout.panels + col * depth_bytes;
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t n = col + lane;
      int32_t sum = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const int8_t code = n < w.n && k < w.k ? codes[n * w.row_stride + k * w.col_stride] : int8_t{0};
        sum += code;
        if (!dot) {
          panel[k * width + lane] = code;
        } else if constexpr (OpI8::kDepthPerUnit == 4) {
          panel[(k / 4 * width + lane) * 4 + k % 4] = code;
        } else {
          const int16_t wide = code;
          std::memcpy(panel + (k / 2 * width + lane) * 4 + k % 2 * 2, &wide, sizeof wide);
        }
      }
      compensation[n] = static_cast<int32_t>(static_cast<uint32_t>(sum) * (dot ? OpI8::kLeftOffset : 0));
      scale[n] = n < w.n ? w.scale[n] : 0.0f;
    }
  }
}

inline void pack_int4(const CanonicalWeight& w, int64_t col0, int64_t col1, char* packed) {
  const PackedLayout layout(WeightKind::kInt4, w.n, w.k, w.group);
  const auto* codes = static_cast<const uint8_t*>(w.codes);
  const int64_t groups = w.k / w.group, group_bytes = kLanes * 4 + w.group / 8 * kLanes * 4;
  for (int64_t col = col0; col < col1; col += kLanes) {
    char* block = packed + col / kLanes * layout.block;
    std::memset(block, 0, static_cast<size_t>(layout.block));
    const int64_t lanes = w.n - col < kLanes ? w.n - col : kLanes;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t n = col + lane;
      for (int64_t g = 0; g < groups; ++g) {
        block[g * kLanes + lane] = static_cast<char>(w.zero_point[n * groups + g]);
        char* at = block + layout.zero_points + g * group_bytes;
        std::memcpy(at + lane * 4, w.scale + n * groups + g, sizeof(float));
        at += kLanes * 4 + lane * 4;
        for (int64_t i = 0; i < w.group; ++i) {
          const int64_t k = g * w.group + i;
          const int byte = codes[n * w.row_stride + k / 2 * w.col_stride];
          const int code = k % 2 == 0 ? byte & 15 : byte >> 4;
          char& to = at[i / 8 * kLanes * 4 + i % 4];
          to = static_cast<char>(to | (i % 8 < 4 ? code : code << 4));
        }
      }
    }
  }
}

inline void pack_weight(WeightKind kind, const CanonicalWeight& w, int64_t col0, int64_t col1, char* packed) {
  const Matrix m{w.codes, w.dtype, w.row_stride, w.col_stride};
  auto* panel = reinterpret_cast<uint32_t*>(packed + col0 * PackedLayout::depth_bytes(kind, w.k));
  switch (kind) {
    case WeightKind::kInt8Dot:
    case WeightKind::kInt8:
      return pack_int8(kind, w, col0, col1, packed);
    case WeightKind::kInt4:
      return pack_int4(w, col0, col1, packed);
    case WeightKind::kBF16:
      return pack_depth_in_row<OpBF16, kCols>(m, col0, col1 - col0, w.k, panel);
    case WeightKind::kF32:
      return pack_depth_in_row<OpF32, kCols>(m, col0, col1 - col0, w.k, panel);
  }
}

// Activations.

// The same where the rows of the operand are columns in memory, as those of a transposed matrix are: depth outside,
// panels inside, so that each row of memory is read once, along its length.
template <class Op>
void prepare_columns(const LinearProblem& p, int64_t row0, int64_t row1, uint32_t* left) {
  const int64_t units = ceil_div(p.k, Op::kDepthPerUnit);
  const Matrix m{p.x.data, p.x.dtype, p.x.col_stride, 1};  // [k, m]
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t row = row0; row < row1; row += kRows) {
      // kRows values are half a register or a whole one.
      const int count = static_cast<int>(row1 - row < kRows ? row1 - row : kRows);
      VecU v;
      if constexpr (Op::kDepthPerUnit == 1) {
        v = (VecU)load_row(m, unit, row, count);
      } else {
        const bool second = 2 * unit + 1 < p.k;
        v = bf16_pairs(load_row(m, 2 * unit, row, count), second ? load_row(m, 2 * unit + 1, row, count) : VecF{});
      }
      std::memcpy(left + (row - row0) * units + unit * kRows, &v, sizeof(uint32_t) * kRows);
    }
  }
}

// Rows [row0, row1) of p.x as left panels, converted to Op's units.
template <class Op>
void prepare_float(const LinearProblem& p, int64_t row0, int64_t row1, uint32_t* left) {
  if (p.x.row_stride == 1 && p.x.col_stride > 1 && p.x.inner >= p.m) return prepare_columns<Op>(p, row0, row1, left);
  const int64_t units = ceil_div(p.k, Op::kDepthPerUnit);
  for (int64_t row = row0; row < row1; row += kRows) {
    const int rows = static_cast<int>(row1 - row < kRows ? row1 - row : kRows);
    Matrix m[kRows];
    for (int i = 0; i < rows; ++i) m[i] = row_of(p.x, row + i);
    for (int64_t unit = 0; unit < units; unit += kLanes) {
      VecU v[kRows];
      for (int i = 0; i < kRows; ++i) v[i] = i < rows ? load_row_units<Op>(m[i], 0, unit, p.k) : VecU{};
      const int count = static_cast<int>(units - unit < kLanes ? units - unit : kLanes);
      store_left_panel(v, count, left + (row - row0) * units + unit * kRows);
    }
  }
}

// The scale of one row, as the reference defines it: largest magnitude / 127, NaN where that is not finite; a static
// scale for every row without a NaN.
inline float scale_of_row(const LinearProblem& p, const Matrix& m) {
  VecI largest = {};  // magnitudes of float32 order like integers, infinity and then NaN above all
  int64_t k = 0;
  if (m.dtype == Dtype::kF32 && m.col_stride == 1) {
    VecI more[4] = {};
    for (; k + 4 * kLanes <= p.k; k += 4 * kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const VecI bits = (VecI)magnitude(load(static_cast<const float*>(m.data) + k + j * kLanes));
        more[j] = bits > more[j] ? bits : more[j];
      }
    }
    for (const VecI& v : more) largest = v > largest ? v : largest;
  }
  for (; k + kLanes <= p.k; k += kLanes) {
    const VecI bits = (VecI)magnitude(load_row(m, 0, k, kLanes));
    largest = bits > largest ? bits : largest;
  }
  if (k < p.k) {
    const VecI bits = (VecI)magnitude(load_row(m, 0, k, static_cast<int>(p.k - k)));
    largest = bits > largest ? bits : largest;
  }
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
  float x;
  std::memcpy(&x, &most, sizeof x);
  if (!p.static_scale) return x < kInfinity ? x / 127.0f : __builtin_nanf("");
  return x == x && p.input_scale > 0.0f && p.input_scale < kInfinity ? p.input_scale : __builtin_nanf("");
}

// round(clamp(x / scale, -127, 127)), ties to even, of the true quotient.
struct RowQuantizer {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
  float scale, inverse;
  bool usable, invertible, may_leave;  // may_leave: the scale is not the row's own

  RowQuantizer(float s, bool fixed)
      : scale(s), inverse(1.0f / s), usable(s > 0.0f), invertible(s > 1e-30f && s < 1e30f), may_leave(fixed) {}

  static VecF clamp(VecF ratio) {
    ratio = ratio > 127.0f ? splat(127.0f) : ratio;
    return ratio < -127.0f ? splat(-127.0f) : ratio;
  }

  static VecI code(VecF ratio) { return (VecI)(ratio + kRound) - (VecI)splat(kRound); }

  // N registers of inputs become codes plus the left operand's offset.
  template <int N>
  void operator()(VecF (&x)[N], VecI (&codes)[N]) const {
#if defined(__AVX512F__)
    if (__builtin_expect(invertible, 1)) {
      // The product with the inverse is within 1.6e-5 of the quotient, so only near a tie can it round to another code;
      // the row's own largest magnitude stays within 127 without a clamp.
      constexpr float kNearTie = 0.5f - 3e-5f;
      VecF ratio[N];
      VecF farthest = {};
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        ratio[j] = x[j] * inverse;
        if (may_leave) ratio[j] = clamp(ratio[j]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const VecF shifted = ratio[j] + kRound;
        const VecF distance = magnitude(ratio[j] - (shifted - kRound));
        farthest = (VecF)_mm512_maskz_max_ps((__mmask16)-1, (__m512)farthest, (__m512)distance);
        codes[j] = (VecI)shifted - ((VecI)splat(kRound) - OpI8::kLeftOffset);
      }
      if (__builtin_expect(_mm512_cmp_ps_mask((__m512)farthest, (__m512)splat(kNearTie), _CMP_GT_OQ) == 0, 1)) return;
    }
#endif
    for (int j = 0; j < N; ++j) codes[j] = (usable ? code(clamp(x[j] / scale)) : VecI{}) + OpI8::kLeftOffset;
  }
};

#if defined(__AVX512VNNI__)
// Four registers of codes as one register of units, in order.
inline VecU code_units(const VecI (&c)[4]) {
  const __m512i low = _mm512_packus_epi32((__m512i)c[0], (__m512i)c[1]);
  const __m512i high = _mm512_packus_epi32((__m512i)c[2], (__m512i)c[3]);
  // The packs work within quarters of a register, which leaves the units transposed, four by four.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (VecU)_mm512_maskz_permutexvar_epi32((__mmask16)-1, order, _mm512_packus_epi16(low, high));
}
#else
// Two registers of codes as one register of units, in order.
inline VecU code_units(const VecI (&c)[2]) {
  typedef int16_t Codes __attribute__((vector_size(kLanes * 2)));
  const Codes halves[2] = {__builtin_convertvector(c[0], Codes), __builtin_convertvector(c[1], Codes)};
  VecU units;
  std::memcpy(&units, halves, sizeof units);
  return units;
}
#endif

inline void prepare_int8(const LinearProblem& p, int64_t row0, int64_t row1, uint32_t* left) {
  constexpr int kPerUnit = OpI8::kDepthPerUnit;
  const int64_t units = ceil_div(p.k, kPerUnit);
  for (int64_t row = row0; row < row1; row += kRows) {
    const int rows = static_cast<int>(row1 - row < kRows ? row1 - row : kRows);
    Matrix m[kRows];
    float scales[kRows];
    for (int i = 0; i < rows; ++i) {
      m[i] = row_of(p.x, row + i);
      scales[i] = p.row_scale[row + i] = scale_of_row(p, m[i]);
    }
    for (int64_t unit = 0; unit < units; unit += kLanes) {
      const int64_t k = unit * kPerUnit, rest = p.k - k;
      VecU v[kRows] = {};
      for (int i = 0; i < rows; ++i) {
        VecF x[kPerUnit];
        if (rest >= kLanes * kPerUnit && m[i].dtype == Dtype::kF32 && m[i].col_stride == 1) {
          const float* from = static_cast<const float*>(m[i].data) + k;
          for (int part = 0; part < kPerUnit; ++part) x[part] = load(from + part * kLanes);
        } else {
          for (int part = 0; part < kPerUnit; ++part) {
            const int64_t left_over = rest - part * kLanes;
            const int count = static_cast<int>(left_over < kLanes ? left_over : kLanes);
            x[part] = count > 0 ? load_row(m[i], 0, k + part * kLanes, count) : VecF{};
          }
        }
        VecI codes[kPerUnit];
        RowQuantizer(scales[i], p.static_scale)(x, codes);
        v[i] = code_units(codes);
      }
      const int count = static_cast<int>(units - unit < kLanes ? units - unit : kLanes);
      store_left_panel(v, count, left + (row - row0) * units + unit * kRows);
    }
  }
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// What decides a top-k result: exact scores in the order of `tree_sum`. And the queries, prepared for a scan.
//
// tree_sum: while more than one term is left, with h the largest power of two below their number, term i + h is added
// to term i. Products of float32 numbers are exact in float64, so only the squares of "l2", whose factors may be
// rounded, must be kept from being fused into the addition that follows.
#pragma once

#include "cpu/topk.h"
#include "engine/pack.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

inline constexpr int kDoubles = kLanes / 2;
typedef double VecD __attribute__((vector_size(VK_VECTOR_BYTES)));
typedef double VecDUnaligned __attribute__((vector_size(VK_VECTOR_BYTES), aligned(8), may_alias));
typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));

inline constexpr double kNormFloorSquare = 0x1.357c299a88ea7p-80;  // 1e-12 squared, as the reference rounds it

inline VecD load_doubles(const double* p) { return *reinterpret_cast<const VecDUnaligned*>(p); }
inline void store_doubles(double* p, VecD v) { *reinterpret_cast<VecDUnaligned*>(p) = v; }
inline VecD widen(const float* p) { return __builtin_convertvector(*reinterpret_cast<const HalfFUnaligned*>(p), VecD); }
inline VecF from_bytes(const int8_t* p) {
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(p), VecI), VecF);
}

// A value that the compiler may not fuse with what is done to it next.
template <class T>
inline T rounded(T x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

struct ProductTerms {
  const double* q;
  const float* x;
  double one(int64_t i) const { return q[i] * static_cast<double>(x[i]); }
  VecD many(int64_t i) const { return load_doubles(q + i) * widen(x + i); }
};

struct SquareTerms {
  const float* x;
  double one(int64_t i) const { return static_cast<double>(x[i]) * static_cast<double>(x[i]); }
  VecD many(int64_t i) const {
    const VecD v = widen(x + i);
    return v * v;
  }
};

struct DistanceTerms {
  const double* q;
  const float* x;
  double one(int64_t i) const {
    const double d = q[i] - static_cast<double>(x[i]);
    return rounded(d * d);
  }
  VecD many(int64_t i) const {
    const VecD d = load_doubles(q + i) - widen(x + i);
    return rounded(d * d);
  }
};

// `work`: as many numbers as the largest power of two below d.
template <class Terms>
double tree_sum(const Terms& terms, int64_t d, double* work) {
  if (d <= 1) return d == 0 ? 0.0 : terms.one(0);
  int64_t half = 1;
  while (2 * half < d) half *= 2;
  const int64_t folded = d - half;
  int64_t i = 0;
  if (folded == half && half >= 4 * kDoubles) {
    // A power of two: three levels at once, in registers.
    half /= 4;
    for (; i < half; i += kDoubles) {
      const VecD a = terms.many(i) + terms.many(i + 4 * half), b = terms.many(i + 2 * half) + terms.many(i + 6 * half);
      const VecD c = terms.many(i + half) + terms.many(i + 5 * half);
      const VecD e = terms.many(i + 3 * half) + terms.many(i + 7 * half);
      store_doubles(work + i, (a + b) + (c + e));
    }
  } else {
    for (; i + kDoubles <= folded; i += kDoubles) store_doubles(work + i, terms.many(i) + terms.many(i + half));
    for (; i < folded; ++i) work[i] = terms.one(i) + terms.one(i + half);
    for (; i + kDoubles <= half; i += kDoubles) store_doubles(work + i, terms.many(i));
    for (; i < half; ++i) work[i] = terms.one(i);
  }
  while (half > kDoubles) {
    half /= 2;
    for (i = 0; i < half; i += kDoubles)
      store_doubles(work + i, load_doubles(work + i) + load_doubles(work + i + half));
  }
  while (half > 1) {
    half /= 2;
    for (i = 0; i < half; ++i) work[i] += work[i + half];
  }
  return work[0];
}

inline double floored_norm(double square) {
  // A NaN passes: the comparison is false.
  return __builtin_sqrt(square < kNormFloorSquare ? kNormFloorSquare : square);
}

// A row as float32, in place where it lies so, else in `buffer` [d].
inline const float* float_row(const Matrix& m, const float* scale, int64_t row, int64_t d, float* buffer) {
  if (m.dtype == Dtype::kF32 && m.col_stride == 1) return static_cast<const float*>(m.data) + row * m.row_stride;
  if (m.dtype == Dtype::kI8) {
    const int8_t* codes = static_cast<const int8_t*>(m.data) + row * m.row_stride;
    for (int64_t i = 0; i < d; ++i) buffer[i] = static_cast<float>(codes[i * m.col_stride]) * scale[row];
    return buffer;
  }
  for (int64_t i = 0; i < d; i += kLanes) {
    const int count = static_cast<int>(d - i < kLanes ? d - i : kLanes);
    store_first(buffer + i, load_row(m, row, i, count), count);
  }
  return buffer;
}

// Brings a row that will be scored soon closer. Only a hint: nothing is read.
inline void prefetch_row(const Matrix& m, int64_t row, int64_t d) {
  if (m.col_stride != 1) return;
  const int64_t size = m.dtype == Dtype::kF32 ? 4 : m.dtype == Dtype::kBF16 ? 2 : 1;
  const char* at = static_cast<const char*>(m.data) + row * m.row_stride * size;
  for (int64_t i = 0; i < d * size && i < 4096; i += 64) __builtin_prefetch(at + i, 0, 2);
}

inline void exact_scores(const TopkScan& s, int64_t query, TopkEntry* entries, int64_t count, char* scratch) {
  auto* work = reinterpret_cast<double*>(scratch);
  auto* buffer = reinterpret_cast<float*>(work + round_up(s.d, 16));
  const double* q = s.queries.exact + query * s.d;
  auto stored = [](const TopkSegment& segment) -> const Matrix& {
    return segment.vectors.data ? segment.vectors : segment.codes;
  };
  constexpr int64_t kAhead = 2;
  for (int64_t e = 0; e < count; ++e) {
    if (e + kAhead < count && !entries[e + kAhead].scored)
      prefetch_row(stored(s.segments[entries[e + kAhead].segment]), entries[e + kAhead].row, s.d);
    TopkEntry& entry = entries[e];
    if (entry.scored) continue;
    const TopkSegment& segment = s.segments[entry.segment];
    const float* x = float_row(stored(segment), segment.scale, entry.row, s.d, buffer);
    double score;
    if (s.metric == Metric::kL2) {
      score = 0.0 - tree_sum(DistanceTerms{q, x}, s.d, work);
    } else {
      score = tree_sum(ProductTerms{q, x}, s.d, work);
      if (s.metric == Metric::kCosine)
        score = score / (s.queries.exact_norm[query] * floored_norm(tree_sum(SquareTerms{x}, s.d, work)));
    }
    entry.score = static_cast<float>(score);
    entry.scored = 1;
  }
}

// The mean of normalised prompts, summed by `tree_sum` over the prompts.
inline void mean_of_prompts(const Matrix& prompts, int64_t prompt_count, int64_t d, int64_t begin, int64_t end,
                            float* out, char* scratch) {
  auto* work = reinterpret_cast<double*>(scratch);
  double* units = work + round_up(d, 16);
  auto* buffer = reinterpret_cast<float*>(units + prompt_count * d);
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t p = 0; p < prompt_count; ++p) {
      const float* x = float_row(prompts, nullptr, c * prompt_count + p, d, buffer);
      const double norm = floored_norm(tree_sum(SquareTerms{x}, d, work));
      for (int64_t i = 0; i < d; ++i) units[p * d + i] = static_cast<double>(x[i]) / norm;
    }
    int64_t count = prompt_count;
    while (count > 1) {
      int64_t half = 1;
      while (2 * half < count) half *= 2;
      for (int64_t i = 0; i < (count - half) * d; ++i) units[i] += units[half * d + i];
      count = half;
    }
    for (int64_t i = 0; i < d; ++i) out[c * d + i] = static_cast<float>(units[i] / static_cast<double>(prompt_count));
  }
}

// +1 or -1, the same in ops/_index_store.py.
inline float rotation_sign(uint32_t i, uint32_t pass) {
  uint32_t h = (i + 1) * 2654435761u + pass * 40503u;
  h ^= h >> 15;
  h *= 2246822519u;
  h ^= h >> 13;
  return (h & 1u) ? -1.0f : 1.0f;
}

// The rounds within a register: lane i takes lane i ^ d, plus itself where bit d of i is 0, minus itself where it is 1.
template <int... I>
inline VecF hadamard_lanes(VecF v, std::integer_sequence<int, I...> lanes) {
#pragma GCC unroll 4
  for (int d = 1; d < kLanes; d *= 2) {
    const VecF sign = {(I & d ? -1.0f : 1.0f)...};
    v = swap_halves(v, d, lanes) + v * sign;
  }
  return v;
}

inline void hadamard(float* x, int64_t n) {
  int64_t h = 1;
  if (n >= kLanes) {
    for (int64_t i = 0; i < n; i += kLanes)
      store(x + i, hadamard_lanes(load(x + i), std::make_integer_sequence<int, kLanes>{}));
    h = kLanes;
  }
  for (; h < n; h *= 2) {
    for (int64_t i = 0; i < n; i += 2 * h) {
      if (h < kLanes) {
        for (int64_t j = i; j < i + h; ++j) {
          const float a = x[j], b = x[j + h];
          x[j] = a + b;
          x[j + h] = a - b;
        }
      } else {
        for (int64_t j = i; j < i + h; j += kLanes) {
          const VecF a = load(x + j), b = load(x + j + h);
          store(x + j, a + b);
          store(x + j + h, a - b);
        }
      }
    }
  }
}

// An orthogonal map that spreads what a few dimensions hold over all: signs and a Hadamard transform of the first 2^p
// dimensions, then of the last 2^p. Rows and queries go through the same one, so products stay.
inline void rotate(float* x, int64_t d) {
  int64_t n = 1;
  while (2 * n <= d) n *= 2;
  const float norm = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(n)));
  for (uint32_t pass = 0; pass < (n == d ? 1u : 2u); ++pass) {
    float* from = pass == 0 ? x : x + d - n;
    for (int64_t i = 0; i < n; ++i) from[i] *= rotation_sign(static_cast<uint32_t>(i), pass) * norm;
    hadamard(from, n);
  }
}

inline VecF round_half_even(VecF x) {
  // |x| is below 2^22: adding and taking off 1.5 * 2^23 leaves the nearest integer.
  constexpr float kRound = 12582912.0f;
  return rounded(x + kRound) - kRound;
}

inline double reduce_doubles(VecD v) {
  double total = 0.0;
  for (int i = 0; i < kDoubles; ++i) total += v[i];
  return total;
}

// Codes of `rotate(row - centre)` for rows [begin, end), and bounds on how far they are from it.
inline void encode_rows(const CodesCall& c, int64_t begin, int64_t end, char* scratch) {
  auto* y = reinterpret_cast<float*>(scratch);
  const int64_t d = c.d;
  double centre_square = 0.0;
  for (int64_t j = 0; j < d; ++j) centre_square += static_cast<double>(c.centre[j]) * static_cast<double>(c.centre[j]);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = c.vectors + row * d;
    VecD squares = {};
    VecF largest = {};
    int64_t j = 0;
    for (; j + kLanes <= d; j += kLanes) {
      const VecD low = widen(x + j), high = widen(x + j + kDoubles);
      squares += low * low + high * high;
      store(y + j, load(x + j) - load(c.centre + j));
    }
    double square = reduce_doubles(squares);
    for (; j < d; ++j) {
      square += static_cast<double>(x[j]) * static_cast<double>(x[j]);
      y[j] = x[j] - c.centre[j];
    }
    for (; j < round_up(d, kLanes); ++j) y[j] = 0.0f;
    rotate(y, d);
    VecD lengths = {};
    for (j = 0; j < d; j += kLanes) {
      const VecF v = load(y + j);
      largest = max_keep(largest, v < 0.0f ? -v : v);
      const VecD low = widen(y + j), high = widen(y + j + kDoubles);
      lengths += low * low + high * high;
    }
    const double norm = __builtin_sqrt(square), length = __builtin_sqrt(reduce_doubles(lengths));
    const bool usable = norm < 1e30 && length < 1e30;
    const float most = usable ? reduce_max(largest) : 0.0f;
    const float scale = usable ? most / 127.0f : __builtin_nanf("");
    const float divisor = scale > 0.0f ? scale : 1.0f;
    VecD errors = {};
    alignas(64) int8_t codes[kLanes];
    for (j = 0; j < d; j += kLanes) {
      const VecF v = usable && scale > 0.0f ? load(y + j) : VecF{};
      VecF code = round_half_even(v / divisor);
      code = code > 127.0f ? splat(127.0f) : code < -127.0f ? splat(-127.0f) : code;
      alignas(64) float off[kLanes];
      store(off, load(y + j) - code * divisor);
      const VecD low = widen(off), high = widen(off + kDoubles);
      errors += low * low + high * high;
      *reinterpret_cast<Bytes*>(codes) = __builtin_convertvector(__builtin_convertvector(code, VecI), Bytes);
      std::memcpy(c.codes + row * d + j, codes, static_cast<size_t>(d - j < kLanes ? d - j : kLanes));
    }
    c.scale[row] = scale;
    c.norm[row] = static_cast<float>(norm);
    // The rotation rounds (2 log2 D + 3 roundings of |y|), and so does the difference to the centre.
    const double error = __builtin_sqrt(reduce_doubles(errors)) * (1.0 + 1e-6) + 4e-6 * length +
                         1.3e-7 * (norm + __builtin_sqrt(centre_square)) + 1e-37;
    c.residual[row] = usable ? static_cast<float>(error * (1.0 + 1e-6)) : __builtin_nanf("");
  }
}

#if defined(__AVX512VNNI__)
inline constexpr bool kSplitQueries = true;
#else
inline constexpr bool kSplitQueries = false;
#endif

// Rows [begin, begin + kRows) of int8 queries as a left panel, which VNNI wants unsigned.
inline void pack_left_bytes(const int8_t* codes, int64_t pitch, int rows, int64_t units, uint32_t* out) {
  constexpr int kGroup = OpI8::kDepthPerUnit;
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int r = 0; r < kRows; ++r) {
      uint32_t packed = 0;
      for (int e = 0; e < kGroup; ++e) {
        const int code = (r < rows ? codes[r * pitch + unit * kGroup + e] : 0) + OpI8::kLeftOffset;
        packed |= kGroup == 4 ? static_cast<uint32_t>(code & 0xff) << (8 * e)
                              : static_cast<uint32_t>(code & 0xffff) << (16 * (e & 1));
      }
      out[unit * kRows + r] = packed;
    }
  }
}

// The query as int8: one byte per element, or two as v = 256 high + low. Returns the sum of squared errors.
inline float split_query(const TopkScan& s, int64_t i, const float* row, float step) {
  const TopkQueries& out = s.queries;
  const float inverse = 1.0f / step;
  VecF error = {};
  VecI high_sum = {}, low_sum = {};
  for (int64_t j = 0; j < s.d; j += kLanes) {
    const VecF x = load(row + j), v = round_half_even(x * inverse), off = x - v * step;
    error += off * off;
    const VecI whole = __builtin_convertvector(v, VecI);
    const VecI high = s.stream ? (whole + 128) >> 8 : whole, low = whole - (high << 8);
    high_sum += high;
    low_sum += low;
    *reinterpret_cast<Bytes*>(out.high + i * out.pitch + j) = __builtin_convertvector(high, Bytes);
    if (s.stream) *reinterpret_cast<Bytes*>(out.low + i * out.pitch + j) = __builtin_convertvector(low, Bytes);
  }
  int32_t high_total = 0, low_total = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    high_total += high_sum[lane];
    low_total += low_sum[lane];
  }
  out.high_sum[i] = 128 * high_total;
  out.low_sum[i] = 128 * low_total;
  for (int64_t j = round_up(s.d, kLanes); j < out.pitch; ++j) {
    out.high[i * out.pitch + j] = 0;
    out.low[i * out.pitch + j] = 0;
  }
  return reduce_add(error);
}

// One query: what the scan multiplies, and the numbers that its bounds need.
inline void prepare_query(const TopkScan& s, int64_t i, float* row, double* work) {
  const TopkQueries& out = s.queries;
  const int64_t d = s.d, padded = round_up(d, kLanes);
  VecD squares[2] = {}, towards[2] = {};
  for (int64_t j = 0; j < d; j += kLanes) {
    const int count = static_cast<int>(d - j < kLanes ? d - j : kLanes);
    store(row + j, load_row(s.q, s.query_row(i), j, count));
    for (int half = 0; half < 2; ++half) {
      const VecD x = widen(row + j + half * kDoubles);
      squares[half] += x * x;
      if (count == kLanes) {
        store_doubles(out.exact + i * d + j + half * kDoubles, x);
        if (s.rotated) towards[half] += x * widen(s.centre + j + half * kDoubles);
      }
    }
  }
  double towards_centre = reduce_doubles(towards[0] + towards[1]);
  for (int64_t j = d / kLanes * kLanes; j < d; ++j) {
    const double x = static_cast<double>(row[j]);
    out.exact[i * d + j] = x;
    if (s.rotated) towards_centre += x * static_cast<double>(s.centre[j]);
  }
  const double norm = __builtin_sqrt(reduce_doubles(squares[0] + squares[1]));
  const bool finite = norm < __builtin_inf();
  const double unit = norm > 0.0 && finite ? norm : 1.0;
  out.norm[i] = norm;
  if (s.metric == Metric::kCosine) out.exact_norm[i] = floored_norm(tree_sum(SquareTerms{row}, d, work));
  // A power of two brings the query near norm 1 without rounding it.
  const int exponent = -__builtin_ilogb(unit);
  const double power = __builtin_ldexp(1.0, exponent);
  if (!finite) {
    for (int64_t j = 0; j < padded; ++j) row[j] = 0.0f;
  } else if (exponent > 100 || exponent < -100) {
    for (int64_t j = 0; j < d; ++j) row[j] = static_cast<float>(out.exact[i * d + j] * power);
  } else if (exponent != 0) {
    const float narrow = static_cast<float>(power);
    for (int64_t j = 0; j < padded; j += kLanes) store(row + j, load(row + j) * narrow);
  }
  if (s.rotated) rotate(row, d);

  double factor = 1.0 / (unit * power);
  float error = 0.0f;
  if (s.codes == Dtype::kI8 && !(s.stream && !kSplitQueries)) {
    VecF largest = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const VecF x = load(row + j);
      largest = max_keep(largest, x < 0.0f ? -x : x);
    }
    const float most = reduce_max(largest), limit = s.stream ? 32000.0f : 127.0f;
    const float step = most > 0.0f ? most / limit : 1.0f;
    error = split_query(s, i, row, step);
    error = __builtin_sqrtf(error) * static_cast<float>(factor);
    factor *= static_cast<double>(step);
  } else {
    float* wide = out.wide + i * out.pitch;
    VecF squared = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const VecF x = load(row + j);
      const VecF near = s.codes == Dtype::kBF16 && !s.stream ? round_through_bf16(x) : x;
      squared += (x - near) * (x - near);
      store(wide + j, near);
    }
    for (int64_t j = padded; j < out.pitch; ++j) wide[j] = 0.0f;
    error = __builtin_sqrtf(reduce_add(squared)) * static_cast<float>(factor);
  }
  // What rounding scores to float32 may cost where they are denormal, and for "l2" what |q|^2 adds to the error.
  const double floor = 1e-12;
  double slack = 1e-37 * (s.metric == Metric::kCosine && unit < floor ? floor : 1.0) / unit;
  if (s.metric == Metric::kL2) slack += static_cast<double>(s.eta) * norm;
  const double centre = towards_centre / unit;
  out.centre[i] = centre;
  out.factor[i] = finite ? static_cast<float>(factor) : __builtin_nanf("");
  out.shift[i] = s.metric == Metric::kL2 ? static_cast<float>(1.0 / unit) : static_cast<float>(centre);
  // Squares and sums of the error are float32's: a thousandth covers them.
  out.loose[i] = error * 1.001f;
  out.slack[i] = static_cast<float>(slack * (1.0 + 1e-5));
}

inline void prepare_queries(const TopkScan& s, int64_t begin, int64_t end, char* scratch) {
  auto* work = reinterpret_cast<double*>(scratch);
  auto* row = reinterpret_cast<float*>(work + round_up(s.d, 16));
  const TopkQueries& out = s.queries;
  for (int64_t i = begin; i < end; ++i) prepare_query(s, i, row, work);
  if (s.stream) return;
  const int64_t d = s.d;
  const Matrix wide{out.wide, Dtype::kF32, out.pitch, 1};
  for (int64_t i = begin; i < end; i += kRows) {
    const int64_t rows = end - i < kRows ? end - i : kRows;
    if (s.codes == Dtype::kI8) {
      const int64_t units = ceil_div(d, OpI8::kDepthPerUnit);
      pack_left_bytes(out.high + i * out.pitch, out.pitch, static_cast<int>(rows), units, out.left + i * units);
    } else if (s.codes == Dtype::kBF16) {
      pack_depth_in_row<OpBF16, kRows>(wide, i, rows, d, out.left + i * ceil_div(d, OpBF16::kDepthPerUnit));
    } else {
      pack_depth_in_row<OpF32, kRows>(wide, i, rows, d, out.left + i * d);
    }
  }
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

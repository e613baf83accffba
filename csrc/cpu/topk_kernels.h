// SPDX-License-Identifier: Apache-2.0
// The scan of top-k similarity: tiles of products, one comparison per score, survivors into small buffers.
//
// With v = s w P + (g c) the score in the scan's units, up to a number that is the same for all rows of a query, and m
// the margin of a row, a score survives where v + m >= threshold - (what the query adds to every margin). Rows whose
// score the bounds cannot describe (norms out of range) have an infinite margin; those that hold a NaN score NaN.
#pragma once

#include "topk_exact.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

static_assert(kTopkBlock % kCols == 0 && kTopkBlock % kLanes == 0 && kTopkStride >= kTopkBlock);

// Norms between these are described by the bounds: their squares and products stay in float32's range.
inline constexpr float kSmallestNorm = 1e-15f, kLargestNorm = 1e18f;

// What a block of rows brings to every query: kept in L1 while the queries pass.
struct RowBlock {
  alignas(64) float factor[kTopkBlock], by_shift[kTopkBlock], margin[kTopkBlock], loose[kTopkBlock], hidden[kTopkBlock];
  alignas(64) float norm[kTopkBlock], code_norm[kTopkBlock];
  alignas(64) int32_t compensation[kTopkBlock];
  float largest_norm, largest_margin, largest_loose, largest_shift;
  bool special, masked;
  const TopkSegment* segment;
  uint32_t segment_index;
  int64_t first;  // within the segment
  int count, vecs;

  int64_t row(int64_t j) const { return segment->rows ? segment->rows[first + j] : first + j; }
};

inline uint32_t lane_bits(VecI condition) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)condition);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)condition));
#elif defined(__SSE2__) && VK_VECTOR_BYTES == 16
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)condition));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (static_cast<uint32_t>(condition[i]) >> 31) << i;
  return bits;
#endif
}

// Norm of a row to within D u: in float32, and again in float64 where squares may have left the range.
inline float norm_of_square(const Matrix& m, int64_t row, int64_t d, float square) {
  if (square > 1e-24f && square < 1e36f) return __builtin_sqrtf(square);
  double wide = 0.0;
  for (int64_t j = 0; j < d; ++j) {
    const double x = static_cast<double>(scalar_at(m, row, j));
    wide += x * x;
  }
  return static_cast<float>(__builtin_sqrt(wide));
}

inline float row_norm(const Matrix& m, int64_t row, int64_t d) {
  VecF sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes <= d; j += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      const VecF x = load_row(m, row, j + i * kLanes, kLanes);
      sums[i] += x * x;
    }
  }
  for (; j < d; j += kLanes) {
    const VecF x = load_row(m, row, j, static_cast<int>(d - j < kLanes ? d - j : kLanes));
    sums[0] += x * x;
  }
  return norm_of_square(m, row, d, reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// The bounds of a block, from its rows' norms; `code_norms`: |codes| were found while packing.
inline void describe_block(const TopkScan& s, RowBlock& b, bool code_norms) {
  const TopkSegment& segment = *b.segment;
  const float eta = s.eta, centre = static_cast<float>(s.centre_norm);
  b.largest_norm = b.largest_margin = b.largest_loose = b.largest_shift = 0.0f;
  b.special = false;
  for (int j = 0; j < b.count; ++j) {
    const int64_t row = b.row(j);
    const float norm = segment.norm ? segment.norm[row] : b.norm[j];
    const float scale = segment.scale ? segment.scale[row] : 1.0f;
    const float residual = segment.residual ? segment.residual[row] : 0.0f;
    b.norm[j] = norm;
    const bool usable = (norm == 0.0f || (norm >= kSmallestNorm && norm <= kLargestNorm)) && residual <= kLargestNorm &&
                        scale >= 0.0f && scale <= kLargestNorm;
    if (!usable) {
      b.special = true;
      b.factor[j] = b.by_shift[j] = b.loose[j] = 0.0f;
      b.margin[j] = kInfinity;
      // Behind the scan these are scored exactly; then they join the sum, unless it is NaN anyway.
      b.hidden[j] = norm < kInfinity ? -kInfinity : __builtin_nanf("");
      continue;
    }
    float y = code_norms ? scale * b.code_norm[j] : norm + residual + centre;
    float margin = residual + eta * (norm + residual + centre) + 1e-35f;
    float factor = scale, by_shift = 0.0f;
    if (s.metric == Metric::kCosine) {
      const float inverse = 1.0f / (norm > 1e-12f ? norm : 1e-12f);
      factor *= inverse;
      margin *= inverse;
      y *= inverse;
      by_shift = s.rotated ? inverse : 0.0f;
    } else if (s.metric == Metric::kL2) {
      factor *= 2.0f;
      margin *= 2.0f;
      y *= 2.0f;
      by_shift = -norm * norm * (1.0f - eta);
    }
    margin *= 1.0001f;
    b.factor[j] = factor;
    b.by_shift[j] = by_shift;
    b.margin[j] = margin;
    b.loose[j] = y;
    b.hidden[j] = 0.0f;
    b.largest_norm = norm > b.largest_norm ? norm : b.largest_norm;
    b.largest_margin = margin > b.largest_margin ? margin : b.largest_margin;
    b.largest_loose = y > b.largest_loose ? y : b.largest_loose;
    const float reach = by_shift < 0.0f ? -by_shift : by_shift;
    b.largest_shift = reach > b.largest_shift ? reach : b.largest_shift;
  }
  for (int j = b.count; j < b.vecs * kLanes; ++j) {
    b.factor[j] = b.by_shift[j] = b.loose[j] = 0.0f;
    b.margin[j] = b.hidden[j] = -kInfinity;
  }
}

// Whether a score of this query with a row of this block could leave float32's range, where bounds say nothing.
inline bool out_of_range(const TopkScan& s, int64_t i, const RowBlock& b) {
  const double a = s.queries.norm[i], x = static_cast<double>(b.largest_norm);
  if (s.metric == Metric::kCosine) return !(a < 1e150);
  if (s.metric == Metric::kDot) return !(a * x < 1e37);
  return !((a + x) * (a + x) < 1e36 && x * x * static_cast<double>(s.queries.shift[i]) < 1e36);
}

// A score that passed the comparison: once more with its own bounds, then into the query's buffer.
inline void consider(const TopkScan& s, int64_t part, int64_t i, const RowBlock& b, int j, float v, float product,
                     bool unknown) {
  const int64_t row = b.row(j);
  if (s.mask && !s.mask[s.query_row(i) * s.mask_stride + b.segment->first + b.first + j]) return;
  const int64_t slot = part * s.padded + i;
  float upper = kInfinity, lower = -kInfinity;
  if (b.margin[j] == kInfinity) {
    if (b.norm[j] != b.norm[j]) upper = -kInfinity;  // holds a NaN: the score is NaN, which ranks last
  } else if (!unknown) {
    const float extra = s.queries.loose[i] * b.loose[j] + s.queries.slack[i];
    float total = b.margin[j] + extra;
    if (s.metric == Metric::kL2) total -= 1.01f * s.eta * b.by_shift[j] * s.queries.shift[i];
    upper = v + extra;
    lower = upper - 2.0001f * total;
  }
  if (upper < s.threshold[slot]) return;
  TopkEntry& entry = s.entries[slot * s.capacity + s.found[slot]];
  entry.upper = upper;
  entry.lower = lower;
  entry.score = 0.0f;
  entry.logit = product * b.factor[j] * (s.logit_scale * s.queries.factor[i]);
  entry.segment = b.segment_index;
  entry.scored = 0;
  entry.row = row;
  if (++s.found[slot] == s.capacity) s.full(s, part, i);
}

// A first threshold from the first block: the k largest of the lanes' maxima belong to k different rows.
inline float first_threshold(const TopkScan& s, int64_t i, const RowBlock& b, const float* v) {
  VecF largest = splat(-kInfinity);
  for (int j = 0; j < b.vecs; ++j) largest = max_keep(largest, load(v + j * kLanes));
  alignas(64) float lanes[kLanes];
  store(lanes, largest);
  float kth = kInfinity;
  for (int64_t round = 0; round < s.k; ++round) {
    int best = 0;
    for (int lane = 1; lane < kLanes; ++lane) best = lanes[lane] > lanes[best] ? lane : best;
    kth = lanes[best];
    lanes[best] = -kInfinity;
  }
  const float total = b.largest_margin + s.queries.loose[i] * b.largest_loose + s.queries.slack[i] +
                      (s.metric == Metric::kL2 ? 1.01f * s.eta * b.largest_shift * s.queries.shift[i] : 0.0f);
  return kth - 2.001f * total;
}

// exp(logit_scale * cosine) of a row of products joins the query's running sum.
inline void add_exponentials(const TopkScan& s, int64_t slot, const RowBlock& b, const float* product, float factor) {
  alignas(64) float logits[kTopkBlock];
  const float scale = s.logit_scale * factor;
  VecF largest = splat(-kInfinity);
  for (int v = 0; v < b.vecs; ++v) {
    const VecF hidden = load(b.hidden + v * kLanes);
    VecF z = load(product + v * kLanes) * load(b.factor + v * kLanes) * scale + hidden;
    z = hidden == -kInfinity ? hidden : z;
    store(logits + v * kLanes, z);
    largest = max_keep(largest, z);
  }
  const float old_max = s.lse_max[slot], block_max = reduce_max(largest);
  const float new_max = block_max > old_max ? block_max : old_max;
  const VecF shift = splat(new_max == -kInfinity ? 0.0f : new_max);
  VecF sum = {};
  for (int v = 0; v < b.vecs; ++v) sum += exp_nonpositive(load(logits + v * kLanes) - shift);
  s.lse_max[slot] = new_max;
  s.lse_sum[slot] = s.lse_sum[slot] * exp_nonpositive(splat(old_max) - shift)[0] + reduce_add(sum);
}

// `rows` queries from `first` against a block: products in `strip`, kTopkStride apart.
inline void select_strip(const TopkScan& s, int64_t part, int64_t first, int rows, const RowBlock& b,
                         const float* strip) {
  const TopkQueries& q = s.queries;
  alignas(64) float v[kTopkBlock];
  for (int r = 0; r < rows; ++r) {
    const int64_t i = first + r, slot = part * s.padded + i;
    const float* product = strip + r * kTopkStride;
    const float factor = q.factor[i], shift = q.shift[i];
    if (s.lse_sum) add_exponentials(s, slot, b, product, factor);
    const bool unknown = out_of_range(s, i, b);
    bool seed = s.threshold[slot] == -kInfinity && !s.fixed && !s.mask && !unknown && !b.special && s.k <= kLanes &&
                b.count >= 2 * kLanes;
    float threshold = s.threshold[slot] - q.loose[i] * b.largest_loose - q.slack[i];
    if (unknown) threshold = __builtin_nanf("");
    for (int j = 0; j < b.vecs; ++j) {
      const int at = j * kLanes;
      VecF x = load(product + at) * load(b.factor + at);
      x = x * factor + (load(b.by_shift + at) * shift + load(b.margin + at));
      if (seed) {
        store(v + at, x);
        continue;
      }
      uint32_t bits = ~lane_bits(x < threshold) & ((1u << (kLanes - 1) << 1) - 1u);
      if (bits == 0) continue;
      store(v + at, x);
      for (; bits != 0; bits &= bits - 1) {
        const int lane = at + __builtin_ctz(bits);
        if (lane < b.count) consider(s, part, i, b, lane, v[lane], product[lane], unknown);
      }
    }
    if (!seed) continue;
    s.threshold[slot] = first_threshold(s, i, b, v);
    threshold = s.threshold[slot] - q.loose[i] * b.largest_loose - q.slack[i];
    for (int lane = 0; lane < b.count; ++lane) {
      if (!(v[lane] < threshold)) consider(s, part, i, b, lane, v[lane], product[lane], false);
    }
  }
}

// Whether the mask leaves any of `rows` queries a row of the block.
inline bool any_allowed(const TopkScan& s, int64_t first, int rows, const RowBlock& b) {
  for (int r = 0; r < rows; ++r) {
    const uint8_t* allowed = s.mask + s.query_row(first + r) * s.mask_stride + b.segment->first + b.first;
    for (int j = 0; j < b.count; ++j) {
      if (allowed[j]) return true;
    }
  }
  return false;
}

// Rows [row0, row1) of all segments, cut into blocks that stay within a segment.
template <class Body>
void for_blocks(const TopkScan& s, int64_t row0, int64_t row1, RowBlock& b, Body body) {
  int64_t start = 0;
  for (int64_t index = 0; index < s.segment_count; ++index) {
    const TopkSegment& segment = s.segments[index];
    const int64_t begin = row0 > start ? row0 - start : 0;
    const int64_t end = row1 - start < segment.count ? row1 - start : segment.count;
    for (int64_t at = begin; at < end; at += s.block) {
      b.segment = &segment;
      b.segment_index = static_cast<uint32_t>(index);
      b.first = at;
      b.count = static_cast<int>(end - at < s.block ? end - at : s.block);
      b.vecs = static_cast<int>(ceil_div(b.count, kLanes));
      body();
    }
    start += segment.count;
  }
}

// Units of int8 codes: four bytes, or two bytes as 16-bit numbers.
inline VecU load_byte_units(const Matrix& m, int64_t row, int64_t unit, int64_t depth) {
  constexpr int kGroup = OpI8::kDepthPerUnit;
  const int64_t first = unit * kGroup, left = depth - first;
  const int8_t* p = static_cast<const int8_t*>(m.data) + row * m.row_stride + first;
  alignas(64) int8_t bytes[kGroup * kLanes] = {};
  if (left < kGroup * kLanes) {
    std::memcpy(bytes, p, static_cast<size_t>(left));
    p = bytes;
  }
  if constexpr (kGroup == 4) {
    return load_units(reinterpret_cast<const uint32_t*>(p));
  } else {
    typedef int8_t Narrow __attribute__((vector_size(2 * kLanes), aligned(1), may_alias));
    typedef int16_t Wide __attribute__((vector_size(4 * kLanes)));
    return (VecU) __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Wide);
  }
}

template <class Op>
inline constexpr bool kOnBytes = std::is_same_v<Op, OpI8>;

template <class Op>
VecU load_code_units(const Matrix& m, int64_t row, int64_t unit, int64_t depth) {
  if constexpr (kOnBytes<Op>) {
    return load_byte_units(m, row, unit, depth);
  } else {
    return load_row_units<Op>(m, row, unit, depth);
  }
}

// Sums and squares of the codes in a register of units, added up by lane.
inline void add_code_sums(VecU units, VecI& sums, VecI& squares) {
#if defined(__AVX512VNNI__)
  sums = (VecI)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi8(1), (__m512i)units);
  const __m512i size = _mm512_abs_epi8((__m512i)units);
  squares = (VecI)_mm512_dpbusd_epi32((__m512i)squares, size, size);
#else
  const VecI low = (VecI)(units << 16) >> 16, high = (VecI)units >> 16;
  sums += low + high;
  squares += low * low + high * high;
#endif
}

// The block as right panels; for codes also what follows from their sums.
template <class Op>
void pack_block(const TopkScan& s, RowBlock& b, uint32_t* out) {
  constexpr bool kBytes = kOnBytes<Op>;
  const Matrix& m = b.segment->codes;
  const int64_t units = ceil_div(s.d, Op::kDepthPerUnit);
  for (int64_t panel = 0; panel < b.count; panel += kCols) {
    const int64_t width = panel_width(b.count, panel);
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      int64_t rows[kLanes] = {};
      int count = 0;
      for (; count < kLanes && panel + lane + count < b.count; ++count) {
        rows[count] = b.row(panel + lane + count);
        if (!kBytes && !b.segment->norm) b.norm[panel + lane + count] = row_norm(m, rows[count], s.d);
      }
      VecI sums = {}, squares = {};
      for (int64_t unit = 0; unit < units; unit += kLanes) {
        VecU square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = i < count ? load_code_units<Op>(m, rows[i], unit, s.d) : VecU{};
        transpose(square);
        const int steps = units - unit < kLanes ? static_cast<int>(units - unit) : kLanes;
        for (int step = 0; step < steps; ++step) {
          store_units(out + (unit + step) * width + lane, square[step]);
          if constexpr (kBytes) add_code_sums(square[step], sums, squares);
        }
      }
      if constexpr (kBytes) {
        store_units(reinterpret_cast<uint32_t*>(b.compensation + panel + lane), (VecU)(sums * OpI8::kLeftOffset));
        for (int i = 0; i < count; ++i)
          b.code_norm[panel + lane + i] = __builtin_sqrtf(static_cast<float>(squares[i])) * 1.0001f;
      }
    }
    out += units * width;
  }
}

// Products of a panel of queries with a packed block. Log-sum-exps want short chains of float32 sums; bounds do not.
template <class Op>
void topk_product(const uint32_t* left, const uint32_t* right, int64_t units, int rows, int count,
                  typename Op::Element* out, int64_t longest) {
  for (int64_t panel = 0; panel < count; panel += kCols) {
    const int width = static_cast<int>(panel_width(count, panel));
    const auto kernel = pick_micro_kernel<Op, LeftPanel>(rows, width);
    int64_t from = 0;
    do {
      const int64_t chain = units - from < longest ? units - from : longest;
      kernel(left + from * kRows, right + panel * units + from * width, chain, out + panel, kTopkStride, rows, width,
             from > 0);
      from += chain;
    } while (from < units);
  }
}

template <class Op>
void scan_packed(const TopkScan& s, int64_t part, int64_t row0, int64_t row1, int64_t q0, int64_t q1, char* scratch) {
  using Element = typename Op::Element;
  constexpr bool kBytes = kOnBytes<Op>;
  const int64_t units = ceil_div(s.d, Op::kDepthPerUnit);
  alignas(64) float strip[kRows * kTopkStride];
  RowBlock b;
  auto* right = reinterpret_cast<uint32_t*>(scratch);
  const int64_t longest = s.lse_sum ? ceil_div(128, Op::kDepthPerUnit) : (units > 0 ? units : 1);
  for_blocks(s, row0, row1, b, [&] {
    pack_block<Op>(s, b, right);
    describe_block(s, b, kBytes);
    for (int64_t i = q0; i < q1; i += kRows) {
      const int rows = static_cast<int>(q1 - i < kRows ? q1 - i : kRows);
      if (s.mask && !any_allowed(s, i, rows, b)) continue;
      topk_product<Op>(s.queries.left + i * units, right, units, rows, b.count, reinterpret_cast<Element*>(strip),
                       longest);
      if constexpr (kBytes) {
        for (int r = 0; r < rows; ++r) {
          for (int j = 0; j < b.vecs; ++j) {
            float* at = strip + r * kTopkStride + j * kLanes;
            const VecI sum = (VecI)load(at) - (VecI)load(reinterpret_cast<const float*>(b.compensation) + j * kLanes);
            store(at, __builtin_convertvector(sum, VecF));
          }
        }
      }
      select_strip(s, part, i, rows, b, strip);
    }
  });
}

// Rows as they lie against few queries: limited by the memory that the rows come from.

inline VecF load_element(const float* p) { return load(p); }
inline VecF load_element(const uint16_t* p) { return from_bf16(p); }
inline VecF load_element(const int8_t* p) { return from_bytes(p); }

inline constexpr int kStreamRows = 4;
inline constexpr int64_t kPrefetchRows = 8;  // rows asked for ahead of their use

// kStreamRows rows against Q queries; the rows' squares too where `squares` is set.
template <class T, int Q>
void stream_products(const T* const (&rows)[kStreamRows], const float* q, int64_t pitch, int64_t d, float* out,
                     float* squares) {
  VecF acc[kStreamRows][Q] = {}, square[kStreamRows] = {};
  auto step = [&](const VecF(&x)[kStreamRows], int64_t j) {
    for (int c = 0; c < Q; ++c) {
      const VecF y = load(q + c * pitch + j);
      for (int r = 0; r < kStreamRows; ++r) acc[r][c] += x[r] * y;
    }
    if (squares) {
      for (int r = 0; r < kStreamRows; ++r) square[r] += x[r] * x[r];
    }
  };
  int64_t j = 0;
  VecF x[kStreamRows];
  for (; j + kLanes <= d; j += kLanes) {
    for (int r = 0; r < kStreamRows; ++r) x[r] = load_element(rows[r] + j);
    step(x, j);
  }
  if (j < d) {
    for (int r = 0; r < kStreamRows; ++r) {
      alignas(64) T tail[kLanes] = {};
      std::memcpy(tail, rows[r] + j, sizeof(T) * static_cast<size_t>(d - j));
      x[r] = load_element(tail);
    }
    step(x, j);
  }
  for (int r = 0; r < kStreamRows; ++r) {
    for (int c = 0; c < Q; ++c) out[c * kTopkStride + r] = reduce_add(acc[r][c]);
    if (squares) squares[r] = reduce_add(square[r]);
  }
}

#if defined(__AVX512VNNI__)
template <int Q>
void stream_split(const int8_t* const (&rows)[kStreamRows], const TopkQueries& q, int64_t first, int64_t d,
                  float* out) {
  __m512i high[kStreamRows][Q] = {}, low[kStreamRows][Q] = {};
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t j = 0; j < d; j += 64) {
    __m512i x[kStreamRows];
    const __mmask64 there = d - j >= 64 ? ~__mmask64{0} : (__mmask64{1} << (d - j)) - 1;
    for (int r = 0; r < kStreamRows; ++r)
      x[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, rows[r] + j), offset);  // codes + 128, unsigned
    for (int c = 0; c < Q; ++c) {
      const __m512i h = _mm512_loadu_si512(q.high + (first + c) * q.pitch + j);
      const __m512i l = _mm512_loadu_si512(q.low + (first + c) * q.pitch + j);
      for (int r = 0; r < kStreamRows; ++r) {
        high[r][c] = _mm512_dpbusd_epi32(high[r][c], x[r], h);
        low[r][c] = _mm512_dpbusd_epi32(low[r][c], x[r], l);
      }
    }
  }
  for (int r = 0; r < kStreamRows; ++r) {
    for (int c = 0; c < Q; ++c) {
      const int32_t h = reduce_ints((VecI)high[r][c]) - q.high_sum[first + c];
      const int32_t l = reduce_ints((VecI)low[r][c]) - q.low_sum[first + c];
      out[c * kTopkStride + r] = 256.0f * static_cast<float>(h) + static_cast<float>(l);
    }
  }
}
#endif

template <class T>
void scan_stream(const TopkScan& s, int64_t part, int64_t row0, int64_t row1, int64_t q0, int64_t q1) {
  alignas(64) float strip[kStreamQueries * kTopkStride] = {};
  RowBlock b;
  for_blocks(s, row0, row1, b, [&] {
    const Matrix& m = b.segment->codes;
    const T* base = static_cast<const T*>(m.data);
    const int64_t bytes = s.d * static_cast<int64_t>(sizeof(T));
    for (int j = 0; j < b.count; j += kStreamRows) {
      const T* rows[kStreamRows];
      for (int r = 0; r < kStreamRows; ++r) rows[r] = base + b.row(j + r < b.count ? j + r : j) * m.row_stride;
      if (b.segment->rows) {
        // Scattered rows are not foreseen by the hardware.
        for (int r = 0; r < kStreamRows; ++r) {
          const int64_t ahead = b.first + j + kPrefetchRows + r;
          if (ahead >= b.segment->count) break;
          const char* at = reinterpret_cast<const char*>(base + b.segment->rows[ahead] * m.row_stride);
          for (int64_t line = 0; line < bytes && line < 4096; line += 64) __builtin_prefetch(at + line, 0, 3);
        }
      }
      float squares[kStreamRows];
      float* wanted = std::is_same_v<T, int8_t> || b.segment->norm ? nullptr : squares;
      for (int64_t i = q0; i < q1;) {
        const int64_t left = q1 - i;
        float* out = strip + (i - q0) * kTopkStride + j;
        const float* q = s.queries.wide + i * s.queries.pitch;
#if defined(__AVX512VNNI__)
        if constexpr (std::is_same_v<T, int8_t>) {
          if (left >= 2) {
            stream_split<2>(rows, s.queries, i, s.d, out);
            i += 2;
          } else {
            stream_split<1>(rows, s.queries, i, s.d, out);
            i += 1;
          }
          continue;
        }
#endif
        if (left >= 4) {
          stream_products<T, 4>(rows, q, s.queries.pitch, s.d, out, wanted);
          i += 4;
        } else if (left >= 2) {
          stream_products<T, 2>(rows, q, s.queries.pitch, s.d, out, wanted);
          i += 2;
        } else {
          stream_products<T, 1>(rows, q, s.queries.pitch, s.d, out, wanted);
          i += 1;
        }
        if (wanted) {
          for (int r = 0; r < kStreamRows && j + r < b.count; ++r)
            b.norm[j + r] = norm_of_square(m, b.row(j + r), s.d, squares[r]);
          wanted = nullptr;
        }
      }
    }
    describe_block(s, b, false);
    select_strip(s, part, q0, static_cast<int>(q1 - q0), b, strip);
  });
}

inline void topk_scan_part(const TopkScan& s, int64_t part, int64_t row0, int64_t row1, int64_t q0, int64_t q1,
                           char* scratch) {
  if (row0 >= row1 || q0 >= q1) return;
  switch (s.codes) {
    case Dtype::kI8:
      return s.stream ? scan_stream<int8_t>(s, part, row0, row1, q0, q1)
                      : scan_packed<OpI8>(s, part, row0, row1, q0, q1, scratch);
    case Dtype::kBF16:
      return s.stream ? scan_stream<uint16_t>(s, part, row0, row1, q0, q1)
                      : scan_packed<OpBF16>(s, part, row0, row1, q0, q1, scratch);
    default:
      return s.stream ? scan_stream<float>(s, part, row0, row1, q0, q1)
                      : scan_packed<OpF32>(s, part, row0, row1, q0, q1, scratch);
  }
}

inline constexpr TopkKernels kTopk = {
    .prepare = prepare_queries,
    .scan = topk_scan_part,
    .exact = exact_scores,
    .class_vectors = mean_of_prompts,
    .panel_rows = kRows,
    .depth_per_unit = {OpF32::kDepthPerUnit, OpBF16::kDepthPerUnit, OpI8::kDepthPerUnit},
    .split_queries = kSplitQueries,
};

}  // namespace vk::cpu::VK_ISA_NAMESPACE

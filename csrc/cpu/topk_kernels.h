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
  alignas(64) float norm[kTopkBlock], code_norm[kTopkBlock], scale[kTopkBlock], residual[kTopkBlock];
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

// Lanes that are not below the threshold; NaN, on either side, is not.
inline uint32_t lanes_at_least(VecF x, VecF threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)threshold, _CMP_NLT_UQ);
#else
  return ~lane_bits(x < threshold) & ((1u << (kLanes - 1) << 1) - 1u);
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

// Numbers of the block's rows, in their order; `otherwise` without an array, and behind the last row.
inline void gather_numbers(const RowBlock& b, const float* from, float otherwise, float* to) {
  int j = 0;
  if (from && b.segment->rows) {
    for (; j < b.count; ++j) to[j] = from[b.row(j)];
  } else if (from) {
    std::memcpy(to, from + b.first, sizeof(float) * static_cast<size_t>(b.count));
    j = b.count;
  }
  for (; j < b.vecs * kLanes; ++j) to[j] = otherwise;
}

// The bounds of a block, from its rows' norms; `code_norms`: |codes| were found while packing.
inline void describe_block(const TopkScan& s, RowBlock& b, bool code_norms) {
  const TopkSegment& segment = *b.segment;
  const float eta = s.eta, centre = static_cast<float>(s.centre_norm);
  if (segment.norm) gather_numbers(b, segment.norm, 0.0f, b.norm);
  for (int j = b.count; j < b.vecs * kLanes; ++j) b.norm[j] = b.code_norm[j] = 0.0f;
  gather_numbers(b, segment.scale, 1.0f, b.scale);
  gather_numbers(b, segment.residual, 0.0f, b.residual);
  VecF largest_norm = {}, largest_margin = {}, largest_loose = {}, largest_shift = {};
  VecI special = {};
  for (int at = 0; at < b.vecs * kLanes; at += kLanes) {
    const VecF norm = load(b.norm + at), scale = load(b.scale + at), residual = load(b.residual + at);
    // Comparisons with NaN are false: it is not usable.
    const VecI usable = ((norm == 0.0f) | ((norm >= kSmallestNorm) & (norm <= kLargestNorm))) &
                        (residual <= kLargestNorm) & (scale >= 0.0f) & (scale <= kLargestNorm);
    VecF loose = code_norms ? scale * load(b.code_norm + at) : norm + residual + centre;
    VecF margin = residual + eta * (norm + residual + centre) + 1e-35f;
    VecF factor = scale, by_shift = {};
    if (s.metric == Metric::kCosine) {
      const VecF inverse = 1.0f / (norm > 1e-12f ? norm : splat(1e-12f));
      factor *= inverse;
      margin *= inverse;
      loose *= inverse;
      if (s.rotated) by_shift = inverse;
    } else if (s.metric == Metric::kL2) {
      factor *= 2.0f;
      margin *= 2.0f;
      loose *= 2.0f;
      by_shift = -norm * norm * (1.0f - eta);
    }
    margin *= 1.0001f;
    factor = usable ? factor : VecF{};
    by_shift = usable ? by_shift : VecF{};
    loose = usable ? loose : VecF{};
    largest_norm = max_keep(largest_norm, usable ? norm : VecF{});
    largest_margin = max_keep(largest_margin, usable ? margin : VecF{});
    largest_loose = max_keep(largest_loose, loose);
    largest_shift = max_keep(largest_shift, by_shift < 0.0f ? -by_shift : by_shift);
    special |= ~usable;
    store(b.factor + at, factor);
    store(b.by_shift + at, by_shift);
    store(b.margin + at, usable ? margin : splat(kInfinity));
    store(b.loose + at, loose);
    // Rows that the bounds say nothing about are scored exactly; then they join the sum, unless it is NaN anyway.
    const VecF unusable = norm < kInfinity ? splat(-kInfinity) : splat(__builtin_nanf(""));
    store(b.hidden + at, usable ? VecF{} : unusable);
  }
  for (int j = b.count; j < b.vecs * kLanes; ++j) {
    b.factor[j] = b.by_shift[j] = b.loose[j] = 0.0f;
    b.margin[j] = b.hidden[j] = -kInfinity;
  }
  b.largest_norm = reduce_max(largest_norm);
  b.largest_margin = reduce_max(largest_margin);
  b.largest_loose = reduce_max(largest_loose);
  b.largest_shift = reduce_max(largest_shift);
  b.special = lane_bits(special) != 0;
}

// Whether a score of this query with a row of this block could leave float32's range, where bounds say nothing.
inline bool out_of_range(const TopkScan& s, int64_t i, const RowBlock& b) {
  const double a = s.queries.norm[i], x = static_cast<double>(b.largest_norm);
  if (s.metric == Metric::kCosine) return !(a < 1e150);
  if (s.metric == Metric::kDot) return !(a * x < 1e37);
  return !((a + x) * (a + x) < 1e36 && x * x * static_cast<double>(s.queries.shift[i]) < 1e36);
}

// A row that passed the comparison: once more with its own bounds, then into the query's buffer.
inline void consider(const TopkScan& s, int64_t part, int64_t i, const RowBlock& b, int j, float product,
                     bool unknown) {
  if (s.mask && !s.mask[s.query_row(i) * s.mask_stride + b.segment->first + b.first + j]) return;
  const int64_t slot = part * s.padded + i;
  float upper = kInfinity, lower = -kInfinity;
  if (b.margin[j] == kInfinity) {
    if (b.norm[j] != b.norm[j]) upper = -kInfinity;  // holds a NaN: the score is NaN, which ranks last
  } else if (!unknown) {
    const float extra = s.queries.loose[i] * b.loose[j] + s.queries.slack[i];
    float total = b.margin[j] + extra;
    if (s.metric == Metric::kL2) total -= 1.01f * s.eta * b.by_shift[j] * s.queries.shift[i];
    const float v = product * b.factor[j] * s.queries.factor[i] + b.by_shift[j] * s.queries.shift[i];
    upper = v + (b.margin[j] + extra);
    lower = upper - 2.0001f * total;
  }
  if (upper < s.threshold_of(part, i)) return;
  TopkEntry& entry = s.entries[slot * s.capacity + s.found[slot]];
  entry.upper = upper;
  entry.lower = lower;
  entry.score = 0.0f;
  entry.logit = product * b.factor[j] * (s.logit_scale * s.queries.factor[i]);
  entry.segment = b.segment_index;
  entry.scored = 0;
  entry.row = b.row(j);
  if (++s.found[slot] == s.capacity) s.full(s, part, i);
}

// A first threshold from the first block: the k largest of the lanes' maxima belong to k different rows.
inline float first_threshold(const TopkScan& s, int64_t i, const RowBlock& b, VecF largest) {
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

// A register of products: sums of bytes become numbers, less what the offset of the left operand added.
template <bool kBytes>
VecF products_at(const float* strip, const RowBlock& b, int at) {
  if constexpr (kBytes) {
    const VecI offset = (VecI)load(reinterpret_cast<const float*>(b.compensation + at));
    return __builtin_convertvector((VecI)load(strip + at) - offset, VecF);
  } else {
    return load(strip + at);
  }
}

// `rows` queries from `first` against a block: products in `strip`, kTopkStride apart. kShift: `by_shift` is not 0.
template <bool kBytes, bool kShift>
void select_rows(const TopkScan& s, int64_t part, int64_t first, int rows, const RowBlock& b, const float* strip) {
  const TopkQueries& q = s.queries;
  uint32_t passed[kTopkBlock / kLanes];
  for (int r = 0; r < rows; ++r) {
    const int64_t i = first + r, slot = part * s.padded + i;
    const float* product = strip + r * kTopkStride;
    const float factor = q.factor[i], shift = q.shift[i];
    if (s.lse_sum) add_exponentials(s, slot, b, product, factor);
    const bool unknown = out_of_range(s, i, b);
    auto bounded = [&](int at) {
      const VecF x = products_at<kBytes>(product, b, at) * load(b.factor + at);
      if constexpr (kShift) return x * factor + (load(b.by_shift + at) * shift + load(b.margin + at));
      return x * factor + load(b.margin + at);
    };
    float reached = s.threshold_of(part, i);
    if (reached == -kInfinity && !s.fixed && !s.mask && !unknown && !b.special && s.k <= kLanes &&
        b.count >= 2 * kLanes) {
      VecF largest = splat(-kInfinity);
      for (int j = 0; j < b.vecs; ++j) largest = max_keep(largest, bounded(j * kLanes));
      reached = first_threshold(s, i, b, largest);
      s.raise_threshold(part, i, reached);
    }
    const float limit = reached - q.loose[i] * b.largest_loose - q.slack[i];
    const VecF threshold = splat(unknown ? __builtin_nanf("") : limit);
    uint32_t any = 0;
#pragma GCC unroll 3
    for (int j = 0; j < b.vecs; ++j) {
      passed[j] = lanes_at_least(bounded(j * kLanes), threshold);
      any |= passed[j];
    }
    if (any == 0) continue;
    for (int j = 0; j < b.vecs; ++j) {
      if (passed[j] == 0) continue;
      alignas(64) float values[kLanes];
      store(values, products_at<kBytes>(product, b, j * kLanes));
      for (uint32_t bits = passed[j]; bits != 0; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits), at = j * kLanes + lane;
        if (at < b.count) consider(s, part, i, b, at, values[lane], unknown);
      }
    }
  }
}

template <bool kBytes>
void select_strip(const TopkScan& s, int64_t part, int64_t first, int rows, const RowBlock& b, const float* strip) {
  const bool shifts = s.metric == Metric::kL2 || (s.metric == Metric::kCosine && s.rotated);
  (shifts ? select_rows<kBytes, true> : select_rows<kBytes, false>)(s, part, first, rows, b, strip);
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

template <class Op>
inline constexpr bool kOnBytes = std::is_same_v<Op, OpI8>;

// Units of a row whose elements lie in sequence; those behind the last element are 0.
inline VecU load_units_of(const float* p, int64_t left) {
  return (VecU)(left >= kLanes ? load(p) : load_first(p, static_cast<int>(left)));
}
inline VecU load_units_of(const uint16_t* p, int64_t left) {
  alignas(64) uint16_t tail[2 * kLanes] = {};
  if (left < 2 * kLanes) {
    std::memcpy(tail, p, sizeof(uint16_t) * static_cast<size_t>(left));
    p = tail;
  }
  return load_units(reinterpret_cast<const uint32_t*>(p));
}
// Four bytes, or two as 16-bit numbers.
inline VecU load_units_of(const int8_t* p, int64_t left) {
  constexpr int kBytes = OpI8::kDepthPerUnit * kLanes;
  alignas(64) int8_t tail[kBytes] = {};
  if (left < kBytes) {
    std::memcpy(tail, p, static_cast<size_t>(left));
    p = tail;
  }
  if constexpr (OpI8::kDepthPerUnit == 4) {
    return load_units(reinterpret_cast<const uint32_t*>(p));
  } else {
    typedef int8_t Narrow __attribute__((vector_size(2 * kLanes), aligned(1), may_alias));
    typedef int16_t Wide __attribute__((vector_size(4 * kLanes)));
    return (VecU) __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Wide);
  }
}

// What is summed over a register of units, by lane: squares of vectors, sums and squares of codes.
template <class Op>
struct UnitSums {
  VecF squares[2] = {};
  void add(VecU units, int step) {
    if constexpr (Op::kDepthPerUnit == 1) {
      squares[step & 1] += (VecF)units * (VecF)units;
    } else {
      const VecF low = (VecF)(units << 16), high = (VecF)(units & 0xffff0000u);
      squares[0] += low * low;
      squares[1] += high * high;
    }
  }
};
template <>
struct UnitSums<OpI8> {
  VecI sums = {}, squares = {};
  void add(VecU units, int) {
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
};

// kLanes rows (fewer at the end) as `units` registers of the panel, `width` apart. Element: of the rows in memory.
template <class Op, class Element>
void pack_lanes(const TopkScan& s, RowBlock& b, int64_t at, int64_t units, int64_t width, uint32_t* out) {
  const Matrix& m = b.segment->codes;
  const Element* rows[kLanes] = {};
  int64_t index[kLanes] = {};
  int count = 0;
  for (; count < kLanes && at + count < b.count; ++count) {
    index[count] = b.row(at + count);
    rows[count] = static_cast<const Element*>(m.data) + index[count] * m.row_stride;
  }
  const bool in_line = m.col_stride == 1;
  UnitSums<Op> sums;
  for (int64_t unit = 0; unit < units; unit += kLanes) {
    VecU square[kLanes];
    const int64_t first = unit * Op::kDepthPerUnit, left = s.d - first;
    if (in_line && count == kLanes && left >= Op::kDepthPerUnit * kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load_units_of(rows[i] + first, Op::kDepthPerUnit * kLanes);
    } else if (in_line) {
      for (int i = 0; i < kLanes; ++i) square[i] = i < count ? load_units_of(rows[i] + first, left) : VecU{};
    } else {
      for (int i = 0; i < kLanes; ++i) {
        square[i] = VecU{};
        if constexpr (!kOnBytes<Op>) {  // codes are always in line
          if (i < count) square[i] = load_row_units<Op>(m, index[i], unit, s.d);
        }
      }
    }
    transpose(square);
    const int64_t steps = units - unit < kLanes ? units - unit : kLanes;
    if (steps == kLanes) {
#pragma GCC unroll 16
      for (int step = 0; step < kLanes; ++step) {
        store_units(out + (unit + step) * width, square[step]);
        sums.add(square[step], step);
      }
    } else {
      for (int step = 0; step < steps; ++step) {
        store_units(out + (unit + step) * width, square[step]);
        sums.add(square[step], step);
      }
    }
  }
  if constexpr (kOnBytes<Op>) {
    store_units(reinterpret_cast<uint32_t*>(b.compensation + at), (VecU)(sums.sums * OpI8::kLeftOffset));
    for (int i = 0; i < count; ++i)
      b.code_norm[at + i] = __builtin_sqrtf(static_cast<float>(sums.squares[i])) * 1.0001f;
  } else if (!b.segment->norm) {
    const VecF total = sums.squares[0] + sums.squares[1];
    for (int i = 0; i < count; ++i) b.norm[at + i] = norm_of_square(m, index[i], s.d, total[i]);
  }
}

// The block as right panels, and what its rows' norms and codes' sums are.
template <class Op, class Element>
void pack_block(const TopkScan& s, RowBlock& b, uint32_t* out) {
  const int64_t units = ceil_div(s.d, Op::kDepthPerUnit);
  for (int64_t panel = 0; panel < b.count; panel += kCols) {
    const int64_t width = panel_width(b.count, panel);
    for (int64_t lane = 0; lane < width; lane += kLanes)
      pack_lanes<Op, Element>(s, b, panel + lane, units, width, out + lane);
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
  using Stored =
      std::conditional_t<kOnBytes<Op>, int8_t, std::conditional_t<std::is_same_v<Op, OpF32>, float, uint16_t>>;
  constexpr bool kBytes = kOnBytes<Op>;
  const int64_t units = ceil_div(s.d, Op::kDepthPerUnit);
  alignas(64) float strip[kRows * kTopkStride];
  RowBlock b;
  auto* right = reinterpret_cast<uint32_t*>(scratch);
  const int64_t longest = s.lse_sum ? ceil_div(128, Op::kDepthPerUnit) : (units > 0 ? units : 1);
  for_blocks(s, row0, row1, b, [&] {
    pack_block<Op, Stored>(s, b, right);
    describe_block(s, b, kBytes);
    for (int64_t i = q0; i < q1; i += kRows) {
      const int rows = static_cast<int>(q1 - i < kRows ? q1 - i : kRows);
      if (s.mask && !any_allowed(s, i, rows, b)) continue;
      topk_product<Op>(s.queries.left + i * units, right, units, rows, b.count, reinterpret_cast<Element*>(strip),
                       longest);
      select_strip<kBytes>(s, part, i, rows, b, strip);
    }
  });
}

// Rows as they lie against few queries: limited by the memory that the rows come from, one stream, which the
// processor's prefetchers follow better than instructions would.

inline VecF load_element(const float* p) { return load(p); }
inline VecF load_element(const uint16_t* p) { return from_bf16(p); }
inline VecF load_element(const int8_t* p) { return from_bytes(p); }

// One row against Q queries; its square too where `square` is set. Phases: chains of additions that do not wait for
// each other.
template <class T, int Q>
void stream_products(const T* row, const float* q, int64_t pitch, int64_t d, float* out, float* square) {
  constexpr int kPhases = Q == 1 ? 4 : Q == 2 ? 2 : 1;
  constexpr int64_t kStep = kPhases * kLanes;
  VecF acc[Q][kPhases] = {}, squares[kPhases] = {};
  int64_t j = 0;
  for (; j + kStep <= d; j += kStep) {
    for (int phase = 0; phase < kPhases; ++phase) {
      const int64_t at = j + phase * kLanes;
      const VecF x = load_element(row + at);
      for (int c = 0; c < Q; ++c) acc[c][phase] += x * load(q + c * pitch + at);
      if (square) squares[phase] += x * x;
    }
  }
  for (; j < d; j += kLanes) {
    alignas(64) T tail[kLanes] = {};
    const T* from = row + j;
    if (d - j < kLanes) {
      std::memcpy(tail, from, sizeof(T) * static_cast<size_t>(d - j));
      from = tail;
    }
    const VecF x = load_element(from);
    for (int c = 0; c < Q; ++c) acc[c][0] += x * load(q + c * pitch + j);
    if (square) squares[0] += x * x;
  }
  auto total = [](const VecF(&phases)[kPhases]) {
    VecF sum = phases[0];
    for (int phase = 1; phase < kPhases; ++phase) sum += phases[phase];
    return reduce_add(sum);
  };
  for (int c = 0; c < Q; ++c) out[c * kTopkStride] = total(acc[c]);
  if (square) *square = total(squares);
}

#if defined(__AVX512VNNI__)
template <int Q>
void stream_split(const int8_t* row, const TopkQueries& q, int64_t first, int64_t d, float* out) {
  __m512i high[Q] = {}, low[Q] = {};
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  const int8_t *high_query = q.high + first * q.pitch, *low_query = q.low + first * q.pitch;
  auto step = [&](__m512i codes, int64_t j) {
    const __m512i x = _mm512_xor_si512(codes, offset);  // codes + 128, unsigned
    for (int c = 0; c < Q; ++c) {
      high[c] = _mm512_dpbusd_epi32(high[c], x, _mm512_loadu_si512(high_query + c * q.pitch + j));
      low[c] = _mm512_dpbusd_epi32(low[c], x, _mm512_loadu_si512(low_query + c * q.pitch + j));
    }
  };
  int64_t j = 0;
  for (; j + 64 <= d; j += 64) step(_mm512_loadu_si512(row + j), j);
  if (j < d) step(_mm512_maskz_loadu_epi8((__mmask64{1} << (d - j)) - 1, row + j), j);
  for (int c = 0; c < Q; ++c) {
    const int32_t h = reduce_ints((VecI)high[c]) - q.high_sum[first + c];
    const int32_t l = reduce_ints((VecI)low[c]) - q.low_sum[first + c];
    out[c * kTopkStride] = 256.0f * static_cast<float>(h) + static_cast<float>(l);
  }
}
#endif

// Queries [i, i + Q) against a row.
template <class T, int Q>
void stream_queries(const TopkScan& s, const T* row, int64_t i, float* out, float* square) {
#if defined(__AVX512VNNI__)
  if constexpr (std::is_same_v<T, int8_t>) return stream_split<Q>(row, s.queries, i, s.d, out);
#endif
  stream_products<T, Q>(row, s.queries.wide + i * s.queries.pitch, s.queries.pitch, s.d, out, square);
}

template <class T>
void scan_stream(const TopkScan& s, int64_t part, int64_t row0, int64_t row1, int64_t q0, int64_t q1) {
  alignas(64) float strip[kStreamQueries * kTopkStride] = {};
  RowBlock b;
  for_blocks(s, row0, row1, b, [&] {
    const Matrix& m = b.segment->codes;
    const T* base = static_cast<const T*>(m.data);
    const int64_t bytes = s.d * static_cast<int64_t>(sizeof(T));
    const bool find_norms = !std::is_same_v<T, int8_t> && !b.segment->norm, scattered = b.segment->rows != nullptr;
    for (int j = 0; j < b.count; ++j) {
      const int64_t index = b.row(j);
      const T* row = base + index * m.row_stride;
      if (scattered && b.first + j + 2 < b.segment->count) {
        // Not foreseen by the hardware.
        const char* next = reinterpret_cast<const char*>(base + b.segment->rows[b.first + j + 2] * m.row_stride);
        for (int64_t line = 0; line < bytes && line < 4096; line += 64) __builtin_prefetch(next + line, 0, 3);
      }
      float square = 0.0f;
      float* wanted = find_norms ? &square : nullptr;
      for (int64_t i = q0; i < q1;) {
        float* out = strip + (i - q0) * kTopkStride + j;
        const int64_t left = q1 - i;
        if (left >= 4) {
          stream_queries<T, 4>(s, row, i, out, wanted);
          i += 4;
        } else if (left >= 2) {
          stream_queries<T, 2>(s, row, i, out, wanted);
          i += 2;
        } else {
          stream_queries<T, 1>(s, row, i, out, wanted);
          i += 1;
        }
        wanted = nullptr;
      }
      if (find_norms) b.norm[j] = norm_of_square(m, index, s.d, square);
    }
    describe_block(s, b, false);
    select_strip<false>(s, part, q0, static_cast<int>(q1 - q0), b, strip);
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
    .encode = encode_rows,
    .panel_rows = kRows,
};

}  // namespace vk::cpu::VK_ISA_NAMESPACE

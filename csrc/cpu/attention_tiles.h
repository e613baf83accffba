// SPDX-License-Identifier: Apache-2.0
// What attention's tile loops are made of: a micro-kernel for narrow products, products of blocks, and packing.
//
// Attention multiplies matrices of 50 to 500 rows whose inner dimension is 64: edges are a large share of the work. So
// the blocks here are 6 rows x 4 registers (64 columns are one block, and 50 rows are 8 blocks and a third of one),
// exist for every number of rows, and end in half a register where 8 columns are left. Both operands have run-time
// strides, so a packed matrix serves as left operand by rows, by columns, and as right operand.
#pragma once

#include "cpu/attention.h"
#include "engine/pack.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int kBlockRows = 6, kBlockVecs = 4;
inline constexpr int kGrain = kLanes / 2;  // columns are computed in multiples of half a register: 256-bit costs half
typedef float HalfF __attribute__((vector_size(VK_VECTOR_BYTES / 2)));
typedef uint32_t HalfU __attribute__((vector_size(VK_VECTOR_BYTES / 2)));
typedef uint32_t HalfUUnaligned __attribute__((vector_size(VK_VECTOR_BYTES / 2), aligned(4), may_alias));

template <class Op>
HalfF mac_half(HalfF c, uint32_t a, HalfU b) {
  if constexpr (Op::kDepthPerUnit == 1) {
    float x;
    std::memcpy(&x, &a, sizeof x);
    return c + x * (HalfF)b;
  } else {
#if defined(__AVX512BF16__)
    return (HalfF)_mm256_dpbf16_ps((__m256)c, (__m256bh)_mm256_set1_epi32((int)a), (__m256bh)b);
#else
    const uint32_t a_low = a << 16, a_high = a & 0xffff0000u;
    float low, high;
    std::memcpy(&low, &a_low, sizeof low);
    std::memcpy(&high, &a_high, sizeof high);
    c = c + low * (HalfF)(b << 16);
    return c + high * (HalfF)(b & 0xffff0000u);
#endif
  }
}
#else
inline constexpr int kBlockRows = 4, kBlockVecs = 3;
inline constexpr int kGrain = kLanes;
#endif
inline constexpr int kBlockGrains = kBlockVecs * kLanes / kGrain;
inline constexpr int kGrainsPerVec = kLanes / kGrain;

// Operands of one block, in units. Left element (row, step) is at a[row * row_stride + step * step_stride]; right
// element (step, column) at b[step * ldb + column].
struct Block {
  const uint32_t* a;
  int64_t row_stride, step_stride;
  const uint32_t* b;
  int64_t ldb, depth;
  float* c;
  int64_t ldc;
  float factor;     // of the product
  bool accumulate;  // add to c
};

// c[Rows x (Vecs registers and, with Half, half a register)] = factor * a b, or += . c is scratch: whole registers.
template <class Op, int Rows, int Vecs, bool Half>
[[gnu::noinline]] void attention_block(const Block& block) {
  constexpr int kFull = Vecs > 0 ? Vecs : 1;
  VecF acc[Rows][kFull];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kFull; ++j) acc[i][j] = VecF{};
  }
#if defined(__AVX512F__)
  HalfF half[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) half[i] = HalfF{};
#endif
  const uint32_t *a = block.a, *b = block.b;
  const int64_t row_stride = block.row_stride, step_stride = block.step_stride, ldb = block.ldb;
#pragma GCC unroll 1
  for (int64_t step = block.depth; step > 0; --step) {
    VecU right[kFull];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) right[j] = load_units(b + j * kLanes);
#if defined(__AVX512F__)
    HalfU right_half = {};
    if constexpr (Half) right_half = *reinterpret_cast<const HalfUUnaligned*>(b + Vecs * kLanes);
#endif
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const uint32_t unit = a[i * row_stride];
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) acc[i][j] = Op::mac(acc[i][j], unit, right[j]);
#if defined(__AVX512F__)
      if constexpr (Half) half[i] = mac_half<Op>(half[i], unit, right_half);
#endif
    }
    a += step_stride;
    b += ldb;
  }
  const float factor = block.factor;
  const bool accumulate = block.accumulate;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    float* c = block.c + i * block.ldc;
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) {
      VecF value = acc[i][j] * factor;
      if (accumulate) value += load(c + j * kLanes);
      store(c + j * kLanes, value);
    }
#if defined(__AVX512F__)
    if constexpr (Half) {
      HalfF value = half[i] * factor;
      auto* at = reinterpret_cast<HalfFUnaligned*>(c + Vecs * kLanes);
      if (accumulate) value += *at;
      *at = value;
    }
#endif
  }
}

using BlockFunction = void (*)(const Block&);

template <class Op, int Rows, int... Grains>
constexpr BlockFunction block_of(int grains, std::integer_sequence<int, Grains...>) {
  constexpr BlockFunction row[] = {
      &attention_block<Op, Rows, (Grains + 1) / kGrainsPerVec, (Grains + 1) % kGrainsPerVec != 0>...};
  return row[grains - 1];
}

template <class Op>
struct BlockTable {
  BlockFunction at[kBlockRows][kBlockGrains];
};

template <class Op, int... Rows>
constexpr BlockTable<Op> make_block_table(std::integer_sequence<int, Rows...>) {
  BlockTable<Op> table{};
  for (int grains = 1; grains <= kBlockGrains; ++grains)
    ((table.at[Rows][grains - 1] = block_of<Op, Rows + 1>(grains, std::make_integer_sequence<int, kBlockGrains>{})),
     ...);
  return table;
}

template <class Op>
inline constexpr BlockTable<Op> kBlocks = make_block_table<Op>(std::make_integer_sequence<int, kBlockRows>{});

// Columns [0, cols) in panels of equal width, at most kBlockVecs registers; the last one ends in the half.
struct Panels {
  int64_t grains, count, vecs, wider;

  explicit Panels(int64_t cols) {
    grains = ceil_div(cols, kGrain);
    count = ceil_div(grains, kBlockGrains);
    const int64_t whole = grains / kGrainsPerVec;
    vecs = count > 0 ? whole / count : 0;
    wider = count > 0 ? whole % count : 0;
  }
  int64_t column(int64_t panel) const { return (panel * vecs + (panel < wider ? panel : wider)) * kLanes; }
  int64_t end(int64_t panel) const { return panel + 1 < count ? column(panel + 1) : grains * kGrain; }
};

struct Range {
  int64_t begin, end;
};

// Rows of the caller's memory that are wanted soon. The heads of a packed qkv are short rows, kilobytes apart: the
// hardware sees no pattern in them, and waiting for each takes longer than the arithmetic of 50 tokens.
class Fetcher {
 public:
  // Not for larger items, which would push each other out of the cache, and have more arithmetic to a byte.
  static constexpr int64_t kMostBytes = 320 << 10;

  void add(const void* data, int64_t row_bytes, int64_t stride_bytes, int64_t rows, bool write) {
    if (count_ == kStreams || rows <= 0) return;
    streams_[count_++] = {static_cast<const char*>(data), row_bytes, stride_bytes, rows, write};
    rows_ += rows;
  }
  // Spreads the rows over this many calls of step().
  void spread(int64_t steps) { each_ = steps > 0 ? ceil_div(rows_, steps) : rows_; }
  void step() {
    for (int64_t left = each_; left > 0 && stream_ < count_; --left) {
      const Stream& s = streams_[stream_];
      const char* p = s.data + row_ * s.stride_bytes;
      if (s.write) {
        for (int64_t b = 0; b < s.row_bytes; b += kLine) __builtin_prefetch(p + b, 1, 2);
      } else {
        for (int64_t b = 0; b < s.row_bytes; b += kLine) __builtin_prefetch(p + b, 0, 2);
      }
      if (++row_ == s.rows) {
        row_ = 0;
        ++stream_;
      }
    }
  }

 private:
  static constexpr int kStreams = 12;
  static constexpr int64_t kLine = 64;
  struct Stream {
    const char* data;
    int64_t row_bytes, stride_bytes, rows;
    bool write;
  };
  Stream streams_[kStreams];
  int count_ = 0, stream_ = 0;
  int64_t row_ = 0, rows_ = 0, each_ = 0;
};

// Longest chain of sums, in units of depth: float32's rounding error grows with it, and a right operand of that many
// rows of 64 columns stays in L1 while all strips pass. A few queries are what the libraries that ours is measured
// against compute as dot products, in as many partial sums as a register has lanes; short chains are as exact.
template <class Op>
inline int64_t longest_chain(int64_t queries) {
  constexpr int64_t kFewQueries = 4, kShortChain = 16;
  if (Op::kDepthPerUnit == 1) return queries <= kFewQueries ? kShortChain : 64;
  return 128;
}

// c[rows x cols] = factor * left right (or +=), every strip of kBlockRows rows over its own range of the depth, in
// units
// (`depths(row)`), and over its own number of columns (`columns(row)`). At most `chain` units are summed in one go.
template <class Op, class Depths, class Columns>
void product(const uint32_t* a, int64_t row_stride, int64_t step_stride, int64_t rows, const uint32_t* b, int64_t ldb,
             int64_t depth, int64_t cols, float* c, int64_t ldc, float factor, bool accumulate, int64_t chain,
             Fetcher& fetcher, Depths&& depths, Columns&& columns) {
  const Panels panels(cols);
  const int64_t pieces = depth > chain ? ceil_div(depth, chain) : 1, piece = ceil_div(depth, pieces);
  for (int64_t p = 0; p < pieces; ++p) {
    const int64_t from = p * piece, to = from + piece < depth ? from + piece : depth;
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t column = panels.column(panel), end = panels.end(panel);
      for (int64_t row = 0; row < rows; row += kBlockRows) {
        const int64_t limit = columns(row) < end ? columns(row) : end;
        if (limit <= column) continue;
        const Range range = depths(row);
        const int64_t begin = range.begin > from ? range.begin : from, stop = range.end < to ? range.end : to;
        const bool adds = accumulate || from > range.begin;
        // a strip without any depth is zeros, written once
        if (begin >= stop && (accumulate || p > 0 || range.begin < range.end)) continue;
        const int64_t count = rows - row < kBlockRows ? rows - row : kBlockRows;
        const Block block{.a = a + row * row_stride + begin * step_stride,
                          .row_stride = row_stride,
                          .step_stride = step_stride,
                          .b = b + begin * ldb + column,
                          .ldb = ldb,
                          .depth = stop > begin ? stop - begin : 0,
                          .c = c + row * ldc + column,
                          .ldc = ldc,
                          .factor = factor,
                          .accumulate = adds};
        kBlocks<Op>.at[count - 1][ceil_div(limit - column, kGrain) - 1](block);
        fetcher.step();
      }
    }
  }
}

inline int64_t offset_of(const AttentionTensor& t, int64_t batch, int64_t row, int64_t head) {
  return batch * t.batch_stride + row * t.row_stride + head * t.head_stride;
}

// The rows of one head of one sequence: row i of the list is row `index[i]` (or first + i) of the sequence.
struct HeadRows {
  const AttentionTensor* tensor;
  int64_t base;          // element offset of the sequence's first row
  const int32_t* index;  // null: consecutive
  int64_t first;

  int64_t offset(int64_t i) const { return base + (index ? index[first + i] : first + i) * tensor->row_stride; }
};

// Rows [row, row + rows) of a head, where they are dense.
inline void fetch_rows(Fetcher& fetcher, const AttentionCall& call, const AttentionTensor& t, int64_t batch,
                       int64_t row, int64_t head, int64_t rows, int64_t width, bool write) {
  const int64_t size = call.bf16 ? 2 : 4;
  if (t.col_stride != 1 || !t.data || rows * width * size > Fetcher::kMostBytes) return;
  fetcher.add(static_cast<const char*>(t.data) + size * offset_of(t, batch, row, head), size * width,
              size * t.row_stride, rows, write);
}

// `count` elements of float32 or bf16 rows as units, zeros behind them; reads nothing behind them.
template <class Op>
VecU load_elements(const void* data, int64_t at, int64_t col_stride, int64_t count) {
  constexpr int64_t kElements = kLanes * Op::kDepthPerUnit;
  if (count > kElements) count = kElements;
  if constexpr (Op::kDepthPerUnit == 1) {
    const float* p = static_cast<const float*>(data) + at;
    if (col_stride == 1) return (VecU)(count == kLanes ? load(p) : load_first(p, static_cast<int>(count)));
    alignas(VK_VECTOR_BYTES) float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i * col_stride];
    return (VecU)load(lanes);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(data) + at;
    if (col_stride == 1 && count == kElements) {
      VecU v;
      std::memcpy(&v, p, sizeof v);
      return v;
    }
#if defined(__AVX512BW__)
    if (col_stride == 1) return (VecU)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1ull), p);
#endif
    alignas(VK_VECTOR_BYTES) uint16_t lanes[kElements] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i * col_stride];
    VecU v;
    std::memcpy(&v, lanes, sizeof v);
    return v;
  }
}

// Left operand: rows of units, [count][ld].
template <class Op>
void pack_left(const HeadRows& rows, int64_t count, int64_t width, uint32_t* out, int64_t ld) {
  const int64_t elements = kLanes * Op::kDepthPerUnit;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = rows.offset(i);
    for (int64_t e = 0; e < width; e += elements)
      store_units(
          out + i * ld + e / Op::kDepthPerUnit,
          load_elements<Op>(rows.tensor->data, at + e * rows.tensor->col_stride, rows.tensor->col_stride, width - e));
  }
}

// Right operand of a product over the rows: [units of count][ld], bf16 in pairs of rows.
template <class Op>
void pack_right(const HeadRows& rows, int64_t count, int64_t width, uint32_t* out, int64_t ld) {
  if constexpr (Op::kDepthPerUnit == 1) {
    pack_left<Op>(rows, count, width, out, ld);
  } else {
    constexpr int64_t kElements = 2 * kLanes;
    const void* data = rows.tensor->data;
    const int64_t stride = rows.tensor->col_stride;
    for (int64_t i = 0; i < count; i += 2) {
      const int64_t low = rows.offset(i), high = i + 1 < count ? rows.offset(i + 1) : 0;
      for (int64_t e = 0; e < width; e += kElements) {
        const VecU a = load_elements<Op>(data, low + e * stride, stride, width - e);
        const VecU b = i + 1 < count ? load_elements<Op>(data, high + e * stride, stride, width - e) : VecU{};
        HalfWords a_halves[2], b_halves[2];
        std::memcpy(a_halves, &a, sizeof a);
        std::memcpy(b_halves, &b, sizeof b);
        for (int half = 0; half < 2; ++half) {
          if (e + half * kLanes >= ld) break;
          store_units(out + i / 2 * ld + e + half * kLanes, __builtin_convertvector(a_halves[half], VecU) |
                                                                (__builtin_convertvector(b_halves[half], VecU) << 16));
        }
      }
    }
  }
}

// Right operand of a product along the rows: [units of width][ld], column i = row i; zeros up to a whole register.
template <class Op>
void pack_transposed(const HeadRows& rows, int64_t count, int64_t width, uint32_t* out, int64_t ld) {
  const int64_t units = ceil_div(width, Op::kDepthPerUnit), stride = rows.tensor->col_stride;
  for (int64_t i = 0; i < count; i += kLanes) {
    int64_t at[kLanes];
    const int64_t real = count - i < kLanes ? count - i : kLanes;
    for (int64_t l = 0; l < real; ++l) at[l] = rows.offset(i + l);
    for (int64_t unit = 0; unit < units; unit += kLanes) {
      const int64_t e = unit * Op::kDepthPerUnit;
      VecU square[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l)
        square[l] = l < real ? load_elements<Op>(rows.tensor->data, at[l] + e * stride, stride, width - e) : VecU{};
      transpose(square);
      const int64_t steps = units - unit < kLanes ? units - unit : kLanes;
#pragma GCC unroll 16
      for (int s = 0; s < kLanes; ++s) {
        if (s < steps) store_units(out + (unit + s) * ld + i, square[s]);
      }
    }
  }
}

// Before row i of `count` is written: a later row moves from L2 to L1, because stores wait for their lines in order.
template <class Op>
inline void fetch_ahead(const AttentionTensor& t, int64_t at, int64_t i, int64_t count, int64_t width) {
  constexpr int64_t kAhead = 6, kSize = 4 / Op::kDepthPerUnit, kLine = 64;
  if (i + kAhead >= count || t.col_stride != 1) return;
  const char* p = static_cast<const char*>(t.data) + kSize * (at + kAhead * t.row_stride);
  for (int64_t b = 0; b < kSize * width; b += kLine) __builtin_prefetch(p + b, 1, 3);
}

// float32 scratch becomes a row of the caller's tensor, times `factor`.
template <class Op>
void write_row(const AttentionTensor& t, int64_t at, const float* from, int64_t width, float factor) {
  if constexpr (Op::kDepthPerUnit == 1) {
    float* out = static_cast<float*>(t.data) + at;
    if (t.col_stride == 1) {
      for (int64_t c = 0; c < width; c += kLanes) {
        const VecF v = load(from + c) * factor;
        if (width - c >= kLanes) {
          store(out + c, v);
        } else {
          store_first(out + c, v, static_cast<int>(width - c));
        }
      }
    } else {
      for (int64_t c = 0; c < width; ++c) out[c * t.col_stride] = from[c] * factor;
    }
  } else {
    uint16_t* out = static_cast<uint16_t*>(t.data) + at;
    for (int64_t c = 0; c < width; c += kLanes) {
      const HalfWords halves = to_bf16(load(from + c) * factor);
      if (t.col_stride == 1 && width - c >= kLanes) {
        std::memcpy(out + c, &halves, sizeof halves);
      } else if (t.col_stride == 1) {
        std::memcpy(out + c, &halves, sizeof(uint16_t) * static_cast<size_t>(width - c));
      } else {
        for (int64_t i = c; i < width && i < c + kLanes; ++i) out[i * t.col_stride] = halves[i - c];
      }
    }
  }
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

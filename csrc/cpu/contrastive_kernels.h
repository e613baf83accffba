// SPDX-License-Identifier: Apache-2.0
// The contrastive family's tile loops and epilogues, compiled once per instruction set.
//
// Forward: a strip of kRows x kTileCols dot products is formed, read twice while it is in L1 (by rows, by columns),
// and forgotten. Backward: the strip turns into a strip of the gradient tile, which is then the left operand of two
// more products: rows times k (gradient of q) and, read by columns, times q (gradient of k).
#pragma once

#include "cpu/contrastive.h"
#include "engine/pack.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

static_assert(kTileCols % kCols == 0 && kTileRows % kRows == 0 && kTileStride >= kTileCols + 2 * kLanes);

// The gradient tile as left operand: by rows (depth = columns) and by columns (depth = rows).
template <class Op>
struct TileLayouts;
template <>
struct TileLayouts<OpF32> {
  using ByRow = LeftLayout<kTileStride, 1>;
  using ByColumn = LeftLayout<1, kTileStride>;
};
template <>
struct TileLayouts<OpBF16> {
  using ByRow = LeftLayout<kPairTileStride, 1>;
  using ByColumn = LeftLayout<1, kTileStride>;
};

inline VecI load_ints(const int32_t* p) { return (VecI)load_units(reinterpret_cast<const uint32_t*>(p)); }

// Buffers of one part, carved from its scratch.
template <class Op>
struct Buffers {
  uint32_t *left, *left_by_depth, *right, *right_by_depth;
  float* strip;         // bf16: kRows x kTileStride float32, before conversion
  uint32_t* tile;       // gradient tile by rows (float32: also by columns)
  uint32_t* pair_tile;  // bf16: pairs of rows, for the product over rows

  Buffers(char* at, const ContrastiveProblem& p, const ContrastivePlan& plan) {
    const int64_t depth = ceil_div(p.d, Op::kDepthPerUnit), width = round_up(p.d, kLanes);
    auto take = [&at](int64_t units) {
      auto* out = reinterpret_cast<uint32_t*>(at);
      at += round_up(units * 4, 64);
      return out;
    };
    left = take(plan.block_rows * depth);
    left_by_depth = take(ceil_div(plan.block_rows, Op::kDepthPerUnit) * width);
    right = take(kTileCols * depth);
    right_by_depth = take(ceil_div(kTileCols, Op::kDepthPerUnit) * width);
    strip = reinterpret_cast<float*>(take(kRows * kTileStride));
    tile = take(kTileRows * kTileStride);
    pair_tile = take(kTileRows / 2 * kTileStride);
  }
};

// What a block of columns brings to every row: kept in L1 while the rows pass.
struct ColumnBlock {
  alignas(64) float bias[kTileCols];  // logit bias; -inf behind the last column
  alignas(64) float max[kTileCols], sum[kTileCols], sum_low[kTileCols], target[kTileCols], total[kTileCols];
  alignas(64) float shift[kTileCols], log[kTileCols], weight[kTileCols], share[kTileCols], bias_grad[kTileCols];
  alignas(64) int32_t label[kTileCols];
  int64_t first;
  int count, vecs;

  ColumnBlock(const ContrastiveProblem& p, int64_t col, int64_t end, int64_t widest) : first(col) {
    count = static_cast<int>(end - col < widest ? end - col : widest);
    vecs = static_cast<int>(ceil_div(count, kLanes));
    const int padded = vecs * kLanes;
    for (int j = 0; j < padded; ++j) {
      const bool real = j < count;
      bias[j] = !real ? -kInfinity : p.key_bias ? p.key_bias[col + j] + p.logit_bias : p.logit_bias;
      max[j] = real && p.columns && p.col_max ? p.col_max[col + j] : -kInfinity;
      sum[j] = real && p.columns && p.col_sum ? p.col_sum[col + j] : 0.0f;
      sum_low[j] = target[j] = total[j] = bias_grad[j] = 0.0f;
      shift[j] = real && p.columns && p.col_shift ? p.col_shift[col + j] : 0.0f;
      log[j] = real && p.columns && p.col_log ? p.col_log[col + j] : 0.0f;
      weight[j] = real && p.columns && p.col_weight ? p.col_weight[col + j] : 0.0f;
      share[j] = real && p.col_share ? p.col_share[col + j] : 0.0f;
      label[j] = real && p.col_labels ? p.col_labels[col + j] : -1;
    }
  }

  void write_statistics(const ContrastiveProblem& p) const {
    for (int j = 0; j < count; ++j) {
      p.col_max[first + j] = max[j];
      p.col_sum[first + j] = sum[j] + sum_low[j];
      p.col_target[first + j] += target[j];
      p.col_total[first + j] += total[j];
    }
  }
};

// Columns of a tile such that `cols` make tiles of about equal size: a narrow last one would keep the multipliers
// waiting.
inline int64_t tile_width(int64_t cols) {
  const int64_t tiles = ceil_div(cols, kTileCols);
  return round_up(ceil_div(cols, tiles), kCols);
}

// Zeros in the last register's lanes behind `count`, which enter the sums over whole registers. The operands are padded
// with zeros, but an infinite feature makes NaN of them, and that survives the bias of -inf that hides these lanes.
inline void clear_tail(float* strip, int rows, int count) {
  const int padded = static_cast<int>(round_up(count, kLanes));
  for (int i = 0; i < rows; ++i) {
    for (int j = count; j < padded; ++j) strip[i * kTileStride + j] = 0.0f;
  }
}

// Longest chain of float32 sums: the rounding error of a dot product grows with it, and the libraries that ours is
// measured against cut theirs too. bf16 operands are rounded far more coarsely than any chain.
inline constexpr int64_t kLongestChain = 128;

// One block of a product, its depth in chains: out[rows x cols] (+)= left[rows x depth] right[depth x cols]. `width` is
// the number of columns that the right operand's panel is packed for.
template <class Op, class Layout>
void product_block(const uint32_t* left, const uint32_t* right, int64_t width, int64_t depth, float* out,
                   int64_t stride, int rows, int cols, bool accumulate) {
  const int64_t longest = Op::kDepthPerUnit == 1 ? kLongestChain : depth;
  const auto kernel = pick_micro_kernel<Op, Layout>(rows, cols);
  int64_t from = 0;
  do {
    const int64_t chain = depth - from < longest ? depth - from : longest;
    kernel(left + from * Layout::kStepStride, right + from * width, chain, out, stride, rows, cols,
           accumulate || from > 0);
    from += chain;
  } while (from < depth);
}

// A block of rows (of the packed left operand) times a block of columns: rows x count dot products into `out`.
template <class Op>
void product_strip(const uint32_t* left, const uint32_t* right, int64_t depth, int rows, int count, float* out) {
  for (int64_t panel = 0; panel < count; panel += kCols) {
    const int64_t width = panel_width(count, panel);
    product_block<Op, LeftPanel>(left, right + panel * depth, width, depth, out + panel, kTileStride, rows,
                                 static_cast<int>(width), false);
  }
  clear_tail(out, rows, count);
}

inline void save_strip(const ContrastiveProblem& p, const float* strip, int64_t row, int rows, const ColumnBlock& b) {
  for (int i = 0; i < rows; ++i)
    std::memcpy(p.saved + (row + i - p.saved_row) * p.m + b.first, strip + i * kTileStride,
                sizeof(float) * static_cast<size_t>(b.count));
}

inline void load_strip(const ContrastiveProblem& p, float* strip, int64_t row, int rows, const ColumnBlock& b) {
  for (int i = 0; i < rows; ++i) {
    float* to = strip + i * kTileStride;
    std::memcpy(to, p.saved + (row + i - p.saved_row) * p.m + b.first, sizeof(float) * static_cast<size_t>(b.count));
  }
  clear_tail(strip, rows, b.count);
}

// Dot products in `strip` become logits; row and column statistics move on by one strip.
inline void statistics_strip(const ContrastiveProblem& p, float* strip, int64_t row, int rows, ColumnBlock& b) {
  const bool labels = p.row_labels != nullptr, smoothing = p.smoothing > 0.0f;
  alignas(64) float strip_max[kTileCols];
  for (int v = 0; v < b.vecs; ++v) store(strip_max + v * kLanes, splat(-kInfinity));
  for (int i = 0; i < rows; ++i) {
    float* z = strip + i * kTileStride;
    VecF row_max = splat(-kInfinity);
    for (int v = 0; v < b.vecs; ++v) {
      const VecF logit = load(z + v * kLanes) * p.scale + load(b.bias + v * kLanes);
      store(z + v * kLanes, logit);
      row_max = max_keep(row_max, logit);
      store(strip_max + v * kLanes, max_keep(load(strip_max + v * kLanes), logit));
    }
    const int64_t r = row + i;
    const float old_max = p.row_max[r], block_max = reduce_max(row_max);
    const float new_max = block_max > old_max ? block_max : old_max;
    const VecF shift = splat(new_max == -kInfinity ? 0.0f : new_max);
    VecF sum = {};
    for (int v = 0; v < b.vecs; ++v) sum += exp_nonpositive(load(z + v * kLanes) - shift);
    const float kept = exp_nonpositive(splat(old_max) - shift)[0];
    p.row_max[r] = new_max;
    p.row_sum[r] = p.row_sum[r] * kept + reduce_add(sum);
    if (p.positives) {
      const int64_t at = p.positives[r] - b.first;
      if (at >= 0 && at < b.count) {
        p.row_target[r] += z[at];
        if (p.columns) b.target[at] += z[at];
      }
    }
    if (labels) {
      const VecI label = VecI{} + p.row_labels[r];
      VecF positive_sum = {};
      for (int v = 0; v < b.vecs; ++v) {
        const VecI same = label == load_ints(b.label + v * kLanes);
        const VecF z_positive = same ? load(z + v * kLanes) : VecF{};
        positive_sum += z_positive;
        if (p.columns) store(b.target + v * kLanes, load(b.target + v * kLanes) + z_positive);
      }
      p.row_target[r] += reduce_add(positive_sum);
    }
    if (smoothing) {
      float total = 0.0f;
      for (int j = 0; j < b.count; ++j) total += z[j];
      p.row_total[r] += total;
      if (p.columns) {
        for (int j = 0; j < b.count; ++j) b.total[j] += z[j];
      }
    }
  }
  if (!p.columns) return;
  for (int v = 0; v < b.vecs; ++v) {
    const int at = v * kLanes;
    const VecF old_max = load(b.max + at), new_max = max_keep(old_max, load(strip_max + at));
    const VecF shift = new_max == -kInfinity ? VecF{} : new_max;
    VecF sum = {};
    for (int i = 0; i < rows; ++i) sum += exp_nonpositive(load(strip + i * kTileStride + at) - shift);
    // A column's sum is long, and its error is every gradient's of the column: what each addition rounds off is kept.
    const VecF factor = exp_nonpositive(old_max - shift);
    const VecF before = load(b.sum + at) * factor, after = before + sum, added = after - before;
    const VecF rounded_off = (before - (after - added)) + (sum - added);
    store(b.max + at, new_max);
    store(b.sum + at, after);
    store(b.sum_low + at, load(b.sum_low + at) * factor + rounded_off);
  }
}

// Dot products in `strip` become scale * (derivative of the result by the logits), softmax objective:
// weight_i (softmax_row - target) + weight_j (softmax_column - target).
inline void softmax_gradient_strip(const ContrastiveProblem& p, float* strip, int64_t row, int rows, ColumnBlock& b,
                                   PartSums* sums) {
  const float hard = 1.0f - p.smoothing;
  const float row_smooth = p.smoothing / static_cast<float>(p.row_classes);
  const float col_smooth = p.smoothing / static_cast<float>(p.col_classes);
  VecF grad_scale = {};
  alignas(64) float bias_grad[kTileCols] = {};  // of this strip: a sum of sums rounds less than one long sum
  for (int i = 0; i < rows; ++i) {
    float* c = strip + i * kTileStride;
    const int64_t r = row + i;
    const float weight = p.row_weight[r];
    const VecF row_shift = splat(p.row_shift[r]), row_log = splat(p.row_log[r]);
    const VecI label = VecI{} + (p.row_labels ? p.row_labels[r] : -2);
    const float row_share = p.row_share ? p.row_share[r] * hard : 0.0f;
    const int64_t positive = p.positives ? p.positives[r] - b.first : -1;
    const int positive_vec = positive >= 0 && positive < b.count ? static_cast<int>(positive / kLanes) : -1;
    for (int v = 0; v < b.vecs; ++v) {
      const int at = v * kLanes;
      const VecF dot = load(c + at);
      const VecF logit = dot * p.scale + load(b.bias + at);
      const VecI positives = p.row_labels ? label == load_ints(b.label + at) : VecI{};
      // Targets leave the probabilities before anything is scaled or summed: near the optimum they almost cancel.
      VecF by_row = exp_nonpositive(logit - row_shift - row_log);
      if (p.smoothing > 0.0f) by_row -= row_smooth;
      if (p.row_labels) by_row -= positives ? splat(row_share) : VecF{};
      if (v == positive_vec) by_row[positive % kLanes] -= hard;
      VecF g = by_row * weight;
      if (p.columns) {
        VecF by_column = exp_nonpositive(logit - load(b.shift + at) - load(b.log + at));
        if (p.smoothing > 0.0f) by_column -= col_smooth;
        if (p.row_labels) by_column -= positives ? load(b.share + at) * hard : VecF{};
        if (v == positive_vec) by_column[positive % kLanes] -= hard;
        g += by_column * load(b.weight + at);
      }
      if (p.grad_key_bias) store(bias_grad + at, load(bias_grad + at) + g);
      grad_scale += g * dot;
      store(c + at, g * p.scale);
    }
  }
  if (p.grad_key_bias) {
    for (int v = 0; v < b.vecs; ++v)
      store(b.bias_grad + v * kLanes, load(b.bias_grad + v * kLanes) + load(bias_grad + v * kLanes));
  }
  sums->grad_scale += static_cast<double>(reduce_add(grad_scale));
}

// Sigmoid objective: sum of softplus(-y z), y = +1 for a row's positive and -1 for all others; derivative
// -y sigmoid(-y z). The positive's logit is negated before, its derivative after, so both signs share one formula
// that is accurate in the far tail.
inline void sigmoid_gradient_strip(const ContrastiveProblem& p, float* strip, int64_t row, int rows, ColumnBlock& b,
                                   PartSums* sums) {
  VecF loss = {}, grad_scale = {}, grad_bias = {};
  const float weight = p.row_weight[row];  // the same for every row: all pairs count
  const float factor = weight * p.scale;
  for (int i = 0; i < rows; ++i) {
    float* c = strip + i * kTileStride;
    const int64_t positive = p.positives[row + i] - b.first;
    const int positive_vec = positive >= 0 && positive < b.count ? static_cast<int>(positive / kLanes) : -1;
    for (int v = 0; v < b.vecs; ++v) {
      const int at = v * kLanes;
      const VecF dot = load(c + at);
      VecF logit = dot * p.scale + load(b.bias + at);
      if (v == positive_vec) logit[positive % kLanes] = -logit[positive % kLanes];
      const VecF e = exp_nonpositive(logit > 0.0f ? -logit : logit);
      loss += (logit > 0.0f ? logit : VecF{}) + log1p_unit(e);
      VecF g = (logit > 0.0f ? splat(1.0f) : e) / (1.0f + e);
      if (v == positive_vec) g[positive % kLanes] = -g[positive % kLanes];
      grad_scale += g * dot;
      grad_bias += g;
      store(c + at, g * factor);
    }
  }
  sums->loss += static_cast<double>(reduce_add(loss));
  sums->grad_scale += static_cast<double>(weight) * static_cast<double>(reduce_add(grad_scale));
  sums->grad_logit_bias += static_cast<double>(weight) * static_cast<double>(reduce_add(grad_bias));
}

template <class Op>
void statistics_part(const ContrastiveProblem& p, const ContrastivePlan& plan, int64_t row0, int64_t row1, int64_t col0,
                     int64_t col1, char* scratch, PartSums*) {
  const Buffers<Op> buffer(scratch, p, plan);
  const int64_t depth = ceil_div(p.d, Op::kDepthPerUnit), tile_cols = tile_width(col1 - col0);
  for (int64_t block = row0; block < row1; block += plan.block_rows) {
    const int64_t block_rows = row1 - block < plan.block_rows ? row1 - block : plan.block_rows;
    pack_depth_in_row<Op, kRows>(p.q, block, block_rows, p.d, buffer.left);
    for (int64_t col = col0; col < col1; col += tile_cols) {
      ColumnBlock columns(p, col, col1, tile_cols);
      pack_depth_in_row<Op, kCols>(p.k, col, columns.count, p.d, buffer.right);
      for (int64_t i = 0; i < block_rows; i += kRows) {
        const int rows = static_cast<int>(block_rows - i < kRows ? block_rows - i : kRows);
        product_strip<Op>(buffer.left + i * depth, buffer.right, depth, rows, columns.count, buffer.strip);
        if (p.saved) save_strip(p, buffer.strip, block + i, rows, columns);
        statistics_strip(p, buffer.strip, block + i, rows, columns);
      }
      if (p.columns) columns.write_statistics(p);
    }
  }
}

// A float32 strip of the gradient tile becomes bf16, by rows (pairs of columns) and by pairs of rows.
inline void convert_strip(const float* strip, int rows, int vecs, int64_t tile_row, uint32_t* tile,
                          uint32_t* pair_tile) {
  for (int i = 0; i < rows; i += 2) {
    const float* a = strip + i * kTileStride;
    auto* by_row = reinterpret_cast<uint16_t*>(tile + (tile_row + i) * kPairTileStride);
    uint32_t* by_pair = pair_tile + (tile_row + i) / 2 * kTileStride;
    for (int v = 0; v < vecs; ++v) {
      const int at = v * kLanes;
      const HalfWords low = to_bf16(load(a + at));
      const HalfWords high = i + 1 < rows ? to_bf16(load(a + kTileStride + at)) : HalfWords{};
      *reinterpret_cast<HalfWords*>(by_row + at) = low;
      *reinterpret_cast<HalfWords*>(by_row + 2 * kPairTileStride + at) = high;
      store_units(by_pair + at, bf16_pairs(low, high));
    }
  }
}

// grad[rows x d] += left[rows x depth] right[depth x d].
template <class Op, class Layout>
void product_into_gradient(const uint32_t* left, const uint32_t* right, int64_t depth, int64_t rows, int64_t d,
                           float* grad) {
  for (int64_t panel = 0; panel < d; panel += kCols) {
    const int width = static_cast<int>(d - panel < kCols ? d - panel : kCols);
    for (int64_t i = 0; i < rows; i += kRows) {
      const int count = static_cast<int>(rows - i < kRows ? rows - i : kRows);
      product_block<Op, Layout>(left + i * Layout::kRowStride, right + panel * depth, panel_width(d, panel), depth,
                                grad + i * d + panel, d, count, width, true);
    }
  }
}

template <class Op>
void gradients_part(const ContrastiveProblem& p, const ContrastivePlan& plan, int64_t row0, int64_t row1, int64_t col0,
                    int64_t col1, char* scratch, PartSums* sums) {
  constexpr bool kFloat = Op::kDepthPerUnit == 1;
  using ByRow = typename TileLayouts<Op>::ByRow;
  using ByColumn = typename TileLayouts<Op>::ByColumn;
  const Buffers<Op> buffer(scratch, p, plan);
  const int64_t depth = ceil_div(p.d, Op::kDepthPerUnit), width = round_up(p.d, kLanes);
  const int64_t tile_cols = tile_width(col1 - col0);
  for (int64_t block = row0; block < row1; block += plan.block_rows) {
    const int64_t block_rows = row1 - block < plan.block_rows ? row1 - block : plan.block_rows;
    if (!p.saved) pack_depth_in_row<Op, kRows>(p.q, block, block_rows, p.d, buffer.left);
    if (p.grad_k) {
      for (int64_t i = 0; i < block_rows; i += kTileRows)
        pack_depth_in_rows<Op>(p.q, block + i, block_rows - i < kTileRows ? block_rows - i : kTileRows, p.d,
                               buffer.left_by_depth + i / Op::kDepthPerUnit * width);
    }
    for (int64_t col = col0; col < col1; col += tile_cols) {
      ColumnBlock columns(p, col, col1, tile_cols);
      if (!p.saved) pack_depth_in_row<Op, kCols>(p.k, col, columns.count, p.d, buffer.right);
      if (p.grad_q) pack_depth_in_rows<Op>(p.k, col, columns.count, p.d, buffer.right_by_depth);
      for (int64_t tile = 0; tile < block_rows; tile += kTileRows) {
        const int64_t tile_rows = block_rows - tile < kTileRows ? block_rows - tile : kTileRows;
        for (int64_t i = 0; i < tile_rows; i += kRows) {
          const int rows = static_cast<int>(tile_rows - i < kRows ? tile_rows - i : kRows);
          const int64_t row = block + tile + i;
          float* strip = kFloat ? reinterpret_cast<float*>(buffer.tile) + i * kTileStride : buffer.strip;
          if (p.saved) {
            load_strip(p, strip, row, rows, columns);
          } else {
            product_strip<Op>(buffer.left + (tile + i) * depth, buffer.right, depth, rows, columns.count, strip);
          }
          if (p.objective == Objective::kSoftmax) {
            softmax_gradient_strip(p, strip, row, rows, columns, sums);
          } else {
            sigmoid_gradient_strip(p, strip, row, rows, columns, sums);
          }
          if constexpr (!kFloat) convert_strip(strip, rows, columns.vecs, i, buffer.tile, buffer.pair_tile);
        }
        if (p.grad_q)
          product_into_gradient<Op, ByRow>(buffer.tile, buffer.right_by_depth,
                                           ceil_div(columns.count, Op::kDepthPerUnit), tile_rows, p.d,
                                           p.grad_q + (block + tile) * p.d);
        if (p.grad_k)
          product_into_gradient<Op, ByColumn>(
              kFloat ? buffer.tile : buffer.pair_tile, buffer.left_by_depth + tile / Op::kDepthPerUnit * width,
              ceil_div(tile_rows, Op::kDepthPerUnit), columns.count, p.d, p.grad_k + col * p.d);
      }
      if (p.grad_key_bias) {
        for (int j = 0; j < columns.count; ++j) p.grad_key_bias[col + j] += columns.bias_grad[j];
      }
    }
  }
}

inline void contrastive_statistics_part(const ContrastiveProblem& p, const ContrastivePlan& plan, int64_t row0,
                                        int64_t row1, int64_t col0, int64_t col1, char* scratch, PartSums* sums) {
  (p.bf16 ? statistics_part<OpBF16> : statistics_part<OpF32>)(p, plan, row0, row1, col0, col1, scratch, sums);
}

inline void contrastive_gradients_part(const ContrastiveProblem& p, const ContrastivePlan& plan, int64_t row0,
                                       int64_t row1, int64_t col0, int64_t col1, char* scratch, PartSums* sums) {
  (p.bf16 ? gradients_part<OpBF16> : gradients_part<OpF32>)(p, plan, row0, row1, col0, col1, scratch, sums);
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

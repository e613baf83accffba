// SPDX-License-Identifier: Apache-2.0
// Attention, backward: scores again from the log-sum-exps, and the four gradient products of their tile.
//
// With P the weights, dP = grad_out v^T and delta_i = grad_out_i . out_i - grad_lse_i, the scores' gradient is
// dS = P (dP - delta); grad_q = scale dS k, grad_k = scale dS^T q, grad_v = P^T grad_out. A tile of P and dS is the
// left operand of all three, read by rows once and by columns twice; bf16 keeps it in pairs for either direction.
#pragma once

#include "cpu/attention_scores.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

template <class Op>
struct BackwardBuffers {
  static constexpr bool kPairs = Op::kDepthPerUnit == 2;
  // Queries and upstream gradients as left operand (product along a row) and as right operand (product over rows):
  // float32 serves as both.
  uint32_t *q_left, *q_right, *upstream_left, *upstream_right;
  uint32_t *keys_along, *values_along, *keys_over;
  float *weights, *slopes;               // P and dS; in bf16 dS ends as 16-bit rows
  uint32_t *weight_pairs, *slope_pairs;  // bf16: pairs of rows
  float *grad_q, *grad_k, *grad_v, *factors, *slope_rows, *delta, *lse;
  int32_t* index;

  BackwardBuffers(char* at, const AttentionCall& call, const AttentionPlan& plan, int64_t lk) {
    auto take = [&at](int64_t count) {
      char* out = at;
      at += round_up(count * 4, 64);
      return reinterpret_cast<uint32_t*>(out);
    };
    auto take_floats = [&take](int64_t count) { return reinterpret_cast<float*>(take(count)); };
    const int64_t d = attention_width(call.d), dv = attention_width(call.dv), stride = attention_stride(plan.key_block);
    q_left = take(plan.query_block * d);
    upstream_left = take(plan.query_block * dv);
    q_right = kPairs ? take(plan.query_block / 2 * d) : q_left;
    upstream_right = kPairs ? take(plan.query_block / 2 * dv) : upstream_left;
    keys_along = take(call.d * stride);
    values_along = take(call.dv * stride);
    keys_over = take(plan.key_block * d);
    weights = take_floats(plan.query_block * stride);
    slopes = take_floats(plan.query_block * stride);
    weight_pairs = kPairs ? take(plan.query_block / 2 * stride) : reinterpret_cast<uint32_t*>(weights);
    slope_pairs = kPairs ? take(plan.query_block / 2 * stride) : reinterpret_cast<uint32_t*>(slopes);
    grad_q = take_floats(plan.rows * d);
    grad_k = take_floats(plan.key_block * d);
    grad_v = take_floats(plan.key_block * dv);
    factors = take_floats(2 * attention_width(plan.key_block));
    slope_rows = take_floats(2 * attention_width(plan.key_block));
    delta = take_floats(plan.query_block);
    lse = take_floats(plan.query_block);
    index = reinterpret_cast<int32_t*>(take(lk));
  }
};

template <class Op>
float dot_rows(const AttentionTensor& x, int64_t x_at, const AttentionTensor& y, int64_t y_at, int64_t width) {
  constexpr int64_t kElements = kLanes * Op::kDepthPerUnit;
  VecF sum = {};
  for (int64_t e = 0; e < width; e += kElements) {
    const VecU a = load_elements<Op>(x.data, x_at + e * x.col_stride, x.col_stride, width - e);
    const VecU b = load_elements<Op>(y.data, y_at + e * y.col_stride, y.col_stride, width - e);
    if constexpr (Op::kDepthPerUnit == 1) {
      sum += (VecF)a * (VecF)b;
    } else {
      sum += (VecF)(a << 16) * (VecF)(b << 16);
      sum += (VecF)(a & 0xffff0000u) * (VecF)(b & 0xffff0000u);
    }
  }
  return reduce_add(sum);
}

// What the gradient pass over two neighbouring rows of a tile needs of each.
struct SlopeRow {
  float *weights, *slopes;
  int64_t count;  // visible keys; 0 for a row that is not there or sees nothing
  float lse, delta;
  const float* factors;  // dropout, or null
  float* kept_slopes;    // float32 dS, or null
};

// Scores of a row become weights, zeros behind them up to a whole register. `row.delta` is minus the gradient of the
// log-sum-exp on entry. The row is complete: its weights' sum and its sum of P dP, from the very numbers that are used,
// correct what the rounding of the log-sum-exp and of the result would leave in every slope. Returns 1 / sum.
inline float weigh_whole_row(SlopeRow& row) {
  VecF sum = {}, product = {};
  auto step = [&](int64_t c, auto masked) {
    VecF p = exp_shifted(load(row.weights + c) - row.lse);
    VecF upstream = load(row.slopes + c);
    if (row.factors) upstream *= load(row.factors + c);
    VecF both = p * upstream;
    if constexpr (decltype(masked)::value) {
      const VecI real = lane_numbers() < static_cast<int32_t>(row.count - c);
      p = real ? p : VecF{};
      both = real ? both : VecF{};
    }
    sum += p;
    product += both;
    store(row.weights + c, p);
  };
  const int64_t whole = row.count / kLanes * kLanes;
  for (int64_t c = 0; c < whole; c += kLanes) step(c, std::false_type{});
  if (whole < row.count) step(whole, std::true_type{});
  const float inverse = 1.0f / reduce_add(sum);
  row.delta += reduce_add(product) * inverse;
  return inverse;
}

// Weights (`Whole`: up to a factor) or scores in `weights` and dP in `slopes` become P and dS, zeros from `count` to
// `padded` (whole registers).
template <class Op, bool Whole>
void slope_pair(const SlopeRow (&rows)[2], const float (&factor)[2], int64_t padded, uint32_t* weight_pairs,
                uint32_t* slope_pairs) {
  const VecI lanes = lane_numbers();
  auto step = [&](int64_t c, auto masked) {
    VecF p[2], s[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const SlopeRow& row = rows[i];
      p[i] = Whole ? load(row.weights + c) * factor[i] : exp_shifted(load(row.weights + c) - row.lse);
      VecF upstream = load(row.slopes + c);
      if (row.factors) upstream *= load(row.factors + c);
      s[i] = p[i] * (upstream - row.delta);
      if (row.factors) p[i] *= load(row.factors + c);
      if constexpr (decltype(masked)::value) {
        const VecI real = lanes < static_cast<int32_t>(row.count - c);
        p[i] = real ? p[i] : VecF{};
        s[i] = real ? s[i] : VecF{};
      }
      if (row.kept_slopes) store(row.kept_slopes + c, s[i]);
    }
    if constexpr (Op::kDepthPerUnit == 1) {
      // the second first: where it is not there, it points at the first
      store(rows[1].weights + c, p[1]);
      store(rows[1].slopes + c, s[1]);
      store(rows[0].weights + c, p[0]);
      store(rows[0].slopes + c, s[0]);
    } else {
      const HalfWords s0 = to_bf16(s[0]), s1 = to_bf16(s[1]);
      std::memcpy(reinterpret_cast<uint16_t*>(rows[1].slopes) + c, &s1, sizeof s1);
      std::memcpy(reinterpret_cast<uint16_t*>(rows[0].slopes) + c, &s0, sizeof s0);
      store_units(slope_pairs + c, bf16_pairs(s0, s1));
      store_units(weight_pairs + c, bf16_pairs(p[0], p[1]));
    }
  };
  const int64_t least = rows[0].count < rows[1].count ? rows[0].count : rows[1].count;
  int64_t c = 0;
  for (; c + kLanes <= least; c += kLanes) step(c, std::false_type{});
  for (; c < padded; c += kLanes) step(c, std::true_type{});
}

template <class Op>
struct BackwardItem {
  const AttentionCall& call;
  const AttentionItem& item;
  const BackwardBuffers<Op> buffer;
  const Keys keys;
  const int64_t group, key_block, query_block, units, value_units, width, value_width, stride;
  const bool slopes_wanted;
  float* const grad_q;
  const int64_t chain;
  mutable Fetcher fetcher;
  const bool carried;  // grad_q outlives its block of queries

  BackwardItem(const AttentionCall& c, const AttentionPlan& plan, const AttentionItem& i, const AttentionItem* next,
               char* scratch)
      : call(c),
        item(i),
        buffer(scratch, c, plan, i.lk),
        keys(c, i, buffer.index),
        group(c.heads / c.key_heads),
        key_block(even_block(keys.count, plan.key_block, kLanes)),
        query_block(even_block(i.lq, plan.query_block, 12)),
        units(ceil_div(c.d, Op::kDepthPerUnit)),
        value_units(ceil_div(c.dv, Op::kDepthPerUnit)),
        width(attention_width(c.d)),
        value_width(attention_width(c.dv)),
        stride(attention_stride(key_block)),
        slopes_wanted(c.grad_q.data || c.grad_k.data || i.grad_bias),
        grad_q(i.partial_dq ? i.partial_dq : buffer.grad_q),
        chain(longest_chain<Op>(i.lq)),
        carried(i.partial_dq || keys.count > plan.key_block) {
    fetch(next);
  }

  void fetch(const AttentionItem* next) {
    const int64_t size = call.bf16 ? 2 : 4;
    if (keys.count * item.lq == 0 || (item.lq * group + keys.count) * (call.d + call.dv) * size > Fetcher::kMostBytes)
      return;
    if (next) {
      fetch_rows(fetcher, call, call.k, next->batch, next->k_start, next->key_head, next->lk, call.d, false);
      fetch_rows(fetcher, call, call.v, next->batch, next->k_start, next->key_head, next->lk, call.dv, false);
    }
    for (int64_t head = item.key_head * group; head < (item.key_head + 1) * group; ++head)
      fetch_rows(fetcher, call, call.grad_q, item.batch, item.q_start, head, item.lq, call.d, true);
    fetch_rows(fetcher, call, call.grad_k, item.batch, item.k_start, item.key_head, item.lk, call.d, true);
    fetch_rows(fetcher, call, call.grad_v, item.batch, item.k_start, item.key_head, item.lk, call.dv, true);
    if (next) {
      for (int64_t head = next->key_head * group; head < (next->key_head + 1) * group; ++head) {
        fetch_rows(fetcher, call, call.q, next->batch, next->q_start, head, next->lq, call.d, false);
        fetch_rows(fetcher, call, call.grad_out, next->batch, next->q_start, head, next->lq, call.dv, false);
      }
    }
    fetcher.spread(group * item.lq / 2 + (3 * group * item.lq + 2 * keys.count) / kBlockRows);
  }

  HeadRows rows_of(const AttentionTensor& t, int64_t start, int64_t head, const int32_t* index, int64_t first) const {
    return {&t, offset_of(t, item.batch, start, head), index, first};
  }

  float* grad_q_of(int64_t head, int64_t q) const {
    return grad_q + (carried ? ((head % group) * item.lq + q) * width : 0);
  }

  void pack_queries(int64_t head, int64_t q, int64_t count) const {
    const HeadRows queries = rows_of(call.q, item.q_start, head, nullptr, q);
    const HeadRows upstream = rows_of(call.grad_out, item.q_start, head, nullptr, q);
    pack_left<Op>(queries, count, call.d, buffer.q_left, width);
    pack_left<Op>(upstream, count, call.dv, buffer.upstream_left, value_width);
    if constexpr (Op::kDepthPerUnit == 2) {
      pack_right<Op>(queries, count, call.d, buffer.q_right, width);
      pack_right<Op>(upstream, count, call.dv, buffer.upstream_right, value_width);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = item.q_start + q + i;
      buffer.lse[i] = call.lse[item.batch * call.lse_batch_stride + head * call.lse_head_stride + row];
      float delta = 0.0f;
      if (carried)
        delta = dot_rows<Op>(call.out, offset_of(call.out, item.batch, row, head), call.grad_out,
                             offset_of(call.grad_out, item.batch, row, head), call.dv);
      if (call.grad_lse)
        delta -= call.grad_lse[item.batch * call.grad_lse_batch_stride + head * call.grad_lse_head_stride +
                               row * call.grad_lse_row_stride];
      buffer.delta[i] = delta;
    }
  }

  void add_bias_gradient(int64_t head, int64_t row, int64_t k, int64_t count, const float* slopes) const {
    const int64_t slice = (call.bias_batch > 1 ? item.batch : 0) * call.bias_heads + (call.bias_heads > 1 ? head : 0);
    float* to = item.grad_bias + (slice * item.lq + row) * item.lk;
    if (!keys.index) {
      for (int64_t c = 0; c < count; ++c) to[k + c] += slopes[c];
    } else {
      for (int64_t c = 0; c < count; ++c) to[keys.index[k + c]] += slopes[c];
    }
  }

  // Queries [q, q + count) of one head against keys [k, k + size) of the list.
  void tile(int64_t head, int64_t q, int64_t count, int64_t k, int64_t size, bool first_keys,
            bool first_queries) const {
    auto seen = [&](int64_t i) {
      const int64_t n = keys.visible(q + i) - k;
      return n < 0 ? int64_t{0} : n < size ? n : size;
    };
    auto seen_by_strip = [&](int64_t i) { return seen((i + kBlockRows < count ? i + kBlockRows : count) - 1); };
    auto whole = [](int64_t depth) { return [depth](int64_t) { return Range{0, depth}; }; };

    pack_queries(head, q, count);
    product<Op>(buffer.q_left, width, 1, count, buffer.keys_along, stride, units, size, buffer.weights, stride,
                call.scale, false, chain, fetcher, whole(units), seen_by_strip);
    product<Op>(buffer.upstream_left, value_width, 1, count, buffer.values_along, stride, value_units, size,
                buffer.slopes, stride, 1.0f, false, chain, fetcher, whole(value_units), seen_by_strip);

    const int64_t factor_stride = attention_width(key_block), most = attention_width(size);
    for (int64_t i = 0; i < count; i += 2) {
      SlopeRow rows[2];
      for (int64_t r = 0; r < 2; ++r) {
        const bool real = i + r < count;
        const int64_t at = real ? i + r : i, n = seen(at);
        float* factors = buffer.factors + r * factor_stride;
        SlopeRow& row = rows[r];
        row = {buffer.weights + at * stride,
               buffer.slopes + at * stride,
               real ? n : 0,
               buffer.lse[at],
               buffer.delta[at],
               nullptr,
               nullptr};
        if (row.lse == -kInfinity) row.count = 0;  // saw nothing
        if (row.count == 0) continue;
        if (call.bias) BiasRow(call, item.batch, head, q + at).add_to(row.weights, keys, k, n);
        if (call.dropout) {
          dropout_row(call, item.batch, head, q + at, keys, k, n, factors);
          row.factors = factors;
        }
        if (item.grad_bias) row.kept_slopes = buffer.slope_rows + r * factor_stride;
      }
      // by columns, a strip of keys starts at the first query that sees its first key: zeros reach that far
      const int64_t furthest = rows[0].count > rows[1].count ? rows[0].count : rows[1].count;
      const int64_t padded = furthest + 16 < most ? round_up(furthest + 16, kLanes) : most;
      uint32_t *weight_pairs = buffer.weight_pairs + i / 2 * stride, *slope_pairs = buffer.slope_pairs + i / 2 * stride;
      float factor[2] = {1.0f, 1.0f};
      if (!carried) {
        for (int64_t r = 0; r < 2; ++r) {
          if (rows[r].count > 0) factor[r] = weigh_whole_row(rows[r]);
        }
        slope_pair<Op, true>(rows, factor, padded, weight_pairs, slope_pairs);
      } else {
        slope_pair<Op, false>(rows, factor, padded, weight_pairs, slope_pairs);
      }
      fetcher.step();
      for (int64_t r = 0; r < 2; ++r) {
        if (rows[r].kept_slopes) add_bias_gradient(head, q + i + r, k, rows[r].count, rows[r].kept_slopes);
      }
    }

    auto from_first_query = [&](int64_t j) {
      const int64_t depth = ceil_div(count, Op::kDepthPerUnit), first = keys.first_query(k + j) - q;
      return Range{first <= 0 ? 0 : first < count ? first / Op::kDepthPerUnit : depth, depth};
    };
    if (call.grad_q.data)
      product<Op>(
          reinterpret_cast<const uint32_t*>(buffer.slopes), stride, 1, count, buffer.keys_over, width,
          ceil_div(size, Op::kDepthPerUnit), call.d, grad_q_of(head, q), width, 1.0f, !first_keys, chain, fetcher,
          [&](int64_t i) { return Range{0, ceil_div(seen_by_strip(i), Op::kDepthPerUnit)}; },
          [&](int64_t) { return call.d; });
    if (call.grad_k.data)
      product<Op>(buffer.slope_pairs, 1, stride, size, buffer.q_right, width, ceil_div(count, Op::kDepthPerUnit),
                  call.d, buffer.grad_k, width, 1.0f, !first_queries, chain, fetcher, from_first_query,
                  [&](int64_t) { return call.d; });
    if (call.grad_v.data)
      product<Op>(buffer.weight_pairs, 1, stride, size, buffer.upstream_right, value_width,
                  ceil_div(count, Op::kDepthPerUnit), call.dv, buffer.grad_v, value_width, 1.0f, !first_queries, chain,
                  fetcher, from_first_query, [&](int64_t) { return call.dv; });
  }

  void write_zeros(const AttentionTensor& t, int64_t at, int64_t count) const {
    alignas(VK_VECTOR_BYTES) const float zeros[kLanes] = {};
    for (int64_t c = 0; c < count; c += kLanes)
      write_row<Op>(t, at + c * t.col_stride, zeros, count - c < kLanes ? count - c : kLanes, 1.0f);
  }

  void write_keys(int64_t k, int64_t size, bool any) const {
    for (int64_t j = 0; j < size; ++j) {
      const int64_t row = item.k_start + keys.original(k + j);
      for (const bool values : {false, true}) {
        const AttentionTensor& t = values ? call.grad_v : call.grad_k;
        if (!t.data) continue;
        const int64_t at = offset_of(t, item.batch, row, item.key_head);
        if (!keys.index) fetch_ahead<Op>(t, at, j, size, values ? call.dv : call.d);
        if (!any) {
          write_zeros(t, at, values ? call.dv : call.d);
        } else if (values) {
          write_row<Op>(t, at, buffer.grad_v + j * value_width, call.dv, 1.0f);
        } else {
          write_row<Op>(t, at, buffer.grad_k + j * width, call.d, call.scale);
        }
      }
    }
  }

  void write_hidden_keys() const {
    for (int64_t j = 0, listed = 0; j < item.lk; ++j) {
      if (listed < keys.count && keys.original(listed) == j) {
        ++listed;
        continue;
      }
      for (const bool values : {false, true}) {
        const AttentionTensor& t = values ? call.grad_v : call.grad_k;
        if (t.data)
          write_zeros(t, offset_of(t, item.batch, item.k_start + j, item.key_head), values ? call.dv : call.d);
      }
    }
  }

  void write_queries(int64_t head, int64_t q, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = offset_of(call.grad_q, item.batch, item.q_start + q + i, head);
      fetch_ahead<Op>(call.grad_q, at, i, count, call.d);
      if (keys.count == 0) {
        write_zeros(call.grad_q, at, call.d);
      } else {
        write_row<Op>(call.grad_q, at, grad_q_of(head, q) + i * width, call.d, call.scale);
      }
    }
  }

  void run() const {
    if (item.block0 == 0 && keys.count < item.lk) write_hidden_keys();
    const int64_t first_head = item.key_head * group, blocks = ceil_div(keys.count, key_block);
    // A masked sequence may have fewer blocks than its length has: the last shares are then empty.
    const int64_t end = item.block1 < blocks && item.block1 < item.blocks ? item.block1 : blocks;
    bool any_keys = false;
    for (int64_t block = item.block0; block < end; ++block) {
      const int64_t k = block * key_block, size = keys.count - k < key_block ? keys.count - k : key_block;
      pack_transposed<Op>(rows_of(call.k, item.k_start, item.key_head, keys.index, k), size, call.d, buffer.keys_along,
                          stride);
      pack_transposed<Op>(rows_of(call.v, item.k_start, item.key_head, keys.index, k), size, call.dv,
                          buffer.values_along, stride);
      pack_right<Op>(rows_of(call.k, item.k_start, item.key_head, keys.index, k), size, call.d, buffer.keys_over,
                     width);
      bool any_queries = false;
      for (int64_t head = first_head; head < first_head + group; ++head) {
        for (int64_t q = 0; q < item.lq; q += query_block) {
          const int64_t count = item.lq - q < query_block ? item.lq - q : query_block;
          if (!any_keys || keys.visible(q + count - 1) > k) {
            tile(head, q, count, k, size, !any_keys, !any_queries);
            any_queries = true;
          }
          if (call.grad_q.data && !item.partial_dq && block + 1 == end) write_queries(head, q, count);
        }
      }
      write_keys(k, size, any_queries);
      any_keys = true;
    }
    if (any_keys) return;
    for (int64_t head = first_head; head < first_head + group; ++head) {
      if (item.partial_dq)
        std::memset(grad_q_of(head, 0), 0, sizeof(float) * static_cast<size_t>(item.lq * width));
      else if (call.grad_q.data)
        write_queries(head, 0, item.lq);
    }
  }
};

inline void attention_backward_item(const AttentionCall& call, const AttentionPlan& plan, const AttentionItem& item,
                                    const AttentionItem* next, char* scratch) {
  if (call.bf16) {
    BackwardItem<OpBF16>(call, plan, item, next, scratch).run();
  } else {
    BackwardItem<OpF32>(call, plan, item, next, scratch).run();
  }
}

// grad_q of one head of one sequence, from the shares of its keys, in their order.
template <class Op>
void sum_shares(const AttentionCall& call, const AttentionItem& item, int64_t head, int64_t shares,
                int64_t share_stride, float* first) {
  const int64_t width = attention_width(call.d);
  const int64_t group = call.heads / call.key_heads;
  for (int64_t i = 0; i < item.lq; ++i) {
    float* row = first + ((head % group) * item.lq + i) * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      VecF sum = load(row + c);
      for (int64_t s = 1; s < shares; ++s) sum += load(row + s * share_stride + c);
      store(row + c, sum);
    }
    write_row<Op>(call.grad_q, offset_of(call.grad_q, item.batch, item.q_start + i, head), row, call.d, call.scale);
  }
}

inline void attention_sum_shares(const AttentionCall& call, const AttentionItem& item, int64_t head, int64_t shares,
                                 int64_t share_stride, float* first) {
  (call.bf16 ? sum_shares<OpBF16> : sum_shares<OpF32>)(call, item, head, shares, share_stride, first);
}

// Sums of the bias's gradient over `parts` buffers of `count` values, in their order, into the caller's dtype.
inline void attention_sum_bias(const AttentionCall& call, const float* from, int64_t parts, int64_t part_stride,
                               int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanes) {
    const int count = static_cast<int>(end - i < kLanes ? end - i : kLanes);
    VecF sum = {};
    for (int64_t p = 0; p < parts; ++p) sum += load_first(from + p * part_stride + i, count);
    if (!call.bias_bf16) {
      store_first(static_cast<float*>(call.grad_bias) + i, sum, count);
    } else {
      const HalfWords halves = to_bf16(sum);
      std::memcpy(static_cast<uint16_t*>(call.grad_bias) + i, &halves, sizeof(uint16_t) * static_cast<size_t>(count));
    }
  }
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

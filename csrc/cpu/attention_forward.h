// SPDX-License-Identifier: Apache-2.0
// Attention, forward: a block of scores in the second-level cache, softmax in place, times the values.
//
// Up to `key_block` keys the softmax of a row is complete when its scores are: nothing is rescaled. Beyond, the running
// maximum and sum of each row, and its share of the result, are carried from block to block.
#pragma once

#include "cpu/attention_scores.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

struct ForwardBuffers {
  static constexpr int64_t kRowSlack = 16;  // finished rows are taken a register at a time
  uint32_t *q, *keys, *values;
  float *scores, *result, *max, *sum, *factors;
  int32_t* index;

  ForwardBuffers(char* at, const AttentionCall& call, const AttentionPlan& plan, int64_t lk) {
    auto take = [&at](int64_t count) {
      char* out = at;
      at += round_up(count * 4, 64);
      return out;
    };
    q = reinterpret_cast<uint32_t*>(take(plan.query_block * attention_width(call.d)));
    keys = reinterpret_cast<uint32_t*>(take(call.d * attention_stride(plan.key_block)));
    values = reinterpret_cast<uint32_t*>(take(plan.key_block * attention_width(call.dv)));
    scores = reinterpret_cast<float*>(take(plan.query_block * attention_stride(plan.key_block)));
    result = reinterpret_cast<float*>(take(plan.rows * attention_width(call.dv)));
    max = reinterpret_cast<float*>(take(plan.rows + kRowSlack));
    sum = reinterpret_cast<float*>(take(plan.rows + kRowSlack));
    factors = reinterpret_cast<float*>(take(attention_width(plan.key_block)));
    index = reinterpret_cast<int32_t*>(take(lk));
  }
};

// Scores of one row become weights exp(score - max), unnormalised, zeros from `count` to `padded` (whole registers).
// bf16 weights take the place of the first half of the row. Returns the new maximum; `sum` is that of this block.
template <class Op>
float softmax_row(float* row, int64_t count, int64_t padded, float max, const float* factors, float* sum) {
  const int64_t whole = count / kLanes * kLanes;
  VecF largest = splat(max);
  for (int64_t c = 0; c < whole; c += kLanes) largest = max_keep(largest, load(row + c));
  if (whole < count) {
    const VecI real = lane_numbers() < static_cast<int32_t>(count - whole);
    const VecF last = real ? load(row + whole) : splat(-kInfinity);
    store(row + whole, last);
    largest = max_keep(largest, last);
  }
  max = reduce_max(largest);
  const VecF shift = splat(max == -kInfinity ? 0.0f : max);
  const int64_t end = round_up(count, kLanes);
  VecF total = {};
  for (int64_t c = 0; c < end; c += kLanes) {
    VecF p = exp_shifted(load(row + c) - shift);
    total += p;
    if (factors) p *= load(factors + c);
    if constexpr (Op::kDepthPerUnit == 1) {
      store(row + c, p);
    } else {
      const HalfWords halves = to_bf16(p);
      std::memcpy(reinterpret_cast<uint16_t*>(row) + c, &halves, sizeof halves);
    }
  }
  for (int64_t c = end; c < padded; c += kLanes) {
    if constexpr (Op::kDepthPerUnit == 1) {
      store(row + c, VecF{});
    } else {
      std::memset(reinterpret_cast<uint16_t*>(row) + c, 0, sizeof(uint16_t) * kLanes);
    }
  }
  *sum = reduce_add(total);
  return max;
}

template <class Op>
struct ForwardItem {
  const AttentionCall& call;
  const AttentionItem& item;
  const ForwardBuffers buffer;
  const Keys keys;
  const int64_t group, queries, units, value_width;
  const int64_t chain;
  mutable Fetcher fetcher;
  const bool carried;  // several key blocks: what belongs to a row outlives its block of queries

  ForwardItem(const AttentionCall& c, const AttentionPlan& plan, const AttentionItem& i, const AttentionItem* next,
              char* scratch)
      : call(c),
        item(i),
        buffer(scratch, c, plan, i.lk),
        keys(c, i, buffer.index),
        group(c.heads / c.key_heads),
        queries(i.q1 - i.q0),
        units(ceil_div(c.d, Op::kDepthPerUnit)),
        value_width(attention_width(c.dv)),
        chain(longest_chain<Op>(i.lq)),
        carried(keys.count > plan.key_block) {
    fetch(next);
  }

  void fetch(const AttentionItem* next) {
    const int64_t size = call.bf16 ? 2 : 4;
    if (keys.count * queries == 0 || (queries * group + keys.count) * (call.d + call.dv) * size > Fetcher::kMostBytes)
      return;
    for (int64_t head = item.key_head * group; head < (item.key_head + 1) * group; ++head)
      fetch_rows(fetcher, call, call.out, item.batch, item.q_start + item.q0, head, queries, call.dv, true);
    if (next) {
      fetch_rows(fetcher, call, call.k, next->batch, next->k_start, next->key_head, next->lk, call.d, false);
      fetch_rows(fetcher, call, call.v, next->batch, next->k_start, next->key_head, next->lk, call.dv, false);
      for (int64_t head = next->key_head * group; head < (next->key_head + 1) * group; ++head)
        fetch_rows(fetcher, call, call.q, next->batch, next->q_start + next->q0, head, next->q1 - next->q0, call.d,
                   false);
    }
    // a step for each row's softmax, and for each strip of either product
    fetcher.spread(group * queries + 2 * group * queries / kBlockRows);
  }

  HeadRows rows_of(const AttentionTensor& t, int64_t start, int64_t head, const int32_t* index, int64_t first) const {
    return {&t, offset_of(t, item.batch, start, head), index, first};
  }

  int64_t first_row(int64_t head, int64_t q) const { return carried ? (head % group) * queries + q - item.q0 : 0; }

  // Queries [q, q + count) of one head against keys [k, k + width) of the list.
  void block(int64_t head, int64_t q, int64_t count, int64_t k, int64_t width, int64_t key_block) const {
    const int64_t stride = attention_stride(key_block), left_width = attention_width(units);
    const int64_t row0 = first_row(head, q);
    auto seen = [&](int64_t i) {  // keys of this block that query q + i sees
      const int64_t n = keys.visible(q + i) - k;
      return n < 0 ? int64_t{0} : n < width ? n : width;
    };
    auto seen_by_strip = [&](int64_t i) { return seen((i + kBlockRows < count ? i + kBlockRows : count) - 1); };
    pack_left<Op>(rows_of(call.q, item.q_start, head, nullptr, q), count, call.d, buffer.q, left_width);
    product<Op>(
        buffer.q, left_width, 1, count, buffer.keys, stride, units, width, buffer.scores, stride, call.scale, false,
        chain, fetcher, [&](int64_t) { return Range{0, units}; }, seen_by_strip);
    for (int64_t strip = 0; strip < count; strip += kBlockRows) {
      const int64_t padded = round_up(seen_by_strip(strip), kLanes);
      for (int64_t i = strip; i < strip + kBlockRows && i < count; ++i) {
        float* scores = buffer.scores + i * stride;
        const int64_t n = seen(i), r = row0 + i;
        if (call.bias) BiasRow(call, item.batch, head, q + i).add_to(scores, keys, k, n);
        if (call.dropout) dropout_row(call, item.batch, head, q + i, keys, k, n, buffer.factors);
        const float before = k > 0 ? buffer.max[r] : -kInfinity;
        float sum;
        const float after = softmax_row<Op>(scores, n, padded, before, call.dropout ? buffer.factors : nullptr, &sum);
        if (k > 0) {
          const float kept = exp_shifted(splat(before - (after == -kInfinity ? 0.0f : after)))[0];
          sum += buffer.sum[r] * kept;
          if (kept != 1.0f) {
            float* result = buffer.result + r * value_width;
            for (int64_t c = 0; c < value_width; c += kLanes) store(result + c, load(result + c) * kept);
          }
        }
        fetcher.step();
        buffer.max[r] = after;
        buffer.sum[r] = sum;
      }
    }
    product<Op>(
        reinterpret_cast<const uint32_t*>(buffer.scores), stride, 1, count, buffer.values, value_width,
        ceil_div(width, Op::kDepthPerUnit), call.dv, buffer.result + row0 * value_width, value_width, 1.0f, k > 0,
        chain, fetcher, [&](int64_t i) { return Range{0, ceil_div(seen_by_strip(i), Op::kDepthPerUnit)}; },
        [&](int64_t) { return call.dv; });
  }

  void write(int64_t head, int64_t q, int64_t count) const {
    alignas(VK_VECTOR_BYTES) const float zeros[kLanes] = {};
    alignas(VK_VECTOR_BYTES) float lse[kLanes], factor[kLanes];
    const int64_t row0 = first_row(head, q);
    float* out_lse = call.lse + item.batch * call.lse_batch_stride + head * call.lse_head_stride + item.q_start + q;
    for (int64_t i = 0; i < count; ++i) {
      const int lane = static_cast<int>(i % kLanes);
      if (lane == 0) {  // a register of rows at a time, those behind the last one included (kRowSlack)
        const VecF sum = load(buffer.sum + row0 + i), max = load(buffer.max + row0 + i);
        // an infinite score makes the sum NaN, and is itself the log-sum-exp
        const VecF found = max == kInfinity ? max : max + log_of_sum(sum);
        store(lse, sum == 0.0f ? splat(-kInfinity) : found);
        if (keys.count == 0) store(lse, splat(-kInfinity));
        store(factor, 1.0f / sum);
      }
      const int64_t at = offset_of(call.out, item.batch, item.q_start + q + i, head);
      fetch_ahead<Op>(call.out, at, i, count, call.dv);
      if (lse[lane] == -kInfinity) {
        for (int64_t c = 0; c < call.dv; c += kLanes)
          write_row<Op>(call.out, at + c * call.out.col_stride, zeros, call.dv - c < kLanes ? call.dv - c : kLanes,
                        1.0f);
      } else {
        write_row<Op>(call.out, at, buffer.result + (row0 + i) * value_width, call.dv, factor[lane]);
      }
      out_lse[i] = lse[lane];
    }
  }

  void run(const AttentionPlan& plan) const {
    const int64_t first_head = item.key_head * group;
    const int64_t query_block = even_block(queries, plan.query_block, kBlockRows);
    const int64_t key_block = even_block(keys.count, plan.key_block, kLanes);
    for (int64_t k = 0; k == 0 || k < keys.count; k += key_block) {
      const int64_t width = keys.count - k < key_block ? keys.count - k : key_block;
      const bool last = k + key_block >= keys.count;
      if (width > 0) {
        pack_transposed<Op>(rows_of(call.k, item.k_start, item.key_head, keys.index, k), width, call.d, buffer.keys,
                            attention_stride(key_block));
        pack_right<Op>(rows_of(call.v, item.k_start, item.key_head, keys.index, k), width, call.dv, buffer.values,
                       value_width);
      }
      for (int64_t head = first_head; head < first_head + group; ++head) {
        for (int64_t q = item.q0; q < item.q1; q += query_block) {
          const int64_t count = item.q1 - q < query_block ? item.q1 - q : query_block;
          if (width > 0 && (k == 0 || keys.visible(q + count - 1) > k)) block(head, q, count, k, width, key_block);
          if (last) write(head, q, count);
        }
      }
    }
  }
};

inline void attention_forward_item(const AttentionCall& call, const AttentionPlan& plan, const AttentionItem& item,
                                   const AttentionItem* next, char* scratch) {
  if (call.bf16) {
    ForwardItem<OpBF16>(call, plan, item, next, scratch).run(plan);
  } else {
    ForwardItem<OpF32>(call, plan, item, next, scratch).run(plan);
  }
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// Attention on the CPU, host side: how a call is cut into items, their scratch, and the sums that cross items.
//
// An item belongs to one key head of one sequence, so its keys and values are packed once. Threads take items as they
// become free, the largest first; an item's arithmetic does not depend on which thread runs it or on how many there
// are.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"
#include "cpu/host.h"
#include "cpu/table.h"

namespace vk::cpu {
namespace {

constexpr int64_t kKeyBytes =
    256 << 10;  // packed keys and values of a block: they stay in a 1 MiB cache with the scores
constexpr int64_t kMostKeys = 640, kFewestKeys = 64, kKeyAlign = 16;
constexpr int64_t kQueryBlock = 72;    // a multiple of every block height (engine: 6 and 4 rows)
constexpr int64_t kCarriedRows = 288;  // rows whose results wait for the next key block
// Backward: the packed keys and values and the sums of their gradients; a tile of weights and one of slopes.
constexpr int64_t kKeyBytesBackward = 392 << 10;
constexpr int64_t kTileScores = 42 << 10;
constexpr int64_t kMostQueriesBackward = 264;
constexpr int64_t kFewItems = 8;  // with fewer key heads than this, the keys of a head are shared out
constexpr int64_t kKeysToShare = 512;
constexpr int64_t kMostBiasBytes = 64 << 20;
constexpr int64_t kItemsPerThread = 4;   // so that the last item keeps nobody waiting for long
constexpr int64_t kSmallPart = 1 << 17;  // multiply-adds below which another thread costs more than it brings

int64_t bytes_of(int64_t count) { return round_up(count * 4, 64); }

struct Sequence {
  int64_t q_start, lq, k_start, lk;
};

int64_t boundary(const void* values, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
}

Sequence sequence(const AttentionCall& call, int64_t b) {
  if (!call.cu_q) return {0, call.lq, 0, call.lk};
  const int64_t q0 = boundary(call.cu_q, call.cu_q_wide, b), q1 = boundary(call.cu_q, call.cu_q_wide, b + 1);
  const int64_t k0 = boundary(call.cu_k, call.cu_k_wide, b), k1 = boundary(call.cu_k, call.cu_k_wide, b + 1);
  return {q0, q1 - q0, k0, k1 - k0};
}

void check(const AttentionCall& call) {
  VK_CHECK(call.lk <= std::numeric_limits<int32_t>::max(), "%lld keys, expected fewer than 2^31", (long long)call.lk);
  if (!call.cu_q) return;
  for (const bool keys : {false, true}) {
    const void* values = keys ? call.cu_k : call.cu_q;
    const bool wide = keys ? call.cu_k_wide : call.cu_q_wide;
    const int64_t tokens = keys ? call.lk : call.lq;
    const char* name = keys ? "cu_seqlens_k" : "cu_seqlens_q";
    const int64_t first = boundary(values, wide, 0), last = boundary(values, wide, call.batch);
    if (first != 0 || last != tokens)
      raise_value_error("%s must go from 0 to %lld (the tokens), got %lld to %lld", name, (long long)tokens,
                        (long long)first, (long long)last);
    for (int64_t b = 0; b < call.batch; ++b) {
      const int64_t start = boundary(values, wide, b), end = boundary(values, wide, b + 1);
      if (end < start)
        raise_value_error("%s must not decrease, got %lld then %lld at sequence %lld", name, (long long)start,
                          (long long)end, (long long)b);
    }
  }
}

// Multiply-adds of a sequence and key head.
int64_t work(const AttentionCall& call, const Sequence& s) {
  const int64_t all = s.lq * s.lk * (call.d + call.dv) * (call.heads / call.key_heads);
  return call.causal && s.lk <= s.lq ? all / 2 : all;
}

int64_t total_work(const AttentionCall& call) {
  int64_t total = 0;
  for (int64_t b = 0; b < call.batch; ++b) total += work(call, sequence(call, b)) * call.key_heads;
  return total;
}

int threads_for(int64_t total, int threads) {
  return static_cast<int>(std::clamp<int64_t>(total / kSmallPart, 1, std::max(threads, 1)));
}

// Runs chains of items: chain c is items [starts[c], starts[c + 1]), one after the other on one thread.
void run_chains(AttentionItemFunction kernel, const AttentionCall& call, const AttentionPlan& plan,
                const std::vector<AttentionItem>& items, const std::vector<int64_t>& starts, int threads,
                char* scratch) {
  const auto chains = static_cast<int64_t>(starts.size()) - 1;
  std::atomic<int64_t> taken{0};
  parallel_for(threads, std::min<int64_t>(threads, chains), [&](int64_t part) {
    // One chain ahead: what an item needs is fetched while the one before it computes.
    int64_t chain = taken.fetch_add(1);
    while (chain < chains) {
      const int64_t after = taken.fetch_add(1);
      const auto begin = static_cast<size_t>(starts[static_cast<size_t>(chain)]);
      const auto end = static_cast<size_t>(starts[static_cast<size_t>(chain) + 1]);
      for (size_t i = begin; i < end; ++i) {
        const AttentionItem* next = nullptr;
        if (i + 1 < end) {
          next = &items[i + 1];
        } else if (after < chains) {
          next = &items[static_cast<size_t>(starts[static_cast<size_t>(after)])];
        }
        kernel(call, plan, items[i], next, scratch + part * plan.scratch_bytes);
      }
      chain = after;
    }
  });
}

int64_t forward_key_block(int64_t bytes_per_key) {
  const int64_t keys = kKeyBytes / bytes_per_key / kKeyAlign * kKeyAlign;
  return std::clamp(keys, kFewestKeys, kMostKeys);
}

AttentionPlan forward_plan(const AttentionCall& call, int64_t longest_keys) {
  AttentionPlan plan;
  const int64_t group = call.heads / call.key_heads;
  plan.key_block = std::min(forward_key_block((call.d + call.dv) * (call.bf16 ? 2 : 4)),
                            round_up(std::max<int64_t>(longest_keys, 1), kKeyAlign));
  plan.query_block = kQueryBlock;
  plan.rows = longest_keys > plan.key_block
                  ? std::max(kQueryBlock, kCarriedRows / group / kQueryBlock * kQueryBlock) * group
                  : kQueryBlock;
  plan.scratch_bytes =
      bytes_of(plan.query_block * attention_width(call.d)) + bytes_of(call.d * attention_stride(plan.key_block)) +
      bytes_of(plan.key_block * attention_width(call.dv)) +
      bytes_of(plan.query_block * attention_stride(plan.key_block)) + bytes_of(plan.rows * attention_width(call.dv)) +
      2 * bytes_of(plan.rows + 16) + bytes_of(attention_width(plan.key_block)) + bytes_of(longest_keys);
  plan.scratch_bytes = round_up(plan.scratch_bytes, 4096) + 64;  // an odd number of lines: no two threads' sets in step
  return plan;
}

AttentionItem item_of(int64_t b, int64_t head, const Sequence& s, int64_t q0, int64_t q1) {
  return {.batch = b,
          .key_head = head,
          .q_start = s.q_start,
          .lq = s.lq,
          .k_start = s.k_start,
          .lk = s.lk,
          .q0 = q0,
          .q1 = q1};
}

// Packed sequences differ in length: whoever takes the longest last is waited for.
void largest_first(const AttentionCall& call, std::vector<AttentionItem>& items) {
  if (!call.cu_q) return;
  std::stable_sort(items.begin(), items.end(), [](const AttentionItem& a, const AttentionItem& b) {
    return (a.q1 - a.q0) * a.lk > (b.q1 - b.q0) * b.lk;
  });
}

int64_t longest_keys(const AttentionCall& call) {
  int64_t longest = 0;
  for (int64_t b = 0; b < call.batch; ++b) longest = std::max(longest, sequence(call, b).lk);
  return longest;
}

// How a backward call is cut: by its shape alone, because sums cross the cuts.
struct Backward {
  AttentionPlan plan;
  int64_t shares = 1;  // of the keys of one head; each leaves partial sums of grad_q
  std::vector<AttentionItem> items;
  std::vector<int64_t> starts{0};  // chains of items that add to one slice of the bias's gradient
  float* bias_sums = nullptr;      // [bias_parts][bias_size]
  int64_t bias_parts = 1, bias_size = 0;
  int64_t bytes = 0;  // of the workspace, before the threads' scratch

  // With `workspace` null only sizes are right.
  Backward(const AttentionCall& call, char* workspace) {
    const int64_t group = call.heads / call.key_heads, sets = call.batch * call.key_heads;
    const int64_t longest = longest_keys(call), width = attention_width(call.d);
    make_plan(call, longest, sets);
    auto take = [&](int64_t count) {
      char* out = workspace + bytes;
      bytes += bytes_of(count);
      return reinterpret_cast<float*>(out);
    };
    const int64_t blocks = ceil_div(longest, plan.key_block);
    if (sets < kFewItems && !call.grad_bias && !call.cu_q)
      shares = std::clamp<int64_t>(ceil_div(kFewItems, std::max<int64_t>(sets, 1)), 1, std::max<int64_t>(blocks, 1));
    for (int64_t b = 0; b < call.batch; ++b) {
      const Sequence s = sequence(call, b);
      if (s.lq == 0 && s.lk == 0) continue;
      for (int64_t head = 0; head < call.key_heads; ++head) {
        for (int64_t share = 0; share < shares; ++share) {
          AttentionItem item = item_of(b, head, s, 0, s.lq);
          item.blocks = blocks;
          item.block0 = blocks * share / shares;
          item.block1 = blocks * (share + 1) / shares;
          if (shares > 1) item.partial_dq = take(group * s.lq * width);
          items.push_back(item);
        }
      }
    }
    if (call.grad_bias) {
      make_bias_chains(call, take);
      return;
    }
    for (size_t i = 1; i <= items.size(); ++i) starts.push_back(static_cast<int64_t>(i));
    largest_first(call, items);
  }

 private:
  void make_plan(const AttentionCall& call, int64_t longest, int64_t sets) {
    const int64_t key_bytes = 4 * (call.bf16 ? 2 * call.d + 3 * call.dv / 2 : 3 * call.d + 2 * call.dv);
    int64_t most = std::clamp(kKeyBytesBackward / key_bytes / kKeyAlign * kKeyAlign, kFewestKeys, kMostKeys);
    if (sets < kFewItems && longest >= kKeysToShare) {  // few heads: smaller blocks, so that there are enough to share
      const int64_t wanted = ceil_div(longest * std::max<int64_t>(sets, 1), kFewItems);
      most = std::min(most, std::max(kFewestKeys, round_up(wanted, kKeyAlign)));
    }
    plan.key_block = std::min(most, round_up(std::max<int64_t>(longest, 1), kKeyAlign));
    constexpr int64_t kQueryAlign = 12;
    plan.query_block =
        std::clamp(kTileScores / plan.key_block / kQueryAlign * kQueryAlign, kQueryAlign, kMostQueriesBackward);
    int64_t longest_queries = 0;
    for (int64_t b = 0; b < call.batch; ++b) longest_queries = std::max(longest_queries, sequence(call, b).lq);
    const bool carried = longest > plan.key_block;
    plan.rows = std::max(plan.query_block, carried ? call.heads / call.key_heads * longest_queries : 0);
    const int64_t d = attention_width(call.d), dv = attention_width(call.dv);
    const int64_t stride = attention_stride(plan.key_block);
    const int64_t tile = bytes_of(plan.query_block * stride), pairs = bytes_of(plan.query_block / 2 * stride);
    plan.scratch_bytes = bytes_of(plan.query_block * d) + bytes_of(plan.query_block * dv) +
                         bytes_of(plan.query_block / 2 * d) + bytes_of(plan.query_block / 2 * dv) +
                         bytes_of(call.d * stride) + bytes_of(call.dv * stride) + bytes_of(plan.key_block * d) +
                         2 * tile + 2 * pairs + bytes_of(plan.rows * d) + bytes_of(plan.key_block * d) +
                         bytes_of(plan.key_block * dv) + 2 * bytes_of(2 * attention_width(plan.key_block)) +
                         2 * bytes_of(plan.query_block) + bytes_of(longest);
    plan.scratch_bytes = round_up(plan.scratch_bytes, 4096) + 64;
  }

  // Items that share a slice of the bias's gradient add to it one after the other. Where that leaves too few chains to
  // run at once, each slice gets several buffers, which are added up at the end.
  template <class Take>
  void make_bias_chains(const AttentionCall& call, Take&& take) {
    const int64_t by_batch = call.bias_batch > 1 ? call.batch : 1;
    const int64_t by_head = call.bias_heads > 1 ? call.key_heads : 1;
    const int64_t slices = by_batch * by_head;
    bias_size = call.bias_batch * call.bias_heads * call.lq * call.lk;
    const int64_t each = ceil_div(static_cast<int64_t>(items.size()), std::max<int64_t>(slices, 1));
    bias_parts = std::clamp<int64_t>(kFewItems / std::max<int64_t>(slices, 1), 1, std::max<int64_t>(each, 1));
    bias_parts = std::clamp<int64_t>(kMostBiasBytes / std::max<int64_t>(4 * bias_size, 1), 1, bias_parts);
    const bool own = bias_parts > 1 || call.bias_bf16;
    bias_sums = own ? take(bias_parts * bias_size) : static_cast<float*>(call.grad_bias);
    std::vector<std::vector<AttentionItem>> members(static_cast<size_t>(slices));
    for (const AttentionItem& item : items) {
      const int64_t slice = (by_batch > 1 ? item.batch : 0) * by_head + (by_head > 1 ? item.key_head : 0);
      members[static_cast<size_t>(slice)].push_back(item);
    }
    std::vector<AttentionItem> ordered;
    ordered.reserve(items.size());
    for (std::vector<AttentionItem>& list : members) {
      const auto count = static_cast<int64_t>(list.size());
      for (int64_t part = 0; part < bias_parts; ++part) {
        for (int64_t i = count * part / bias_parts; i < count * (part + 1) / bias_parts; ++i) {
          list[static_cast<size_t>(i)].grad_bias = bias_sums + part * bias_size;
          ordered.push_back(list[static_cast<size_t>(i)]);
        }
        const auto end = static_cast<int64_t>(ordered.size());
        if (starts.back() < end) starts.push_back(end);
      }
    }
    items = std::move(ordered);
  }
};

}  // namespace

int64_t attention_workspace(const AttentionCall& call, bool backward, int threads) {
  if (!backward) return std::max(threads, 1) * forward_plan(call, longest_keys(call)).scratch_bytes;
  const Backward pass(call, nullptr);
  return pass.bytes + std::max(threads, 1) * pass.plan.scratch_bytes;
}

void attention_forward(const AttentionCall& call, int threads) {
  check(call);
  const AttentionPlan plan = forward_plan(call, longest_keys(call));
  const int64_t group = call.heads / call.key_heads;
  std::vector<AttentionItem> items;
  const int64_t total = total_work(call);
  const int used = threads_for(total, threads);
  // The number of queries in an item changes no result: each row is computed by itself.
  const int64_t fair = std::max<int64_t>(total / (used * kItemsPerThread), 1);
  for (int64_t b = 0; b < call.batch; ++b) {
    const Sequence s = sequence(call, b);
    if (s.lq == 0) continue;
    int64_t rows = s.lk > plan.key_block ? plan.rows / group : s.lq;
    const int64_t parts = std::min(ceil_div(work(call, s), fair), ceil_div(s.lq, kQueryBlock));
    if (used > 1) rows = std::min(rows, round_up(ceil_div(s.lq, std::max<int64_t>(parts, 1)), kQueryBlock));
    for (int64_t head = 0; head < call.key_heads; ++head) {
      for (int64_t q = 0; q < s.lq; q += rows) items.push_back(item_of(b, head, s, q, std::min(q + rows, s.lq)));
    }
  }
  std::vector<int64_t> starts(items.size() + 1);
  for (size_t i = 0; i < starts.size(); ++i) starts[i] = static_cast<int64_t>(i);
  largest_first(call, items);
  run_chains(kernels().attention.forward, call, plan, items, starts, used, call.workspace);
}

void attention_backward(const AttentionCall& call, int threads) {
  check(call);
  const Backward pass(call, call.workspace);
  const int used = threads_for(total_work(call), threads);
  const AttentionKernels& kernel = kernels().attention;
  if (pass.bias_sums) std::memset(pass.bias_sums, 0, static_cast<size_t>(4 * pass.bias_parts * pass.bias_size));
  run_chains(kernel.backward, call, pass.plan, pass.items, pass.starts, used, call.workspace + pass.bytes);
  if (pass.shares > 1 && call.grad_q.data) {
    const int64_t group = call.heads / call.key_heads, sets = static_cast<int64_t>(pass.items.size()) / pass.shares;
    parallel_for(used, sets * group, [&](int64_t part) {
      const AttentionItem& first = pass.items[static_cast<size_t>(part / group * pass.shares)];
      const int64_t stride = group * first.lq * attention_width(call.d);
      kernel.sum_shares(call, first, first.key_head * group + part % group, pass.shares, stride, first.partial_dq);
    });
  }
  if (pass.bias_sums && (pass.bias_parts > 1 || call.bias_bf16)) {
    constexpr int64_t kPiece = 1 << 14;
    parallel_for(used, ceil_div(pass.bias_size, kPiece), [&](int64_t part) {
      kernel.sum_bias(call, pass.bias_sums, pass.bias_parts, pass.bias_size, part * kPiece,
                      std::min((part + 1) * kPiece, pass.bias_size));
    });
  }
}

}  // namespace vk::cpu

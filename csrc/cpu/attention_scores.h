// SPDX-License-Identifier: Apache-2.0
// What stands between a product of queries and keys and its softmax: which keys a row sees, the bias, dropout's mask.
#pragma once

#include "cpu/attention_tiles.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

inline VecI lane_numbers() {
  VecI lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// The keys of a sequence that the mask leaves, in order. Hidden keys are never packed, so they cost nothing.
struct Keys {
  int64_t count;
  const int32_t* index;  // null: the first `count`
  bool causal;
  int64_t shift;  // query i sees keys below i + shift

  Keys(const AttentionCall& call, const AttentionItem& item, int32_t* scratch)
      : count(item.lk), index(nullptr), causal(call.causal), shift(item.lk - item.lq + 1) {
    if (!call.key_mask) return;
    const uint8_t* mask = call.key_mask + item.batch * call.mask_batch_stride;
    int64_t n = 0;
    for (int64_t j = 0; j < item.lk; ++j) {
      scratch[n] = static_cast<int32_t>(j);
      n += mask[j * call.mask_col_stride] != 0;
    }
    count = n;
    if (n > 0 && scratch[n - 1] != n - 1) index = scratch;
  }

  int64_t original(int64_t j) const { return index ? index[j] : j; }

  // How many of the listed keys query i sees.
  int64_t visible(int64_t i) const {
    if (!causal) return count;
    const int64_t limit = i + shift;
    if (limit <= 0) return 0;
    if (!index) return limit < count ? limit : count;
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (index[middle] < limit) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // The first query of [0, lq) that sees listed key j.
  int64_t first_query(int64_t j) const {
    if (!causal) return 0;
    const int64_t i = original(j) - shift + 1;
    return i > 0 ? i : 0;
  }
};

// Blocks of at most `most`, as equal as multiples of `multiple` allow.
inline int64_t even_block(int64_t n, int64_t most, int64_t multiple) {
  const int64_t blocks = n > most ? ceil_div(n, most) : 1;
  return round_up(n > 0 ? ceil_div(n, blocks) : 1, multiple);
}

// Bias of one query and head, at the keys of the list.
struct BiasRow {
  const void* data = nullptr;
  bool bf16 = false;
  int64_t at = 0, stride = 0;

  BiasRow(const AttentionCall& call, int64_t batch, int64_t head, int64_t row)
      : data(call.bias),
        bf16(call.bias_bf16),
        at(batch * call.bias_batch_stride + head * call.bias_head_stride + row * call.bias_row_stride),
        stride(call.bias_col_stride) {}

  float value(int64_t j) const {
    if (!bf16) return static_cast<const float*>(data)[at + j * stride];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at + j * stride]) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  // scores[0 .. count) of keys first .. first + count of the list.
  void add_to(float* scores, const Keys& keys, int64_t first, int64_t count) const {
    if (stride == 1 && !keys.index) {
      for (int64_t c = 0; c < count; c += kLanes) {
        const int64_t left = count - c;
        VecF b;
        if (!bf16) {
          const float* p = static_cast<const float*>(data) + at + first + c;
          b = left >= kLanes ? load(p) : load_first(p, static_cast<int>(left));
        } else {
          const uint16_t* p = static_cast<const uint16_t*>(data) + at + first + c;
          alignas(VK_VECTOR_BYTES) uint16_t lanes[kLanes] = {};
          std::memcpy(lanes, p, sizeof(uint16_t) * static_cast<size_t>(left < kLanes ? left : kLanes));
          b = from_bf16(lanes);
        }
        store(scores + c, load(scores + c) + b);
      }
      return;
    }
    for (int64_t c = 0; c < count; ++c) scores[c] += value(keys.original(first + c));
  }
};

// Philox4x32-10 (Salmon et al. 2011), one counter in each 64-bit lane: reference/attention.py has it line by line.
typedef uint64_t VecU64 __attribute__((vector_size(VK_VECTOR_BYTES)));
inline constexpr int kCounters = VK_VECTOR_BYTES / 8;

inline void philox(uint64_t seed, int64_t batch, int64_t head, int64_t row, int64_t first_block, uint32_t* words) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  constexpr int kRounds = 10;
  constexpr uint64_t kLow = 0xFFFFFFFF;
  VecU64 c0, c1 = VecU64{} + (static_cast<uint64_t>(row) & kLow), c2 = VecU64{} + (static_cast<uint64_t>(head) & kLow),
             c3 = VecU64{} + (static_cast<uint64_t>(batch) & kLow);
  for (int i = 0; i < kCounters; ++i) c0[i] = static_cast<uint64_t>(first_block + i) & kLow;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const VecU64 product0 = c0 * kMultiplier0, product1 = c2 * kMultiplier1;
    c0 = (product1 >> 32) ^ c1 ^ key0;
    c2 = (product0 >> 32) ^ c3 ^ key1;
    c1 = product1 & kLow;
    c3 = product0 & kLow;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  for (int i = 0; i < kCounters; ++i) {
    words[4 * i] = static_cast<uint32_t>(c0[i]);
    words[4 * i + 1] = static_cast<uint32_t>(c1[i]);
    words[4 * i + 2] = static_cast<uint32_t>(c2[i]);
    words[4 * i + 3] = static_cast<uint32_t>(c3[i]);
  }
}

// factors[0 .. count): what dropout multiplies the weights of one query by, at keys first .. first + count of the list.
inline void dropout_row(const AttentionCall& call, int64_t batch, int64_t head, int64_t row, const Keys& keys,
                        int64_t first, int64_t count, float* factors) {
  uint32_t words[4 * kCounters];
  int64_t base = -1;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t j = keys.original(first + c), wanted = j / (4 * kCounters);
    if (wanted != base) {
      base = wanted;
      philox(call.seed, batch, head, row, base * kCounters, words);
    }
    factors[c] = words[j % (4 * kCounters)] >= call.drop_below ? call.keep_scale : 0.0f;
  }
  for (int64_t c = count; c < round_up(count, kLanes); ++c) factors[c] = 0.0f;  // they meet weights of 0
}

// log(x) for x >= 1: a sum of shifted exponentials, which holds a 1.
inline VecF log_of_sum(VecF x) {
  constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723e-6f;
  const VecI exponent = ((VecI)x >> 23) - 127;
  const VecF mantissa = (VecF)(((VecI)x & 0x7fffff) | 0x3f800000);
  const VecF k = __builtin_convertvector(exponent, VecF);
  const VecF result = k * kLn2High + (k * kLn2Low + log1p_unit(mantissa - 1.0f));
  return x < kInfinity ? result : x;  // NaN stays
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

// SPDX-License-Identifier: Apache-2.0
// What forward and backward of attention share on the device: the head that a block works on, which keys a query sees,
// the bias, dropout.
#pragma once

#include "cuda/attention.h"
#include "cuda/engine/device.h"
#include "cuda/engine/philox.h"
#include "cuda/engine/tile.h"

namespace vk::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kInfinity = __builtin_huge_valf();

inline constexpr int kTile = kAttentionTile;
inline constexpr int kChunk = kAttentionChunk;
inline constexpr int kTilesPerChunk = kChunk / kTile;

// A tensor's rows of one batch entry and head.
struct HeadRows {
  char* data;
  int64_t stride_bytes;

  __device__ __forceinline__ HeadRows(const AttentionTensor& tensor, int64_t batch, int64_t head)
      : data(static_cast<char*>(tensor.data) + 2 * (batch * tensor.batch_stride + head * tensor.head_stride)),
        stride_bytes(2 * tensor.row_stride) {}
  __device__ __forceinline__ char* row(int64_t i) const { return data + i * stride_bytes; }
};

// One head of one batch entry, as its scores see it. Scores are counted in powers of two: log2(e) is in scale and bias.
template <class T>
struct Head {
  const AttentionParams& params;
  int64_t batch, head;
  int lq, lk;
  float scale2;
  int shift;            // query i sees keys up to i + shift
  const uint8_t* mask;  // of this batch entry, or null
  const char* bias;
  uint64_t seed;

  __device__ __forceinline__ Head(const AttentionParams& params, int64_t batch, int64_t head)
      : params(params),
        batch(batch),
        head(head),
        lq(static_cast<int>(params.lq)),
        lk(static_cast<int>(params.lk)),
        scale2(params.scale * kLog2E),
        shift(params.causal ? lk - lq : lk),
        mask(params.key_mask ? params.key_mask + batch * params.mask_batch_stride : nullptr),
        bias(params.bias ? static_cast<const char*>(params.bias) +
                               bias_bytes() * (batch * params.bias_batch_stride + head * params.bias_head_stride)
                         : nullptr),
        seed(params.seed ? static_cast<uint64_t>(*params.seed) : 0) {}

  __device__ __forceinline__ int bias_bytes() const { return params.bias_float ? 4 : 2; }

  __device__ __forceinline__ bool key_visible(int key) const {
    return key < lk && (!mask || mask[key * params.mask_col_stride] != 0);
  }

  // Keys [64 chunk, 64 chunk + 64) as bits, the same in every lane.
  __device__ __forceinline__ uint2 visible_keys(int chunk) const {
    const int key = chunk * kChunk + lane_id();
    return {ballot(key_visible(key)), ballot(key_visible(key + kWarp))};
  }

  // How many tiles of keys the queries below `end` see: none of the later ones. Aligned to the end, and at most all.
  __device__ __forceinline__ int key_tiles(int end) const {
    if (!params.causal) return (lk + kTile - 1) / kTile;
    const int keys = min(lk, end + shift);
    return keys <= 0 ? 0 : (keys + kTile - 1) / kTile;
  }

  // A score from its product: scale and bias.
  __device__ __forceinline__ float score(float product, int query, int key) const {
    float s = product * scale2;
    if (bias && query < lq && key < lk) {
      const int64_t at = query * params.bias_row_stride + key * params.bias_col_stride;
      const float value =
          params.bias_float ? reinterpret_cast<const float*>(bias)[at] : to_float(reinterpret_cast<const T*>(bias)[at]);
      s += value * kLog2E;
    }
    return s;
  }

  // Whether dropout keeps a weight, word by word: words of four neighbouring keys.
  __device__ __forceinline__ Words dropout_words(int query, int key_block) const {
    return philox(seed, static_cast<uint32_t>(key_block), static_cast<uint32_t>(query), static_cast<uint32_t>(head),
                  static_cast<uint32_t>(batch));
  }
  __device__ __forceinline__ bool keeps(uint32_t word) const { return word >= params.drop_below; }

  // Of one weight; lanes that hold neighbouring keys draw the same words.
  __device__ __forceinline__ bool keeps_weight(int query, int key) const {
    const Words words = dropout_words(query, key / 4);
    const uint32_t low = key & 1 ? words.word[1] : words.word[0], high = key & 1 ? words.word[3] : words.word[2];
    return keeps(key & 2 ? high : low);
  }

  // Bit i is set where dropout keeps value i of a 16 x 8 result: rows are queries from first_query, columns are keys.
  __device__ __forceinline__ uint32_t kept_of_tile(int first_query, int first_key) const {
    const int group = lane_id() / 4, t = lane_id() % 4;
    // Of the two lanes that share four keys, the even one draws for row `group`, the odd one for row `group` + 8.
    const bool odd = t % 2 != 0;
    const Words words = dropout_words(first_query + group + (odd ? 8 : 0), (first_key + 2 * t) / 4);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(keeps(words.word[i])) << i;
    const uint32_t others = shuffle_xor(bits, 1);
    const uint32_t upper = odd ? others : bits, lower = odd ? bits : others;
    const int place = odd ? 2 : 0;
    return (upper >> place & 3) | (lower >> place & 3) << 2;
  }
};

// Bits [first, first + 16) of a chunk's 64.
__device__ __forceinline__ uint32_t sixteen_bits(uint2 bits, int first) {
  return ((first & 32 ? bits.y : bits.x) >> (first & 16)) & 0xffff;
}

}  // namespace vk::cuda

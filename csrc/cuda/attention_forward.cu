// SPDX-License-Identifier: Apache-2.0
// Attention forward: a warp takes 16 queries past the keys, 64 at a time, with a running maximum and sum. Scores and
// weights never leave its registers: the result of the first product is the left operand of the second.
#include "cuda/attention_launch.h"
#include "cuda/attention_scores.h"

namespace vk::cuda {
namespace {

// 16 queries of one head, while the keys pass by.
template <class T, int kWidth>
struct QueryTile {
  using Tile = Rows<2 * kWidth>;
  static constexpr int kBlocks = kWidth / 16;

  uint32_t q[kBlocks][4];
  float out[2 * kBlocks][4] = {};
  float highest[2] = {-kInfinity, -kInfinity};  // of rows group and group + 8
  float sum[2] = {};                            // of this lane's columns

  // Keys [first_key, first_key + 16 steps) lie at `row` of the tiles; bit i of `visible` is key first_key + i.
  __device__ __forceinline__ void attend(const Head<T>& head, SharedAddress keys, SharedAddress values, int row,
                                         int first_query, int first_key, int steps, uint2 visible) {
    const int group = lane_id() / 4, t = lane_id() % 4;
    float s[2 * kTilesPerChunk][4] = {};
#pragma unroll
    for (int step = 0; step < kTilesPerChunk; ++step)
      if (step < steps) product_16x16<T, Tile, kBlocks>(s[2 * step], s[2 * step + 1], q, keys, row + kTile * step);

    // Most chunks hide nothing, and need no look at each score.
    const bool plain =
        !head.bias && (visible.x & visible.y) == 0xffffffffu && first_key + kChunk - 1 <= first_query + head.shift;
    float top[2] = {highest[0], highest[1]};
#pragma unroll
    for (int half = 0; half < 2 * kTilesPerChunk; ++half) {
      if (half / 2 >= steps) break;
      const uint32_t bits = sixteen_bits(visible, half / 2 * kTile) >> (half % 2 * 8 + 2 * t);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[half][i];
        if (plain) {
          x *= head.scale2;
        } else {
          const int query = first_query + group + i / 2 * 8, key = first_key + half * 8 + 2 * t + i % 2;
          const bool seen = (bits >> (i % 2) & 1) && key <= query + head.shift;
          x = seen ? head.score(x, query, key) : -kInfinity;
        }
        top[i / 2] = fmaxf(top[i / 2], x);
      }
    }

    float base[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = quad_max(top[r]);
      base[r] = top[r] == -kInfinity ? 0.0f : top[r];  // no key yet: every weight becomes 2^-inf
      const float factor = exp2_fast(highest[r] - base[r]);
      highest[r] = top[r];
      sum[r] *= factor;
#pragma unroll
      for (int column = 0; column < 2 * kBlocks; ++column) {
        out[column][2 * r] *= factor;
        out[column][2 * r + 1] *= factor;
      }
    }

#pragma unroll
    for (int step = 0; step < kTilesPerChunk; ++step) {
      if (step >= steps) break;
#pragma unroll
      for (int half = 2 * step; half < 2 * step + 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[half][i] = exp2_fast(s[half][i] - base[i / 2]);
          sum[i / 2] += s[half][i];
        }
        if (head.params.seed) {
          const uint32_t kept = head.kept_of_tile(first_query, first_key + half * 8);
#pragma unroll
          for (int i = 0; i < 4; ++i) s[half][i] = kept >> i & 1 ? s[half][i] : 0.0f;
        }
      }
      uint32_t weights[4];
      as_operand<T>(weights, s[2 * step], s[2 * step + 1]);
      product_16xwidth<T, Tile, kBlocks>(out, weights, values, row + kTile * step);
    }
  }

  // Natural logarithm of a row's sum, which no weight reached where it is 0, and which an infinite score made NaN.
  __device__ __forceinline__ static float log_sum(float highest, float total) {
    if (total == 0.0f) return -kInfinity;
    return highest == kInfinity ? kInfinity : highest * kLn2 + logf(total);
  }

  __device__ __forceinline__ void store(const Head<T>& head, int first_query, char* staging) {
    const int group = lane_id() / 4, t = lane_id() % 4;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(sum[r]);
      factor[r] = total == 0.0f ? 0.0f : head.params.keep_scale / total;
      const int query = first_query + group + 8 * r;
      if (t == 0 && query < head.lq)
        head.params.lse[(head.batch * head.params.heads + head.head) * head.params.lq + query] =
            log_sum(highest[r], total);
      if (total != 0.0f) continue;
      // zero times a value that no weight reached could be NaN
#pragma unroll
      for (int column = 0; column < 2 * kBlocks; ++column) out[column][2 * r] = out[column][2 * r + 1] = 0.0f;
    }
    const HeadRows rows(head.params.out, head.batch, head.head);
    store_16_rows<T, Tile, 2 * kBlocks>(staging, out, factor[0], factor[1], rows.row(first_query), rows.stride_bytes,
                                        head.lq - first_query, 2 * static_cast<int>(head.params.d));
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kAttentionForwardWarps* kWarp, kWidth <= 96 ? 2 : 1)
    attention_forward_kernel(const __grid_constant__ AttentionParams params,
                             const __grid_constant__ AttentionPlan plan) {
  using Tile = Rows<2 * kWidth>;
  const int warp = warp_id(), threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const bool resident = plan.mode == AttentionMode::kResident;
  const int64_t block = blockIdx.x, part = block % plan.parts, head_index = block / plan.parts % params.heads;
  const int64_t batch = block / plan.parts / params.heads;
  const Head<T> head(params, batch, head_index);
  const int64_t key_head = head_index / (params.heads / params.key_heads);
  const HeadRows q(params.q, batch, head_index), k(params.k, batch, key_head), v(params.v, batch, key_head);
  const int row_bytes = 2 * static_cast<int>(params.d);

  const int first_tile = static_cast<int>(part * plan.tiles);
  const int last_tile = min(first_tile + static_cast<int>(plan.tiles), (head.lq + kTile - 1) / kTile);
  const int chunks = (head.lk + kChunk - 1) / kChunk;
  const int block_tiles = head.key_tiles(min(last_tile * kTile, head.lq));  // of keys that any query here sees
  const int block_chunks = (block_tiles + kTilesPerChunk - 1) / kTilesPerChunk;

  // Keys, values, 16 rows per warp for queries and results, visible keys.
  const int key_rows = resident ? (head.lk + kTile - 1) / kTile * kTile : 2 * kChunk;
  char* const staging = shared_memory() + (2 * key_rows + warp * kTile) * Tile::kPitch;
  auto* const visible = reinterpret_cast<uint2*>(shared_memory() + (2 * key_rows + warps * kTile) * Tile::kPitch);
  const SharedAddress keys = shared_address(shared_memory()), values = keys + key_rows * Tile::kPitch;
  const SharedAddress queries = shared_address(staging);

  const auto copy_keys = [&](int first, int rows, int at) {
    const auto seen = [&](int row) { return head.key_visible(first + row); };
    const int left = head.lk - first;
    copy_rows<Tile>(keys + at * Tile::kPitch, rows, k.row(first), k.stride_bytes, left, row_bytes,
                    static_cast<int>(threadIdx.x), threads, seen);
    copy_rows<Tile>(values + at * Tile::kPitch, rows, v.row(first), v.stride_bytes, left, row_bytes,
                    static_cast<int>(threadIdx.x), threads, seen);
  };
  const auto note_visible = [&](int chunk, int place) {
    const uint2 bits = head.visible_keys(chunk);
    if (lane_id() == 0) visible[place] = bits;
  };
  const auto copy_queries = [&](int tile) {
    const int first = tile * kTile;
    if (tile < last_tile)
      copy_rows<Tile>(queries, kTile, q.row(first), q.stride_bytes, head.lq - first, row_bytes, lane_id(), kWarp,
                      EveryRow());
  };

  int tile = first_tile + warp;
  copy_queries(tile);
  if (resident) {
    copy_keys(0, key_rows, 0);
    for (int chunk = warp; chunk < chunks; chunk += warps) note_visible(chunk, chunk);
  } else if (block_chunks > 0) {
    copy_keys(0, kChunk, 0);
    if (warp == 0) note_visible(0, 0);
  }
  copy_commit();
  copy_wait<0>();
  sync_block();

  // Streaming: one tile for each warp, and no warp leaves before the last chunk.
  while (tile < last_tile || !resident) {
    QueryTile<T, kWidth> state;
    const int first_query = tile * kTile;
    const int tiles = tile < last_tile ? head.key_tiles(min(first_query + kTile, head.lq)) : 0;
    if (tile < last_tile) load_fragments<Tile>(state.q, queries, 0);
    const int end = resident ? (tiles + kTilesPerChunk - 1) / kTilesPerChunk : block_chunks;
    for (int chunk = 0; chunk < end; ++chunk) {
      const int place = resident ? chunk : chunk % 2;
      if (!resident && chunk + 1 < end) {
        copy_keys((chunk + 1) * kChunk, kChunk, (chunk + 1) % 2 * kChunk);
        if (warp == 0) note_visible(chunk + 1, (chunk + 1) % 2);
        copy_commit();
      }
      const int steps = min(tiles - chunk * kTilesPerChunk, kTilesPerChunk);
      const uint2 bits = visible[place];
      if (steps > 0 && (bits.x | bits.y) != 0)
        state.attend(head, keys, values, place * kChunk, first_query, chunk * kChunk, steps, bits);
      if (!resident) {
        copy_wait<0>();
        sync_block();
      }
    }
    if (tile < last_tile) state.store(head, first_query, staging);
    if (!resident) break;
    tile += warps;
    copy_queries(tile);
    copy_commit();
    copy_wait<0>();
    sync_warp();
  }
}

}  // namespace

AttentionPlan attention_forward_plan(const AttentionParams& params, int64_t most_shared) {
  AttentionPlan plan;
  const int64_t tiles = ceil_div(params.lq, kAttentionTile), pitch = 2 * attention_width(params.d);
  const int64_t heads = params.batch * params.heads;
  const auto bytes = [&](int64_t rows, int warps, int64_t chunks) {
    return (2 * rows + warps * kAttentionTile) * pitch + chunks * static_cast<int64_t>(sizeof(uint64_t));
  };

  const int64_t key_rows = ceil_div(params.lk, kAttentionTile) * kAttentionTile;
  plan.parts = ceil_div(tiles, kAttentionResidentTiles);
  plan.tiles = plan.parts == 0 ? 0 : ceil_div(tiles, plan.parts);
  plan.warps = even_warps(plan.tiles, kAttentionForwardWarps);
  plan.shared_bytes = bytes(key_rows, plan.warps, ceil_div(params.lk, kAttentionChunk));
  plan.blocks = heads * plan.parts;
  const bool short_enough = key_rows <= kAttentionResidentTiles * kAttentionTile;
  if (plan.shared_bytes <= (short_enough ? most_shared : most_shared / 2)) return plan;

  plan.mode = AttentionMode::kQueries;
  plan.warps =
      static_cast<int>(std::min<int64_t>(std::max<int64_t>(tiles, kAttentionFewestWarps), kAttentionForwardWarps));
  plan.tiles = plan.warps;
  plan.parts = ceil_div(tiles, plan.tiles);
  plan.shared_bytes = bytes(2 * kAttentionChunk, plan.warps, 2);
  plan.blocks = plan.shared_bytes <= most_shared ? heads * plan.parts : -1;
  return plan;
}

cudaError_t launch_attention_forward(const AttentionParams& params, cudaStream_t stream) {
  int64_t most_shared = 0;
  VK_CUDA_RETURN_IF_ERROR(shared_limit(&most_shared));
  const AttentionPlan plan = attention_forward_plan(params, most_shared);
  return with_attention_kernel(params, [&]<class T, int kWidth>(ElementType<T>, Width<kWidth>) {
    return launch(attention_forward_kernel<T, kWidth>, attention_shape(plan), stream, params, plan);
  });
}

}  // namespace vk::cuda

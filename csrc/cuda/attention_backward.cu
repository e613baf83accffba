// SPDX-License-Identifier: Apache-2.0
// Attention backward: scores are formed again from the log-sum-exps. With p the weights, o the result and do its
// gradient,
//
//   dv = p^T do,   ds = p * (do v^T - rowsum(do * o)),   dq = scale ds k,   dk = scale ds^T q.
//
// A warp takes 16 keys past all queries (dk, dv stay in its registers), or 16 queries past all keys (dq). Forming
// scores twice costs 7 products instead of 5, and saves every exchange between warps: no atomics, no order to keep, and
// where a whole head fits into shared memory no barrier after it has arrived.
#include "cuda/attention_launch.h"
#include "cuda/attention_scores.h"

namespace vk::cuda {
namespace {

// Widths up to this one keep a tile's left operands in registers; above, they are read again for each product.
inline constexpr int kWidestHeld = 96;

// The left operands of a tile: 16 rows of two tensors.
template <class Tile, int kBlocks>
struct Operands {
  static constexpr bool kHeld = 16 * kBlocks <= kWidestHeld;
  uint32_t first[kHeld ? kBlocks : 1][4], second[kHeld ? kBlocks : 1][4];
  SharedAddress first_tile, second_tile;
  int row;

  __device__ __forceinline__ void take(SharedAddress one, SharedAddress two, int at) {
    first_tile = one, second_tile = two, row = at;
    if constexpr (kHeld) {
      load_fragments<Tile>(first, one, at);
      load_fragments<Tile>(second, two, at);
    }
  }
  // c += first rows(tile_one)^T and d += second rows(tile_two)^T, for 16 rows from `at`.
  template <class T>
  __device__ __forceinline__ void products(float (&c)[2][4], float (&d)[2][4], SharedAddress tile_one,
                                           SharedAddress tile_two, int at) const {
    if constexpr (kHeld) {
      product_16x16<T, Tile, kBlocks>(c[0], c[1], first, tile_one, at);
      product_16x16<T, Tile, kBlocks>(d[0], d[1], second, tile_two, at);
    } else {
      product_16x16<T, Tile, kBlocks>(c[0], c[1], first_tile, row, tile_one, at);
      product_16x16<T, Tile, kBlocks>(d[0], d[1], second_tile, row, tile_two, at);
    }
  }
};

// Whether all of 16 queries see all of 16 keys, so that scores need no look one by one.
template <class T>
__device__ __forceinline__ bool plain_tile(const Head<T>& head, int first_query, int first_key, uint32_t visible) {
  return !head.bias && visible == 0xffff && first_key + kTile - 1 <= first_query + head.shift;
}

// 16 queries while the keys pass by: dq.
template <class T, int kWidth>
struct QueryGradient {
  using Tile = Rows<2 * kWidth>;
  static constexpr int kBlocks = kWidth / 16;

  Operands<Tile, kBlocks> operands;  // q, do
  float dq[2 * kBlocks][4] = {};
  float lse[2], dots[2];  // of rows group and group + 8

  __device__ __forceinline__ void step(const Head<T>& head, SharedAddress keys, SharedAddress values, int row,
                                       int first_query, int first_key, uint32_t visible) {
    const int group = lane_id() / 4, t = lane_id() % 4;
    float s[2][4] = {}, dp[2][4] = {};
    operands.template products<T>(s, dp, keys, values, row);
    const bool plain = plain_tile(head, first_query, first_key, visible);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t kept = head.params.seed ? head.kept_of_tile(first_query, first_key + 8 * half) : 0xf;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = first_query + group + i / 2 * 8, key = first_key + half * 8 + 2 * t + i % 2;
        const bool seen = plain || ((visible >> (half * 8 + 2 * t + i % 2) & 1) && key <= query + head.shift);
        const float score = plain ? s[half][i] * head.scale2 : head.score(s[half][i], query, key);
        const float p = exp2_fast(score - lse[i / 2]);
        const float gradient = kept >> i & 1 ? dp[half][i] * head.params.keep_scale : 0.0f;
        s[half][i] = seen ? p * (gradient - dots[i / 2]) : 0.0f;
      }
    }
    uint32_t ds[4];
    as_operand<T>(ds, s[0], s[1]);
    product_16xwidth<T, Tile, kBlocks>(dq, ds, keys, row);
  }
};

// 16 keys while the queries pass by: dk and dv. Results of products are transposed: rows are keys.
template <class T, int kWidth>
struct KeyGradient {
  using Tile = Rows<2 * kWidth>;
  static constexpr int kBlocks = kWidth / 16;

  Operands<Tile, kBlocks> operands;  // k, v
  float dk[2 * kBlocks][4] = {}, dv[2 * kBlocks][4] = {};

  // `lse` and `dots` are those of the 16 queries at `row`.
  __device__ __forceinline__ void step(const Head<T>& head, SharedAddress queries, SharedAddress gradients, int row,
                                       const float* lse, const float* dots, int first_query, int first_key,
                                       uint32_t visible) {
    const int group = lane_id() / 4, t = lane_id() % 4;
    float s[2][4] = {}, dp[2][4] = {};
    operands.template products<T>(s, dp, queries, gradients, row);
    const bool plain = plain_tile(head, first_query, first_key, visible);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = half * 8 + 2 * t + i % 2;
        const int query = first_query + at, key = first_key + group + i / 2 * 8;
        const bool seen = plain || ((visible >> (group + i / 2 * 8) & 1) && key <= query + head.shift);
        const float score = plain ? s[half][i] * head.scale2 : head.score(s[half][i], query, key);
        const float p = seen ? exp2_fast(score - lse[at]) : 0.0f;
        bool kept = true;
        if (head.params.seed) kept = head.keeps_weight(query, key);
        const float gradient = kept ? dp[half][i] * head.params.keep_scale : 0.0f;
        s[half][i] = kept ? p : 0.0f;
        dp[half][i] = seen ? p * (gradient - dots[at]) : 0.0f;
      }
    }
    uint32_t a[4];
    as_operand<T>(a, s[0], s[1]);
    product_16xwidth<T, Tile, kBlocks>(dv, a, gradients, row);
    as_operand<T>(a, dp[0], dp[1]);
    product_16xwidth<T, Tile, kBlocks>(dk, a, queries, row);
  }
};

// One block's work. Which tiles lie where in shared memory depends on the plan's mode:
//   kResident  q, do, k, v of the head; 16 rows per warp; lse and dots of every query; visible keys of every chunk
//   kQueries   two chunks of k and of v; q and do of each warp; their lse and dots; visible keys of two chunks
//   kKeys      two chunks of q and of do; k and v of each warp; lse and dots of two chunks
template <class T, int kWidth>
struct BackwardBlock {
  using Tile = Rows<2 * kWidth>;

  const AttentionParams& params;
  const int warp, warps, threads, row_bytes;

  __device__ __forceinline__ explicit BackwardBlock(const AttentionParams& params)
      : params(params),
        warp(warp_id()),
        warps(static_cast<int>(blockDim.x) / kWarp),
        threads(static_cast<int>(blockDim.x)),
        row_bytes(2 * static_cast<int>(params.d)) {}

  __device__ __forceinline__ static int tiles_of(int rows) { return (rows + kTile - 1) / kTile; }

  // Begins to copy rows [first, first + count) of a tensor, all threads of the block or one warp.
  template <class Visible>
  __device__ __forceinline__ void copy(SharedAddress tile, const HeadRows& from, int first, int count, int all,
                                       bool by_warp, Visible visible) const {
    copy_rows<Tile>(tile, count, from.row(first), from.stride_bytes, all - first, row_bytes,
                    by_warp ? lane_id() : static_cast<int>(threadIdx.x), by_warp ? kWarp : threads, visible);
  }

  // One warp: log-sum-exps and rowsum(do * o) - dlse of 16 queries whose do lies at `gradients`. In powers of two; a
  // query without a key, or past the end, gets infinity, so that its weights are 2^-inf.
  __device__ __forceinline__ void row_facts(const Head<T>& head, const char* gradients, int row, int first_query,
                                            float* lse, float* dots) const {
    constexpr int kLanesPerRow = 8, kRows = kWarp / kLanesPerRow;
    const HeadRows out(params.out, head.batch, head.head);
    const int lane = lane_id() % kLanesPerRow;
#pragma unroll
    for (int r = lane_id() / kLanesPerRow; r < kTile; r += kRows) {
      const int query = first_query + r;
      float sum = 0.0f;
      if (query < head.lq) {
        for (int chunk = lane; chunk * kChunkBytes < row_bytes; chunk += kLanesPerRow) {
          const uint4 a = load_16(gradients + Tile::offset(row + r, chunk));
          const uint4 b = load_16(out.row(query) + chunk * kChunkBytes);
          sum += dot<T>(a.x, b.x) + dot<T>(a.y, b.y) + dot<T>(a.z, b.z) + dot<T>(a.w, b.w);
        }
      }
#pragma unroll
      for (int step = 1; step < kLanesPerRow; step *= 2) sum += shuffle_xor(sum, step);
      if (lane != 0) continue;
      float value = kInfinity;
      if (query < head.lq) {
        value = params.lse[(head.batch * params.heads + head.head) * params.lq + query] * kLog2E;
        value = value == -kInfinity ? kInfinity : value;
        if (params.grad_lse)
          sum -= params.grad_lse[head.batch * params.grad_lse_batch_stride + head.head * params.grad_lse_head_stride +
                                 query * params.grad_lse_row_stride];
      }
      lse[r] = value;
      dots[r] = sum;
    }
  }

  template <int kColumns>
  __device__ __forceinline__ void store(const AttentionTensor& to, const Head<T>& head, int64_t head_index,
                                        const float (&c)[kColumns][4], float factor, int first, int all,
                                        char* staging) const {
    if (!to.data) return;  // not wanted
    const HeadRows rows(to, head.batch, head_index);
    store_16_rows<T, Tile, kColumns>(staging, c, factor, factor, rows.row(first), rows.stride_bytes, all - first,
                                     row_bytes);
  }

  __device__ __forceinline__ void resident() const {
    const int64_t head_index = blockIdx.x % params.heads, batch = blockIdx.x / params.heads;
    const Head<T> head(params, batch, head_index);
    const int query_tiles = tiles_of(head.lq), key_tiles = tiles_of(head.lk);
    const int query_rows = query_tiles * kTile, key_rows = key_tiles * kTile;
    const int chunks = (head.lk + kChunk - 1) / kChunk;

    char* const shared = shared_memory();
    const char* const gradient_bytes = shared + query_rows * Tile::kPitch;
    char* const staging = shared + (2 * query_rows + 2 * key_rows + warp * kTile) * Tile::kPitch;
    auto* const visible =
        reinterpret_cast<uint2*>(shared + (2 * query_rows + 2 * key_rows + warps * kTile) * Tile::kPitch);
    auto* const lse = reinterpret_cast<float*>(visible + chunks);
    float* const dots = lse + query_rows;
    const SharedAddress queries = shared_address(shared), gradients = queries + query_rows * Tile::kPitch;
    const SharedAddress keys = gradients + query_rows * Tile::kPitch, values = keys + key_rows * Tile::kPitch;

    const auto seen = [&](int row) { return head.key_visible(row); };
    copy(queries, HeadRows(params.q, batch, head_index), 0, query_rows, head.lq, false, EveryRow());
    copy(gradients, HeadRows(params.grad_out, batch, head_index), 0, query_rows, head.lq, false, EveryRow());
    copy(keys, HeadRows(params.k, batch, head_index), 0, key_rows, head.lk, false, seen);
    copy(values, HeadRows(params.v, batch, head_index), 0, key_rows, head.lk, false, seen);
    copy_commit();
    for (int chunk = warp; chunk < chunks; chunk += warps) {
      const uint2 bits = head.visible_keys(chunk);
      if (lane_id() == 0) visible[chunk] = bits;
    }
    copy_wait<0>();
    sync_block();
    for (int tile = warp; tile < query_tiles; tile += warps)
      row_facts(head, gradient_bytes, tile * kTile, tile * kTile, lse + tile * kTile, dots + tile * kTile);
    sync_block();

    const auto visible_tile = [&](int tile) {
      return sixteen_bits(visible[tile / kTilesPerChunk], tile % kTilesPerChunk * kTile);
    };
    for (int task = warp; task < key_tiles + query_tiles; task += warps) {
      if (task < key_tiles) {
        const int first_key = task * kTile;
        const uint32_t bits = visible_tile(task);
        KeyGradient<T, kWidth> state;
        state.operands.take(keys, values, first_key);
        for (int tile = first_query_tile(head, first_key); tile < query_tiles && bits != 0; ++tile)
          state.step(head, queries, gradients, tile * kTile, lse + tile * kTile, dots + tile * kTile, tile * kTile,
                     first_key, bits);
        store(params.grad_k, head, head_index, state.dk, params.scale, first_key, head.lk, staging);
        store(params.grad_v, head, head_index, state.dv, params.keep_scale, first_key, head.lk, staging);
      } else {
        const int first_query = (task - key_tiles) * kTile, group = lane_id() / 4;
        QueryGradient<T, kWidth> state;
        state.operands.take(queries, gradients, first_query);
        for (int r = 0; r < 2; ++r) {
          state.lse[r] = lse[first_query + group + 8 * r];
          state.dots[r] = dots[first_query + group + 8 * r];
        }
        const int end = head.key_tiles(min(first_query + kTile, head.lq));
        for (int tile = 0; tile < end; ++tile) {
          const uint32_t bits = visible_tile(tile);
          if (bits != 0) state.step(head, keys, values, tile * kTile, first_query, tile * kTile, bits);
        }
        store(params.grad_q, head, head_index, state.dq, params.scale, first_query, head.lq, staging);
      }
    }
  }

  // The first tile of queries of which one sees the key.
  __device__ __forceinline__ static int first_query_tile(const Head<T>& head, int key) {
    return head.params.causal ? max(key - head.shift, 0) / kTile : 0;
  }

  __device__ __forceinline__ void query_block(const AttentionPlan& plan) const {
    const int64_t block = blockIdx.x, part = block % plan.parts, head_index = block / plan.parts % params.heads;
    const int64_t batch = block / plan.parts / params.heads;
    const Head<T> head(params, batch, head_index);
    const int64_t key_head = head_index / (params.heads / params.key_heads);
    const HeadRows k(params.k, batch, key_head), v(params.v, batch, key_head);
    const int first_query = static_cast<int>(part * plan.tiles + warp) * kTile;
    const int block_end = min(static_cast<int>((part + 1) * plan.tiles) * kTile, head.lq);
    const int end = (head.key_tiles(block_end) + kTilesPerChunk - 1) / kTilesPerChunk;
    const bool active = first_query < head.lq;

    char* const shared = shared_memory();
    char* const own = shared + (4 * kChunk + 2 * warp * kTile) * Tile::kPitch;  // q, then do
    auto* const visible = reinterpret_cast<uint2*>(shared + (4 * kChunk + 2 * warps * kTile) * Tile::kPitch);
    auto* const lse = reinterpret_cast<float*>(visible + 2) + 2 * warp * kTile;
    float* const dots = lse + kTile;
    const SharedAddress keys = shared_address(shared), values = keys + 2 * kChunk * Tile::kPitch;
    const SharedAddress queries = shared_address(own), gradients = queries + kTile * Tile::kPitch;

    const auto begin = [&](int chunk) {
      const auto seen = [&](int row) { return head.key_visible(chunk * kChunk + row); };
      const int at = chunk % 2 * kChunk * Tile::kPitch;
      copy(keys + at, k, chunk * kChunk, kChunk, head.lk, false, seen);
      copy(values + at, v, chunk * kChunk, kChunk, head.lk, false, seen);
      if (warp == 0) {
        const uint2 bits = head.visible_keys(chunk);
        if (lane_id() == 0) visible[chunk % 2] = bits;
      }
    };
    if (active) {
      copy(queries, HeadRows(params.q, batch, head_index), first_query, kTile, head.lq, true, EveryRow());
      copy(gradients, HeadRows(params.grad_out, batch, head_index), first_query, kTile, head.lq, true, EveryRow());
    }
    if (end > 0) begin(0);
    copy_commit();
    copy_wait<0>();
    sync_block();

    QueryGradient<T, kWidth> state;
    int tiles = 0;
    if (active) {
      tiles = head.key_tiles(min(first_query + kTile, head.lq));
      row_facts(head, own + kTile * Tile::kPitch, 0, first_query, lse, dots);
      sync_warp();
      state.operands.take(queries, gradients, 0);
      for (int r = 0; r < 2; ++r) {
        state.lse[r] = lse[lane_id() / 4 + 8 * r];
        state.dots[r] = dots[lane_id() / 4 + 8 * r];
      }
      const int query = first_query + lane_id();
      if (lane_id() < kTile && query < head.lq)
        params.row_dots[(batch * params.heads + head_index) * params.lq + query] = dots[lane_id()];
    }
    for (int chunk = 0; chunk < end; ++chunk) {
      if (chunk + 1 < end) begin(chunk + 1);
      copy_commit();
      const int steps = min(tiles - chunk * kTilesPerChunk, kTilesPerChunk);
      for (int step = 0; step < steps; ++step) {
        const uint32_t bits = sixteen_bits(visible[chunk % 2], step * kTile);
        if (bits != 0)
          state.step(head, keys, values, chunk % 2 * kChunk + step * kTile, first_query, chunk * kChunk + step * kTile,
                     bits);
      }
      copy_wait<0>();
      sync_block();
    }
    if (active) store(params.grad_q, head, head_index, state.dq, params.scale, first_query, head.lq, own);
  }

  __device__ __forceinline__ void key_block(const AttentionPlan& plan) const {
    const int64_t block = blockIdx.x, part = block % plan.parts, key_head = block / plan.parts % params.key_heads;
    const int64_t batch = block / plan.parts / params.key_heads, group_heads = params.heads / params.key_heads;
    const Head<T> first_head(params, batch, key_head * group_heads);
    const int lq = first_head.lq, lk = first_head.lk;
    const int first_key = static_cast<int>(part * plan.tiles + warp) * kTile;
    const int first_chunk = first_query_tile(first_head, static_cast<int>(part * plan.tiles) * kTile) / kTilesPerChunk;
    const int chunks = max((lq + kChunk - 1) / kChunk - first_chunk, 0);  // of each query head
    const int end = chunks * static_cast<int>(group_heads);
    const bool active = first_key < lk;

    char* const shared = shared_memory();
    char* const own = shared + (4 * kChunk + 2 * warp * kTile) * Tile::kPitch;  // k, then v
    auto* const lse = reinterpret_cast<float*>(shared + (4 * kChunk + 2 * warps * kTile) * Tile::kPitch);
    float* const dots = lse + 2 * kChunk;
    const SharedAddress queries = shared_address(shared), gradients = queries + 2 * kChunk * Tile::kPitch;
    const SharedAddress keys = shared_address(own), values = keys + kTile * Tile::kPitch;

    const auto begin = [&](int i) {
      const int64_t head_index = key_head * group_heads + i / chunks;
      const int first = (first_chunk + i % chunks) * kChunk, at = i % 2 * kChunk;
      copy(queries + at * Tile::kPitch, HeadRows(params.q, batch, head_index), first, kChunk, lq, false, EveryRow());
      copy(gradients + at * Tile::kPitch, HeadRows(params.grad_out, batch, head_index), first, kChunk, lq, false,
           EveryRow());
      for (int row = static_cast<int>(threadIdx.x); row < kChunk; row += threads) {
        const int64_t from = (batch * params.heads + head_index) * params.lq + first + row;
        const bool inside = first + row < lq;
        const float value = inside ? params.lse[from] * kLog2E : kInfinity;
        lse[at + row] = value == -kInfinity ? kInfinity : value;
        dots[at + row] = inside ? params.row_dots[from] : 0.0f;
      }
    };
    const auto seen = [&](int row) { return first_head.key_visible(first_key + row); };
    uint32_t bits = 0;
    if (active) {
      copy(keys, HeadRows(params.k, batch, key_head), first_key, kTile, lk, true, seen);
      copy(values, HeadRows(params.v, batch, key_head), first_key, kTile, lk, true, seen);
      bits = sixteen_bits(first_head.visible_keys(first_key / kChunk), first_key % kChunk);
    }
    if (end > 0) begin(0);
    copy_commit();
    copy_wait<0>();
    sync_block();

    KeyGradient<T, kWidth> state;
    if (active) state.operands.take(keys, values, 0);
    for (int i = 0; i < end; ++i) {
      if (i + 1 < end) begin(i + 1);
      copy_commit();
      const Head<T> head(params, batch, key_head * group_heads + i / chunks);
      const int first = (first_chunk + i % chunks) * kChunk, at = i % 2 * kChunk;
      const int tiles = min(tiles_of(lq - first), kTilesPerChunk);
      for (int step = max(first_query_tile(head, first_key) - first / kTile, 0); step < tiles && bits != 0; ++step)
        state.step(head, queries, gradients, at + step * kTile, lse + at + step * kTile, dots + at + step * kTile,
                   first + step * kTile, first_key, bits);
      copy_wait<0>();
      sync_block();
    }
    if (!active) return;
    store(params.grad_k, first_head, key_head, state.dk, params.scale, first_key, lk, own);
    store(params.grad_v, first_head, key_head, state.dv, params.keep_scale, first_key, lk, own);
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kAttentionBackwardWarps* kWarp, 1)
    attention_backward_kernel(const __grid_constant__ AttentionParams params,
                              const __grid_constant__ AttentionPlan plan) {
  const BackwardBlock<T, kWidth> block(params);
  if (plan.mode == AttentionMode::kResident) {
    block.resident();
  } else if (plan.mode == AttentionMode::kQueries) {
    block.query_block(plan);
  } else {
    block.key_block(plan);
  }
}

}  // namespace

AttentionBackwardPlan attention_backward_plan(const AttentionParams& params, int64_t most_shared) {
  const int64_t query_tiles = ceil_div(params.lq, kAttentionTile), key_tiles = ceil_div(params.lk, kAttentionTile);
  const int64_t pitch = 2 * attention_width(params.d), chunk_bytes = sizeof(uint64_t), row_facts = 2 * sizeof(float);
  const bool grouped = params.heads != params.key_heads;
  if (!grouped && std::max(query_tiles, key_tiles) <= kAttentionResidentTiles) {
    for (int warps = even_warps(query_tiles + key_tiles, kAttentionBackwardWarps); warps >= kAttentionFewestWarps;
         --warps) {
      AttentionPlan plan{.warps = warps, .tiles = query_tiles + key_tiles, .blocks = params.batch * params.heads};
      plan.shared_bytes = (2 * query_tiles + 2 * key_tiles + warps) * kAttentionTile * pitch +
                          ceil_div(params.lk, kAttentionChunk) * chunk_bytes + query_tiles * kAttentionTile * row_facts;
      if (plan.shared_bytes <= most_shared) return {.first = plan, .second = {}, .two = false};
    }
  }
  const auto streaming = [&](AttentionMode mode, int64_t tiles, int64_t heads) {
    AttentionPlan plan{.mode = mode};
    for (plan.warps = kAttentionBackwardWarps; plan.warps >= kAttentionFewestWarps; --plan.warps) {
      plan.shared_bytes = (4 * kAttentionChunk + 2 * plan.warps * kAttentionTile) * pitch;
      plan.shared_bytes += mode == AttentionMode::kQueries ? 2 * chunk_bytes + plan.warps * kAttentionTile * row_facts
                                                           : 2 * kAttentionChunk * row_facts;
      if (plan.shared_bytes <= most_shared) break;
    }
    plan.tiles = plan.warps;
    plan.parts = ceil_div(tiles, plan.tiles);
    plan.blocks = plan.shared_bytes <= most_shared ? params.batch * heads * plan.parts : -1;
    return plan;
  };
  return {.first = streaming(AttentionMode::kQueries, query_tiles, params.heads),
          .second = streaming(AttentionMode::kKeys, key_tiles, params.key_heads),
          .two = true};
}

cudaError_t launch_attention_backward(const AttentionParams& params, cudaStream_t stream) {
  int64_t most_shared = 0;
  VK_CUDA_RETURN_IF_ERROR(shared_limit(&most_shared));
  const AttentionBackwardPlan plan = attention_backward_plan(params, most_shared);
  return with_attention_kernel(params, [&]<class T, int kWidth>(ElementType<T>, Width<kWidth>) {
    VK_CUDA_RETURN_IF_ERROR(
        launch(attention_backward_kernel<T, kWidth>, attention_shape(plan.first), stream, params, plan.first));
    if (!plan.two) return cudaSuccess;
    return launch(attention_backward_kernel<T, kWidth>, attention_shape(plan.second), stream, params, plan.second);
  });
}

}  // namespace vk::cuda

// SPDX-License-Identifier: Apache-2.0
// What the emulator computes and what it catches: a correct kernel per instruction, and one kernel per kind of mistake.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cuda/engine/launch.h"
#include "cuda/engine/tile.h"

using namespace vk::cuda;

extern "C" int64_t emulator_matrix_conflicts();

namespace {

constexpr int kShared = 4096;

// An error's message, or "fine".
std::string outcome(void (*kernel)(char*), int threads, char* global = nullptr, int64_t shared = kShared) {
  const LaunchShape shape{.blocks = 1, .threads = threads, .shared_bytes = shared};
  const cudaError_t status = launch(kernel, shape, nullptr, global);
  return status == cudaSuccess ? "fine" : cudaGetErrorString(status);
}

void expect(const char* what, const std::string& found, const char* wanted) {
  if (found.find(wanted) != std::string::npos) return;
  std::printf("%s: expected '%s', found '%s'\n", what, wanted, found.c_str());
  std::exit(1);
}

SharedAddress shared_begin() { return shared_address(shared_memory()); }

// A product of whole numbers through copies, matrix loads and the multiplication: exact, so any wrong layout shows.
struct Product {
  uint16_t a[16][16], b[8][16], b_rows[16][8];
  float with_columns[16][8], with_rows[16][8];
};
void product_kernel(char* global) {
  auto& work = *reinterpret_cast<Product*>(global);
  using Tile = Rows<64>;
  const SharedAddress a = shared_begin(), b = a + 16 * Tile::kPitch, rows = b + 16 * Tile::kPitch;
  copy_rows<Tile>(a, 16, global + offsetof(Product, a), 32, 16, 32, lane_id(), kWarp, EveryRow());
  copy_rows<Tile>(b, 16, global + offsetof(Product, b), 32, 8, 32, lane_id(), kWarp, EveryRow());
  copy_rows<Tile>(rows, 16, global + offsetof(Product, b_rows), 16, 16, 16, lane_id(), kWarp, EveryRow());
  copy_commit();
  copy_wait<0>();
  sync_warp();
  uint32_t fragments[1][4];
  load_fragments<Tile>(fragments, a, 0);
  float left[4] = {}, unused[4] = {}, wide[2][4] = {};
  product_16x16<F16, Tile, 1>(left, unused, fragments, b, 0);
  product_16xwidth<F16, Tile, 1>(wide, fragments[0], rows, 0);
  for (int i = 0; i < 4; ++i) {
    work.with_columns[lane_id() / 4 + 8 * (i / 2)][2 * (lane_id() % 4) + i % 2] = left[i];
    work.with_rows[lane_id() / 4 + 8 * (i / 2)][2 * (lane_id() % 4) + i % 2] = wide[0][i];
  }
}

struct ByteProduct {
  int8_t a[16][32], b[8][32];
  int32_t c[16][8];
};
void byte_product_kernel(char* global) {
  auto& work = *reinterpret_cast<ByteProduct*>(global);
  using Tile = Rows<32>;
  const SharedAddress a = shared_begin(), b = a + 16 * Tile::kPitch;
  copy_rows<Tile>(a, 16, global, 32, 16, 32, lane_id(), kWarp, EveryRow());
  copy_rows<Tile>(b, 16, global + offsetof(ByteProduct, b), 32, 8, 32, lane_id(), kWarp, EveryRow());
  copy_commit();
  copy_wait<0>();
  sync_warp();
  uint32_t left[4], right[4];
  int32_t c[4] = {};
  load_matrices(left, rows_first<Tile>(a, 0, 0));
  load_matrices(right, columns_first<Tile>(b, 0, 0));
  multiply_add(c, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) work.c[lane_id() / 4 + 8 * (i / 2)][2 * (lane_id() % 4) + i % 2] = c[i];
}

uint16_t half_of(int value) { return static_cast<uint16_t>(pack<F16>(static_cast<float>(value), 0.0f)); }

void products_are_exact() {
  static Product work;
  static ByteProduct bytes;
  std::srand(1);
  int a[16][16], b[8][16];
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) work.a[i][k] = half_of(a[i][k] = std::rand() % 15 - 7);
  for (int j = 0; j < 8; ++j)
    for (int k = 0; k < 16; ++k) work.b[j][k] = work.b_rows[k][j] = half_of(b[j][k] = std::rand() % 15 - 7);
  expect("product", outcome(product_kernel, 32, reinterpret_cast<char*>(&work)), "fine");
  for (auto& row : bytes.a)
    for (auto& x : row) x = static_cast<int8_t>(std::rand() % 255 - 127);
  for (auto& row : bytes.b)
    for (auto& x : row) x = static_cast<int8_t>(std::rand() % 255 - 127);
  expect("byte product", outcome(byte_product_kernel, 32, reinterpret_cast<char*>(&bytes)), "fine");
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      int sum = 0, byte_sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[i][k] * b[j][k];
      for (int k = 0; k < 32; ++k) byte_sum += bytes.a[i][k] * bytes.b[j][k];
      if (work.with_columns[i][j] != static_cast<float>(sum) || work.with_rows[i][j] != static_cast<float>(sum) ||
          bytes.c[i][j] != byte_sum) {
        std::printf("products differ at %d, %d\n", i, j);
        std::exit(1);
      }
    }
  }
  if (emulator_matrix_conflicts() != 0) {
    std::printf("exchanged rows have bank conflicts\n");
    std::exit(1);
  }
}

void conversions_agree() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const F16 half{static_cast<uint16_t>(bits)};
    const float value = to_float(half);
    if (value == value && (pack<F16>(value, 0.0f) & 0xffff) != bits) {
      std::printf("float16 %x comes back as %x\n", bits, pack<F16>(value, 0.0f));
      std::exit(1);
    }
  }
  // ties go to the even neighbour
  if (pack<F16>(2049.0f, 2051.0f) != (half_of(2048) | static_cast<uint32_t>(half_of(2052)) << 16)) std::exit(1);
  if (pack<Bf16>(257.0f, 259.0f) != (0x4380u | 0x4382u << 16)) std::exit(1);
}

void unwaited(char* global) {
  copy_async(shared_begin() + 16 * static_cast<uint32_t>(threadIdx.x), global, true);
  copy_commit();
  uint32_t value;
  std::memcpy(&value, shared_memory() + 16 * threadIdx.x, sizeof value);
  copy_wait<0>();
  std::memcpy(global + 64 + 4 * threadIdx.x, &value, sizeof value);
}
void never_waited(char* global) {
  copy_async(shared_begin() + 16 * static_cast<uint32_t>(threadIdx.x), global, true);
  copy_commit();
}
void misaligned_target(char* global) { copy_async(shared_begin() + 8, global, true); }
void misaligned_source(char* global) { copy_async(shared_begin(), global + 8, true); }
void misaligned_matrix(char*) {
  uint32_t r[4];
  load_matrices(r, shared_begin() + 8);
}
void matrix_outside(char*) {
  uint32_t r[4];
  load_matrices(r, shared_begin() + kShared);
}
void conflicting_matrix(char*) {
  uint32_t r[4];
  load_matrices(r, shared_begin() + 128 * (lane_id() % 8));
}
void shared_above(char*) { shared_memory()[kShared] = 1; }
void shared_below(char*) { shared_memory()[-1] = 1; }
void global_outside(char* global) { *global = 1; }
void missed_barrier(char*) {
  if (threadIdx.x < 32) sync_block();
}
void divergent_warp(char*) {
  if (lane_id() < 16)
    sync_warp();
  else
    ballot(true);
}
void too_much_shared(char*) {}

}  // namespace

int main() {
  products_are_exact();
  conversions_agree();

  alignas(16) static char global[256];
  expect("unwaited", outcome(unwaited, 32, global), "fine");
  uint32_t seen;
  std::memcpy(&seen, global + 64, sizeof seen);
  if (seen != 0xffffffff) std::exit(1);  // what was copied is poison until the wait
  expect("never waited", outcome(never_waited, 32, global), "copies under way");
  expect("misaligned target", outcome(misaligned_target, 32, global), "shared address 8 is not a multiple of 16");
  expect("misaligned source", outcome(misaligned_source, 32, global), "is not a multiple of 16");
  expect("misaligned matrix", outcome(misaligned_matrix, 32), "shared address 8 is not a multiple of 16");
  expect("matrix outside", outcome(matrix_outside, 32), "shared bytes 4096 to 4112 of 4096");
  expect("shared above", outcome(shared_above, 32), "shared memory: access at byte 4096 of 4096");
  expect("shared below", outcome(shared_below, 32), "written below");
  expect("global outside", outcome(global_outside, 32, reinterpret_cast<char*>(4096)), "outside every tensor");
  expect("missed barrier", outcome(missed_barrier, 64), "never come: 0 at sync_block");
  expect("divergent warp", outcome(divergent_warp, 32), "different operations: sync_warp and ballot");
  expect("shared limit", outcome(too_much_shared, 32, nullptr, 228 * 1024), "error");
  const int64_t before = emulator_matrix_conflicts();
  expect("conflicts", outcome(conflicting_matrix, 32), "fine");
  if (emulator_matrix_conflicts() - before != 4 * 7) std::exit(1);
  expect("after all errors", outcome(conflicting_matrix, 32), "fine");
  std::printf("ok\n");
}

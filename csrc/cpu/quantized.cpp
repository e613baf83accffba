// SPDX-License-Identifier: Apache-2.0
// The linear layers' host side: how a call is cut into parts, and the buffers of each part.
#include "cpu/quantized.h"

#include <cstring>

#include "core/pages.h"
#include "core/parallel.h"
#include "cpu/linear_host.h"
#include "cpu/table.h"

namespace vk::cpu {
namespace {

// Below so many operations a second thread costs more than it brings.
constexpr double kWorkOfAThread = 2e6;

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// Parts of rows times parts of columns: as even as panels allow. Cut by columns, the left operand is prepared once for
// all; cut by rows alone, each part prepares its own, block by block, which needs less memory and no second step.
struct Grid {
  int64_t rows = 1, cols = 1;

  Grid(const LinearProblem& p, int threads) {
    const QuantizedKernels& k = kernels().quantized;
    const int64_t row_panels = std::max<int64_t>(1, ceil_div(p.m, k.rows));
    const int64_t col_panels = std::max<int64_t>(1, ceil_div(p.n, k.cols));
    double best = 0.0;
    for (int64_t c = 1; c <= threads; ++c) {
      const int64_t r = threads / c;
      const double steps = static_cast<double>(ceil_div(row_panels, r) * ceil_div(col_panels, c));
      const double cost = steps * (c == 1 ? 1.0 : 1.02);
      if (c == 1 || cost < best) {
        best = cost;
        rows = r;
        cols = c;
      }
    }
    rows = std::min(rows, row_panels);
    cols = std::min(cols, col_panels);
  }
};

bool few_rows(const LinearProblem& p) {
  return p.kind == WeightKind::kInt4 && p.m > 0 && p.k > 0 && p.m <= kernels().quantized.few_rows;
}

const float* padded_bias(const LinearCall& call, Arena& arena) {
  if (!call.bias) return nullptr;
  const int64_t n = call.problem.n, padded = round_up(n, kernels().quantized.lanes);
  auto* out = arena.take<float>(padded);
  if (call.bias_dtype == Dtype::kF32) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<const float*>(call.bias)[i * call.bias_stride];
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(static_cast<const uint16_t*>(call.bias)[i * call.bias_stride]);
  }
  std::fill(out + n, out + padded, 0.0f);
  return out;
}

}  // namespace

int threads_for(const LinearProblem& p, int threads) {
  const double work = 2.0 * static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k);
  return work < kWorkOfAThread ? 1 : threads;
}

// The buffers of a call, in the order in which `run_product` takes them.
int64_t product_bytes(const LinearProblem& p, int threads) {
  const QuantizedKernels& k = kernels().quantized;
  const Grid grid(p, threads);
  const int64_t units = k.depth_units(p), parts = grid.rows * grid.cols;
  const int64_t left_rows = grid.cols == 1 ? parts * kRowBlock : round_up(p.m, kRowBlock);
  return round_up(4 * round_up(p.m, k.rows), kLine) + round_up(4 * units * left_rows, kLine) +
         parts * round_up(k.product_scratch(p), kLine);
}

// The product and its epilogue, the right operand being packed.
void run_product(LinearProblem& p, Arena arena, int threads) {
  const QuantizedKernels& k = kernels().quantized;
  const Grid grid(p, threads);
  const int64_t units = k.depth_units(p), parts = grid.rows * grid.cols;
  p.row_scale = arena.take<float>(round_up(p.m, k.rows));
  const int64_t left_rows = grid.cols == 1 ? parts * kRowBlock : round_up(p.m, kRowBlock);
  auto* left = arena.take<uint32_t>(units * left_rows);
  const int64_t scratch_bytes = round_up(k.product_scratch(p), kLine);
  char* scratch = arena.take<char>(parts * scratch_bytes);
  if (grid.cols == 1) {
    parallel_for(threads, parts, [&](int64_t part) {
      const Range rows = cut(p.m, k.rows, part, parts);
      uint32_t* own = left + part * kRowBlock * units;
      for (int64_t row = rows.begin; row < rows.end; row += kRowBlock) {
        const int64_t end = std::min(rows.end, row + kRowBlock);
        k.prepare(p, row, end, own);
        k.product(p, row, end, 0, p.n, own, scratch + part * scratch_bytes);
      }
    });
    return;
  }
  parallel_for(threads, threads, [&](int64_t part) {
    const Range rows = cut(p.m, k.rows, part, threads);
    if (rows.begin < rows.end) k.prepare(p, rows.begin, rows.end, left + rows.begin * units);
  });
  parallel_for(threads, parts, [&](int64_t part) {
    const Range rows = cut(p.m, k.rows, part / grid.cols, grid.rows);
    const Range cols = cut(p.n, k.cols, part % grid.cols, grid.cols);
    if (cols.begin >= cols.end) return;
    for (int64_t row = rows.begin; row < rows.end; row += kRowBlock)
      k.product(p, row, std::min(rows.end, row + kRowBlock), cols.begin, cols.end, left + row * units,
                scratch + part * scratch_bytes);
  });
}

int64_t packed_weight_bytes(WeightKind kind, int64_t n, int64_t k, int64_t group) {
  return kernels().quantized.packed_bytes(kind, n, k, group);
}

void pack_weight(WeightKind kind, const CanonicalWeight& weight, char* packed, int threads) {
  const QuantizedKernels& k = kernels().quantized;
  if (weight.n == 0) return;
  // A row streams the weight past once: with small pages, every 4 KiB would wait for its translation.
  ask_for_large_pages(packed, k.packed_bytes(kind, weight.n, weight.k, weight.group));
  const int64_t parts = std::min<int64_t>(ceil_div(weight.n, k.cols), 4 * threads);
  parallel_for(threads, parts, [&](int64_t part) {
    const Range cols = cut(weight.n, k.cols, part, parts);
    if (cols.begin < cols.end) k.pack_weight(kind, weight, cols.begin, cols.end, packed);
  });
}

int64_t linear_workspace(const LinearCall& call, int threads) {
  const QuantizedKernels& k = kernels().quantized;
  const LinearProblem& p = call.problem;
  int64_t bytes = call.bias ? round_up(4 * round_up(p.n, k.lanes), kLine) : 0;
  if (call.weight.codes) bytes += round_up(k.packed_bytes(p.kind, p.n, p.k, 0), kLine);
  if (few_rows(p)) bytes += round_up(k.few_bytes(p), kLine);
  return bytes + product_bytes(p, threads_for(p, threads));
}

void linear_forward(LinearCall& call, int threads) {
  const QuantizedKernels& k = kernels().quantized;
  LinearProblem& p = call.problem;
  if (p.m == 0 || p.n == 0) return;
  if (call.workspace) ask_for_large_pages(call.workspace, linear_workspace(call, threads));
  threads = threads_for(p, threads);
  ask_for_large_pages(p.out, p.m * p.n * (p.out_dtype == Dtype::kF32 ? 4 : 2));
  Arena arena(call.workspace);
  p.bias = padded_bias(call, arena);
  if (call.weight.codes) {
    char* packed = arena.take<char>(k.packed_bytes(p.kind, p.n, p.k, 0));
    pack_weight(p.kind, call.weight, packed, threads);
    p.packed = packed;
  }
  if (few_rows(p)) {
    char* digits = arena.take<char>(k.few_bytes(p));
    if (k.few_prepare(p, digits)) {
      const int64_t parts = std::min<int64_t>(threads, ceil_div(p.n, k.lanes));
      parallel_for(threads, parts, [&](int64_t part) {
        const Range cols = cut(p.n, k.lanes, part, parts);
        k.few_product(p, cols.begin, cols.end, digits);
      });
      return;
    }
  }
  run_product(p, arena, threads);
}

}  // namespace vk::cpu

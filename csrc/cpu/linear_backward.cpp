// SPDX-License-Identifier: Apache-2.0
// Gradients of the linear layers: two more products, of the pre-activation's gradient with the weight and with x.
#include <cstring>

#include "core/pages.h"
#include "core/parallel.h"
#include "cpu/linear_host.h"
#include "cpu/table.h"

namespace vk::cpu {
namespace {

int64_t size_of(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

WeightKind product_kind(const LinearGradients& call) { return call.half ? WeightKind::kBF16 : WeightKind::kF32; }

bool has_slope(const LinearGradients& call) { return call.forward.problem.activation != Activation::kNone; }

bool is_quantized(const CanonicalWeight& weight) { return weight.dtype == Dtype::kI8 || weight.dtype == Dtype::kU8; }

// Rows that one stride describes need no copy to be the right operand of a product over them.
bool is_matrix(const Rows& rows, int64_t m) {
  return rows.inner >= m || rows.outer_stride == rows.inner * rows.row_stride;
}

// Where the gradient of the pre-activation is grad_out itself, and lies as the products read it.
bool is_given(const LinearGradients& call) {
  const LinearProblem& f = call.forward.problem;
  return !has_slope(call) && is_matrix(call.grad_out, f.m) && call.grad_out.col_stride == 1;
}

// Products in bf16 round the gradient once, here, instead of wherever it is packed.
Dtype gradient_dtype(const LinearGradients& call) { return call.half ? Dtype::kBF16 : Dtype::kF32; }

int64_t gradient_bytes(const LinearGradients& call) {
  const LinearProblem& f = call.forward.problem;
  if (is_given(call)) return 0;
  const int64_t pre = has_slope(call) ? round_up(4 * f.m * f.n, kLine) : 0;
  return pre + (call.half || pre == 0 ? round_up(size_of(gradient_dtype(call)) * f.m * f.n, kLine) : 0);
}

// A product [m, depth] times [depth, k], k being the layer's inputs, into a gradient.
LinearProblem gradient_problem(const LinearGradients& call, int64_t m, int64_t depth, void* out, Dtype dtype) {
  LinearProblem p;
  p.m = m;
  p.n = call.forward.problem.k;
  p.k = depth;
  p.kind = product_kind(call);
  p.out = out;
  p.out_dtype = dtype;
  p.out_stride = p.n;
  return p;
}

// grad_x [m, k] = g [m, n] weight [n, k]
LinearProblem input_problem(const LinearGradients& call) {
  const LinearProblem& f = call.forward.problem;
  return gradient_problem(call, f.m, f.n, call.grad_x, call.grad_x_dtype);
}

// grad_weight [n, k] = g^T [n, m] x [m, k]
LinearProblem weight_problem(const LinearGradients& call) {
  const LinearProblem& f = call.forward.problem;
  return gradient_problem(call, f.n, f.m, call.grad_weight, call.grad_weight_dtype);
}

int64_t right_bytes(const LinearProblem& p) { return kernels().quantized.packed_bytes(p.kind, p.n, p.k, 0); }

// Bytes behind the gradient of the pre-activation, for whichever step takes most.
int64_t step_bytes(const LinearGradients& call, int threads) {
  const LinearProblem& f = call.forward.problem;
  int64_t most = 0;
  if (has_slope(call)) most = std::max(most, linear_workspace(call.forward, threads));
  if (call.grad_x) {
    const LinearProblem p = input_problem(call);
    const int64_t dequantized = is_quantized(call.weight) ? round_up(4 * f.n * f.k, kLine) : 0;
    most = std::max(most, dequantized + round_up(right_bytes(p), kLine) + product_bytes(p, threads_for(p, threads)));
  }
  if (call.grad_weight) {
    const LinearProblem p = weight_problem(call);
    const int64_t copy = is_matrix(f.x, f.m) ? 0 : round_up(size_of(f.x.dtype) * f.m * f.k, kLine);
    most = std::max(most, copy + round_up(right_bytes(p), kLine) + product_bytes(p, threads_for(p, threads)));
  }
  return most;
}

// A product whose right operand's depth runs over the rows of `right`.
void product_over_rows(LinearProblem& p, const Matrix& right, Arena arena, int threads) {
  const QuantizedKernels& k = kernels().quantized;
  char* packed = arena.take<char>(right_bytes(p));
  const int64_t parts = std::min<int64_t>(ceil_div(p.n, k.cols), 4 * threads);
  parallel_for(threads, parts, [&](int64_t part) {
    const Range cols = cut(p.n, k.cols, part, parts);
    if (cols.begin < cols.end) k.pack_over_rows(p.kind, right, p.k, p.n, cols.begin, cols.end, packed);
  });
  p.packed = packed;
  run_product(p, arena, threads);
}

Matrix dequantized(const LinearGradients& call, Arena& arena, int threads) {
  const CanonicalWeight& w = call.weight;
  if (!is_quantized(w)) return {w.codes, w.dtype, w.row_stride, w.col_stride};
  const LinearProblem& f = call.forward.problem;
  auto* out = arena.take<float>(w.n * w.k);
  parallel_for(threads, 4 * threads, [&](int64_t part) {
    const Range rows = cut(w.n, 1, part, 4 * threads);
    kernels().quantized.dequantize_rows(f.kind, w, rows.begin, rows.end, out);
  });
  return {out, Dtype::kF32, w.k, 1};
}

Matrix x_matrix(const LinearProblem& f, Arena& arena, int threads) {
  const Rows& x = f.x;
  if (is_matrix(x, f.m)) return {x.data, x.dtype, x.row_stride, x.col_stride};
  const int64_t size = size_of(x.dtype);
  char* out = arena.take<char>(size * f.m * f.k);
  parallel_for(threads, 4 * threads, [&](int64_t part) {
    const Range rows = cut(f.m, 1, part, 4 * threads);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t at = r / x.inner * x.outer_stride + r % x.inner * x.row_stride;
      const char* from = static_cast<const char*>(x.data) + at * size;
      char* to = out + r * f.k * size;
      if (x.col_stride == 1) {
        std::memcpy(to, from, static_cast<size_t>(f.k * size));
      } else {
        for (int64_t j = 0; j < f.k; ++j)
          std::memcpy(to + j * size, from + j * x.col_stride * size, static_cast<size_t>(size));
      }
    }
  });
  return {out, x.dtype, f.k, 1};
}

void fill_zeros(void* out, Dtype dtype, int64_t count) {
  if (out && count > 0) std::memset(out, 0, static_cast<size_t>(count * size_of(dtype)));
}

}  // namespace

int64_t linear_backward_workspace(const LinearGradients& call, int threads) {
  return gradient_bytes(call) + step_bytes(call, threads);
}

void linear_backward(LinearGradients& call, int threads) {
  const QuantizedKernels& k = kernels().quantized;
  LinearProblem& f = call.forward.problem;
  if (f.m == 0 || f.n == 0 || f.k == 0) {
    fill_zeros(call.grad_x, call.grad_x_dtype, f.m * f.k);
    fill_zeros(call.grad_weight, call.grad_weight_dtype, f.n * f.k);
    if (f.m == 0 || f.n == 0) {
      fill_zeros(call.grad_bias, call.grad_bias_dtype, f.n);
      return;
    }
  }
  ask_for_large_pages(call.workspace, linear_backward_workspace(call, threads));
  Arena arena(call.workspace);
  Rows g = call.grad_out;
  const Activation activation = f.activation;
  const int workers = threads_for(f, threads);
  if (!is_given(call)) {
    auto* pre = has_slope(call) ? arena.take<float>(f.m * f.n) : nullptr;
    const Dtype dtype = gradient_dtype(call);
    void* out = pre && !call.half ? static_cast<void*>(pre) : arena.take<char>(size_of(dtype) * f.m * f.n);
    if (has_slope(call)) {
      LinearCall forward = call.forward;
      forward.problem.activation = Activation::kNone;
      forward.problem.residual = Rows{};
      forward.problem.out = pre;
      forward.problem.out_dtype = Dtype::kF32;
      forward.problem.out_stride = f.n;
      Arena rest = arena;
      forward.workspace = rest.take<char>(0);
      linear_forward(forward, threads);
    }
    parallel_for(workers, 4 * workers, [&](int64_t part) {
      const Range rows = cut(f.m, 1, part, 4 * workers);
      k.slopes(activation, call.grad_out, f.n, rows.begin, rows.end, pre, out, dtype);
    });
    g = {out, dtype, f.m, 0, f.n, 1};
  }
  if (call.grad_bias) {
    parallel_for(workers, 4 * workers, [&](int64_t part) {
      const Range cols = cut(f.n, k.lanes, part, 4 * workers);
      k.column_sums(g, f.m, f.n, cols.begin, cols.end, call.grad_bias, call.grad_bias_dtype);
    });
  }
  if (f.k == 0) return;
  if (call.grad_x) {
    LinearProblem p = input_problem(call);
    p.x = g;
    Arena rest = arena;
    const Matrix weight = dequantized(call, rest, workers);
    product_over_rows(p, weight, rest, workers);
  }
  if (call.grad_weight) {
    LinearProblem p = weight_problem(call);
    p.x = {g.data, g.dtype, f.n, 0, 1, g.row_stride};
    Arena rest = arena;
    const Matrix x = x_matrix(f, rest, workers);
    product_over_rows(p, x, rest, workers);
  }
}

}  // namespace vk::cpu

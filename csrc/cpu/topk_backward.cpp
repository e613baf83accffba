// SPDX-License-Identifier: Apache-2.0
// Gradients of top-k scores and of zero-shot probabilities.
#include "cpu/topk_backward.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "cpu/host.h"

namespace vk::cpu {
namespace {

constexpr double kNormFloor = 1e-12;    // as in torch.nn.functional.normalize
constexpr int64_t kPartWork = 1 << 16;  // multiply-adds below which another thread costs more than it brings

void read_row(const Matrix& m, int64_t row, int64_t d, double* out) {
  if (m.dtype == Dtype::kF32) {
    const float* at = static_cast<const float*>(m.data) + row * m.row_stride;
    for (int64_t i = 0; i < d; ++i) out[i] = static_cast<double>(at[i * m.col_stride]);
    return;
  }
  const uint16_t* at = static_cast<const uint16_t*>(m.data) + row * m.row_stride;
  for (int64_t i = 0; i < d; ++i)
    out[i] = static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(at[i * m.col_stride]) << 16));
}

double dot(const double* a, const double* b, int64_t d) {
  double sum = 0.0;
  for (int64_t i = 0; i < d; ++i) sum += a[i] * b[i];
  return sum;
}

// out += a x - b y
void add_scaled(double a, const double* x, double b, const double* y, int64_t d, double* out) {
  for (int64_t i = 0; i < d; ++i) out[i] += a * x[i] - b * y[i];
}

void write_row(const double* sums, int64_t d, bool add, float* out, uint16_t* rounded) {
  for (int64_t i = 0; i < d; ++i) {
    out[i] = static_cast<float>(add ? static_cast<double>(out[i]) + sums[i] : sums[i]);
    if (rounded) rounded[i] = round_to_bf16(out[i]);
  }
}

// What a pair's gradients are made of; see the header.
struct Pair {
  double a = 0.0, b = 0.0, c = 0.0;
};

// The pair's coefficients, and its score in `score`.
Pair pair_of(Metric metric, double g, const double* q, const double* x, int64_t d, double* score) {
  if (metric == Metric::kL2) return {2.0 * g, 2.0 * g, 2.0 * g};
  const double product = dot(q, x, d);
  *score = product;
  if (metric == Metric::kDot) return {g, 0.0, 0.0};
  const double qq = dot(q, q, d), xx = dot(x, x, d);
  const double q_norm = std::max(std::sqrt(qq), kNormFloor), x_norm = std::max(std::sqrt(xx), kNormFloor);
  *score = product / (q_norm * x_norm);
  // Below the floor the norm is a constant. NaN is not below it, and stays NaN.
  const bool q_floored = qq < kNormFloor * kNormFloor, x_floored = xx < kNormFloor * kNormFloor;
  return {g / (q_norm * x_norm), q_floored ? 0.0 : g * *score / qq, x_floored ? 0.0 : g * *score / xx};
}

int parts_for(int64_t work, int threads) {
  return static_cast<int>(std::clamp<int64_t>(work / kPartWork, 1, std::max(threads, 1)));
}

}  // namespace

int64_t topk_gradients_workspace(const TopkGradients& call) {
  const int64_t pairs = call.n * call.k;
  return round_up(pairs * static_cast<int64_t>(sizeof(Pair)), kLine) + round_up(pairs * 8, kLine) +
         round_up((call.m + 1) * 8, kLine) + round_up(call.n * 8, kLine);
}

void topk_gradients(const TopkGradients& call, int threads) {
  const int64_t n = call.n, m = call.m, d = call.d, k = call.k;
  Arena arena(call.workspace);
  auto* pairs = arena.take<Pair>(n * k);
  auto* order = arena.take<int64_t>(n * k);  // pairs by database row, then by query
  auto* first = arena.take<int64_t>(m + 1);
  auto* by_scale = arena.take<double>(n);

  const int64_t query_parts = parts_for(n * k * d, threads);
  parallel_for(threads, query_parts, [&](int64_t part) {
    std::vector<double> rows(static_cast<size_t>(3 * d));
    double *q = rows.data(), *x = q + d, *sums = x + d;
    for (int64_t i = n * part / query_parts; i < n * (part + 1) / query_parts; ++i) {
      read_row(call.q, i, d, q);
      std::fill_n(sums, d, 0.0);
      by_scale[i] = 0.0;
      for (int64_t j = i * k; j < (i + 1) * k; ++j) {
        pairs[j] = {};
        if (call.indices[j] < 0) continue;
        read_row(call.x, call.indices[j], d, x);
        const double g = static_cast<double>(call.grad_score[j]);
        double score = 0.0;
        pairs[j] = pair_of(call.metric, g, q, x, d, &score);
        if (call.logit_scale) by_scale[i] += g * score;
        add_scaled(pairs[j].a, x, pairs[j].b, q, d, sums);
      }
      if (call.grad_q)
        write_row(sums, d, call.add, call.grad_q + i * d, call.grad_q_bf16 ? call.grad_q_bf16 + i * d : nullptr);
    }
  });
  if (call.grad_scale) {
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) total += by_scale[i];
    *call.grad_scale += static_cast<float>(total / static_cast<double>(*call.logit_scale));
  }
  if (!call.grad_x) return;

  // A counting sort: a row's pairs are added in the order of the queries, whichever thread does it.
  std::fill_n(first, m + 1, 0);
  for (int64_t j = 0; j < n * k; ++j)
    if (call.indices[j] >= 0) ++first[call.indices[j] + 1];
  for (int64_t r = 0; r < m; ++r) first[r + 1] += first[r];
  for (int64_t j = 0; j < n * k; ++j)
    if (call.indices[j] >= 0) order[first[call.indices[j]]++] = j;
  // `first` now holds each row's end, which is the next row's begin.
  const int64_t row_parts = parts_for(n * k * d + m * d / 4, threads);
  parallel_for(threads, row_parts, [&](int64_t part) {
    std::vector<double> rows(static_cast<size_t>(3 * d));
    double *q = rows.data(), *x = q + d, *sums = x + d;
    for (int64_t r = m * part / row_parts; r < m * (part + 1) / row_parts; ++r) {
      const int64_t begin = r ? first[r - 1] : 0, end = first[r];
      if (begin == end && call.add) continue;
      std::fill_n(sums, d, 0.0);
      if (begin < end) read_row(call.x, r, d, x);
      for (int64_t at = begin; at < end; ++at) {
        read_row(call.q, order[at] / k, d, q);
        const Pair& pair = pairs[order[at]];
        add_scaled(pair.a, q, pair.c, x, d, sums);
      }
      write_row(sums, d, call.add, call.grad_x + r * d, call.grad_x_bf16 ? call.grad_x_bf16 + r * d : nullptr);
    }
  });
}

void zero_shot_weights(const ZeroShotWeights& call) {
  for (int64_t i = 0; i < call.n; ++i) {
    double sum = 0.0;
    for (int64_t j = i * call.k; j < (i + 1) * call.k; ++j) {
      const double term = static_cast<double>(call.grad_probabilities[j]) * static_cast<double>(call.probabilities[j]);
      call.grad_score[j] = static_cast<float>(static_cast<double>(call.logit_scale) * term);
      sum += term;
    }
    call.row_weight[i] = static_cast<float>(static_cast<double>(call.grad_lse[i]) - sum);
    call.row_lse[i] = call.lse[i];
    call.row_lse[call.n + i] = 0.0f;
    call.no_positives[i] = -1;
  }
  if (call.zeros) std::fill_n(call.zeros, call.n * call.d, 0.0f);
}

void unit_gradients(const UnitGradients& call, int threads) {
  const int64_t d = call.d, parts = parts_for(4 * call.rows * d, threads);
  parallel_for(threads, parts, [&](int64_t part) {
    std::vector<double> rows(static_cast<size_t>(3 * d));
    double *x = rows.data(), *g = x + d, *sums = g + d;
    for (int64_t r = call.rows * part / parts; r < call.rows * (part + 1) / parts; ++r) {
      read_row(call.x, r, d, x);
      const float* given = call.grad + r / call.group * d;
      for (int64_t i = 0; i < d; ++i) g[i] = static_cast<double>(given[i]) / static_cast<double>(call.group);
      const double square = dot(x, x, d), norm = std::max(std::sqrt(square), kNormFloor);
      const double along = square < kNormFloor * kNormFloor ? 0.0 : dot(g, x, d) / square;
      std::fill_n(sums, d, 0.0);
      add_scaled(1.0 / norm, g, along / norm, x, d, sums);
      write_row(sums, d, false, call.out + r * d, call.out_bf16 ? call.out_bf16 + r * d : nullptr);
    }
  });
}

}  // namespace vk::cpu

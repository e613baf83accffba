// SPDX-License-Identifier: Apache-2.0
// The contrastive family on the CPU, host side: how a pass is cut into parts, what surrounds the tile loops.
//
// A pass over N x M logits runs in T steps of T parts. Part t owns row group t throughout and column group (t + step)
// mod T in each step, so no two parts that run at once share a row or a column: nothing is locked, nothing is merged,
// and every sum is taken in an order that depends on T alone.
#include "cpu/contrastive.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"
#include "cpu/host.h"
#include "cpu/table.h"

namespace vk::cpu {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kScratchLimit = 48 * kMiB;  // of all parts together
constexpr int64_t kChunkLimit = 50 * kMiB;    // dot products kept in one pass
constexpr int64_t kSmallPart = 1 << 21;       // multiply-adds below which another thread costs more than it brings
constexpr int64_t kRowAlign = 8;
constexpr int64_t kColAlign = 48;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t part_scratch(const ContrastiveProblem& p, int64_t block_rows) {
  // Upper bound over the instruction sets: float32 units, widths rounded to the widest register.
  const int64_t width = round_up(p.d, 16);
  const int64_t units = 2 * block_rows * width + 2 * kTileCols * width + (3 * kTileRows + 16) * kTileStride;
  return round_up(units * 4, 4096) + 4096;
}

ContrastivePlan make_plan(const ContrastiveProblem& p, int threads) {
  ContrastivePlan plan;
  const int64_t useful = p.n * p.m * std::max<int64_t>(p.d, 1) / kSmallPart;
  plan.threads = static_cast<int>(std::clamp<int64_t>(useful, 1, std::max(threads, 1)));
  const int64_t widest = round_up((p.n + plan.threads - 1) / plan.threads, kTileRows);
  plan.block_rows = std::clamp<int64_t>(widest, kTileRows, 1024);
  while (plan.block_rows > kTileRows && plan.threads * part_scratch(p, plan.block_rows) > kScratchLimit)
    plan.block_rows -= kTileRows;
  plan.scratch_bytes = part_scratch(p, plan.block_rows);
  while (plan.threads > 1 && plan.threads * plan.scratch_bytes > kScratchLimit) --plan.threads;
  const int64_t n = std::max<int64_t>(p.n, 1), m = std::max<int64_t>(p.m, 1);
  const int64_t most =
      std::clamp<int64_t>(kChunkLimit / (4 * m) / kRowAlign * kRowAlign, kRowAlign, round_up(n, kRowAlign));
  const int64_t chunks = (n + most - 1) / most;
  plan.chunk_rows = round_up((n + chunks - 1) / chunks, kRowAlign);  // chunks of equal size
  return plan;
}

// Boundary `part` of `parts` of [begin, end), aligned so that edges fall on whole blocks.
int64_t boundary(int64_t begin, int64_t end, int part, int parts, int64_t align) {
  const int64_t blocks = (end - begin + align - 1) / align;
  return std::min(end, begin + blocks * part / parts * align);
}

void add(PartSums& total, const PartSums& part) {
  total.loss += part.loss;
  total.grad_scale += part.grad_scale;
  total.grad_logit_bias += part.grad_logit_bias;
}

// Runs one pass of rows [row0, row1) x all columns in rotating parts; returns the parts' sums added in order.
PartSums run_pass(ContrastivePart kernel, const ContrastiveProblem& p, const ContrastivePlan& plan, int64_t row0,
                  int64_t row1, char* scratch) {
  const int parts = plan.threads;
  std::vector<PartSums> sums(static_cast<size_t>(parts) * parts);
  for (int step = 0; step < parts; ++step) {
    parallel_for(parts, parts, [&](int64_t part) {
      const int t = static_cast<int>(part), c = (t + step) % parts;
      const int64_t r0 = boundary(row0, row1, t, parts, kRowAlign), r1 = boundary(row0, row1, t + 1, parts, kRowAlign);
      const int64_t c0 = boundary(0, p.m, c, parts, kColAlign), c1 = boundary(0, p.m, c + 1, parts, kColAlign);
      if (r0 < r1 && c0 < c1)
        kernel(p, plan, r0, r1, c0, c1, scratch + t * plan.scratch_bytes, &sums[static_cast<size_t>(step) * parts + t]);
    });
  }
  PartSums total;
  for (const PartSums& s : sums) add(total, s);
  return total;
}

int64_t arrays_bytes(const ContrastiveProblem& p) {
  // 9 numbers of 4 bytes and one of 8 per row, 8 of 4 per column, each array rounded to a cache line.
  return p.n * (9 * 4 + 8) + p.m * (8 * 4) + 18 * 64 + 64;
}

int64_t problem_workspace(const ContrastiveCall& call, const ContrastivePlan& plan, bool one_pass) {
  const ContrastiveProblem& p = call.problem;
  const bool chunks = one_pass && p.objective == Objective::kSoftmax;
  const int64_t own = chunks ? plan.threads * (plan.chunk_rows * (p.d + 4) * 4 + 5 * 64) : 0;
  return arrays_bytes(p) + plan.threads * plan.scratch_bytes + own + (chunks ? plan.chunk_rows * p.m * 4 + 64 : 0);
}

// Equal labels become equal small integers; share[i] = 1 / (labels of the other side equal to it), 0 without any.
void match_labels(const int64_t* rows, int64_t n, const int64_t* cols, int64_t m, int32_t* row_ids, int32_t* col_ids,
                  float* row_share, float* col_share) {
  std::vector<int64_t> values(rows, rows + n);
  values.insert(values.end(), cols, cols + m);
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  auto id_of = [&](int64_t label) {
    return static_cast<int32_t>(std::lower_bound(values.begin(), values.end(), label) - values.begin());
  };
  std::vector<int64_t> in_rows(values.size()), in_cols(values.size());
  for (int64_t i = 0; i < n; ++i) ++in_rows[static_cast<size_t>(row_ids[i] = id_of(rows[i]))];
  for (int64_t j = 0; j < m; ++j) ++in_cols[static_cast<size_t>(col_ids[j] = id_of(cols[j]))];
  auto share = [](int64_t count) { return count > 0 ? 1.0f / static_cast<float>(count) : 0.0f; };
  for (int64_t i = 0; i < n; ++i) row_share[i] = share(in_cols[static_cast<size_t>(row_ids[i])]);
  for (int64_t j = 0; j < m; ++j) col_share[j] = share(in_rows[static_cast<size_t>(col_ids[j])]);
}

// Problem `index` of the call with its small arrays set up; `arena` moves behind them.
struct Prepared {
  ContrastiveProblem problem;
  float *row_weight, *col_weight;
  float row_mean = 0.0f, col_mean = 0.0f;  // weight of one counted row's (column's) loss in the call's loss
  bool ignores;
  int64_t ignore_index;

  Prepared(const ContrastiveCall& call, int64_t index, Arena& arena)
      : problem(call.problem), ignores(call.ignores), ignore_index(call.ignore_index) {
    ContrastiveProblem& p = problem;
    auto advance = [&](Matrix& m, int64_t stride) {
      const int64_t bytes = index * stride * (m.dtype == Dtype::kF32 ? 4 : 2);
      m.data = static_cast<const char*>(m.data) + bytes;
    };
    p.row_classes = call.block ? call.row_classes : p.m;
    p.col_classes = call.block ? call.col_classes : p.n;
    advance(p.q, call.q_batch_stride);
    advance(p.k, call.k_batch_stride);
    p.row_max = arena.take<float>(p.n);
    p.row_sum = arena.take<float>(p.n);
    p.row_target = arena.take<float>(p.n);
    p.row_total = arena.take<float>(p.n);
    p.col_max = arena.take<float>(p.m);
    p.col_sum = arena.take<float>(p.m);
    p.col_target = arena.take<float>(p.m);
    p.col_total = arena.take<float>(p.m);
    row_weight = arena.take<float>(p.n);
    col_weight = arena.take<float>(p.m);
    p.row_weight = row_weight;
    p.col_weight = col_weight;
    std::fill_n(p.row_max, p.n, -kInfinity);
    std::fill_n(p.col_max, p.m, -kInfinity);
    for (float* zeros : {p.row_sum, p.row_target, p.row_total}) std::fill_n(zeros, p.n, 0.0f);
    for (float* zeros : {p.col_sum, p.col_target, p.col_total}) std::fill_n(zeros, p.m, 0.0f);
    if (call.key_mask || call.key_bias) {
      float* bias = arena.take<float>(p.m);
      for (int64_t j = 0; j < p.m; ++j) {
        const bool usable = !call.key_mask || call.key_mask[index * p.m + j];
        bias[j] = !usable ? -kInfinity : call.key_bias ? call.key_bias[j] : 0.0f;
      }
      p.key_bias = bias;
    }
    if (call.row_labels) {
      auto* row_ids = arena.take<int32_t>(p.n);
      auto* col_ids = arena.take<int32_t>(p.m);
      auto* row_share = arena.take<float>(p.n);
      auto* col_share = arena.take<float>(p.m);
      match_labels(call.row_labels + index * p.n, p.n, call.col_labels + index * p.m, p.m, row_ids, col_ids, row_share,
                   col_share);
      p.row_labels = row_ids;
      p.col_labels = col_ids;
      p.row_share = call.block ? call.row_share : row_share;
      p.col_share = call.block ? call.col_share : col_share;
    } else if (call.positives) {
      p.positives = call.positives + index * p.n;
      if (!call.block) check_positives(call, index);
    } else {
      auto* identity = arena.take<int64_t>(p.n);
      for (int64_t i = 0; i < p.n; ++i) identity[i] = i;
      p.positives = identity;
      if (call.key_mask) check_positives(call, index);
    }
    set_means(call);
  }

  bool counts_row(int64_t i) const {
    if (problem.row_labels) return problem.row_share[i] > 0.0f;
    return !ignores || problem.positives[i] != ignore_index;
  }
  bool counts_col(int64_t j) const { return !problem.col_labels || problem.col_share[j] > 0.0f; }

 private:
  void check_positives(const ContrastiveCall& call, int64_t index) const {
    const ContrastiveProblem& p = problem;
    for (int64_t i = 0; i < p.n; ++i) {
      const int64_t at = p.positives[i];
      if (!counts_row(i)) continue;
      const char* name = ignores ? "targets" : "positives";
      if (at < 0 || at >= p.m)
        raise_value_error("%s must be in [0, %lld), got %lld in row %lld", name, static_cast<long long>(p.m),
                          static_cast<long long>(at), static_cast<long long>(i));
      if (call.key_mask && !call.key_mask[index * p.m + at])
        raise_value_error("%s must be usable keys, but key_mask leaves out key %lld of row %lld", name,
                          static_cast<long long>(at), static_cast<long long>(i));
    }
  }

  void set_means(const ContrastiveCall& call) {
    const ContrastiveProblem& p = problem;
    int64_t rows = 0, cols = 0;
    for (int64_t i = 0; i < p.n; ++i) rows += counts_row(i);
    for (int64_t j = 0; j < p.m; ++j) cols += counts_col(j);
    const double share = (p.columns ? 0.5 : 1.0) / static_cast<double>(call.batch);
    if (call.reduction == Reduction::kMean) {
      row_mean = static_cast<float>(share / static_cast<double>(rows));
      col_mean = static_cast<float>(share / static_cast<double>(cols));
    } else {
      row_mean = col_mean = 1.0f;
    }
  }
};

void logs(const float* sums, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(std::log(static_cast<double>(sums[i])));
}

double row_loss(const ContrastiveProblem& p, int64_t i) {
  const double hard = 1.0 - p.smoothing, share = p.row_share ? p.row_share[i] : 1.0;
  const double target =
      hard * share * p.row_target[i] + p.smoothing / static_cast<double>(p.row_classes) * p.row_total[i];
  return p.row_max[i] - target + std::log(static_cast<double>(p.row_sum[i]));
}

double col_loss(const ContrastiveProblem& p, int64_t j) {
  const double hard = 1.0 - p.smoothing, share = p.col_share ? p.col_share[j] : 1.0;
  const double target =
      hard * share * p.col_target[j] + p.smoothing / static_cast<double>(p.col_classes) * p.col_total[j];
  return p.col_max[j] - target + std::log(static_cast<double>(p.col_sum[j]));
}

// The problem's part of the loss; with Reduction::kNone each row's loss goes to `each`.
double reduce_losses(const Prepared& prepared, bool none, int64_t row0, int64_t row1, float* each) {
  const ContrastiveProblem& p = prepared.problem;
  double rows = 0.0, cols = 0.0;
  for (int64_t i = row0; i < row1; ++i) {
    const double loss = prepared.counts_row(i) ? row_loss(p, i) : 0.0;
    if (none) each[i] = static_cast<float>(loss);
    rows += loss;
  }
  if (p.columns) {
    for (int64_t j = 0; j < p.m; ++j) cols += prepared.counts_col(j) ? col_loss(p, j) : 0.0;
  }
  // A side without any counted row leaves the loss NaN (0 * inf), as the mean of nothing does.
  return rows * prepared.row_mean + (p.columns ? cols * prepared.col_mean : 0.0);
}

// The mean over no problems is NaN, as over no rows.
float result(const ContrastiveCall& call, double loss) {
  const bool nothing = call.batch == 0 && call.reduction == Reduction::kMean;
  return nothing ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(loss);
}

// The softmax objective in one pass, a chunk of rows at a time: here a part owns a group of columns and sees every row
// of the chunk, so that each key is packed once a chunk. What belongs to the rows (statistics, gradient of q) each
// part keeps for itself; `statistics` and `gradients` merge them in the order of the parts.
class ChunkPass {
 public:
  ChunkPass(ContrastiveProblem& problem, const ContrastivePlan& plan, bool gradients, Arena& arena)
      : whole_(problem), plan_(plan), parts_(static_cast<size_t>(plan.threads)) {
    row_log_ = arena.take<float>(plan.chunk_rows);
    float* dots = gradients ? arena.take<float>(plan.chunk_rows * problem.m) : nullptr;
    for (ContrastiveProblem& part : parts_) {
      part = problem;
      part.row_max = arena.take<float>(plan.chunk_rows);
      part.row_sum = arena.take<float>(plan.chunk_rows);
      part.row_target = arena.take<float>(plan.chunk_rows);
      part.row_total = arena.take<float>(plan.chunk_rows);
      part.grad_q = problem.grad_q ? arena.take<float>(plan.chunk_rows * problem.d) : nullptr;
      part.saved = dots;
      part.row_log = row_log_;
    }
    scratch_ = arena.rest();
  }

  void statistics(int64_t row, int64_t end) {
    row_ = row;
    rows_ = end - row;
    for (ContrastiveProblem& part : parts_) {
      const int64_t bytes = row * whole_.q.row_stride * (whole_.q.dtype == Dtype::kF32 ? 4 : 2);
      part.q.data = static_cast<const char*>(whole_.q.data) + bytes;
      part.positives = whole_.positives + row;
      part.row_shift = whole_.row_max + row;
      part.row_weight = whole_.row_weight + row;
    }
    run([&](ContrastiveProblem& part, int64_t col0, int64_t col1, char* scratch, PartSums*) {
      std::fill_n(part.row_max, rows_, -kInfinity);
      for (float* zeros : {part.row_sum, part.row_target, part.row_total}) std::fill_n(zeros, rows_, 0.0f);
      kernels().contrastive.statistics(part, plan_, 0, rows_, col0, col1, scratch, nullptr);
    });
    for (int64_t i = 0; i < rows_; ++i) merge_row(i);
    logs(whole_.row_sum + row, rows_, row_log_);
  }

  PartSums gradients() {
    const PartSums total =
        run([&](ContrastiveProblem& part, int64_t col0, int64_t col1, char* scratch, PartSums* sums) {
          if (part.grad_q) std::fill_n(part.grad_q, rows_ * whole_.d, 0.0f);
          kernels().contrastive.gradients(part, plan_, 0, rows_, col0, col1, scratch, sums);
        });
    if (whole_.grad_q) {
      float* out = whole_.grad_q + row_ * whole_.d;
      for (const ContrastiveProblem& part : parts_) {
        for (int64_t i = 0; i < rows_ * whole_.d; ++i) out[i] += part.grad_q[i];
      }
    }
    return total;
  }

 private:
  template <class F>
  PartSums run(F&& body) {
    const int parts = plan_.threads;
    std::vector<PartSums> sums(parts_.size());
    parallel_for(parts, parts, [&](int64_t part) {
      const int t = static_cast<int>(part);
      const int64_t col0 = boundary(0, whole_.m, t, parts, kColAlign),
                    col1 = boundary(0, whole_.m, t + 1, parts, kColAlign);
      body(parts_[static_cast<size_t>(t)], col0, col1, scratch_ + t * plan_.scratch_bytes,
           &sums[static_cast<size_t>(t)]);
    });
    PartSums total;
    for (const PartSums& s : sums) add(total, s);
    return total;
  }

  void merge_row(int64_t i) {
    float max = -kInfinity;
    for (const ContrastiveProblem& part : parts_) max = std::max(max, part.row_max[i]);
    double sum = 0.0, target = 0.0, total = 0.0;
    for (const ContrastiveProblem& part : parts_) {
      if (part.row_sum[i] != 0.0f)
        sum += static_cast<double>(part.row_sum[i]) * std::exp(static_cast<double>(part.row_max[i] - max));
      target += part.row_target[i];
      total += part.row_total[i];
    }
    whole_.row_max[row_ + i] = max;
    whole_.row_sum[row_ + i] = static_cast<float>(sum);
    whole_.row_target[row_ + i] = static_cast<float>(target);
    whole_.row_total[row_ + i] = static_cast<float>(total);
  }

  ContrastiveProblem& whole_;
  const ContrastivePlan& plan_;
  std::vector<ContrastiveProblem> parts_;
  float* row_log_;
  char* scratch_;
  int64_t row_ = 0, rows_ = 0;
};

template <class F>
void for_each_problem(const ContrastiveCall& call, bool one_pass, int threads, F&& body) {
  // Many small problems run side by side, each on one thread; few run one after the other on all of them.
  const bool side_by_side = call.batch > 1 && threads > 1;
  const int inner = side_by_side ? 1 : threads;
  const ContrastivePlan plan = make_plan(call.problem, inner);
  const int64_t bytes = problem_workspace(call, plan, one_pass);
  const int lanes = side_by_side ? static_cast<int>(std::min<int64_t>(threads, call.batch)) : 1;
  parallel_for(lanes, lanes, [&](int64_t lane) {
    for (int64_t b = lane; b < call.batch; b += lanes) body(b, plan, call.workspace + lane * bytes);
  });
}

}  // namespace

int64_t contrastive_workspace(const ContrastiveCall& call, bool one_pass, int threads) {
  const bool side_by_side = call.batch > 1 && threads > 1;
  const ContrastivePlan plan = make_plan(call.problem, side_by_side ? 1 : threads);
  return problem_workspace(call, plan, one_pass) * (side_by_side ? std::min<int64_t>(threads, call.batch) : 1);
}

void contrastive_forward(const ContrastiveCall& call, int threads) {
  std::vector<double> losses(static_cast<size_t>(call.batch));
  for_each_problem(call, false, threads, [&](int64_t b, const ContrastivePlan& plan, char* workspace) {
    Arena arena(workspace);
    Prepared prepared(call, b, arena);
    ContrastiveProblem& p = prepared.problem;
    if (call.saved) p.saved = call.saved + b * p.n * p.m;
    run_pass(kernels().contrastive.statistics, p, plan, 0, p.n, arena.rest());
    std::copy_n(p.row_max, p.n, call.row_lse + 2 * b * p.n);
    logs(p.row_sum, p.n, call.row_lse + (2 * b + 1) * p.n);
    if (p.columns) {
      std::copy_n(p.col_max, p.m, call.col_lse + 2 * b * p.m);
      logs(p.col_sum, p.m, call.col_lse + (2 * b + 1) * p.m);
    }
    const bool none = call.reduction == Reduction::kNone;
    losses[static_cast<size_t>(b)] = reduce_losses(prepared, none, 0, p.n, none ? call.loss + b * p.n : nullptr);
  });
  if (call.reduction == Reduction::kNone) return;
  double total = 0.0;
  for (double loss : losses) total += loss;
  *call.loss = result(call, total);
}

void contrastive_block_statistics(const ContrastiveCall& call, int threads) {
  for_each_problem(call, false, threads, [&](int64_t b, const ContrastivePlan& plan, char* workspace) {
    Arena arena(workspace);
    Prepared prepared(call, b, arena);
    const ContrastiveProblem& p = prepared.problem;
    run_pass(kernels().contrastive.statistics, p, plan, 0, p.n, arena.rest());
    float* row = call.row_stats;
    for (const float* part : {p.row_max, p.row_sum, p.row_target, p.row_total}) row = std::copy_n(part, p.n, row);
    float* col = call.col_stats;
    for (const float* part : {p.col_max, p.col_sum, p.col_target, p.col_total}) col = std::copy_n(part, p.m, col);
  });
}

namespace {

// Gradients of bf16 features: summed in float32, rounded once.
void round_gradients(const ContrastiveCall& call, int threads) {
  const ContrastiveProblem& p = call.problem;
  auto round = [&](const float* from, int64_t count, uint16_t* to) {
    if (!from || !to) return;
    constexpr int64_t kPiece = 1 << 16;
    parallel_for(threads, (count + kPiece - 1) / kPiece, [&](int64_t part) {
      const int64_t end = std::min(count, (part + 1) * kPiece);
      for (int64_t i = part * kPiece; i < end; ++i) to[i] = round_to_bf16(from[i]);
    });
  };
  round(call.grad_q, call.batch * p.n * p.d, call.grad_q_bf16);
  round(call.grad_k, call.batch * p.m * p.d, call.grad_k_bf16);
}

}  // namespace

void contrastive_backward(const ContrastiveCall& call, int threads) {
  std::vector<PartSums> sums(static_cast<size_t>(call.batch));
  if (call.grad_key_bias) std::fill_n(call.grad_key_bias, call.problem.m, 0.0f);
  for_each_problem(call, false, threads, [&](int64_t b, const ContrastivePlan& plan, char* workspace) {
    Arena arena(workspace);
    Prepared prepared(call, b, arena);
    ContrastiveProblem& p = prepared.problem;
    if (call.saved) p.saved = call.saved + b * p.n * p.m;
    p.row_shift = call.row_lse + 2 * b * p.n;
    p.row_log = p.row_shift + p.n;
    if (p.columns) {
      p.col_shift = call.col_lse + 2 * b * p.m;
      p.col_log = p.col_shift + p.m;
    }
    if (call.block) {
      p.row_weight = call.row_weight;
      p.col_weight = call.col_weight;
    } else {
      const bool none = call.reduction == Reduction::kNone;
      for (int64_t i = 0; i < p.n; ++i) {
        const float upstream = none ? call.grad_loss[b * p.n + i] : *call.grad_loss;
        prepared.row_weight[i] = prepared.counts_row(i) ? upstream * prepared.row_mean : 0.0f;
      }
      for (int64_t j = 0; j < p.m; ++j)
        prepared.col_weight[j] = p.columns && prepared.counts_col(j) ? *call.grad_loss * prepared.col_mean : 0.0f;
    }
    p.grad_q = call.grad_q ? call.grad_q + b * p.n * p.d : nullptr;
    p.grad_k = call.grad_k ? call.grad_k + b * p.m * p.d : nullptr;
    p.grad_key_bias = call.grad_key_bias;
    if (p.grad_q && !call.block) std::fill_n(p.grad_q, p.n * p.d, 0.0f);
    if (p.grad_k) std::fill_n(p.grad_k, p.m * p.d, 0.0f);
    sums[static_cast<size_t>(b)] = run_pass(kernels().contrastive.gradients, p, plan, 0, p.n, arena.rest());
  });
  double grad_scale = 0.0, grad_logit_bias = 0.0;
  for (const PartSums& s : sums) {
    grad_scale += s.grad_scale;
    grad_logit_bias += s.grad_logit_bias;
  }
  if (call.grad_scale) *call.grad_scale = static_cast<float>(grad_scale);
  if (call.grad_logit_bias) *call.grad_logit_bias = static_cast<float>(grad_logit_bias);
  round_gradients(call, threads);
}

void contrastive_one_pass(const ContrastiveCall& call, int threads) {
  std::vector<double> losses(static_cast<size_t>(call.batch));
  std::vector<PartSums> sums(static_cast<size_t>(call.batch));
  const bool gradients = call.grad_q || call.grad_k || call.grad_scale || call.grad_key_bias;
  if (call.grad_key_bias) std::fill_n(call.grad_key_bias, call.problem.m, 0.0f);
  for_each_problem(call, true, threads, [&](int64_t b, const ContrastivePlan& plan, char* workspace) {
    Arena arena(workspace);
    Prepared prepared(call, b, arena);
    ContrastiveProblem& p = prepared.problem;
    p.grad_q = call.grad_q ? call.grad_q + b * p.n * p.d : nullptr;
    p.grad_k = call.grad_k ? call.grad_k + b * p.m * p.d : nullptr;
    p.grad_key_bias = call.grad_key_bias;
    if (p.grad_q && !call.block) std::fill_n(p.grad_q, p.n * p.d, 0.0f);
    if (p.grad_k) std::fill_n(p.grad_k, p.m * p.d, 0.0f);
    if (call.block) {
      p.row_weight = call.row_weight;
      prepared.row_mean = p.n > 0 ? call.row_weight[0] : 0.0f;
    } else {
      for (int64_t i = 0; i < p.n; ++i) prepared.row_weight[i] = prepared.counts_row(i) ? prepared.row_mean : 0.0f;
    }
    std::fill_n(prepared.col_weight, p.m, 0.0f);
    PartSums& total = sums[static_cast<size_t>(b)];
    double& loss = losses[static_cast<size_t>(b)];
    if (p.objective == Objective::kSigmoid) {
      total = run_pass(kernels().contrastive.gradients, p, plan, 0, p.n, arena.rest());
      loss = total.loss * prepared.row_mean;
      return;
    }
    loss = reduce_losses(prepared, false, 0, 0, nullptr);  // 0, or NaN where no row counts, also without any row
    ChunkPass chunks(p, plan, gradients, arena);
    for (int64_t row = 0; row < p.n; row += plan.chunk_rows) {
      const int64_t end = std::min(p.n, row + plan.chunk_rows);
      chunks.statistics(row, end);
      loss += reduce_losses(prepared, false, row, end, nullptr);
      if (gradients) add(total, chunks.gradients());
    }
  });
  double loss = 0.0, grad_scale = 0.0, grad_logit_bias = 0.0;
  for (size_t b = 0; b < losses.size(); ++b) {
    loss += losses[b];
    grad_scale += sums[b].grad_scale;
    grad_logit_bias += sums[b].grad_logit_bias;
  }
  *call.loss = result(call, loss);
  if (call.grad_scale) *call.grad_scale = static_cast<float>(grad_scale);
  if (call.grad_logit_bias) *call.grad_logit_bias = static_cast<float>(grad_logit_bias);
  round_gradients(call, threads);
}

}  // namespace vk::cpu

// SPDX-License-Identifier: Apache-2.0
// Top-k similarity on the CPU, host side: how a search is cut into parts, what becomes of the candidates.
//
// A part of the rows keeps thresholds and candidates of its own for every query of a chunk. A full buffer is pruned by
// the bounds; where that does not help, its rows are scored exactly and the k best stay. At the end the candidates of
// all parts meet, and rows that even the k-th best exact score cannot exclude are scored. Thresholds only ever exclude
// rows that k others beat for certain, so the answer depends on none of this.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "core/parallel.h"
#include "cpu/host.h"
#include "cpu/table.h"
#include "cpu/topk_search.h"

namespace vk::cpu {
namespace {

constexpr int64_t kWorkspaceLimit = int64_t{48} << 20;  // of queries and candidates at once
constexpr int64_t kSmallPart = 96;                      // rows below which another thread costs more than it brings
constexpr int64_t kPanelBytes = int64_t{480} << 10;     // of a packed block: it stays in the second cache
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// How a call is cut. `wide`: the second scan, of vectors in place of codes.
struct Plan {
  bool stream;
  int row_parts, query_parts;
  int64_t chunk;  // queries at once
  int64_t block;  // rows of a block
  int64_t capacity;
  int64_t pitch;
  int64_t scratch;  // bytes of one part
};

Dtype scanned(const TopkCall& call, bool wide) {
  const TopkSegment& first = call.segments.front();
  return wide ? first.vectors.dtype : first.codes.dtype;
}

Plan make_plan(const TopkCall& call, Dtype dtype, int64_t queries, int threads) {
  Plan plan;
  const int64_t rows = call.rows(), d = std::max<int64_t>(call.d, 1);
  plan.stream = queries <= kStreamQueries;
  for (const TopkSegment& segment : call.segments) {
    const bool in_line = segment.codes.col_stride == 1 && (!segment.vectors.data || segment.vectors.col_stride == 1);
    plan.stream = plan.stream && in_line;
  }
  plan.row_parts = static_cast<int>(std::clamp<int64_t>(rows / kSmallPart, 1, std::max(threads, 1)));
  const int64_t panels = (queries + 7) / 8;
  plan.query_parts = static_cast<int>(std::clamp<int64_t>(threads / plan.row_parts, 1, std::max<int64_t>(panels, 1)));
  const int64_t row_bytes = round_up(d, 16) * 4;
  plan.block = std::clamp<int64_t>(kPanelBytes / row_bytes / 48 * 48, 48, kTopkBlock);
  plan.pitch = round_up(d, 64);
  // Room for the rows that the bounds of coarser codes leave open, besides the k best.
  const int64_t room = dtype == Dtype::kI8     ? 8 * call.k + 448
                       : dtype == Dtype::kBF16 ? 3 * call.k + 64
                                               : 2 * call.k + 64;
  plan.capacity = std::min(room, rows + 1);
  const int64_t per_query =
      plan.row_parts * (plan.capacity * static_cast<int64_t>(sizeof(TopkEntry)) + 16) + d * 12 + plan.pitch * 6 + 128;
  plan.chunk =
      std::clamp<int64_t>(kWorkspaceLimit / per_query / 16 * 16, 16, round_up(std::max<int64_t>(queries, 1), 16));
  plan.scratch = round_up(std::max(plan.block * row_bytes, 12 * round_up(d, 16)) + round_up(d, 16) * 16 + 4096, 4096);
  return plan;
}

// Arrays of a chunk of queries; returns where the parts' scratch begins.
char* lay_out(TopkScan& s, const Plan& plan, bool classify, char* workspace) {
  Arena arena(workspace);
  const int64_t n = plan.chunk, d = std::max<int64_t>(s.d, 1);
  TopkQueries& q = s.queries;
  q.pitch = plan.pitch;
  q.left = arena.take<uint32_t>(plan.stream ? 0 : n * round_up(d, 16));
  q.wide = arena.take<float>(n * plan.pitch);
  q.high = arena.take<int8_t>(n * plan.pitch);
  q.low = arena.take<int8_t>(n * plan.pitch);
  q.high_sum = arena.take<int32_t>(n);
  q.low_sum = arena.take<int32_t>(n);
  q.exact = arena.take<double>(n * d);
  q.exact_norm = arena.take<double>(n);
  q.norm = arena.take<double>(n);
  q.centre = arena.take<double>(n);
  q.factor = arena.take<float>(n);
  q.shift = arena.take<float>(n);
  q.loose = arena.take<float>(n);
  q.slack = arena.take<float>(n);
  s.padded = n;
  s.capacity = plan.capacity;
  const int64_t slots = n * plan.row_parts;
  s.threshold = arena.take<float>(slots);
  s.found = arena.take<int32_t>(slots);
  s.entries = arena.take<TopkEntry>(slots * plan.capacity);
  s.lse_max = classify ? arena.take<float>(slots) : nullptr;
  s.lse_sum = classify ? arena.take<float>(slots) : nullptr;
  return arena.rest();
}

int64_t plan_bytes(const TopkCall& call, const Plan& plan, int threads) {
  TopkScan scan;
  scan.d = call.d;
  char* const nowhere = nullptr;
  const int64_t parts = std::max(plan.row_parts * plan.query_parts, std::max(threads, 1));
  return (lay_out(scan, plan, call.classify, nowhere) - nowhere) + parts * plan.scratch;
}

// A score in the scan's units, for a threshold: never more than what the row's own lower bound may claim.
float as_threshold(const TopkScan& s, int64_t i, double score) {
  const double norm = s.queries.norm[i], unit = norm > 0.0 && std::isfinite(norm) ? norm : 1.0;
  const double eta = s.eta, centre = s.queries.centre[i], slack = s.queries.slack[i];
  double v = 0.0, error = slack;
  switch (s.metric) {
    case Metric::kDot:
      v = score / unit - centre;
      error += eta * (std::abs(score) / unit + std::abs(centre));
      break;
    case Metric::kCosine:
      v = norm == 0.0 ? 0.0 : score * std::max(norm, 1e-12) / norm;
      error += eta * std::abs(v);
      break;
    case Metric::kL2:
      v = score / unit + norm * norm / unit - 2.0 * centre;
      error += eta * (std::abs(score) / unit + norm + 2.0 * std::abs(centre));
      break;
  }
  v -= error;
  return std::isfinite(v) ? static_cast<float>(v) : -kInfinity;
}

// Better first: larger score, NaN last, then the smaller label.
struct Ranked {
  float score;
  int64_t label;
  bool operator<(const Ranked& other) const {
    const bool nan = score != score, other_nan = other.score != other.score;
    if (nan || other_nan) return nan == other_nan ? label < other.label : other_nan;
    return score != other.score ? score > other.score : label < other.label;
  }
};

int64_t label_of(const TopkSegment* segments, const TopkEntry& entry) {
  const TopkSegment& segment = segments[entry.segment];
  return segment.labels ? segment.labels[entry.row] : segment.first + entry.row;
}

// One scan of a chunk of queries, and what becomes of its candidates.
class Search {
 public:
  Search(const TopkCall& call, const Plan& plan, bool wide, int threads, char* workspace)
      : call_(call), plan_(plan), threads_(threads), segments_(call.segments) {
    scan.metric = call.metric;
    scan.d = call.d;
    scan.k = call.k;
    scan.eta = static_cast<float>(2.0 * static_cast<double>(call.d + 32) * 0x1p-24);
    scan.codes = scanned(call, wide);
    scan.stream = plan.stream;
    scan.rotated = call.centre != nullptr && !wide;
    scan.centre = call.centre;
    scan.block = plan.block;
    scan.q = call.q;
    scan.mask = call.mask;
    scan.mask_stride = call.mask_stride;
    if (wide) {
      for (TopkSegment& segment : segments_) {
        segment.codes = segment.vectors;
        segment.scale = segment.residual = nullptr;
      }
    }
    if (scan.rotated) {
      double square = 0.0;
      for (int64_t j = 0; j < call.d; ++j) square += static_cast<double>(call.centre[j]) * call.centre[j];
      scan.centre_norm = std::sqrt(square) * 1.00001;
    }
    // The vectors can tell more than the codes: a query that too many rows remain for starts again on them.
    coarse_ = scan.codes == Dtype::kI8;
    may_widen_ = !wide && segments_.front().vectors.data != nullptr;
    scan.segments = segments_.data();
    scan.segment_count = static_cast<int64_t>(segments_.size());
    scratch_ = lay_out(scan, plan, call.classify && !wide, workspace);
    scan.full = &Search::on_full;
    scan.host = this;
    rows_ = call.rows();
    scored_.resize(static_cast<size_t>(plan.row_parts) * plan.chunk);
    widened_.resize(static_cast<size_t>(plan.chunk));
    part_widened_.resize(scored_.size());
  }

  char* scratch(int64_t part) const { return scratch_ + part * plan_.scratch; }

  void prepare(const int64_t* which, int64_t first, int64_t count) {
    scan.which = which;
    scan.first_query = first;
    scan.queries.count = count;
    const int64_t slots = scan.padded * plan_.row_parts;
    std::fill_n(scan.threshold, slots, -kInfinity);
    scan.threshold_stride = scan.lse_sum ? scan.padded : 0;
    std::fill_n(scan.found, slots, 0);
    std::fill(scored_.begin(), scored_.end(), 0);
    std::fill(widened_.begin(), widened_.end(), 0);
    std::fill(part_widened_.begin(), part_widened_.end(), 0);
    if (scan.lse_sum) {
      scan.logit_scale = static_cast<float>(call_.logit_scale);
      std::fill_n(scan.lse_max, slots, -kInfinity);
      std::fill_n(scan.lse_sum, slots, 0.0f);
    }
    const int panel = kernels().topk.panel_rows;
    const int64_t panels = (count + panel - 1) / panel;
    const int64_t parts = std::clamp<int64_t>(panels, 1, threads_);
    parallel_for(threads_, parts, [&](int64_t part) {
      const int64_t begin = panels * part / parts * panel, end = std::min(count, panels * (part + 1) / parts * panel);
      kernels().topk.prepare(scan, begin, end, scratch(part));
    });
  }

  void run() {
    const int64_t count = scan.queries.count, panels = (count + 7) / 8;
    const int row_parts = plan_.row_parts, query_parts = plan_.query_parts;
    const int64_t pieces = (rows_ + 15) / 16;
    parallel_for(threads_, row_parts * query_parts, [&](int64_t index) {
      const int64_t part = index % row_parts, share = index / row_parts;
      const int64_t row0 = pieces * part / row_parts * 16, row1 = std::min(rows_, pieces * (part + 1) / row_parts * 16);
      const int64_t q0 = panels * share / query_parts * 8, q1 = std::min(count, panels * (share + 1) / query_parts * 8);
      kernels().topk.scan(scan, part, row0, row1, q0, q1, scratch(index));
    });
  }

  // Candidates of all parts to the k best, for every query of the chunk.
  void finish() {
    const int64_t count = scan.queries.count;
    const int64_t shares = std::clamp<int64_t>(count, 1, threads_);
    rescored_.assign(static_cast<size_t>(shares), 0);
    parallel_for(threads_, shares, [&](int64_t share) {
      std::vector<TopkEntry> entries;
      std::vector<Ranked> ranked;
      for (int64_t i = share; i < count; i += shares) {
        if (!widened_[static_cast<size_t>(i)]) finish_query(i, share, entries, ranked);
      }
    });
    for (const int64_t scored : rescored_) *call_.rescored += scored;
    for (const int64_t scored : scored_) *call_.rescored += scored;
  }

  // Sets the threshold of a range search, after `prepare`.
  void fix_threshold(float limit) {
    scan.fixed = true;
    limit_ = limit;
    hits_.resize(static_cast<size_t>(scan.padded) * plan_.row_parts);
    for (int64_t i = 0; i < scan.queries.count; ++i) {
      for (int part = 0; part < plan_.row_parts; ++part)
        scan.threshold[part * scan.threshold_stride + i] = as_threshold(scan, i, static_cast<double>(limit));
    }
  }

  // Range search: what was found joins the result, query by query.
  void finish_range(RangeResult& result) {
    const int64_t count = scan.queries.count, shares = std::clamp<int64_t>(count, 1, threads_);
    parallel_for(threads_, shares, [&](int64_t share) {
      for (int64_t i = share; i < count; i += shares) {
        for (int part = 0; part < plan_.row_parts; ++part) keep_hits(part, i);
        std::vector<Ranked>& own = hits_[static_cast<size_t>(i)];
        for (int part = 1; part < plan_.row_parts; ++part) {
          std::vector<Ranked>& other = hits_[static_cast<size_t>(part * scan.padded + i)];
          own.insert(own.end(), other.begin(), other.end());
          other.clear();
        }
        std::sort(own.begin(), own.end());
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      std::vector<Ranked>& own = hits_[static_cast<size_t>(i)];
      for (const Ranked& hit : own) {
        result.scores.push_back(hit.score);
        result.labels.push_back(hit.label);
      }
      own.clear();
      result.lims.push_back(static_cast<int64_t>(result.scores.size()));
    }
  }

  // Queries of the chunk that gave up on the codes.
  void collect_widened(std::vector<int64_t>& out) {
    for (int64_t i = 0; i < scan.queries.count; ++i) {
      for (int part = 0; part < plan_.row_parts; ++part)
        widened_[static_cast<size_t>(i)] |= part_widened_[static_cast<size_t>(part * scan.padded + i)];
      if (widened_[static_cast<size_t>(i)]) out.push_back(scan.query_row(i));
    }
  }

  TopkScan scan;

 private:
  static void on_full(const TopkScan& s, int64_t part, int64_t query) {
    auto* self = static_cast<Search*>(s.host);
    if (s.fixed) {
      self->keep_hits(part, query);
    } else {
      self->prune(part, query);
    }
  }

  // Range search: which candidates reach the threshold.
  void keep_hits(int64_t part, int64_t i) {
    const int64_t slot = part * scan.padded + i;
    TopkEntry* entries = scan.entries + slot * scan.capacity;
    std::vector<char> room(static_cast<size_t>(exact_scratch()));
    kernels().topk.exact(scan, i, entries, scan.found[slot], room.data());
    for (int32_t e = 0; e < scan.found[slot]; ++e) {
      if (entries[e].score >= limit_)
        hits_[static_cast<size_t>(slot)].push_back({entries[e].score, label_of(scan.segments, entries[e])});
    }
    scan.found[slot] = 0;
  }

  void prune(int64_t part, int64_t i) {
    const int64_t slot = part * scan.padded + i, k = scan.k;
    TopkEntry* entries = scan.entries + slot * scan.capacity;
    int64_t count = scan.found[slot];
    if (count > k) {
      // The bounds of codes are wide: the exact scores of the rows that look best exclude several times as many others
      // as their lower bounds do.
      int64_t& scored = scored_[static_cast<size_t>(slot)];
      scan.raise_threshold(part, i, coarse_ ? score_best(i, entries, count, scored) : kth_lower(entries, count));
      count = keep_possible(entries, count, scan.threshold_of(part, i));
    }
    if (count > scan.capacity - scan.capacity / 4) count = resolve(part, i, entries, count);
    scan.found[slot] = static_cast<int32_t>(count);
  }

  // The k-th largest of what `key` gives for the entries, k below count. On plain numbers: entries are long to move.
  template <class Key>
  float kth_largest(const TopkEntry* entries, int64_t count, Key key) const {
    static thread_local std::vector<float> keys;
    keys.resize(static_cast<size_t>(count));
    for (int64_t e = 0; e < count; ++e) keys[static_cast<size_t>(e)] = key(entries[e]);
    std::nth_element(keys.begin(), keys.begin() + (scan.k - 1), keys.end(), std::greater<float>());
    return keys[static_cast<size_t>(scan.k - 1)];
  }

  float kth_lower(const TopkEntry* entries, int64_t count) const {
    return kth_largest(entries, count, [](const TopkEntry& e) { return e.lower; });
  }

  // Scores the k entries that look best, which come first then; the threshold that follows from them.
  float score_best(int64_t i, TopkEntry* entries, int64_t count, int64_t& scored) {
    // Rows that the bounds do not describe look like nothing: they come last.
    auto looks = [](const TopkEntry& e) { return e.upper == kInfinity ? -kInfinity : e.upper + e.lower; };
    const float kth = kth_largest(entries, count, looks);
    int64_t front = 0;
    for (int64_t e = 0; e < count && front < scan.k; ++e) {
      if (looks(entries[e]) > kth) std::swap(entries[e], entries[front++]);
    }
    for (int64_t e = front; e < count && front < scan.k; ++e) {
      if (looks(entries[e]) == kth) std::swap(entries[e], entries[front++]);
    }
    score(i, entries, scan.k, scored);
    float worst = kInfinity;
    for (int64_t e = 0; e < scan.k; ++e) worst = std::min(worst, as_threshold(scan, i, entries[e].score));
    return worst;
  }

  void score(int64_t i, TopkEntry* entries, int64_t count, int64_t& scored) const {
    for (int64_t e = 0; e < count; ++e) scored += !entries[e].scored;
    static thread_local std::vector<char> room;
    room.resize(static_cast<size_t>(exact_scratch()));
    kernels().topk.exact(scan, i, entries, count, room.data());
  }

  static int64_t keep_possible(TopkEntry* entries, int64_t count, float threshold) {
    int64_t kept = 0;
    for (int64_t e = 0; e < count; ++e) {
      if (!(entries[e].upper < threshold)) entries[kept++] = entries[e];
    }
    return kept;
  }

  // The bounds cannot tell these rows apart: score them, and keep the k best.
  int64_t resolve(int64_t part, int64_t i, TopkEntry* entries, int64_t count) {
    const int64_t slot = part * scan.padded + i, k = scan.k;
    int64_t& scored = scored_[static_cast<size_t>(slot)];
    if (may_widen_ && scored > std::max<int64_t>(4096, rows_ / 64)) {
      part_widened_[static_cast<size_t>(slot)] = 1;
      scan.raise_threshold(part, i, kInfinity);
      return 0;
    }
    score(i, entries, count, scored);
    if (count <= k) return count;
    auto better = [this](const TopkEntry& a, const TopkEntry& b) {
      return Ranked{a.score, label_of(scan.segments, a)} < Ranked{b.score, label_of(scan.segments, b)};
    };
    std::nth_element(entries, entries + (k - 1), entries + count, better);
    const float kth = entries[k - 1].score;
    if (kth == kth) scan.raise_threshold(part, i, as_threshold(scan, i, kth));
    return k;
  }

  int64_t exact_scratch() const { return round_up(scan.d, 16) * 12 + 256; }

  void finish_query(int64_t i, int64_t share, std::vector<TopkEntry>& entries, std::vector<Ranked>& ranked) {
    const int64_t k = scan.k;
    entries.clear();
    for (int part = 0; part < plan_.row_parts; ++part) {
      const int64_t slot = part * scan.padded + i;
      const TopkEntry* from = scan.entries + slot * scan.capacity;
      const float threshold = scan.threshold_of(part, i);
      for (int32_t e = 0; e < scan.found[slot]; ++e) {
        if (!(from[e].upper < threshold)) entries.push_back(from[e]);
      }
    }
    int64_t& scored = rescored_[static_cast<size_t>(share)];
    auto count = static_cast<int64_t>(entries.size());
    if (count > k) {
      count = keep_possible(entries.data(), count, kth_lower(entries.data(), count));
      // With the scores of those that look best known, few others remain.
      if (count > k) count = keep_possible(entries.data(), count, score_best(i, entries.data(), count, scored));
    }
    score(i, entries.data(), count, scored);
    ranked.clear();
    for (int64_t e = 0; e < count; ++e) {
      const TopkEntry& entry = entries[static_cast<size_t>(e)];
      ranked.push_back({entry.score, label_of(scan.segments, entry)});
    }
    const int64_t best = std::min(k, count);
    std::partial_sort(ranked.begin(), ranked.begin() + best, ranked.end());
    const int64_t row = scan.query_row(i);
    float* scores = call_.scores + row * k;
    int64_t* labels = call_.labels + row * k;
    for (int64_t e = 0; e < k; ++e) {
      scores[e] = e < best ? ranked[static_cast<size_t>(e)].score : -kInfinity;
      labels[e] = e < best ? ranked[static_cast<size_t>(e)].label : -1;
    }
    if (call_.classify) to_probabilities(i, entries.data(), count, scores, call_.lse + row);
  }

  void to_probabilities(int64_t i, const TopkEntry* entries, int64_t count, float* scores, float* lse) {
    const double scale = call_.logit_scale;
    double largest = -kInfinity, sum = 0.0;
    for (int part = 0; part < plan_.row_parts; ++part)
      largest = std::max(largest, static_cast<double>(scan.lse_max[part * scan.padded + i]));
    for (int64_t e = 0; e < count; ++e) {
      if (entries[e].upper == kInfinity) largest = std::max(largest, scale * entries[e].score);
    }
    for (int part = 0; part < plan_.row_parts; ++part) {
      const int64_t slot = part * scan.padded + i;
      const double shift = static_cast<double>(scan.lse_max[slot]) - largest;
      if (scan.lse_sum[slot] != 0.0f) sum += static_cast<double>(scan.lse_sum[slot]) * std::exp(shift);
    }
    // What was scored exactly takes the place of what was summed: the largest terms, hence most of the sum's error.
    // Rows that the scan could not describe have not joined it yet.
    for (int64_t e = 0; e < count; ++e) {
      sum += std::exp(scale * entries[e].score - largest);
      if (entries[e].upper != kInfinity) sum -= std::exp(entries[e].logit - largest);
    }
    const double total = largest + std::log(sum);
    *lse = static_cast<float>(total);
    for (int64_t e = 0; e < scan.k; ++e) scores[e] = static_cast<float>(std::exp(scale * scores[e] - total));
  }

  const TopkCall& call_;
  const Plan& plan_;
  int threads_;
  std::vector<TopkSegment> segments_;
  bool coarse_ = false, may_widen_ = false;
  int64_t rows_ = 0;
  char* scratch_ = nullptr;
  std::vector<int64_t> scored_;  // [row part, query] rows scored while scanning
  std::vector<char> part_widened_, widened_;
  std::vector<int64_t> rescored_;
  float limit_ = 0.0f;
  std::vector<std::vector<Ranked>> hits_;  // [row part, query]
};

}  // namespace

void TopkCall::keep_allowed(const uint8_t* allowed) {
  std::vector<TopkSegment> remaining;
  for (TopkSegment segment : segments) {
    const uint8_t* at = allowed + segment.first;
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < segment.count;) {
      uint64_t eight = 0;
      if (i + 8 <= segment.count) std::memcpy(&eight, at + i, 8);
      if (i + 8 <= segment.count && eight == 0) {
        i += 8;
        continue;
      }
      for (const int64_t end = std::min(segment.count, i + 8); i < end; ++i) {
        if (at[i]) rows.push_back(segment.rows ? segment.rows[i] : i);
      }
    }
    if (rows.empty()) continue;
    // The vector's buffer stays where it is when the vector moves.
    kept.push_back(std::move(rows));
    segment.rows = kept.back().data();
    segment.count = static_cast<int64_t>(kept.back().size());
    remaining.push_back(segment);
  }
  segments = std::move(remaining);
}

int64_t topk_workspace(const TopkCall& call, int threads) {
  if (call.segments.empty() || call.n == 0) return 0;
  int64_t bytes = plan_bytes(call, make_plan(call, scanned(call, false), call.n, threads), threads);
  if (call.segments.front().vectors.data) {
    // How many queries will need the second scan is not known: the plans of few and of many are both served.
    for (const int64_t queries : {int64_t{1}, kStreamQueries, kStreamQueries + 1, call.n})
      bytes = std::max(
          bytes, plan_bytes(call, make_plan(call, scanned(call, true), std::min(queries, call.n), threads), threads));
  }
  return bytes;
}

void topk_search(const TopkCall& call, int threads) {
  *call.rescored = call.rescored[1] = 0;
  if (call.n == 0) return;
  if (call.segments.empty()) {
    std::fill_n(call.scores, call.n * call.k, -kInfinity);
    std::fill_n(call.labels, call.n * call.k, int64_t{-1});
    return;
  }
  std::vector<int64_t> widened;
  const Plan plan = make_plan(call, scanned(call, false), call.n, threads);
  Search search(call, plan, false, threads, call.workspace);
  for (int64_t first = 0; first < call.n; first += plan.chunk) {
    search.prepare(nullptr, first, std::min(plan.chunk, call.n - first));
    search.run();
    search.collect_widened(widened);
    search.finish();
  }
  if (widened.empty()) return;
  const auto count = static_cast<int64_t>(widened.size());
  call.rescored[1] = count;
  const Plan wide_plan = make_plan(call, scanned(call, true), count, threads);
  Search again(call, wide_plan, true, threads, call.workspace);
  for (int64_t first = 0; first < count; first += wide_plan.chunk) {
    again.prepare(widened.data() + first, 0, std::min(wide_plan.chunk, count - first));
    again.run();
    again.finish();
  }
}

int64_t range_workspace(const TopkCall& call, int threads) {
  if (call.segments.empty() || call.n == 0) return 0;
  return plan_bytes(call, make_plan(call, scanned(call, false), call.n, threads), threads);
}

void topk_range(const TopkCall& call, float threshold, int threads, RangeResult& result) {
  result.lims.assign(1, 0);
  if (call.segments.empty() || call.n == 0) {
    result.lims.resize(static_cast<size_t>(call.n) + 1);
    return;
  }
  const Plan plan = make_plan(call, scanned(call, false), call.n, threads);
  Search search(call, plan, false, threads, call.workspace);
  for (int64_t first = 0; first < call.n; first += plan.chunk) {
    search.prepare(nullptr, first, std::min(plan.chunk, call.n - first));
    search.fix_threshold(threshold);
    search.run();
    search.finish_range(result);
  }
}

void encode_codes(const CodesCall& call, int64_t n, int threads) {
  const int64_t parts = std::clamp<int64_t>(n / 64, 1, threads);
  parallel_for(threads, parts, [&](int64_t part) {
    std::vector<float> row(static_cast<size_t>(round_up(call.d, 16)));
    kernels().topk.encode(call, n * part / parts, n * (part + 1) / parts, reinterpret_cast<char*>(row.data()));
  });
}

int64_t class_vectors_workspace(int64_t prompt_count, int64_t d, int threads) {
  return std::max(threads, 1) * round_up(round_up(d, 16) * 12 + prompt_count * d * 8 + 256, 64);
}

void class_vectors(const Matrix& prompts, int64_t classes, int64_t prompt_count, int64_t d, float* out, char* workspace,
                   int threads) {
  const int64_t parts = std::clamp<int64_t>(classes, 1, threads), scratch = class_vectors_workspace(prompt_count, d, 1);
  parallel_for(threads, parts, [&](int64_t part) {
    kernels().topk.class_vectors(prompts, prompt_count, d, classes * part / parts, classes * (part + 1) / parts, out,
                                 workspace + part * scratch);
  });
}

}  // namespace vk::cpu

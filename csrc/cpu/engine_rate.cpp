// SPDX-License-Identifier: Apache-2.0
// Timing around the bare tile engine.
#include "cpu/engine_rate.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <vector>

#include "core/error.h"
#include "core/parallel.h"
#include "cpu/table.h"

namespace vk::cpu {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct AlignedUnits {
  explicit AlignedUnits(int64_t units)
      : data(static_cast<uint32_t*>(
            ::operator new(sizeof(uint32_t) * static_cast<size_t>(units), std::align_val_t{64}))) {
    std::fill_n(data, units, 0u);
  }
  AlignedUnits(const AlignedUnits&) = delete;
  AlignedUnits& operator=(const AlignedUnits&) = delete;
  ~AlignedUnits() { ::operator delete(data, std::align_val_t{64}); }
  uint32_t* data;
};

}  // namespace

double engine_rate(Peak kind, int64_t m, int64_t n, int64_t depth, double seconds, int threads) {
  VK_CHECK(kind != Peak::kRead, "the tile engine multiplies float32, bfloat16 or int8");
  VK_CHECK(m >= 1 && n >= 1 && depth >= 1, "sizes are m %lld, n %lld, depth %lld, expected at least 1",
           static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(depth));
  VK_CHECK(seconds > 0.0 && threads >= 1, "seconds is %g and threads %d, expected more than 0", seconds, threads);
  const EngineKernels& engine = kernels().engine;
  const auto index = static_cast<size_t>(kind);
  const int64_t units = (depth + engine.depth_per_unit[index] - 1) / engine.depth_per_unit[index];
  // Panels round rows and columns up; the widest panel is 48.
  const int64_t left_units = (m + 48) * units, right_units = (n + 48) * units;
  const double work = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(depth);
  // Short products repeat within a round, so that the clock is read once a millisecond or so.
  const auto repeats = static_cast<int64_t>(std::max(1.0, 2e8 / work));
  std::vector<double> rates(static_cast<size_t>(threads), 0.0);
  parallel_for(threads, threads, [&](int64_t part) {
    const AlignedUnits left(left_units), right(right_units);
    int32_t sink = 0;
    double best = 0.0;
    const double end = now() + seconds;
    do {
      const double start = now();
      for (int64_t i = 0; i < repeats; ++i) engine.pass[index](left.data, right.data, m, n, units, &sink);
      best = std::max(best, work * static_cast<double>(repeats) / (now() - start));
    } while (now() < end);
    rates[static_cast<size_t>(part)] = sink == 0 ? best : 0.0;  // zeros times zeros: reading the sink keeps the product
  });
  double total = 0.0;
  for (double rate : rates) total += rate;
  return total * 1e-9;
}

}  // namespace vk::cpu

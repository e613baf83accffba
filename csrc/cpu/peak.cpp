// SPDX-License-Identifier: Apache-2.0
// Timing around the probes.
#include "cpu/peak.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>

#include "core/error.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "cpu/table.h"

namespace vk::cpu {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs `round` (which does `work` operations) until the time is over and keeps the best rate; the first round warms up.
template <class Round>
double best_rate(double seconds, double work, Round round) {
  round();
  double best = 0.0;
  const double end = now() + seconds;
  do {
    const double start = now();
    round();
    best = std::max(best, work / (now() - start));
  } while (now() < end);
  return best * 1e-9;
}

double compute_peak(const ComputeProbe& probe, double seconds, int threads) {
  constexpr int64_t kIterations = 1 << 20;  // a few milliseconds a round: long beside the start of a team
  return best_rate(seconds, probe.operations * static_cast<double>(kIterations) * threads, [&] {
    parallel_for(threads, threads, [&](int64_t) {
      alignas(64) unsigned char sink[64];
      probe.run(kIterations, sink);
    });
  });
}

double read_peak(double seconds, int threads) {
  constexpr int64_t kFloats = int64_t{1} << 26;  // 256 MiB: several times the last cache of today's servers
  const std::unique_ptr<float[]> buffer(new float[kFloats]);
  ask_for_large_pages(buffer.get(), kFloats * 4);
  const int64_t share = kFloats / threads;
  // Each thread touches what it will read, so that the pages are on its memory node.
  parallel_for(threads, threads, [&](int64_t part) { std::fill_n(buffer.get() + part * share, share, 1.0f); });
  return best_rate(seconds, 4.0 * static_cast<double>(share) * threads, [&] {
    parallel_for(threads, threads, [&](int64_t part) {
      const float sum = kernels().probe_read(buffer.get() + part * share, share);
      VK_CHECK(sum > 0.0f, "the read probe summed ones to %g", static_cast<double>(sum));
    });
  });
}

}  // namespace

double measure_peak(Peak kind, double seconds, int threads) {
  VK_CHECK(seconds > 0.0, "seconds is %g, expected more than 0", seconds);
  VK_CHECK(threads >= 1, "threads is %d, expected at least 1", threads);
  switch (kind) {
    case Peak::kF32:
      return compute_peak(kernels().probe_f32, seconds, threads);
    case Peak::kBF16:
      return compute_peak(kernels().probe_bf16, seconds, threads);
    case Peak::kI8:
      return compute_peak(kernels().probe_i8, seconds, threads);
    case Peak::kRead:
      return read_peak(seconds, threads);
  }
  raise_error("unknown probe %d", static_cast<int>(kind));
}

}  // namespace vk::cpu

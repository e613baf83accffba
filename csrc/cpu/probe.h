// SPDX-License-Identifier: Apache-2.0
// Probes of what the hardware can do at one instruction set: multiply-add loops on registers, and a read of memory.
//
// They are the denominators of `vlmkernels bench --peak`. Where a level lacks an instruction the probe runs what the
// kernels of that level run instead, so the figure is the limit of the level, not of the processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vk::cpu::VK_ISA_NAMESPACE {

typedef float ProbeF32 __attribute__((vector_size(VK_VECTOR_BYTES)));
typedef float ProbeF32Loose __attribute__((vector_size(VK_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t ProbeI32 __attribute__((vector_size(VK_VECTOR_BYTES)));
typedef uint32_t ProbeU32 __attribute__((vector_size(VK_VECTOR_BYTES)));
typedef int16_t ProbeI16 __attribute__((vector_size(VK_VECTOR_BYTES)));

inline constexpr int kProbeLanes = VK_VECTOR_BYTES / 4;
// Independent chains: enough to cover a latency of 5 cycles on two ports, few enough for 16 registers.
inline constexpr int kProbeChains = 10;

// Keeps a value in a register and opaque, or the compiler would fold the loop.
template <class Vector>
inline void opaque(Vector& value) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  __asm__ volatile("" : "+v"(value));
#else
  __asm__ volatile("" : "+x"(value));
#endif
#elif defined(__aarch64__)
  __asm__ volatile("" : "+w"(value));
#else
  __asm__ volatile("" : "+m"(value));
#endif
}

// The chains are indexed by constants: a loop over an array would leave it in memory.
template <class Vector, class Step, int... Chain>
inline void run_chains(int64_t iterations, void* sink, Step step, std::integer_sequence<int, Chain...>) {
  Vector chain[kProbeChains] = {};
  for (int64_t i = 0; i < iterations; ++i) ((chain[Chain] = step(chain[Chain]), opaque(chain[Chain])), ...);
  Vector total{};
  ((total += chain[Chain]), ...);
  std::memcpy(sink, &total, sizeof total);
}

template <class Vector, class Step>
inline void run_chains(int64_t iterations, void* sink, Step step) {
  run_chains<Vector>(iterations, sink, step, std::make_integer_sequence<int, kProbeChains>{});
}

inline constexpr double kOpsF32 = 2.0 * kProbeChains * kProbeLanes;

inline void probe_f32(int64_t iterations, void* sink) {
  ProbeF32 factor = ProbeF32{} + 0.999f, term = ProbeF32{} + 1e-9f;
  opaque(factor);
  opaque(term);
  run_chains<ProbeF32>(iterations, sink, [=](ProbeF32 x) { return x * factor + term; });
}

inline constexpr double kOpsBF16 = 2.0 * kOpsF32;

inline void probe_bf16(int64_t iterations, void* sink) {
  ProbeU32 pairs = ProbeU32{} + 0x3c003c01u;  // two bfloat16 values of about 0.0078
  opaque(pairs);
#if defined(__AVX512BF16__)
  run_chains<ProbeF32>(iterations, sink, [=](ProbeF32 x) {
    return (ProbeF32)_mm512_dpbf16_ps((__m512)x, (__m512bh)pairs, (__m512bh)pairs);
  });
#else
  ProbeU32 unit = pairs;
  run_chains<ProbeF32>(iterations, sink, [&](ProbeF32 x) {
    opaque(unit);  // unpacking is part of the work: the loop must not hoist it
    x += (ProbeF32)(unit << 16) * (ProbeF32)pairs;
    return x + (ProbeF32)(unit & 0xffff0000u) * (ProbeF32)pairs;
  });
#endif
}

#if defined(__AVX512VNNI__)
inline constexpr double kOpsI8 = 8.0 * kProbeChains * kProbeLanes;
#else
inline constexpr double kOpsI8 = 4.0 * kProbeChains * kProbeLanes;
#endif

inline void probe_i8(int64_t iterations, void* sink) {
#if defined(__AVX512VNNI__)
  ProbeU32 unit = ProbeU32{} + 0x03030303u;
  opaque(unit);
  run_chains<ProbeI32>(iterations, sink, [=](ProbeI32 x) {
    return (ProbeI32)_mm512_dpbusd_epi32((__m512i)x, (__m512i)unit, (__m512i)unit);
  });
#else
  // Pairs of 16-bit products, which are exact: the 8-bit pair instructions of these levels saturate.
  ProbeU32 unit = ProbeU32{} + 0x00030003u;
  opaque(unit);
  run_chains<ProbeI32>(iterations, sink, [&](ProbeI32 x) {
    opaque(unit);
#if defined(__AVX512BW__)
    return x + (ProbeI32)_mm512_madd_epi16((__m512i)unit, (__m512i)unit);
#elif defined(__AVX2__)
    return x + (ProbeI32)_mm256_madd_epi16((__m256i)unit, (__m256i)unit);
#elif defined(__x86_64__)
    return x + (ProbeI32)_mm_madd_epi16((__m128i)unit, (__m128i)unit);
#else
    const ProbeI32 low = (ProbeI32)(unit << 16) >> 16, high = (ProbeI32)unit >> 16;
    return x + low * low + high * high;
#endif
  });
#endif
}

inline float probe_read(const float* data, int64_t count) {
  constexpr int kStreams = 8;
  constexpr int64_t kStep = kStreams * kProbeLanes;
  ProbeF32 sums[kStreams] = {};
  for (int64_t i = 0; i + kStep <= count; i += kStep) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) sums[s] += *reinterpret_cast<const ProbeF32Loose*>(data + i + s * kProbeLanes);
  }
  float total = 0.0f;
  for (int s = 0; s < kStreams; ++s)
    for (int lane = 0; lane < kProbeLanes; ++lane) total += sums[s][lane];
  return total;
}

}  // namespace vk::cpu::VK_ISA_NAMESPACE

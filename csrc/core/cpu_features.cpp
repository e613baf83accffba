// SPDX-License-Identifier: Apache-2.0
// CPUID and XGETBV. Compiled for the baseline: this file runs before anything is known about the processor.
#include "core/cpu_features.h"

#include <cstdint>
#include <cstring>

#include "core/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vk {
namespace {

constexpr const char* kNames[kIsaLevels] = {"portable", "x86-64-v2", "avx2", "avx512", "avx512_bf16"};

#if defined(__x86_64__)

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros for a leaf that does not exist
  return r;
}

constexpr bool has(uint32_t word, int bit) { return (word >> bit & 1u) != 0; }

// Register state that the operating system saves on a context switch; without it the instructions fault.
uint64_t saved_state(const Registers& leaf1) {
  constexpr int kOsxsave = 27;
  if (!has(leaf1.ecx, kOsxsave)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

IsaLevel detect() {
  const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
  const uint64_t state = saved_state(leaf1);
  constexpr uint64_t kYmmState = 0x6;   // XMM and the upper halves of YMM
  constexpr uint64_t kZmmState = 0xe6;  // those, mask registers, and both parts of ZMM

  const bool sse3 = has(leaf1.ecx, 0), ssse3 = has(leaf1.ecx, 9), cx16 = has(leaf1.ecx, 13);
  const bool sse41 = has(leaf1.ecx, 19), sse42 = has(leaf1.ecx, 20), popcnt = has(leaf1.ecx, 23);
  if (!(sse3 && ssse3 && cx16 && sse41 && sse42 && popcnt)) return IsaLevel::kPortable;

  const bool fma = has(leaf1.ecx, 12), avx = has(leaf1.ecx, 28), f16c = has(leaf1.ecx, 29);
  const bool avx2 = has(leaf7.ebx, 5);
  if (!(fma && avx && f16c && avx2 && (state & kYmmState) == kYmmState)) return IsaLevel::kX86V2;

  const bool f = has(leaf7.ebx, 16), dq = has(leaf7.ebx, 17), bw = has(leaf7.ebx, 30), vl = has(leaf7.ebx, 31);
  if (!(f && dq && bw && vl && (state & kZmmState) == kZmmState)) return IsaLevel::kAvx2;

  const bool vnni = has(leaf7.ecx, 11), bf16 = has(leaf7_1.eax, 5);
  return vnni && bf16 ? IsaLevel::kAvx512Bf16 : IsaLevel::kAvx512;
}

#else

IsaLevel detect() { return IsaLevel::kPortable; }

#endif

}  // namespace

const char* isa_name(IsaLevel level) { return kNames[static_cast<int>(level)]; }

IsaLevel detected_isa() {
  static const IsaLevel level = detect();
  return level;
}

IsaLevel choose_isa(const char* forced) {
  const IsaLevel highest = detected_isa();
  if (forced == nullptr || *forced == '\0') return highest;
  for (int i = 0; i < kIsaLevels; ++i) {
    if (std::strcmp(forced, kNames[i]) != 0) continue;
    VK_CHECK(i <= static_cast<int>(highest), "VLMKERNELS_CPU_ISA=%s, but the highest level of this machine is %s",
             forced, isa_name(highest));
    return static_cast<IsaLevel>(i);
  }
  raise_error("VLMKERNELS_CPU_ISA=%s is not a known level; expected portable, x86-64-v2, avx2, avx512 or avx512_bf16",
              forced);
}

const char* cpu_brand() {
#if defined(__x86_64__)
  constexpr int kBytesPerLeaf = 16, kLeaves = 3;
  struct Brand {
    char text[kBytesPerLeaf * kLeaves + 1] = {};
    Brand() {
      constexpr uint32_t kFirst = 0x80000002, kCount = 0x80000000;
      if (cpuid(kCount, 0).eax < kFirst + kLeaves - 1) return;
      for (int i = 0; i < kLeaves; ++i) {
        const Registers r = cpuid(kFirst + static_cast<uint32_t>(i), 0);
        std::memcpy(text + kBytesPerLeaf * i, &r, sizeof r);
      }
    }
  };
  static const Brand brand;
  const char* start = brand.text;
  while (*start == ' ') ++start;
  return start;
#else
  return "";
#endif
}

}  // namespace vk

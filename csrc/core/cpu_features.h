// SPDX-License-Identifier: Apache-2.0
// Which instruction sets this processor and its operating system offer, as the levels that kernels are compiled for.
//
// Included by the files in csrc/cpu/isa/: no standard header that brings functions.
#pragma once

namespace vk {

// Ascending: a processor that has a level has all those below it.
enum class IsaLevel : int { kPortable = 0, kX86V2 = 1, kAvx2 = 2, kAvx512 = 3, kAvx512Bf16 = 4 };

inline constexpr int kIsaLevels = 5;

const char* isa_name(IsaLevel level);

// The highest level of this machine, from CPUID and the register state that the kernel saves (XGETBV).
IsaLevel detected_isa();

// The level to run: `forced` (the value of VLMKERNELS_CPU_ISA) or, where that is empty or null, the detected one.
// Throws Error on an unknown name and on a level that this machine lacks.
IsaLevel choose_isa(const char* forced);

// The brand string of the processor; empty where there is none to ask for.
const char* cpu_brand();

}  // namespace vk

// SPDX-License-Identifier: Apache-2.0
// The functions that exist once per instruction set, as one table per level, and the choice between the tables.
#pragma once

#include <cstdint>

#include "core/cpu_features.h"
#include "cpu/attention.h"
#include "cpu/contrastive.h"
#include "cpu/engine_rate.h"
#include "cpu/quantized.h"
#include "cpu/topk.h"

namespace vk::cpu {

// A loop of one instruction on registers only: what the multipliers can do when nothing else limits them.
struct ComputeProbe {
  void (*run)(int64_t iterations, void* sink);  // sink: 64 bytes, so that the result is used
  double operations;                            // per iteration; a multiplication and an addition are two
};

struct KernelTable {
  const char* isa;
  ComputeProbe probe_f32, probe_bf16, probe_i8;
  float (*probe_read)(const float* data, int64_t count);  // the sum, so that every element is read
  EngineKernels engine;
  ContrastiveKernels contrastive;
  TopkKernels topk;
  QuantizedKernels quantized;
  AttentionKernels attention;
};

// One accessor per file in csrc/cpu/isa/. The tables are constants: nothing of a level runs before it is chosen.
const KernelTable* table_portable();
#if defined(__x86_64__)
const KernelTable* table_x86_64_v2();
const KernelTable* table_avx2();
const KernelTable* table_avx512();
const KernelTable* table_avx512_bf16();
#endif

// The table of the level in use: that of VLMKERNELS_CPU_ISA or the highest this machine has, chosen on the first call.
const KernelTable& kernels();

// The table of a level, or of the next lower one that was compiled.
const KernelTable& table_for(IsaLevel level);

}  // namespace vk::cpu

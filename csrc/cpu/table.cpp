// SPDX-License-Identifier: Apache-2.0
// The choice of a kernel table. Compiled for the baseline.
#include "cpu/table.h"

#include <cstdlib>

namespace vk::cpu {

const KernelTable& table_for(IsaLevel level) {
#if defined(__x86_64__)
  switch (level) {
    case IsaLevel::kAvx512Bf16:
      return *table_avx512_bf16();
    case IsaLevel::kAvx512:
      return *table_avx512();
    case IsaLevel::kAvx2:
      return *table_avx2();
    case IsaLevel::kX86V2:
      return *table_x86_64_v2();
    case IsaLevel::kPortable:
      break;
  }
#else
  (void)level;
#endif
  return *table_portable();
}

const KernelTable& kernels() {
  static const KernelTable& chosen = table_for(choose_isa(std::getenv("VLMKERNELS_CPU_ISA")));
  return chosen;
}

}  // namespace vk::cpu

// SPDX-License-Identifier: Apache-2.0
// Kernels for any processor: the compiler's own 16-byte vectors at the baseline (SSE2, NEON).
#define VK_ISA_NAMESPACE portable
#define VK_ISA_NAME "portable"
#define VK_VECTOR_BYTES 16
#include "cpu/isa/level.h"

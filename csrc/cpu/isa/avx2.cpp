// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX2 with FMA and F16C.
#define VK_ISA_NAMESPACE avx2
#define VK_ISA_NAME "avx2"
#define VK_VECTOR_BYTES 32
#include "cpu/isa/level.h"

// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX-512 F, BW, DQ and VL.
#define VK_ISA_NAMESPACE avx512
#define VK_ISA_NAME "avx512"
#define VK_VECTOR_BYTES 64
#include "cpu/isa/level.h"

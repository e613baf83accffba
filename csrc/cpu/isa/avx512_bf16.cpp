// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX-512 with BF16 and VNNI.
#define VK_ISA_NAMESPACE avx512_bf16
#define VK_ISA_NAME "avx512_bf16"
#define VK_VECTOR_BYTES 64
#include "cpu/isa/level.h"

// SPDX-License-Identifier: Apache-2.0
// Kernels for x86-64-v2: SSE4.2.
#define VK_ISA_NAMESPACE x86_64_v2
#define VK_ISA_NAME "x86-64-v2"
#define VK_VECTOR_BYTES 16
#include "cpu/isa/level.h"

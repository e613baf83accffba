// SPDX-License-Identifier: Apache-2.0
// The body of every file in this folder: the kernels of one instruction set and their table.
//
// The including file sets VK_ISA_NAMESPACE, VK_ISA_NAME and VK_VECTOR_BYTES. No include guard is needed: each file
// includes this once. Everything with code is in VK_ISA_NAMESPACE; no global here has a constructor.
#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#include "cpu/contrastive_kernels.h"
#include "cpu/probe.h"
#include "cpu/table.h"
#include "cpu/topk_kernels.h"
#include "engine/pass.h"
#include "quantized_kernels.h"

namespace vk::cpu::VK_ISA_NAMESPACE {

inline constexpr KernelTable kTable = {
    .isa = VK_ISA_NAME,
    .probe_f32 = {probe_f32, kOpsF32},
    .probe_bf16 = {probe_bf16, kOpsBF16},
    .probe_i8 = {probe_i8, kOpsI8},
    .probe_read = probe_read,
    .engine = kEngine,
    .contrastive = {contrastive_statistics_part, contrastive_gradients_part},
    .topk = kTopk,
    .quantized = kQuantized,
    .attention = {attention_forward_item, attention_backward_item, attention_sum_shares, attention_sum_bias},
};

}  // namespace vk::cpu::VK_ISA_NAMESPACE

namespace vk::cpu {

#define VK_TABLE_ACCESSOR_2(level) table_##level
#define VK_TABLE_ACCESSOR(level) VK_TABLE_ACCESSOR_2(level)
const KernelTable* VK_TABLE_ACCESSOR(VK_ISA_NAMESPACE)() { return &VK_ISA_NAMESPACE::kTable; }

}  // namespace vk::cpu

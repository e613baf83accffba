# SPDX-License-Identifier: Apache-2.0
"""Modules on the ops: attention, the transformer block, losses. Names only."""

from vlmkernels.nn.attention import (
    AttentionPool,
    AttentionPool2d,
    MultiheadAttention,
    MultiheadCrossAttention,
    MultiheadSelfAttention,
)
from vlmkernels.nn.linear import Linear
from vlmkernels.nn.lora import (
    LoRALinear,
    add_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    set_lora_scale,
)
from vlmkernels.nn.losses import ClipLoss, InfoNCELoss, LinearCrossEntropyLoss, MultiPositiveLoss, SigLipLoss
from vlmkernels.nn.quantize import QuantizationReport, dequantize_, quantize_
from vlmkernels.nn.quantized import FusedActivation, QuantizedLinear, QuantizedPatchEmbedding
from vlmkernels.nn.quantized_attention import QuantizedMultiheadAttention
from vlmkernels.nn.transformer import (
    MLP,
    DropPath,
    LayerNorm,
    QuickGELU,
    Transformer,
    TransformerBlock,
    activation,
)

__all__ = [
    "MLP",
    "AttentionPool",
    "AttentionPool2d",
    "ClipLoss",
    "DropPath",
    "FusedActivation",
    "InfoNCELoss",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LoRALinear",
    "MultiPositiveLoss",
    "MultiheadAttention",
    "MultiheadCrossAttention",
    "MultiheadSelfAttention",
    "QuantizationReport",
    "QuantizedLinear",
    "QuantizedMultiheadAttention",
    "QuantizedPatchEmbedding",
    "QuickGELU",
    "SigLipLoss",
    "Transformer",
    "TransformerBlock",
    "activation",
    "add_lora",
    "dequantize_",
    "load_lora_state_dict",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "quantize_",
    "set_lora_scale",
]

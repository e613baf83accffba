# SPDX-License-Identifier: Apache-2.0
"""Modules on the ops: attention, the transformer block, losses. Names only."""

from vlmkernels.nn.attention import (
    AttentionPool,
    AttentionPool2d,
    MultiheadCrossAttention,
    MultiheadSelfAttention,
)
from vlmkernels.nn.linear import Linear
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
    "MultiPositiveLoss",
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
    "dequantize_",
    "quantize_",
]

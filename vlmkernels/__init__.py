# SPDX-License-Identifier: Apache-2.0
"""The public names of vlmkernels, and nothing else."""

from vlmkernels import data, integrations, models, nn, train
from vlmkernels._version import __version__
from vlmkernels.diagnostics import backends
from vlmkernels.nn.quantize import quantize_
from vlmkernels.ops.attention import (
    attention,
    attention_qkvpacked,
    attention_varlen,
    scaled_dot_product_attention,
)
from vlmkernels.ops.contrastive import (
    clip_loss,
    info_nce,
    linear_cross_entropy,
    multi_positive_loss,
    siglip_loss,
)
from vlmkernels.ops.flat_index import FlatIndex
from vlmkernels.ops.linear import linear
from vlmkernels.ops.quantized import QuantizedWeight, quantize_weight, quantized_linear
from vlmkernels.ops.sharded_index import ShardedIndex
from vlmkernels.ops.topk import topk_similarity, zero_shot

__all__ = [
    "FlatIndex",
    "QuantizedWeight",
    "ShardedIndex",
    "__version__",
    "attention",
    "attention_qkvpacked",
    "attention_varlen",
    "backends",
    "clip_loss",
    "data",
    "info_nce",
    "integrations",
    "linear",
    "linear_cross_entropy",
    "models",
    "multi_positive_loss",
    "nn",
    "quantize_",
    "quantize_weight",
    "quantized_linear",
    "scaled_dot_product_attention",
    "siglip_loss",
    "topk_similarity",
    "train",
    "zero_shot",
]

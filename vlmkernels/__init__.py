# SPDX-License-Identifier: Apache-2.0
"""The public names of vlmkernels, and nothing else."""

from .nn.quantize import quantize_ as quantize_
from .ops.contrastive import clip_loss as clip_loss
from .ops.contrastive import info_nce as info_nce
from .ops.contrastive import linear_cross_entropy as linear_cross_entropy
from .ops.contrastive import multi_positive_loss as multi_positive_loss
from .ops.contrastive import siglip_loss as siglip_loss
from .ops.flat_index import FlatIndex as FlatIndex
from .ops.linear import linear as linear
from .ops.quantized import QuantizedWeight as QuantizedWeight
from .ops.quantized import quantize_weight as quantize_weight
from .ops.quantized import quantized_linear as quantized_linear
from .ops.topk import topk_similarity as topk_similarity
from .ops.topk import zero_shot as zero_shot

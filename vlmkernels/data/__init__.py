# SPDX-License-Identifier: Apache-2.0
"""Data: the bundled emoji set, tokenizers and image transforms. Names only."""

from vlmkernels.data import emoji
from vlmkernels.data.augment import Augment, AugmentConfig, blend_styles
from vlmkernels.data.canvases import Canvases, draw_canvases
from vlmkernels.data.tokenizer import Tokenizer, clean_text, find_openai_merges, tokenizer_for
from vlmkernels.data.transforms import OPENAI_MEAN, OPENAI_STD, ImageTransform, transform_for

__all__ = [
    "OPENAI_MEAN",
    "OPENAI_STD",
    "Augment",
    "AugmentConfig",
    "Canvases",
    "ImageTransform",
    "Tokenizer",
    "blend_styles",
    "clean_text",
    "draw_canvases",
    "emoji",
    "find_openai_merges",
    "tokenizer_for",
    "transform_for",
]

# SPDX-License-Identifier: Apache-2.0
"""Checked by mypy, never run: the types that a user's program sees. A public function without types fails here."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

import vlmkernels as vk


def contrastive(images: Tensor, texts: Tensor, labels: Tensor, scale: Tensor) -> None:
    assert_type(vk.clip_loss(images, texts, scale), Tensor)
    assert_type(vk.clip_loss(images, texts, 14.3, label_smoothing=0.1, compute_dtype=torch.bfloat16), Tensor)
    assert_type(vk.siglip_loss(images, texts, scale, -10.0), Tensor)
    assert_type(vk.multi_positive_loss(images, texts, scale, labels, labels), Tensor)
    assert_type(vk.info_nce(images, texts, scale, positives=labels, reduction="none"), Tensor)
    assert_type(vk.linear_cross_entropy(images, texts, labels, ignore_index=-1, backend="reference"), Tensor)


def quantized(x: Tensor, weight: Tensor, model: torch.nn.Module) -> None:
    packed = vk.quantize_weight(weight, "w8a8")
    assert_type(packed, vk.QuantizedWeight)
    assert_type(vk.quantized_linear(x, packed, activation="gelu"), Tensor)
    assert_type(vk.linear(x, weight, None, residual=x), Tensor)
    vk.quantize_(model, scheme="w4a16", group_size=64)


def search(queries: Tensor, database: Tensor) -> None:
    scores, indices = vk.topk_similarity(queries, database, 5, metric="cosine")
    assert_type(scores, Tensor)
    assert_type(indices, Tensor)
    probabilities, classes, lse = vk.zero_shot(queries, database, k=3)
    assert_type(probabilities, Tensor)
    assert_type(classes, Tensor)
    assert_type(lse, Tensor)
    index = vk.FlatIndex(64, metric="l2", storage="int8")
    index.add(database)
    assert_type(len(index), int)


def integrations(model: torch.nn.Module, features: Tensor) -> None:
    report = vk.integrations.convert(model, linear=True)
    assert_type(report, vk.integrations.ConversionReport)
    assert_type(report.left_alone, dict[str, str])
    assert_type(vk.integrations.transformers.register(), str)
    assert_type(vk.integrations.faiss.read_index("flat.index", metric="cosine"), vk.FlatIndex)
    with vk.integrations.torch.sdpa():
        model(features)


def diagnostics() -> None:
    status = vk.backends()["cpu"]
    assert_type(status.available, bool)
    assert_type(status.reason, str)

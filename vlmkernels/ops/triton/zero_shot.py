# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification on Triton: one launch for a few classes, the scan of top-k similarity for many.

Classes of several prompts are averaged first, in float64 as everywhere, so that the ranks are every backend's. The
gradient of the log-sum-exp over all classes is the contrastive losses' softmax by rows, chunk by chunk; that of the k
best comes on top of it as top-k similarity's. No [N, C] array exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmkernels.ops import _topk_search
from vlmkernels.ops._topk_cpu import Rows
from vlmkernels.ops.reference import topk as reference
from vlmkernels.ops.reference.topk_score import NORM_FLOOR

from . import _tables_topk  # noqa: F401  puts its rows into the tables
from ._launch import cdiv, launch, tile_of, widens
from ._tables import Tile
from .contrastive import Problem, Sinks, normalised, shifted_sums, softmax_gradients, statistics
from .topk import TritonScan, float32_like, pair_sums, row_norms
from .topk_backward import score_gradients
from .zero_shot_kernels import class_mean_kernel, zero_shot_kernel

#: What one launch serves: classes and width that fit its registers, and a list that is kept by insertion.
FEW_CLASSES = 1024
LONGEST_LIST = 16
WIDEST_CLASS = 1024
#: Prompts of a class that are averaged by a kernel.
MOST_PROMPTS = 1024


def zero_shot(
    images: Tensor, class_features: Tensor, logit_scale: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [N, k], log-sum-exps [N] and indices [N, k]; see `vk.zero_shot`."""
    classes = class_features if class_features.ndim == 2 else class_vectors(class_features)
    images = images.to(classes.dtype)
    scale = logit_scale.to(device=images.device, dtype=torch.float32)
    count, width = classes.shape
    if count <= FEW_CLASSES and k <= LONGEST_LIST and 0 < width <= WIDEST_CLASS:
        return _one_launch(images, classes, scale, k)
    norm = row_norms(images)
    factor = (scale.double() / norm).float()
    # As accurate as float32 goes: they are part of every logit.
    rows = Rows(classes, count, norm=torch.linalg.vector_norm(classes, dim=-1, dtype=torch.float64).float())
    cosines, indices, lse = _topk_search.classify(TritonScan(), images, rows, k, factor)
    probabilities = torch.exp(scale.double() * cosines.double() - lse.unsqueeze(-1)).float()
    return probabilities, lse.float(), indices


def _one_launch(images: Tensor, classes: Tensor, scale: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    (n, width), count = images.shape, classes.shape[0]
    probabilities = torch.empty(n, k, dtype=torch.float32, device=images.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=images.device)
    lse = torch.empty(n, dtype=torch.float32, device=images.device)
    block = max(16, 1 << (count - 1).bit_length())
    tile = tile_of("zero_shot", images, classes=block)
    levels = (width - 1).bit_length()
    launch(
        zero_shot_kernel,
        cdiv(n, tile["ROWS"]),
        images,
        classes,
        scale,
        probabilities,
        indices,
        lse,
        n,
        count,
        width,
        *images.stride(),
        *classes.stride(),
        # the product's, and as much for the two norms
        2.0 * _topk_search.Scan().rounding(torch.bfloat16, width),
        tile=Tile({"ROWS": tile["ROWS"], "DEPTH": tile["DEPTH"], "CLASSES": block}, tile.warps, tile.stages),
        exact_float=True,
        K=k,
        KEPT=1 << (k - 1).bit_length(),
        FLOOR=NORM_FLOOR,
        WIDEN=widens(images.dtype),
        PRECISION=float32_like(images.dtype),
        PIECES=max(1, 2**levels // tile["WIDTH"]),
        LEVELS=min(levels, tile["WIDTH"].bit_length() - 1),
    )
    return probabilities, lse, indices


def class_vectors(class_features: Tensor) -> Tensor:
    """[C, P, D] -> [C, D] float32: the mean of each class's normalised prompts, the reference's bits."""
    c, p, d = class_features.shape
    if p > MOST_PROMPTS or class_features.numel() == 0:
        return reference.class_vectors(class_features)
    means = torch.empty(c, d, dtype=torch.float32, device=class_features.device)
    norm = row_norms(class_features.reshape(c * p, d))
    levels = (p - 1).bit_length()
    tile = tile_of("class_mean", class_features)
    width = max(1, tile["ELEMENTS"] >> levels)
    launch(
        class_mean_kernel,
        c * cdiv(d, width),
        class_features,
        norm,
        means,
        p,
        d,
        *class_features.stride(),
        tile=Tile({"WIDTH": width}, tile.warps),
        exact_float=True,
        LEVELS=levels,
    )
    return means


def zero_shot_gradients(
    grad_probabilities: Tensor,  # [N, k] float32
    grad_lse: Tensor,  # [N] float32
    image_features: Tensor,
    class_features: Tensor,
    logit_scale: Tensor,
    indices: Tensor,
    probabilities: Tensor,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Fills the gradients of image features, class features and the scale, those that are given.

    A logit's gradient is `w_n softmax_nj`, w the gradient of the log-sum-exp, and `g_ni p_ni` more where j is among the
    k best: `w = grad_lse - sum_i g_ni p_ni`.
    """
    device, n = image_features.device, image_features.shape[0]
    classes = class_features if class_features.ndim == 2 else class_vectors(class_features)
    scale = logit_scale.to(device=device, dtype=torch.float32)
    images, units = _units(image_features), _units(classes)
    through = grad_probabilities.double() * probabilities.double()
    weight, _, factor = normalised((grad_lse.double() - through.sum(1)).float()[None], None, None)
    problem = Problem(
        # gradients of half-precision features are rounded to their dtype, and so may be what is multiplied
        q=images[None].to(classes.dtype),
        k=units[None].to(classes.dtype),
        scale=scale,
        positives=torch.full((1, n), -1, dtype=torch.int64, device=device),
    )
    grad_images = torch.zeros_like(images)
    grad_units = torch.empty_like(units) if outputs[1] is not None else None
    sinks = Sinks(problem, grad_images[None], None if grad_units is None else grad_units[None], None, factor)
    # not from lse: rounded to float32, it would shift every softmax of a row by what it was rounded by
    row_sums = shifted_sums(statistics(problem, target=0.0)[0])
    softmax_gradients(problem, row_sums, None, weight, None, (None, None), sinks)
    sinks.finish()

    best = through * scale.double()
    score_gradients(best, images, units, indices, "dot", grad_images, grad_units, add=True)
    if outputs[0] is not None:
        _through_units(image_features, images, grad_images, outputs[0])
    if outputs[1] is not None and grad_units is not None:
        if class_features.ndim == 2:
            _through_units(classes, units, grad_units, outputs[1])
        else:
            grad_means = _through_units(classes, units, grad_units, torch.empty_like(units))
            grad_prompts = (grad_means / class_features.shape[1]).unsqueeze(1).expand(class_features.shape)
            _through_units(class_features, _units(class_features), grad_prompts, outputs[1])
    if outputs[2] is not None:
        query = torch.arange(n, device=device).repeat_interleave(indices.shape[1])
        cosines, _ = pair_sums(images, units, query, indices.reshape(-1))
        outputs[2].copy_(sinks.number(0) + (through.reshape(-1) * cosines).sum())


def _units(x: Tensor) -> Tensor:
    """Normalised rows, float32, contiguous."""
    wide = x.float()
    return (wide / _norm(wide)).contiguous()


def _norm(wide: Tensor) -> Tensor:
    return torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=NORM_FLOOR)


def _through_units(x: Tensor, units: Tensor, grad: Tensor, out: Tensor) -> Tensor:
    """Gradient of rows from that of their unit vectors, into `out`."""
    norm = _norm(x.float())
    along = (units * grad).sum(-1, keepdim=True)
    # a norm below the floor is a constant
    return out.copy_((grad - torch.where(norm > NORM_FLOOR, along, 0.0) * units) / norm)

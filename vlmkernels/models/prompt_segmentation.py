# SPDX-License-Identifier: Apache-2.0
"""Zero-shot segmentation by a prompting patch, and how far objects are apart in a space of patch features.

The two protocols of "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding" (Wu et al., 2023),
after its abstract: click one patch of an object, compare it with all patches of the image, threshold; and compare
similarities inside objects with those between objects. Up-sampling of similarities before the threshold, the choice of
prompts, the curve over thresholds and the separation's metrics are (reconstructed).

Features are the patches of the last block after its norm, without the class token: raw tokens have a large common
direction that pushes all cosines towards 1 and makes any fixed threshold meaningless.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "THRESHOLDS",
    "draw_segmentation",
    "object_patches",
    "prompt_patch_segment",
    "prompt_similarity",
    "segmentation_scores",
    "similarity_separation",
]

#: The thresholds of the curve: 0.0, 0.05, ... 0.95.
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(20))


def _check_grid(function: str, features: Tensor, grid: tuple[int, int]) -> None:
    if features.ndim != 2 or features.shape[0] != grid[0] * grid[1]:
        raise ValueError(
            f"{function}: features must be [{grid[0]} * {grid[1]}, d], the patches of one image without class token, "
            f"got {list(features.shape)}"
        )


def prompt_similarity(
    features: Tensor,  # [N, d]
    prompt_index: int | Tensor,
    grid: tuple[int, int],
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    """Cosine of every patch with the prompting patch.

    Args:
        features: Patches of one image, `[N, d]`, row by row of the grid.
        prompt_index: Which patch prompts.
        grid: Rows and columns of patches.
        out_size: Height and width to bring the map to, bilinearly; None = the grid.

    Returns:
        `[H, W]`, float32; the prompting patch has exactly 1.

    Raises:
        ValueError: If features do not fill the grid or there is no such patch.
    """
    _check_grid("prompt_similarity", features, grid)
    index = int(prompt_index)
    if not 0 <= index < len(features):
        raise ValueError(f"prompt_similarity: prompt_index must lie in [0, {len(features)}), got {index}")
    unit = F.normalize(features.float(), dim=-1)
    similarity = unit @ unit[index]
    similarity[index] = 1.0
    similarity = similarity.view(grid)
    if out_size is None:
        return similarity
    return F.interpolate(similarity[None, None], out_size, mode="bilinear", align_corners=False)[0, 0]


def prompt_patch_segment(
    features: Tensor,  # [N, d]
    prompt_index: int | Tensor,
    threshold: float,
    grid: tuple[int, int],
    out_size: tuple[int, int] | None = None,
) -> Tensor:
    """The object that a patch lies on: where the similarity with it is at least `threshold`.

    Args:
        features: Patches of one image, `[N, d]`.
        prompt_index: A patch of the object.
        threshold: Of the cosine; -1 and less selects all.
        grid: Rows and columns of patches.
        out_size: Height and width of the mask; None = the grid.

    Returns:
        Bool `[H, W]`.

    Example:
        >>> features = torch.eye(2)[torch.tensor([0, 0, 1, 1])]
        >>> prompt_patch_segment(features, 0, 0.5, (2, 2)).tolist()
        [[True, True], [False, False]]
    """
    return prompt_similarity(features, prompt_index, grid, out_size) >= threshold


def object_patches(masks: Tensor, grid: tuple[int, int], coverage: float = 0.5) -> Tensor:  # [O, H, W]
    """Patches that may prompt for an object: those of which its mask covers more than `coverage`, `[O, N]` bool."""
    share = F.adaptive_avg_pool2d(masks.float().unsqueeze(1), grid)
    return (share > coverage).flatten(1)


def segmentation_scores(
    features: Tensor,  # [N, d]
    masks: Tensor,  # [O, H, W]
    grid: tuple[int, int],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    prompts: int = 4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """IoU per object and threshold of one image, averaged over prompts drawn on the object.

    Averages are taken object by object, so that large objects, which have more patches, weigh no more than small ones.
    Choose the threshold on other images than those reported.

    Args:
        features: Patches of the image, `[N, d]`.
        masks: Bool `[O, H, W]`.
        grid: Rows and columns of patches.
        thresholds: T of them.
        prompts: Most prompts per object, drawn among the patches it covers by more than half.
        generator: A CPU generator for the draw.

    Returns:
        float32 `[O, T]`; NaN for objects that cover no patch.
    """
    allowed = object_patches(masks, grid)
    out = torch.full((len(masks), len(thresholds)), float("nan"))
    limits = torch.tensor(thresholds).view(-1, 1, 1)
    for o, mask in enumerate(masks):
        patches = allowed[o].nonzero()[:, 0]
        if not len(patches):
            continue
        chosen = patches[torch.randperm(len(patches), generator=generator)[:prompts]]
        scores = []
        for index in chosen.tolist():
            similarity = prompt_similarity(features, index, grid, (mask.shape[0], mask.shape[1]))
            found = similarity >= limits
            inner, union = (found & mask).flatten(1).sum(1), (found | mask).flatten(1).sum(1)
            scores.append(inner / union)
        out[o] = torch.stack(scores).mean(0)
    return out


def similarity_separation(
    features: Tensor,  # [N, d]
    labels: Tensor,  # [N]
    *,
    images: Tensor | None = None,  # [N]
    bins: int = 100,
) -> dict[str, float]:
    """How far cosines inside objects lie from those between objects.

    Args:
        features: Patches, `[N, d]`.
        labels: int64 `[N]`, object of each patch; negative = no object, left out.
        images: int64 `[N]`, image of each patch; where given, only pairs of one image count.
        bins: Bins of the two histograms over [-1, 1].

    Returns:
        `intra` and `inter`, the mean cosines; `overlap`, the common mass of the two normalised histograms (lower is
        better); `auc`, the probability that a pair inside an object is more alike than one between (ties count half).

    Raises:
        ValueError: If shapes do not fit, or there are no pairs of both kinds.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"similarity_separation: expected features [N, d] and labels [N], got {list(features.shape)} and "
            f"{list(labels.shape)}"
        )
    kept = labels >= 0
    unit = F.normalize(features[kept].float(), dim=-1)
    labels = labels[kept]
    row, column = torch.triu_indices(len(unit), len(unit), 1, device=unit.device)
    if images is not None:
        together = images[kept][row] == images[kept][column]
        row, column = row[together], column[together]
    cosines = (unit[row] * unit[column]).sum(-1)
    same = labels[row] == labels[column]
    if not bool(same.any()) or bool(same.all()):
        raise ValueError(
            "similarity_separation: there must be pairs inside objects and pairs between objects"
        )
    intra, inter = cosines[same], cosines[~same]
    histograms = [torch.histc(x.clamp(-1, 1), bins, -1.0, 1.0) / len(x) for x in (intra, inter)]
    values, group = cosines.unique(return_inverse=True)
    # Rank sum of the inside pairs, ties at their mean rank (Mann and Whitney 1947).
    counts = torch.zeros(len(values), dtype=torch.float64).index_add_(
        0, group.cpu(), torch.ones(len(group), dtype=torch.float64)
    )
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[group.cpu()]
    positive, negative = len(intra), len(inter)
    wins = float(ranks[same.cpu()].sum()) - positive * (positive + 1) / 2
    return {
        "intra": float(intra.mean()),
        "inter": float(inter.mean()),
        "overlap": float(torch.minimum(*histograms).sum()),
        "auc": wins / (positive * negative),
    }


def draw_segmentation(
    image: Tensor,  # [3, H, W] uint8
    features: Tensor,  # [N, d]
    prompt_index: int,
    threshold: float,
    grid: tuple[int, int],
) -> Tensor:
    """Three pictures side by side: the image with its prompting patch framed, the similarities, the mask.

    Args:
        image: uint8 `[3, H, W]`.
        features: Its patches, `[N, d]`.
        prompt_index: The prompting patch.
        threshold: Of the cosine.
        grid: Rows and columns of patches.

    Returns:
        uint8 `[3, H, 3 W]`.

    Raises:
        ValueError: If image is no uint8 `[3, H, W]`.
    """
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"draw_segmentation: image must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}"
        )
    height, width = image.shape[1:]
    similarity = prompt_similarity(features, prompt_index, grid, (height, width))
    framed = image.clone()
    row, column = divmod(int(prompt_index), grid[1])
    top, bottom = row * height // grid[0], (row + 1) * height // grid[0] - 1
    left, right = column * width // grid[1], (column + 1) * width // grid[1] - 1
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1)
    framed[:, top, left : right + 1] = framed[:, bottom, left : right + 1] = red
    framed[:, top : bottom + 1, left] = framed[:, top : bottom + 1, right] = red
    # Blue, white, red from -1 over 0 to 1.
    warm, cold = similarity.clamp(min=0), (-similarity).clamp(min=0)
    heat = torch.stack([1 - cold, 1 - warm - cold, 1 - warm]).clamp(0, 1) * 255
    mask = similarity >= threshold
    dimmed = torch.where(mask, image.float(), 0.25 * image.float() + 0.75 * 255)
    return torch.cat([framed, heat.to(torch.uint8), dimmed.to(torch.uint8)], dim=2)

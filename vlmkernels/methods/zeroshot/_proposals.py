# SPDX-License-Identifier: Apache-2.0
"""Segmentation proposals: boxes and masks of things in a picture. A classical default; a segmenter is an argument.

A proposer is `propose(picture uint8 [3, H, W], boxes [n, 4] or None) -> masks bool [n, H, W]`: one mask per box, or as
many as it finds where there are no boxes. Boxes are (left, top, right, bottom) in pixels, right and bottom excluded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Proposer = Callable[[Tensor, "Tensor | None"], Tensor]


def check_picture(owner: str, picture: Tensor) -> None:
    """Raises: ValueError: the picture is not uint8 [3, H, W]."""
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(
            f"{owner}: expected a picture uint8 [3, H, W], got {picture.dtype} {list(picture.shape)}"
        )


def connected_components(mask: Tensor) -> Tensor:
    """Numbers the 8-connected components of a mask [H, W]: int64, 0 = background, 1, 2, ... in order of first pixel.

    Labels spread to neighbours until none changes: as many steps as the longest way within a component.
    """
    h, w = mask.shape
    # every pixel starts with its own number, the first pixel of a component with the largest
    labels = torch.arange(h * w, 0, -1, dtype=torch.float64).view(1, 1, h, w) * mask
    while True:
        spread = F.max_pool2d(labels, 3, 1, 1) * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    values = labels.unique().flip(0)
    values = values[values > 0]
    out = torch.zeros(h, w, dtype=torch.int64)
    for number, value in enumerate(values.tolist()):
        out[labels[0, 0] == value] = number + 1
    return out


def without_specks(mask: Tensor, area: int) -> Tensor:
    """Fills holes and drops islands smaller than `area` pixels; the largest island stays in any case."""
    holes = connected_components(~mask)
    sizes = torch.bincount(holes.flatten())
    border = torch.cat([holes[0], holes[-1], holes[:, 0], holes[:, -1]]).unique()
    small = sizes < area
    small[border] = False  # what touches the border is background, not a hole
    small[0] = False
    filled = mask | small[holes]
    islands = connected_components(filled)
    sizes = torch.bincount(islands.flatten())
    sizes[0] = 0
    keep = sizes >= area
    if len(sizes) > 1:
        keep[sizes.argmax()] = True
    keep[0] = False
    return keep[islands]


def otsu_threshold(values: Tensor) -> float:
    """Returns the threshold that separates values best into two classes (Otsu 1979), over 256 bins."""
    x = values.float().flatten()
    low, high = float(x.min()), float(x.max())
    if high <= low:
        return low
    counts = torch.histc(x, 256, low, high).double()
    centres = low + (torch.arange(256, dtype=torch.float64) + 0.5) * (high - low) / 256
    mass, total = counts.cumsum(0), (counts * centres).cumsum(0)
    below, above = mass[:-1], mass[-1] - mass[:-1]
    between = (
        below * above * (total[:-1] / below.clamp(min=1) - (total[-1] - total[:-1]) / above.clamp(min=1)) ** 2
    )
    return low + (int(between.argmax()) + 1) * (high - low) / 256


def foreground(picture: Tensor) -> Tensor:
    """Returns what differs from the colour of the border, bool [H, W]: Otsu's threshold on the distance in RGB."""
    x = picture.float()
    border = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1)
    distance = (x - border.median(1).values[:, None, None]).norm(dim=0)
    return distance > max(otsu_threshold(distance), 8.0)  # differences below 8 of 255 are noise


def propose_components(picture: Tensor, boxes: Tensor | None = None, *, area: int = 16) -> Tensor:
    """The default proposer: connected parts that differ from the border; with boxes, the foreground of each box.

    Args:
        picture: uint8 [3, H, W].
        boxes: [n, 4], or None.
        area: parts with fewer pixels are dropped.

    Returns:
        bool [n, H, W].

    Raises:
        ValueError: The picture or boxes have another shape.
    """
    check_picture("propose_components", picture)
    h, w = picture.shape[1:]
    if boxes is None:
        labels = connected_components(without_specks(foreground(picture), area))
        return torch.stack(
            [labels == i for i in range(1, int(labels.max()) + 1)] or [torch.ones(h, w)]
        ).bool()
    masks = torch.zeros(len(boxes), h, w, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, clip_boxes(boxes, h, w).tolist(), strict=True):
        part = without_specks(foreground(picture[:, top:bottom, left:right]), area)
        # a box without a foreground is taken whole
        mask[top:bottom, left:right] = part if bool(part.any()) else True
    return masks


def clip_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Returns integer boxes inside the picture; degenerate ones get one pixel.

    Raises:
        ValueError: Not [n, 4].
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [n, 4], got {list(boxes.shape)}")
    left = boxes[:, 0].floor().clamp(0, width - 1)
    top = boxes[:, 1].floor().clamp(0, height - 1)
    right = torch.maximum(boxes[:, 2].ceil().clamp(0, width), left + 1)
    bottom = torch.maximum(boxes[:, 3].ceil().clamp(0, height), top + 1)
    return torch.stack([left, top, right, bottom], 1).long()


def mask_boxes(masks: Tensor) -> Tensor:
    """Returns the smallest boxes around masks [n, H, W], float32 [n, 4]; (0, 0, W, H) around an empty one."""
    n, h, w = masks.shape
    out = torch.tensor([[0.0, 0.0, w, h]]).repeat(n, 1)
    for i, mask in enumerate(masks):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if len(rows):
            out[i] = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)
    return out

# SPDX-License-Identifier: Apache-2.0
"""Scenes of several emoji on one canvas, with the box and the mask of each: data for grounding and segmentation.

The pictures are cut to what is opaque in them, so that boxes and masks, made from the alpha channel, are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vlmkernels.data.emoji import EmojiSet

_OPAQUE = 0.5
_TRIES = 40


@dataclass
class Canvases:
    """A batch of scenes; object o of scene n is `pairs[n][o]`.

    Attributes:
        images: [N, 3, S, S] uint8.
        boxes: [N, O, 4] float32, (centre x, centre y, width, height) as shares of the side; zeros where there is no
            object.
        labels: [N, S, S] int64, 0 on the background, o + 1 on object o.
        present: [N, O] bool, whether there is an object.
        pairs: per scene its (emoji index, style) pairs.
    """

    images: torch.Tensor
    boxes: torch.Tensor
    labels: torch.Tensor
    present: torch.Tensor
    pairs: list[list[tuple[int, str]]]

    def masks(self, scene: int) -> torch.Tensor:
        """Returns the masks of a scene's objects, [objects, S, S] bool."""
        count = int(self.present[scene].sum())
        return self.labels[scene] == torch.arange(1, count + 1).view(-1, 1, 1)


def draw_canvases(
    emojis: EmojiSet,
    pairs: Sequence[tuple[int, str]],
    count: int,
    generator: torch.Generator,
    *,
    size: int = 128,
    objects: tuple[int, int] = (2, 4),
    scale: tuple[float, float] = (0.25, 0.5),
    background: tuple[float, float] = (160.0, 255.0),
) -> Canvases:
    """Pastes emoji at random places of plain canvases, without overlap.

    Args:
        emojis: the set that has the pictures.
        pairs: what to draw from, as `EmojiSet.select` gives it; emoji of one scene are distinct.
        count: N, how many scenes.
        generator: a CPU generator; the same state gives the same scenes.
        size: S, side of a canvas in pixels.
        objects: fewest and most objects of a scene; one that finds no free place is left out, the first never.
        scale: smallest and largest side of an object, as a share of the canvas.
        background: range of the three background channels, drawn per scene.

    Returns:
        The scenes.

    Raises:
        ValueError: no pairs, or a range that makes no sense.

    Example:
        >>> from vlmkernels.data import emoji
        >>> emojis = emoji.load()
        >>> animals = emojis.select(split="train", group="Animals & Nature", base_only=True)
        >>> scenes = draw_canvases(emojis, animals, 2, torch.Generator().manual_seed(0), size=64)
        >>> scenes.images.shape, scenes.boxes.shape
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 4, 4]))
    """
    if not 1 <= objects[0] <= objects[1] <= len(pairs):
        raise ValueError(
            f"draw_canvases: objects must be a range within [1, {len(pairs)}] (the pairs), got {objects}"
        )
    if not 0 < scale[0] <= scale[1] <= 1 or size < 8:
        raise ValueError(
            f"draw_canvases: scale must be a range within (0, 1] and size at least 8, got {scale} and {size}"
        )
    low, high = background
    colours = low + (high - low) * torch.rand(count, 3, 1, 1, generator=generator)
    images = colours.expand(count, 3, size, size).clone()
    boxes, present = torch.zeros(count, objects[1], 4), torch.zeros(count, objects[1], dtype=torch.bool)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    drawn: list[list[tuple[int, str]]] = []
    for scene in range(count):
        drawn.append([])
        wanted = int(torch.randint(objects[0], objects[1] + 1, (), generator=generator))
        for row in torch.randperm(len(pairs), generator=generator)[: 2 * wanted].tolist():
            if len(drawn[-1]) == wanted:
                break
            if pairs[row][0] in (index for index, _ in drawn[-1]):
                continue
            glyph = _cut_out(emojis.rgba([pairs[row]])[0].float() / 255)
            share = scale[0] + (scale[1] - scale[0]) * float(torch.rand((), generator=generator))
            glyph = _resize(glyph, max(4, round(share * size)))
            place = _free_place(labels[scene] == 0, glyph[3] >= _OPAQUE, generator)
            if place is None:
                continue
            number = len(drawn[-1])
            boxes[scene, number] = _paste(images[scene], labels[scene], glyph, place, number + 1)
            present[scene, number] = True
            drawn[-1].append(pairs[row])
    return Canvases(images.round().clamp(0, 255).to(torch.uint8), boxes, labels, present, drawn)


def _cut_out(rgba: torch.Tensor) -> torch.Tensor:
    """Cuts a picture [4, H, W] to the rectangle of what is opaque in it."""
    opaque = rgba[3] >= _OPAQUE
    rows, columns = opaque.any(1).nonzero()[:, 0], opaque.any(0).nonzero()[:, 0]
    return rgba[:, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]


def _resize(rgba: torch.Tensor, side: int) -> torch.Tensor:
    """Scales a picture [4, H, W] so that its longer side is `side`."""
    height, width = rgba.shape[1:]
    factor = side / max(height, width)
    shape = (max(2, round(height * factor)), max(2, round(width * factor)))
    # Premultiplied, so that the colour of what is transparent does not bleed in.
    premultiplied = torch.cat([rgba[:3] * rgba[3:], rgba[3:]])
    return F.interpolate(premultiplied[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]


def _free_place(
    free: torch.Tensor, opaque: torch.Tensor, generator: torch.Generator
) -> tuple[int, int] | None:
    """Draws a place (y, x) where the rectangle of a glyph covers no other object; None where none was found."""
    height, width = opaque.shape
    size = free.shape[0]
    for y, x in torch.rand(_TRIES, 2, generator=generator).tolist():
        top, left = int(y * (size - height + 1)), int(x * (size - width + 1))
        if bool(free[top : top + height, left : left + width].all()):
            return top, left
    return None


def _paste(
    image: torch.Tensor, labels: torch.Tensor, glyph: torch.Tensor, place: tuple[int, int], label: int
) -> torch.Tensor:
    """Draws a premultiplied glyph over an image [3, S, S], labels its pixels and returns its box [4]."""
    top, left = place
    height, width = glyph.shape[1:]
    window = (slice(top, top + height), slice(left, left + width))
    alpha = glyph[3]
    image[:, window[0], window[1]] = 255 * glyph[:3] + image[:, window[0], window[1]] * (1 - alpha)
    opaque = alpha >= _OPAQUE
    labels[window][opaque] = label
    rows, columns = opaque.any(1).nonzero()[:, 0], opaque.any(0).nonzero()[:, 0]
    if not len(rows):  # a hair-thin glyph may lose its opaque pixels when it shrinks
        rows, columns = torch.tensor([0, height - 1]), torch.tensor([0, width - 1])
    y0, y1 = top + int(rows[0]), top + int(rows[-1]) + 1
    x0, x1 = left + int(columns[0]), left + int(columns[-1]) + 1
    return torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / image.shape[-1]

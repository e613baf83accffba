# SPDX-License-Identifier: Apache-2.0
"""FGVP: which box does a sentence mean? One marked copy of the picture per candidate, and CLIP picks the copy.

Yang et al., "Fine-Grained Visual Prompting" (2023; released code ylingfeng/FGVP, which extends ReCLIP). The best mark
blurs everything outside of a candidate's segmentation mask. With prompt kinds v, backbones m and candidates i:

```
l[v,i] = sum_m s_m cos(copy_{v,i}, "a photo of " + sentence)
S:  l[v,i] -= mean over a bank of captions (same prefix) of their l[v,i]
l[i]   = sum_v l[v,i];  p = softmax_i(l)                      over boxes, not over captions
R:  p_i q_i with q from the sentence's relations (`_relations.py`), where it has any
```

Masks come from the user, from a segmenter passed as `propose` (the paper: SAM ViT-H), or from the bundled classical
proposals. The blur works at the size the network sees: at full resolution, a radius of 100 hides much less. Departures:
the blur is an exact Gaussian with repeated borders (Pillow approximates it by boxes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.methods.zeroshot._classifier import encoder_of, scale_of
from vlmkernels.methods.zeroshot._metrics import assign
from vlmkernels.methods.zeroshot._proposals import (
    Proposer,
    check_picture,
    clip_boxes,
    mask_boxes,
    propose_components,
    without_specks,
)
from vlmkernels.methods.zeroshot._relations import Parser, entity_distribution, parse_expression
from vlmkernels.systems import register_system

__all__ = ["FGVP", "MARKS", "Referral", "gaussian_blur", "mark", "match_texts"]

#: Kinds of marks, with the paper's letters.
MARKS = {
    "crop": "P",
    "box_line": "B1",
    "tint_box": "B2",
    "grey_reverse_box": "B3",
    "blur_reverse_box": "B4",
    "ellipse_line": "C1",
    "grey_reverse_ellipse": "C3",
    "blur_reverse_ellipse": "C4",
    "contour": "D1",
    "tint_mask": "D2",
    "grey_reverse_mask": "D3",
    "blur_reverse_mask": "D4",
}
BEST_SINGLE = ("crop", "blur_reverse_mask")
BEST_ENSEMBLE = ("crop", "contour", "grey_reverse_mask", "blur_reverse_mask")
_LINE = 2
_RED, _GREEN, _BOX_TINT, _BOX_ALPHA = (255, 0, 0), (0, 255, 0), (240, 0, 30), 127 / 255
_TINT_SUFFIX = " is in red color."


def gaussian_blur(picture: Tensor, radius: float) -> Tensor:
    """Blurs a picture uint8 [3, H, W] with a Gaussian of standard deviation `radius`, borders repeated."""
    if radius < 0:
        raise ValueError(f"gaussian_blur: radius must not be negative, got {radius}")
    if radius == 0:
        return picture.clone()
    out = picture.float()
    for axis in (1, 2):
        out = _blur_along(out, axis, radius)
    return out.round().clamp(0, 255).to(torch.uint8)


def _blur_along(x: Tensor, axis: int, radius: float) -> Tensor:
    """A product with the matrix of the blur: its border columns take what the kernel would find beyond them."""
    n = x.shape[axis]
    # the Gaussian integrated over each pixel, by distance; beyond the border the rest of the tail
    edges = torch.arange(2 * n, dtype=torch.float64) - (n - 0.5)
    below = torch.special.ndtr(edges / radius).unfold(0, n + 1, 1).flip(0)
    below[:, 0], below[:, -1] = 0.0, 1.0
    weights = below.diff(dim=1).to(x.dtype)
    return torch.einsum("ij,cjk->cik" if axis == 1 else "ij,ckj->cki", weights, x)


def grey(picture: Tensor) -> Tensor:
    """Returns the released code's grey: it reads RGB as BGR, so that red weighs 0.114 and blue 0.299."""
    weights = torch.tensor([0.114, 0.587, 0.299])
    value = (picture.float() * weights[:, None, None]).sum(0).round().clamp(0, 255).to(torch.uint8)
    return value.expand_as(picture).clone()


def box_mask(box: Sequence[int], height: int, width: int) -> Tensor:
    """Returns the mask of a box, bool [H, W]."""
    left, top, right, bottom = box
    out = torch.zeros(height, width, dtype=torch.bool)
    out[top:bottom, left:right] = True
    return out


def ellipse_mask(box: Sequence[int], height: int, width: int, grow: float = 0.0) -> Tensor:
    """Returns the mask of the ellipse inscribed in a box, its half axes longer by `grow` pixels."""
    left, top, right, bottom = box
    a, b = max((right - left) / 2 + grow, 0.1), max((bottom - top) / 2 + grow, 0.1)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return ((x - (left + right) / 2) / a) ** 2 + ((y - (top + bottom) / 2) / b) ** 2 <= 1


def outline(mask: Tensor, thickness: int = _LINE) -> Tensor:
    """Returns the pixels within `thickness` / 2 of the edge of a mask, on either side."""
    x = mask[None, None].float()
    size, pad = 2 * (thickness // 2) + 1, thickness // 2
    wide = F.max_pool2d(x, size, 1, pad)
    narrow = -F.max_pool2d(F.pad(-x, (pad,) * 4, value=0.0), size, 1)  # beyond the picture there is no mask
    return (wide > narrow)[0, 0]


def _painted(picture: Tensor, where: Tensor, colour: Sequence[int], alpha: float = 1.0) -> Tensor:
    paint = torch.tensor(colour, dtype=torch.float32)[:, None, None]
    mixed = torch.lerp(picture.float(), paint.expand_as(picture), alpha).round().to(torch.uint8)
    return torch.where(where, mixed, picture)


def mark(
    picture: Tensor,  # [3, H, W]
    masks: Tensor,  # [n, H, W]
    boxes: Tensor,  # [n, 4]
    kind: str = "blur_reverse_mask",
    *,
    blur_radius: float = 100.0,
) -> list[Tensor]:
    """Returns one marked copy of a picture per candidate.

    Args:
        picture: uint8, at the size that the network will see.
        masks: bool, or floats of which those above 0 count.
        boxes: (left, top, right, bottom) in pixels.
        kind: one of `MARKS`; crops have the size of their boxes, all others that of the picture.
        blur_radius: standard deviation of the blur, in pixels.

    Returns:
        n pictures uint8 [3, h, w].

    Raises:
        ValueError: An unknown kind, or shapes that do not fit.
    """
    check_picture("mark", picture)
    if kind not in MARKS:
        raise ValueError(f"mark: kind must be one of {list(MARKS)}, got {kind!r}")
    h, w = picture.shape[1:]
    if masks.shape != (len(boxes), h, w):
        raise ValueError(f"mark: masks must be [{len(boxes)}, {h}, {w}], got {list(masks.shape)}")
    corners = clip_boxes(boxes, h, w).tolist()
    if kind == "crop":
        return [picture[:, top:bottom, left:right] for left, top, right, bottom in corners]
    shapes = {
        "box": lambda i: box_mask(corners[i], h, w),
        "ellipse": lambda i: ellipse_mask(corners[i], h, w),
        "mask": lambda i: masks[i] > 0,
    }
    if "reverse" in kind:
        effect, _, shape = kind.split("_")
        outside = gaussian_blur(picture, blur_radius) if effect == "blur" else grey(picture)
        sharp = masks > 0 if shape == "mask" else torch.stack([shapes[shape](i) for i in range(len(boxes))])
        return list(torch.where(sharp[:, None], picture, outside))
    out = []
    for i in range(len(boxes)):
        if kind == "box_line":
            out.append(_painted(picture, outline(shapes["box"](i)), _RED))
        elif kind == "ellipse_line":
            ring = ellipse_mask(corners[i], h, w, _LINE / 2) & ~ellipse_mask(corners[i], h, w, -_LINE / 2)
            out.append(_painted(picture, ring, _RED))
        elif kind == "contour":
            out.append(_painted(picture, outline(shapes["mask"](i)), _RED))
        elif kind == "tint_mask":
            out.append(_painted(picture, shapes["mask"](i), _GREEN, 0.5))
        else:  # tint_box
            out.append(_painted(picture, shapes["box"](i), _BOX_TINT, _BOX_ALPHA))
    return out


@dataclass
class Referral:
    """What a sentence refers to.

    Attributes:
        index: the candidate.
        probabilities: [n] over candidates, after relations where they were used.
        logits: [n], before the softmax.
        boxes: [n, 4].
        masks: bool [n, H, W] at the picture's own size.
        pictures: the marked copies of the first kind, as the network saw them.
    """

    index: int
    probabilities: Tensor
    logits: Tensor
    boxes: Tensor
    masks: Tensor
    pictures: list[Tensor]


@register_system("FGVP", "Fine-Grained Visual Prompting", "referring-expression comprehension method")
class FGVP:
    """Finds what a sentence refers to; see the top of this file.

    Args:
        encoders: one model, or several backbones whose logits are added.
        kinds: prompt kinds, of `MARKS`; the paper's best: `BEST_SINGLE`, with relations `BEST_ENSEMBLE`.
        blur_radius: in pixels at `size`.
        size: the shortest side (or longest, see `processing`) pictures are brought to before marking (the paper: 384).
        processing: "resize": shortest side to `size`; "padding": longest side, the rest in black.
        aggregate: over kinds, "sum" or "max".
        caption_bank: captions whose mean logit is subtracted (S); the paper draws 500 of the split without replacement.
        relations: whether relations of the sentence are used (R).
        parser: sentence to `Entity`.
        propose: masks for boxes, or boxes and masks where none are given.
        minimum_area: holes and islands of masks below this many pixels are removed (the paper: 400 on 1024 px).
        prefix: before the lower-cased sentence.

    Raises:
        ValueError: Options out of range.
    """

    def __init__(
        self,
        encoders: Any,
        *,
        kinds: Sequence[str] = BEST_SINGLE,
        blur_radius: float = 100.0,
        size: int = 384,
        processing: str = "resize",
        aggregate: str = "sum",
        caption_bank: Sequence[str] | None = None,
        relations: bool = True,
        parser: Parser = parse_expression,
        propose: Proposer = propose_components,
        minimum_area: int = 0,
        prefix: str = "a photo of ",
    ) -> None:
        if not kinds or any(kind not in MARKS for kind in kinds):
            raise ValueError(f"FGVP: kinds must be among {list(MARKS)}, got {list(kinds)}")
        if aggregate not in ("sum", "max") or processing not in ("resize", "padding"):
            raise ValueError(
                f"FGVP: aggregate 'sum' or 'max' and processing 'resize' or 'padding', got {aggregate!r}"
            )
        several = encoders if isinstance(encoders, (list, tuple)) else [encoders]
        self.encoders = [encoder_of(e) for e in several]
        self.kinds, self.blur_radius, self.size = tuple(kinds), blur_radius, size
        self.processing, self.aggregate = processing, aggregate
        self.relations, self.parser, self.propose = relations, parser, propose
        self.minimum_area, self.prefix = minimum_area, prefix
        self.caption_bank = list(caption_bank) if caption_bank is not None else None

    def refer(
        self, picture: Tensor, text: str, boxes: Tensor | None = None, masks: Tensor | None = None
    ) -> Referral:
        """Finds the candidate that a sentence means.

        Args:
            picture: uint8 [3, H, W].
            text: the sentence.
            boxes: candidates [n, 4] in pixels; None: around `masks`, or proposed.
            masks: bool [n, H, W]; None: proposed for the boxes.

        Raises:
            ValueError: Shapes that do not fit, or no candidate.
        """
        check_picture("FGVP.refer", picture)
        boxes, masks = self._candidates(picture, boxes, masks)
        features, small_boxes, pictures = self._marked_features(picture, boxes, masks)

        def score(phrase: str) -> Tensor:
            return self._aggregate(self._logits(features, phrase))

        logits = score(text)
        p = logits.softmax(0)
        if self.relations:
            entity = self.parser(text)
            if not entity.is_plain:
                p = p * entity_distribution(entity, score, small_boxes)
                p = p / p.sum().clamp(min=1e-30)
        return Referral(int(p.argmax()), p, logits, boxes, masks, pictures)

    def _candidates(
        self, picture: Tensor, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if masks is None:
            masks = self.propose(picture, boxes)
        if boxes is None:
            boxes = mask_boxes(masks)
        if not len(boxes) or masks.shape != (len(boxes), *picture.shape[1:]):
            raise ValueError(
                f"FGVP: boxes {list(boxes.shape)} and masks {list(masks.shape)} do not fit the picture"
            )
        if self.minimum_area:
            masks = torch.stack([without_specks(m > 0, self.minimum_area) for m in masks])
        return boxes.float(), masks > 0

    def _resized(self, picture: Tensor, boxes: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Everything at the size of the network: masks bilinearly as floats, and above 0."""
        h, w = picture.shape[1:]
        side = min(h, w) if self.processing == "resize" else max(h, w)
        scale = self.size / side
        shape = (max(1, round(h * scale)), max(1, round(w * scale)))
        small = F.interpolate(
            picture[None].float(), shape, mode="bicubic", antialias=True, align_corners=False
        )
        small = small.round().clamp(0, 255).to(torch.uint8)[0]
        fine = F.interpolate(masks[:, None].float(), shape, mode="bilinear", align_corners=False)[:, 0] > 0
        if self.processing == "padding":
            right, below = self.size - shape[1], self.size - shape[0]
            small, fine = F.pad(small, (0, right, 0, below)), F.pad(fine, (0, right, 0, below))
        return small, boxes * scale, fine

    def _marked_features(
        self, picture: Tensor, boxes: Tensor, masks: Tensor
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """Per backbone the unit features [V, n, D] of all copies, which go through it as one batch."""
        small, small_boxes, fine = self._resized(picture, boxes, masks)
        copies: list[Tensor] = []
        for kind in self.kinds:
            copies += mark(small, fine, small_boxes, kind, blur_radius=self.blur_radius)
        batch = torch.cat(
            [
                F.interpolate(
                    c[None].float(), (self.size, self.size), mode="bilinear", antialias=True
                ).round()
                for c in copies
            ]
        )
        batch = batch.clamp(0, 255).to(torch.uint8)
        shape = (len(self.kinds), len(boxes), -1)
        return [e.images(batch).view(shape) for e in self.encoders], small_boxes, copies[: len(boxes)]

    def _logits(self, features: Sequence[Tensor], text: str) -> Tensor:
        """[V, n]: the sum over backbones, less the caption bank's mean."""
        kinds, n = features[0].shape[:2]
        total = torch.zeros(kinds, n)
        for encoder, copies in zip(self.encoders, features, strict=True):
            texts = self._texts(encoder, [text])[:, 0]
            if self.caption_bank is not None:
                # the mean over captions is linear, so one averaged row per kind stands for the bank
                texts = texts - self._texts(encoder, self.caption_bank).mean(1)
            total += scale_of(encoder) * (copies * texts[:, None]).sum(2)
        return total

    def _texts(self, encoder: Any, texts: Sequence[str]) -> Tensor:
        """[V, len(texts), D] with each kind's own suffix."""
        rows = []
        for kind in self.kinds:
            end = _TINT_SUFFIX if kind == "tint_box" else ""
            rows.append(encoder.texts([f"{self.prefix}{t.lower()}{end}" for t in texts]))
        return torch.stack(rows)

    def _aggregate(self, logits: Tensor) -> Tensor:
        return logits.sum(0) if self.aggregate == "sum" else logits.amax(0)

    def match(
        self, picture: Tensor, texts: Sequence[str], boxes: Tensor | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """Gives every text its own candidate: a one-to-one assignment on the mean logits over kinds.

        Returns:
            int64 [T], the candidate of each text.

        Raises:
            ValueError: More texts than candidates.
        """
        boxes, masks = self._candidates(picture, boxes, masks)
        features, _, _ = self._marked_features(picture, boxes, masks)
        return match_texts(torch.stack([self._logits(features, t).mean(0) for t in texts]))


def match_texts(logits: Tensor) -> Tensor:
    """Assigns texts to candidates one to one, at the least total `exp(-similarity)`: [T, n] -> [T].

    Raises:
        ValueError: More texts than candidates.
    """
    if logits.shape[0] > logits.shape[1]:
        raise ValueError(
            f"match_texts: {logits.shape[0]} texts cannot have different ones of {logits.shape[1]} candidates"
        )
    shifted = (
        (logits - logits.max()).double().clamp(min=-math.log(1e15))
    )  # the same assignment, and no overflow
    return assign(-(-shifted).exp())

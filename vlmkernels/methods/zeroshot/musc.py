# SPDX-License-Identifier: Apache-2.0
"""MuSc: anomalies among unlabelled pictures of one kind, found by how well other pictures' patches match each patch.

Li et al., "MuSc: Zero-Shot Industrial Anomaly Classification and Segmentation with Mutual Scoring of the Unlabeled
Images" (2024; released code xrli-U/MuSc). N pictures with L patch tokens per layer (ViT-L/14-336 at 518 px: 37 x 37
tokens of blocks 6, 12, 18 and 24 counted from 1, class token removed):

```
LNAMD  Z = normalise(mean over r x r neighbours of LayerNorm_{C,H,W}(tokens)),  r in {1, 3, 5}, zero padding counted
MSM    a[u,j] = min_v |z_iu - z_jv| for j != i;  score of u = mean of its floor(0.3 (N - 1)) smallest (at least 1)
map    = mean over layers and r, upsampled bilinearly (corners aligned);  picture's score = largest value of its map
RsCIN  S = min-max normalised scores, smoothed over the k most similar pictures: mean over k of P_k S
```

The matching multiplies every pair of pictures once: with |z_iu - z_jv|^2 in a block, the smallest entry of a row is the
best match of a patch of i, that of a column the best match of a patch of j, at half the operations of two searches.
Blocks stay in the cache; no NL x NL matrix exists, and what is kept, [N, L, N], is N / C of the patches themselves.
Where a match is so close that |u|^2 + |v|^2 - 2 u v cancels, `vk.topk_similarity` with metric "l2" searches again, so
that equal patches are 0 apart.

    vlmkernels anomalies folder/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.methods.zeroshot._classifier import cache_block, check_features, encoder_of, unit
from vlmkernels.models.clip import CLIP, ConvStem, VisionTransformer
from vlmkernels.ops.topk import topk_similarity
from vlmkernels.systems import register_system
from vlmkernels.train.evaluation import Encoder

__all__ = ["Anomalies", "MuSc", "lnamd", "musc", "mutual_score", "patch_tokens", "rscin"]

_LAYER_NORM_EPS = 1e-5
#: Squared distance below which a match is measured again: of unit rows, the products give it to about 2e-7 in float32.
_CLOSE = 2e-3


def lnamd(tokens: Tensor, r: int, *, grid: tuple[int, int] | None = None) -> Tensor:
    """Normalises tokens and averages them over neighbourhoods (local neighbourhood aggregation).

    Args:
        tokens: [N, L, C] patch tokens, row by row, without the class token.
        r: odd side of the neighbourhood.
        grid: (rows, columns) of the patches; None: a square.

    Returns:
        Unit rows [N, L, C].

    Raises:
        ValueError: r is even, or L is no such grid.
    """
    if r < 1 or r % 2 == 0:
        raise ValueError(f"lnamd: r must be odd and positive, got {r}")
    n, length, width = tokens.shape
    rows, columns = grid or (round(length**0.5), round(length**0.5))
    if rows * columns != length:
        raise ValueError(f"lnamd: {length} tokens are no grid of {rows} x {columns}")
    x = tokens if tokens.dtype == torch.float64 else tokens.float()
    x = x.transpose(1, 2).reshape(n, width, rows, columns)
    x = F.layer_norm(x, x.shape[1:], eps=_LAYER_NORM_EPS)
    if r > 1:  # borders are shrunk by the zeros that count, then normalised again
        x = F.avg_pool2d(x, r, stride=1, padding=(r - 1) // 2, count_include_pad=True)
    return unit(x.flatten(2).transpose(1, 2))


def mutual_score(z: Tensor, top: float = 0.3) -> Tensor:
    """Scores every patch by the pictures that match it best.

    Args:
        z: [N, L, C] unit rows.
        top: share of the other pictures that is averaged over, the best matching ones.

    Returns:
        [N, L], 0 = matched perfectly.

    Raises:
        ValueError: Fewer than two pictures, or a share outside of (0, 1].
    """
    if z.ndim != 3 or len(z) < 2:
        raise ValueError(f"mutual_score: z must be [N, L, C] with N at least 2, got {list(z.shape)}")
    if not 0 < top <= 1:
        raise ValueError(f"mutual_score: top must lie in (0, 1], got {top}")
    n, length, _ = z.shape
    kept = max(1, int(top * (n - 1)))
    nearest = _nearest_distances(z if z.dtype == torch.float64 else z.float())
    out = nearest.new_empty(n, length)
    for i in range(n):  # no picture matches itself
        others = torch.cat([nearest[i, :, :i], nearest[i, :, i + 1 :]], 1)
        out[i] = others.topk(kept, dim=1, largest=False, sorted=False).values.mean(1)
    return out


@torch.no_grad()
def _nearest_distances(z: Tensor) -> Tensor:
    """Distances [N, L, N] of every patch to the nearest patch of every picture; 0 for its own."""
    n, length, width = z.shape
    best = z.new_zeros(n, length, n)  # minus half the squared distances
    halves = 0.5 * z.square().sum(2)
    rows, several = cache_block(length, length)
    room = z.new_empty(rows * min(several, n - 1) * length)
    for i in range(n):
        for first in range(i + 1, n, several):
            others = z[first : first + several]
            count = len(others)
            back = z.new_full((count, length), -torch.inf)
            for part in range(0, length, rows):
                mine = z[i, part : part + rows]
                # torch multiplies many rows with few columns faster than the other way round
                product = room[: count * length * len(mine)].view(-1, len(mine))
                shift = -halves[first : first + several].reshape(-1, 1)
                torch.addmm(shift, others.reshape(-1, width), mine.T, out=product)
                product = product.sub_(halves[i, part : part + rows]).view(count, length, -1)
                best[i, part : part + rows, first : first + count] = product.amax(1).T
                torch.maximum(back, product.amax(2), out=back)
            best[first : first + count, :, i] = back
    nearest = best.mul_(-2).clamp_(min=0)
    patches = z.reshape(n * length, width)
    for j in range(n):
        close = nearest[:, :, j] < _CLOSE
        close[j] = False
        found = close.flatten().nonzero()[:, 0]
        if len(found):
            score, _ = topk_similarity(patches[found], z[j], 1, metric="l2")
            nearest[:, :, j][close] = score[:, 0].neg()
    return nearest.sqrt_()


def rscin(scores: Tensor, features: Tensor, ks: Sequence[int] = (1, 2, 3)) -> Tensor:
    """Smooths picture scores over similar pictures.

    Args:
        scores: [N].
        features: [N, D] global features of the pictures.
        ks: window sizes, the picture itself counted; (1, 2, 3) for MVTec AD and BTAD, (1, 8, 9) for VisA.

    Returns:
        [N]: min-max normalised scores, averaged over the windows.

    Raises:
        ValueError: A window larger than N, or none.
    """
    n = len(scores)
    check_features("rscin", "features", features)
    if not ks or not all(1 <= k <= n for k in ks):
        raise ValueError(f"rscin: windows must lie between 1 and {n}, got {list(ks)}")
    spread = scores.max() - scores.min()
    s = (scores - scores.min()) / spread if spread > 0 else torch.zeros_like(scores)
    similarity, rows = topk_similarity(features, features, max(ks), metric="cosine")
    total = torch.zeros_like(s)
    for k in ks:
        weight = similarity[:, :k].to(s.dtype)
        total += (weight * s[rows[:, :k]]).sum(1) / weight.sum(1)
    return total / len(ks)


def musc(
    layers: Sequence[Tensor],
    features: Tensor | None,
    *,
    rs: Sequence[int] = (1, 3, 5),
    top: float = 0.3,
    ks: Sequence[int] = (1, 2, 3),
    grid: tuple[int, int] | None = None,
    size: int | None = None,
    parts: int = 1,
) -> tuple[Tensor, Tensor]:
    """Scores pictures and their pixels.

    Args:
        layers: per layer patch tokens [N, L, C]; widths may differ, grids may not.
        features: [N, D] global features for `rscin`; None: without that step.
        rs: sides of the neighbourhoods.
        top: as in `mutual_score`.
        ks: as in `rscin`; windows larger than N are left out.
        grid: as in `lnamd`.
        size: side of the upsampled map in pixels; None: the grid as it is.
        parts: the pictures are dealt into this many groups that are scored apart (`divide_num`), which takes memory and
            time down; RsCIN sees them all.

    Returns:
        `(scores [N], maps [N, size, size])`.

    Raises:
        ValueError: No layer, grids that differ, or groups of fewer than two pictures.
    """
    if not layers or any(t.shape[:2] != layers[0].shape[:2] for t in layers):
        raise ValueError(f"musc: layers must share [N, L], got {[list(t.shape) for t in layers]}")
    n, length, _ = layers[0].shape
    if parts < 1 or n // parts < 2:
        raise ValueError(f"musc: {n} pictures cannot be dealt into {parts} groups of at least two")
    total = torch.zeros(
        n, length, dtype=layers[0].dtype if layers[0].dtype == torch.float64 else torch.float32
    )
    for r in rs:
        for tokens in layers:
            z = lnamd(tokens, r, grid=grid)
            for part in range(parts):
                total[part::parts] += mutual_score(z[part::parts], top)
    rows, columns = grid or (round(length**0.5), round(length**0.5))
    maps = (total / (len(rs) * len(layers))).view(n, 1, rows, columns)
    if size is not None:
        maps = F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=True)
    maps = maps[:, 0]
    scores = maps.flatten(1).amax(1)
    if features is not None:
        scores = rscin(scores, features, [k for k in ks if k <= n])
    return scores, maps


@torch.no_grad()
def patch_tokens(
    model: Any, images: Tensor, *, blocks: Sequence[int] | None = None, batch_size: int = 16
) -> list[Tensor]:
    """Reads patch tokens of a CLIP's vision transformer: raw block outputs, class token removed.

    Args:
        model: a `CLIP` with a ViT image tower.
        images: float [N, 3, H, W], normalised; of another size than the model's, positions are resized (bicubic).
        blocks: counted from 0; None: four spread evenly, the last included (5, 11, 17 and 23 of 24). A tower with a
            convolutional stem and fewer than four blocks gives its stem's stages instead, averaged onto the grid of the
            stage that is 1/8 of the picture: its few blocks see a grid too coarse to point at anything.
        batch_size: pictures at once.

    Returns:
        Per layer [N, L, C].

    Raises:
        TypeError: The model has no such tower.
    """
    visual = getattr(model, "visual", None)
    if not isinstance(visual, VisionTransformer):
        raise TypeError(
            f"patch_tokens: expected a CLIP with a vision transformer, got {type(model).__name__}"
        )
    depth = len(visual.transformer.resblocks)
    from_stem = blocks is None and isinstance(visual.conv1, ConvStem) and depth < 4
    if blocks is None:
        blocks = [depth * (i + 1) // 4 - 1 for i in range(4)] if depth >= 4 else list(range(depth))
    collected: list[list[Tensor]] = []
    for part in images.split(batch_size):
        layers = _stem_stages(visual.conv1, part) if from_stem else _block_outputs(visual, part, blocks)
        collected.append(layers)
    return [torch.cat(parts) for parts in zip(*collected, strict=True)]


def _stem_stages(stem: nn.Module, images: Tensor) -> list[Tensor]:
    side = (max(1, images.shape[-2] // 8), max(1, images.shape[-1] // 8))
    stages, x = [], images
    for block in stem.blocks:  # type: ignore[union-attr]
        x = block(x)
        if x.shape[-1] >= side[1]:
            stages.append(F.adaptive_avg_pool2d(x, side).flatten(2).transpose(1, 2))
    return stages


def _block_outputs(visual: VisionTransformer, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    x = visual.conv1(images)
    rows, columns = x.shape[-2:]
    has_class = visual.class_embedding is not None
    positions = visual.positional_embedding[int(has_class) :]
    side = round(len(positions) ** 0.5)
    if (rows, columns) != (side, side):
        square = positions.T.reshape(1, -1, side, side)
        resized = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
        positions = resized.flatten(2)[0].T
    x = x.flatten(2).transpose(1, 2) + positions
    if has_class:
        first = visual.class_embedding + visual.positional_embedding[0]
        x = torch.cat([first.expand(len(x), 1, -1), x], 1)
    x, found = visual.ln_pre(x), {}
    for i, block in enumerate(visual.transformer.resblocks):
        x = block(x)
        if i in blocks:
            found[i] = x[:, int(has_class) :]
    return [found[i] for i in blocks]


@dataclass
class Anomalies:
    """What `MuSc` finds.

    Attributes:
        scores: [N], larger = stranger.
        maps: [N, S, S] per pixel, on one scale for all pictures.
    """

    scores: Tensor
    maps: Tensor


@register_system(
    "MuSc",
    "MuSc: Zero-Shot Industrial Anomaly Classification and Segmentation with Mutual Scoring of the Unlabeled Images",
    "zero-shot anomaly detection method",
)
class MuSc:
    """Anomaly detector for unlabelled pictures of one kind; see the top of this file.

    Args:
        model: a `CLIP` with a vision transformer, or an `Encoder` around one.
        size: side that pictures are resized to (the paper: 518); None: the model's own, four times it for a tower
            with a convolutional stem and few blocks.
        blocks: as in `patch_tokens`.
        rs, top, ks, parts: as in `musc`.
        smooth: whether RsCIN runs.

    Raises:
        TypeError: The model is another one.
    """

    def __init__(
        self,
        model: Any,
        *,
        size: int | None = None,
        blocks: Sequence[int] | None = None,
        rs: Sequence[int] = (1, 3, 5),
        top: float = 0.3,
        ks: Sequence[int] = (1, 2, 3),
        parts: int = 1,
        smooth: bool = True,
    ) -> None:
        encoder = encoder_of(model)
        if not isinstance(encoder, Encoder) or not isinstance(encoder.model, CLIP):
            raise TypeError(f"MuSc: expected a CLIP of this package, got {type(model).__name__}")
        vision = encoder.model.config.vision
        few = vision.stem == "conv" and not vision.is_resnet and int(vision.layers) < 4  # type: ignore[arg-type]
        self.encoder, self.blocks = encoder, blocks
        self.size = size or vision.image_size * (4 if few else 1)
        self.rs, self.top, self.ks, self.parts, self.smooth = rs, top, ks, parts, smooth

    def predict(self, pictures: Tensor) -> Anomalies:
        """Scores uint8 pictures [N, 3, H, W]; all of them together are the reference.

        Raises:
            ValueError: Fewer than two pictures, or another shape.
        """
        from vlmkernels.data.transforms import ImageTransform

        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or len(pictures) < 2:
            raise ValueError(
                f"MuSc: expected uint8 [N, 3, H, W] with N at least 2, got {pictures.dtype} {list(pictures.shape)}"
            )
        vision = self.encoder.model.config.vision
        transform = ImageTransform(self.size, mean=vision.image_mean, std=vision.image_std)
        tokens = patch_tokens(self.encoder.model, transform(pictures), blocks=self.blocks)
        features = self.encoder.images(pictures) if self.smooth else None
        scores, maps = musc(
            tokens, features, rs=self.rs, top=self.top, ks=self.ks, size=self.size, parts=self.parts
        )
        return Anomalies(scores, maps)

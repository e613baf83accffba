# SPDX-License-Identifier: Apache-2.0
"""Random changes to a batch of pictures, as a few tensor operations on the whole batch.

Written for small pictures on a CPU, where a transform per picture and worker processes cost more than the model. The
changes are those between two drawings of the same thing: place, size and tilt, colours, thickness of outlines,
background, missing parts. Left and right are only exchanged where the caller says that it does no harm.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from vlmkernels.data.draws import Draws

_LUMA = (0.299, 0.587, 0.114)
_WARP_CELLS = 4  # control points of the local moves, along a side
_BACKGROUND_CELLS = 3  # of the coloured backgrounds, which fade from one to the next


@dataclass(frozen=True)
class AugmentConfig:
    """How strong `Augment` is. Every field may be 0, which turns that change off.

    Attributes:
        rotate: largest tilt, in degrees.
        zoom: pictures are drawn between ``1 - zoom`` and ``1 + zoom / 2`` of their size.
        stretch: largest change of the ratio of height to width.
        shift: largest move, as a fraction of the side.
        perspective: largest change of the homogeneous coordinate from the centre to an edge.
        warp: largest local move, as a fraction of the side; moves are smooth over a quarter of the picture.
        hue: largest turn around the grey axis, as a fraction of a full turn.
        saturation: colours are scaled by ``1 - saturation`` to ``1 + saturation``.
        contrast: largest relative change of the distance from mid-grey.
        brightness: largest change of brightness, of a range of 1.
        gray: share of pictures without colour.
        lines: share of pictures whose dark lines, or light ones, are thinned or thickened by a pixel.
        outline: share of pictures that get a dark outline (with transparency only).
        background: share of pictures whose background is not plain white (with transparency only).
        blur: share of pictures that are blurred.
        erase: share of pictures in which one rectangle is covered.
        flip: share of pictures that are mirrored, among those that may be.
    """

    rotate: float = 15.0
    zoom: float = 0.3
    stretch: float = 0.15
    shift: float = 0.08
    perspective: float = 0.15
    warp: float = 0.03
    hue: float = 0.04
    saturation: float = 0.4
    contrast: float = 0.3
    brightness: float = 0.15
    gray: float = 0.1
    lines: float = 0.4
    outline: float = 0.15
    background: float = 0.4
    blur: float = 0.2
    erase: float = 0.3
    flip: float = 0.5

    def scaled(self, strength: float) -> AugmentConfig:
        """Returns the same with every change but the flip multiplied by ``strength``; shares stop at 1.

        Raises:
            ValueError: strength is negative, or so large that pictures would turn inside out.
        """
        if not 0 <= strength <= 2:
            raise ValueError(f"AugmentConfig: strength must lie between 0 and 2, got {strength}")
        values = {name: value * strength for name, value in asdict(self).items()}
        shares = ("gray", "lines", "outline", "background", "blur", "erase")
        values |= {name: min(1.0, values[name]) for name in shares}
        return AugmentConfig(**values | {"flip": self.flip if strength else 0.0})


class Augment:
    """Draws new versions of pictures. The same generator state gives the same result, and so do the same `Draws`.

    Args:
        size: side of what comes out, in pixels.
        config: how strong.

    Example:
        >>> augment = Augment(48)
        >>> pictures = torch.zeros(2, 4, 64, 64, dtype=torch.uint8)
        >>> augment(pictures, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 48, 48])
    """

    def __init__(self, size: int, config: AugmentConfig | None = None) -> None:
        if size < 8:
            raise ValueError(f"Augment: size must be at least 8, got {size}")
        self.size = size
        self.config = config or AugmentConfig()

    def __call__(
        self,
        pictures: torch.Tensor,  # [N, 3 or 4, H, W] uint8
        generator: torch.Generator | Draws,
        *,
        may_flip: torch.Tensor | None = None,  # [N] bool
    ) -> torch.Tensor:
        """Changes every picture in its own way.

        Args:
            pictures: [N, 3, H, W] or, with transparency (straight, not premultiplied), [N, 4, H, W]; uint8.
            generator: a CPU generator; or the pictures' own draws, which do not depend on what else is in the batch.
            may_flip: [N] bool, which pictures may be mirrored; None: all.

        Returns:
            [N, 3, size, size] float32 from 0 to 1, on the same device.

        Raises:
            ValueError: the shape or dtype of pictures, the shape of may_flip, or the number of draws is another one.
        """
        if pictures.dim() != 4 or pictures.shape[1] not in (3, 4) or pictures.dtype != torch.uint8:
            raise ValueError(
                "Augment: pictures must be uint8 [N, 3, H, W] or [N, 4, H, W], "
                f"got {pictures.dtype} {list(pictures.shape)}"
            )
        n = pictures.shape[0]
        if may_flip is not None and may_flip.shape != (n,):
            raise ValueError(f"Augment: may_flip must have shape [{n}], got {list(may_flip.shape)}")
        draws = _draws("Augment", generator, n)
        if n == 0:
            return torch.zeros(0, 3, self.size, self.size)
        moved = F.grid_sample(
            _premultiply(pictures), self._grid(draws, may_flip), mode="bilinear", align_corners=False
        )
        moved = self._recolour(moved, draws)
        moved = self._outline(moved, draws)
        out = moved[:, :3] + (1 - moved[:, 3:]) * self._background(draws)
        out = self._lines(out, draws)
        out = self._blur(out, draws)
        out = self._erase(out, draws)
        return out.clamp_(0, 1)

    def _grid(self, draws: Draws, may_flip: torch.Tensor | None) -> torch.Tensor:
        """Where each pixel that comes out is read from, [N, size, size, 2] in -1 to 1."""
        c, n = self.config, len(draws)
        angle = draws.between(math.radians(c.rotate))
        scale = 1 / (1 - c.zoom + 1.5 * c.zoom * draws.uniform())
        stretch = torch.exp(draws.between(c.stretch) / 2)
        mirrored = draws.chance(c.flip)
        if may_flip is not None:
            mirrored &= may_flip.cpu()
        sign = torch.where(mirrored, -1.0, 1.0)
        rows = [
            sign * scale * stretch * angle.cos(),
            -sign * scale * stretch * angle.sin(),
            draws.between(2 * c.shift),
            scale / stretch * angle.sin(),
            scale / stretch * angle.cos(),
            draws.between(2 * c.shift),
            draws.between(c.perspective),
            draws.between(c.perspective),
            torch.ones(n),
        ]
        homography = torch.stack(rows, 1).view(n, 3, 3)

        ticks = (torch.arange(self.size) * 2 + 1) / self.size - 1
        y, x = torch.meshgrid(ticks, ticks, indexing="ij")
        points = torch.stack([x, y, torch.ones_like(x)], -1).view(1, -1, 3)
        mapped = points @ homography.mT
        grid = (mapped[..., :2] / mapped[..., 2:]).view(n, self.size, self.size, 2)
        if c.warp:
            moves = draws.normal(2, _WARP_CELLS, _WARP_CELLS) * c.warp
            smooth = F.interpolate(moves, size=(self.size, self.size), mode="bilinear", align_corners=True)
            grid = grid + smooth.permute(0, 2, 3, 1)
        return grid

    def _recolour(self, rgba: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Hue, saturation, contrast and brightness are one 3 x 4 matrix per picture, applied to premultiplied RGBA."""
        c, n = self.config, rgba.shape[0]
        hue = draws.between(2 * math.pi * c.hue, 1, 1)
        eye, ones = torch.eye(3), torch.full((3, 3), 1 / 3)
        cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
        turn = hue.cos() * eye + (1 - hue.cos()) * ones + hue.sin() * cross
        keep = 1 + draws.between(c.saturation)
        keep = torch.where(draws.chance(c.gray), 0.0, keep).view(n, 1, 1)
        colour = (keep * eye + (1 - keep) * torch.tensor(_LUMA).expand(3, 3)) @ turn
        gain = 1 + draws.between(c.contrast, 1, 1)
        offset = (1 - gain) / 2 + draws.between(c.brightness, 1, 1)
        matrix = torch.cat([gain * colour, offset.expand(n, 3, 1)], 2)
        alpha = rgba[:, 3:]
        rgb = (matrix @ rgba.flatten(2)).view(n, 3, *rgba.shape[2:])
        return torch.cat([torch.minimum(rgb.clamp_(min=0), alpha), alpha], 1)

    def _outline(self, rgba: torch.Tensor, draws: Draws) -> torch.Tensor:
        rows = _rows(draws.chance(self.config.outline))
        shade = 0.25 * draws.uniform(1, 1, 1)[rows]
        if not len(rows):
            return rgba
        alpha = rgba[rows, 3:]
        wide = F.max_pool2d(alpha, 3, 1, 1)
        rgba[rows] = torch.cat([rgba[rows, :3] + (wide - alpha) * shade, wide], 1)
        return rgba

    def _background(self, draws: Draws) -> torch.Tensor:
        """White, one colour, or colours that fade into each other: [N, 3, size, size]."""
        cells = _BACKGROUND_CELLS
        colour, spread = draws.uniform(3, 1, 1), draws.uniform(1, 1, 1).square()
        field = colour + spread * draws.normal(3, cells, cells) / 2
        field[~draws.chance(self.config.background)] = 1.0
        return F.interpolate(
            field.clamp_(0, 1), size=(self.size, self.size), mode="bilinear", align_corners=True
        )

    def _lines(self, rgb: torch.Tensor, draws: Draws) -> torch.Tensor:
        changes = (_thin_dark, _thick_dark, _close_dark, _close_light)
        rows = _rows(draws.chance(self.config.lines))
        kinds = draws.integers(len(changes))[rows]
        for kind, change in enumerate(changes):
            chosen = rows[kinds == kind]
            if len(chosen):
                rgb[chosen] = change(rgb[chosen])
        return rgb

    def _blur(self, rgb: torch.Tensor, draws: Draws) -> torch.Tensor:
        rows, amount = _rows(draws.chance(self.config.blur)), draws.uniform(1, 1, 1)
        if len(rows):
            sharp = rgb[rows]
            soft = F.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False)
            rgb[rows] = sharp.lerp(soft, amount[rows])
        return rgb

    def _erase(self, rgb: torch.Tensor, draws: Draws) -> torch.Tensor:
        rows = _rows(draws.chance(self.config.erase))
        side, place, colour = (draws.uniform(*shape)[rows] for shape in ((2,), (2,), (3, 1, 1)))
        if not len(rows):
            return rgb
        side = self.size * (0.15 + 0.3 * side)
        start = (self.size - side) * place
        at = torch.arange(self.size)
        inside = (at >= start[..., None]) & (at < (start + side)[..., None])  # [n, 2, size]
        cover = inside[:, 0, :, None] & inside[:, 1, None, :]
        rgb[rows] = torch.where(cover[:, None], colour, rgb[rows])
        return rgb


def blend_styles(
    first: torch.Tensor,  # [N, 4, H, W] uint8
    second: torch.Tensor,  # [N, 4, H, W] uint8
    generator: torch.Generator | Draws,
    *,
    share: float = 0.3,
) -> torch.Tensor:
    """Mixes two drawings of the same things: all over, or each on its side of a straight cut.

    Args:
        first: [N, C, H, W] uint8, returned as it is where a picture is not mixed.
        second: [N, C, H, W] uint8, the same things drawn otherwise.
        generator: a CPU generator, or the pictures' own draws.
        share: share of pictures that are mixed.

    Returns:
        [N, C, H, W] uint8.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"blend_styles: second must have first's shape {list(first.shape)}, got {list(second.shape)}"
        )
    draws = _draws("blend_styles", generator, first.shape[0])
    rows = _rows(draws.chance(share))
    angle, place, even, cut = draws.uniform(4, 1, 1)[rows].unbind(1)
    if not len(rows):
        return first
    angle, even, cut = 2 * math.pi * angle, 0.2 + 0.6 * even, cut < 0.5
    height, width = first.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    side = x * angle.cos() + y * angle.sin() > 0.3 * (2 * place - 1)
    weight = torch.where(cut, side.float(), even)[:, None]
    # Premultiplied, so that the colour of what is transparent in one drawing does not bleed into the other.
    mixed = _premultiply(first[rows]).lerp(_premultiply(second[rows]), weight)
    alpha = mixed[:, 3:]
    mixed = torch.cat([mixed[:, :3] / alpha.clamp(min=1 / 255), alpha], 1)
    out = first.clone()
    out[rows] = mixed.mul_(255).round_().clamp_(0, 255).to(torch.uint8)[:, : first.shape[1]]
    return out


def _premultiply(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 RGB or straight RGBA to float32 RGBA from 0 to 1, colours times opacity."""
    x = pictures.float().mul_(1 / 255)
    if x.shape[1] == 3:
        return torch.cat([x, torch.ones_like(x[:, :1])], 1)
    x[:, :3] *= x[:, 3:]
    return x


def _draws(function: str, generator: torch.Generator | Draws, count: int) -> Draws:
    if not isinstance(generator, Draws):
        return Draws.from_generator(generator, count)
    if len(generator) != count:
        raise ValueError(f"{function}: generator must have draws for {count} pictures, got {len(generator)}")
    return generator


def _rows(chosen: torch.Tensor) -> torch.Tensor:
    return chosen.nonzero()[:, 0]


def _thin_dark(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def _thick_dark(x: torch.Tensor) -> torch.Tensor:
    return -F.max_pool2d(-x, 3, 1, 1)


def _close_dark(x: torch.Tensor) -> torch.Tensor:
    """Removes dark lines of up to two pixels and leaves larger areas as they are."""
    return _thick_dark(_thin_dark(x))


def _close_light(x: torch.Tensor) -> torch.Tensor:
    """Removes light lines of up to two pixels."""
    return _thin_dark(_thick_dark(x))

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
    """Draws new versions of pictures. The same generator state gives the same result.

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
        generator: torch.Generator,
        *,
        may_flip: torch.Tensor | None = None,  # [N] bool
    ) -> torch.Tensor:
        """Changes every picture in its own way.

        Args:
            pictures: [N, 3, H, W] or, with transparency (straight, not premultiplied), [N, 4, H, W]; uint8.
            generator: a CPU generator.
            may_flip: [N] bool, which pictures may be mirrored; None: all.

        Returns:
            [N, 3, size, size] float32 from 0 to 1, on the same device.

        Raises:
            ValueError: the shape or dtype of pictures, or the shape of may_flip, is another one.
        """
        if pictures.dim() != 4 or pictures.shape[1] not in (3, 4) or pictures.dtype != torch.uint8:
            raise ValueError(
                "Augment: pictures must be uint8 [N, 3, H, W] or [N, 4, H, W], "
                f"got {pictures.dtype} {list(pictures.shape)}"
            )
        n = pictures.shape[0]
        if may_flip is not None and may_flip.shape != (n,):
            raise ValueError(f"Augment: may_flip must have shape [{n}], got {list(may_flip.shape)}")
        if n == 0:
            return torch.zeros(0, 3, self.size, self.size)
        moved = F.grid_sample(
            _premultiply(pictures), self._grid(n, generator, may_flip), mode="bilinear", align_corners=False
        )
        moved = self._recolour(moved, generator)
        moved = self._outline(moved, generator)
        out = moved[:, :3] + (1 - moved[:, 3:]) * self._background(n, generator)
        out = self._lines(out, generator)
        out = self._blur(out, generator)
        out = self._erase(out, generator)
        return out.clamp_(0, 1)

    def _grid(self, n: int, generator: torch.Generator, may_flip: torch.Tensor | None) -> torch.Tensor:
        """Where each pixel that comes out is read from, [N, size, size, 2] in -1 to 1."""
        c = self.config
        angle = _between(n, generator, math.radians(c.rotate))
        scale = 1 / (1 - c.zoom + 1.5 * c.zoom * torch.rand(n, generator=generator))
        stretch = torch.exp(_between(n, generator, c.stretch) / 2)
        mirrored = torch.rand(n, generator=generator) < c.flip
        if may_flip is not None:
            mirrored &= may_flip.cpu()
        sign = torch.where(mirrored, -1.0, 1.0)
        rows = [
            sign * scale * stretch * angle.cos(),
            -sign * scale * stretch * angle.sin(),
            _between(n, generator, 2 * c.shift),
            scale / stretch * angle.sin(),
            scale / stretch * angle.cos(),
            _between(n, generator, 2 * c.shift),
            _between(n, generator, c.perspective),
            _between(n, generator, c.perspective),
            torch.ones(n),
        ]
        homography = torch.stack(rows, 1).view(n, 3, 3)

        ticks = (torch.arange(self.size) * 2 + 1) / self.size - 1
        y, x = torch.meshgrid(ticks, ticks, indexing="ij")
        points = torch.stack([x, y, torch.ones_like(x)], -1).view(1, -1, 3)
        mapped = points @ homography.mT
        grid = (mapped[..., :2] / mapped[..., 2:]).view(n, self.size, self.size, 2)
        if c.warp:
            moves = torch.randn(n, 2, _WARP_CELLS, _WARP_CELLS, generator=generator) * c.warp
            smooth = F.interpolate(moves, size=(self.size, self.size), mode="bilinear", align_corners=True)
            grid = grid + smooth.permute(0, 2, 3, 1)
        return grid

    def _recolour(self, rgba: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Hue, saturation, contrast and brightness are one 3 x 4 matrix per picture, applied to premultiplied RGBA."""
        c, n = self.config, rgba.shape[0]
        hue = _between(n, generator, 2 * math.pi * c.hue).view(n, 1, 1)
        eye, ones = torch.eye(3), torch.full((3, 3), 1 / 3)
        cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
        turn = hue.cos() * eye + (1 - hue.cos()) * ones + hue.sin() * cross
        keep = 1 + _between(n, generator, c.saturation)
        keep = torch.where(torch.rand(n, generator=generator) < c.gray, 0.0, keep).view(n, 1, 1)
        colour = (keep * eye + (1 - keep) * torch.tensor(_LUMA).expand(3, 3)) @ turn
        gain = 1 + _between(n, generator, c.contrast).view(n, 1, 1)
        offset = (1 - gain) / 2 + _between(n, generator, c.brightness).view(n, 1, 1)
        matrix = torch.cat([gain * colour, offset.expand(n, 3, 1)], 2)
        alpha = rgba[:, 3:]
        rgb = (matrix @ rgba.flatten(2)).view(n, 3, *rgba.shape[2:])
        return torch.cat([torch.minimum(rgb.clamp_(min=0), alpha), alpha], 1)

    def _outline(self, rgba: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        rows = _share(rgba.shape[0], generator, self.config.outline)
        if not len(rows):
            return rgba
        shade = 0.25 * torch.rand(len(rows), 1, 1, 1, generator=generator)
        alpha = rgba[rows, 3:]
        wide = F.max_pool2d(alpha, 3, 1, 1)
        rgba[rows] = torch.cat([rgba[rows, :3] + (wide - alpha) * shade, wide], 1)
        return rgba

    def _background(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """White, one colour, or colours that fade into each other: [N, 3, size, size]."""
        cells = _BACKGROUND_CELLS
        colour = torch.rand(n, 3, 1, 1, generator=generator)
        spread = torch.rand(n, 1, 1, 1, generator=generator).square()
        field = colour + spread * torch.randn(n, 3, cells, cells, generator=generator) / 2
        plain = torch.rand(n, generator=generator) >= self.config.background
        field[plain] = 1.0
        return F.interpolate(
            field.clamp_(0, 1), size=(self.size, self.size), mode="bilinear", align_corners=True
        )

    def _lines(self, rgb: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        rows = _share(rgb.shape[0], generator, self.config.lines)
        kinds = torch.randint(4, (len(rows),), generator=generator)
        for kind, change in enumerate((_thin_dark, _thick_dark, _close_dark, _close_light)):
            chosen = rows[kinds == kind]
            if len(chosen):
                rgb[chosen] = change(rgb[chosen])
        return rgb

    def _blur(self, rgb: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        rows = _share(rgb.shape[0], generator, self.config.blur)
        if len(rows):
            sharp = rgb[rows]
            soft = F.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False)
            rgb[rows] = sharp.lerp(soft, torch.rand(len(rows), 1, 1, 1, generator=generator))
        return rgb

    def _erase(self, rgb: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        rows = _share(rgb.shape[0], generator, self.config.erase)
        n = len(rows)
        if not n:
            return rgb
        side = self.size * (0.15 + 0.3 * torch.rand(n, 2, generator=generator))
        start = (self.size - side) * torch.rand(n, 2, generator=generator)
        at = torch.arange(self.size)
        inside = (at >= start[..., None]) & (at < (start + side)[..., None])  # [n, 2, size]
        cover = inside[:, 0, :, None] & inside[:, 1, None, :]
        colour = torch.rand(n, 3, 1, 1, generator=generator)
        rgb[rows] = torch.where(cover[:, None], colour, rgb[rows])
        return rgb


def blend_styles(
    first: torch.Tensor,  # [N, 4, H, W] uint8
    second: torch.Tensor,  # [N, 4, H, W] uint8
    generator: torch.Generator,
    *,
    share: float = 0.3,
) -> torch.Tensor:
    """Mixes two drawings of the same things: all over, or each on its side of a straight cut.

    Args:
        first: [N, C, H, W] uint8, returned as it is where a picture is not mixed.
        second: [N, C, H, W] uint8, the same things drawn otherwise.
        generator: a CPU generator.
        share: share of pictures that are mixed.

    Returns:
        [N, C, H, W] uint8.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"blend_styles: second must have first's shape {list(first.shape)}, got {list(second.shape)}"
        )
    rows = _share(first.shape[0], generator, share)
    n, height, width = len(rows), first.shape[-2], first.shape[-1]
    if not n:
        return first
    angle = 2 * math.pi * torch.rand(n, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    side = x * angle.cos() + y * angle.sin() > _between(n, generator, 0.3).view(n, 1, 1)
    even = 0.2 + 0.6 * torch.rand(n, 1, 1, generator=generator)
    cut = torch.rand(n, 1, 1, generator=generator) < 0.5
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


def _between(n: int, generator: torch.Generator, limit: float) -> torch.Tensor:
    return limit * (2 * torch.rand(n, generator=generator) - 1)


def _share(n: int, generator: torch.Generator, share: float) -> torch.Tensor:
    return (torch.rand(n, generator=generator) < share).nonzero()[:, 0]


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

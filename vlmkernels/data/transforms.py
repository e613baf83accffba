# SPDX-License-Identifier: Apache-2.0
"""Image preprocessing: Pillow pictures or uint8 tensors to the normalised floats an image tower takes."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["OPENAI_MEAN", "OPENAI_STD", "ImageTransform", "transform_for"]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_RESIZES = ("crop", "squash", "squash_crop")
_ALIGN_RATIO = 346 / 289


class ImageTransform:
    """Resize, crop, scale to [0, 1], subtract mean, divide by deviation.

    In evaluation the short side is resized to `size` (bicubic, Pillow, as OpenAI's preprocessing) and the
    centre cropped. In training a random square of `scale` of the shorter side's square is cut and resized,
    the paper's only augmentation.

    Args:
        size: Side S of the output.
        mean: Per channel.
        std: Per channel.
        train: Random crop instead of the centre.
        scale: Range of the area of the random crop, as a share of the largest square.
        background: Colour under transparent pixels; None drops the alpha channel, as OpenAI's preprocessing
            does.
        resize: "crop" as above; "squash" resizes both sides to `size`, whatever the ratio (SigLIP); "squash_crop"
            resizes both sides to 346 / 289 of it, bilinearly, and crops the centre (ALIGN).

    Raises:
        ValueError: If size, std, scale or resize is out of range.
    """

    def __init__(
        self,
        size: int,
        *,
        mean: tuple[float, float, float] = OPENAI_MEAN,
        std: tuple[float, float, float] = OPENAI_STD,
        train: bool = False,
        scale: tuple[float, float] = (0.9, 1.0),
        background: tuple[int, int, int] | None = (255, 255, 255),
        resize: str = "crop",
    ) -> None:
        if resize not in _RESIZES:
            raise ValueError(f"ImageTransform: resize must be one of {list(_RESIZES)}, got {resize!r}")
        if size < 1:
            raise ValueError(f"ImageTransform: size must be positive, got {size}")
        if min(std) <= 0.0:
            raise ValueError(f"ImageTransform: std must be positive, got {std}")
        if not 0.0 < scale[0] <= scale[1] <= 1.0:
            raise ValueError(f"ImageTransform: scale must be a range within (0, 1], got {scale}")
        self.size = size
        self.mean = mean
        self.std = std
        self.train = train
        self.scale = scale
        self.background = background
        self.resize = resize

    def __repr__(self) -> str:
        return f"ImageTransform(size={self.size}, train={self.train})"

    def __call__(self, image: Image.Image | Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Transforms one picture, or a batch of equally sized ones.

        Args:
            image: A Pillow picture of any mode, or a uint8 tensor `[3, H, W]` or `[B, 3, H, W]`. A batch that
                is already S x S takes a path without Pillow, on whichever device it is.
            generator: Source of the random crops; None = torch's default one.

        Returns:
            float32 `[3, S, S]`, or `[B, 3, S, S]` for a batch.

        Raises:
            TypeError: If the input is neither a Pillow picture nor a uint8 tensor.
            ValueError: If a tensor has another shape.
        """
        if isinstance(image, Tensor):
            return self._tensor(image, generator)
        if not hasattr(image, "convert"):
            raise TypeError(
                f"ImageTransform: expected a Pillow picture or a uint8 tensor, got {type(image).__name__}"
            )
        return self.normalize(_to_tensor(self._resize(self._flatten(image), generator)).unsqueeze(0))[0]

    def normalize(self, images: Tensor) -> Tensor:
        """Turns uint8 `[..., 3, H, W]` into normalised float32 of the same shape."""
        shape = (3, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (images.to(torch.float32) / 255.0 - mean) / std

    def denormalize(self, images: Tensor) -> Tensor:
        """Turns normalised `[..., 3, H, W]` back into uint8, for showing."""
        shape = (3, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return ((images.float() * std + mean) * 255.0).round().clamp(0, 255).to(torch.uint8)

    def _tensor(self, image: Tensor, generator: torch.Generator | None) -> Tensor:
        if image.dtype != torch.uint8:
            raise TypeError(f"ImageTransform: tensors must be uint8, got {image.dtype}")
        if image.ndim not in (3, 4) or image.shape[-3] != 3:
            raise ValueError(
                f"ImageTransform: tensors must be [3, H, W] or [B, 3, H, W], got {list(image.shape)}"
            )
        batch = image if image.ndim == 4 else image.unsqueeze(0)
        if not len(batch):
            return self.normalize(batch.new_zeros(0, 3, self.size, self.size))
        if tuple(batch.shape[-2:]) == (self.size, self.size):
            out = self.normalize(batch)
            out = self._random_crop(out, generator) if self.train else out
        else:
            resized = [_to_tensor(self._resize(_to_picture(one), generator)) for one in batch]
            out = self.normalize(torch.stack(resized)).to(image.device)
        return out if image.ndim == 4 else out[0]

    def _random_crop(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Random squares of a batch of squares, resampled bilinearly in one call."""
        count = len(images)
        area, across, down = _uniform((3, count), generator).to(images.device)
        side = (self.scale[0] + (self.scale[1] - self.scale[0]) * area).sqrt()
        theta = images.new_zeros(count, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = side
        # In grid_sample's coordinates, [-1, 1] over the picture, a crop of side s may move by 1 - s either
        # way.
        theta[:, 0, 2] = (2 * across - 1) * (1 - side)
        theta[:, 1, 2] = (2 * down - 1) * (1 - side)
        grid = F.affine_grid(theta, [count, 3, self.size, self.size], align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _flatten(self, image: Image.Image) -> Image.Image:
        """Brings any mode to RGB, transparent pixels over the background."""
        from PIL import Image

        if self.background is not None and (
            image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        ):
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, (*self.background, 255))
            image = Image.alpha_composite(canvas, image)
        return image.convert("RGB")

    def _resize(self, image: Image.Image, generator: torch.Generator | None) -> Image.Image:
        from PIL import Image

        width, height = image.size
        short = min(width, height)
        if self.train:
            area, across, down = _uniform((3,), generator).tolist()
            side = short * (self.scale[0] + (self.scale[1] - self.scale[0]) * area) ** 0.5
            left, top = across * (width - side), down * (height - side)
            box = (left, top, left + side, top + side)
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if self.resize == "squash":
            return image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self.resize == "squash_crop":
            side = round(self.size * _ALIGN_RATIO)
            first = (side - self.size) // 2
            image = image.resize((side, side), Image.Resampling.BILINEAR)
            return image.crop((first, first, first + self.size, first + self.size))
        # Rounding as torchvision's Resize and CenterCrop do, so that features agree with those of other
        # programs.
        resized = (int(self.size * width / short), int(self.size * height / short))
        if resized != image.size:
            image = image.resize(resized, Image.Resampling.BICUBIC)
        left, top = (round((extent - self.size) / 2.0) for extent in resized)
        return image.crop((left, top, left + self.size, top + self.size))


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator)


def _to_tensor(image: Image.Image) -> Tensor:
    """RGB picture to uint8 `[3, H, W]`."""
    width, height = image.size
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(height, width, 3).permute(2, 0, 1).contiguous()


def _to_picture(image: Tensor) -> Image.Image:
    from PIL import Image

    pixels = image.permute(1, 2, 0).contiguous().cpu()
    raw = ctypes.string_at(pixels.data_ptr(), pixels.numel())
    return Image.frombytes("RGB", (image.shape[2], image.shape[1]), raw)


def transform_for(model: nn.Module, train: bool = False) -> ImageTransform:
    """Returns the preprocessing that belongs to a model: its image size, mean and deviation.

    Args:
        model: A model of `vk.models` with an image tower.
        train: Random crops instead of the centre.

    Raises:
        TypeError: If the model has no image tower's configuration.
    """
    vision = getattr(getattr(model, "config", None), "vision", None)
    if vision is None:
        raise TypeError(f"transform_for: expected a model with config.vision, got {type(model).__name__}")
    return ImageTransform(
        vision.image_size,
        mean=vision.image_mean,
        std=vision.image_std,
        train=train,
        resize=getattr(model, "image_resize", "crop"),
    )

# SPDX-License-Identifier: Apache-2.0
"""Checks that the models share: of configurations, of images and of token ids."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor


def freeze_lists(config: Any) -> None:
    """Turns lists among a frozen dataclass's fields into tuples: JSON and users give lists, hashing wants tuples."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            object.__setattr__(config, field.name, tuple(value))


def require_positive(config: Any, *names: str) -> None:
    """Raises ValueError where one of the named fields is not a positive number."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{type(config).__name__}: {name} must be positive, got {getattr(config, name)}")


def require_one_of(config: Any, **allowed: tuple[str, ...]) -> None:
    """Raises ValueError where a field is none of its allowed values."""
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"{type(config).__name__}: {name} must be one of {list(values)}, got {getattr(config, name)!r}"
            )


def require_share(config: Any, *names: str) -> None:
    """Raises ValueError where one of the named fields does not lie in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(
                f"{type(config).__name__}: {name} must lie in [0, 1), got {getattr(config, name)}"
            )


def check_ids(owner: str, ids: Tensor, limit: int) -> None:
    """Raises ValueError or TypeError where ids are not int32 or int64 [B, L] with L from 1 to `limit`."""
    if ids.ndim != 2 or not 1 <= ids.shape[1] <= limit:
        raise ValueError(f"{owner}: ids must be [B, L] with L from 1 to {limit}, got {list(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{owner}: ids must be int32 or int64, got {ids.dtype}")


def check_images(owner: str, images: Tensor, size: int | None, channels: int = 3) -> None:
    """Raises ValueError or TypeError where images are not floating [B, channels, size, size] (None: any size)."""
    side = "S" if size is None else size
    wrong_size = size is not None and tuple(images.shape[2:]) != (size, size)
    if images.ndim != 4 or images.shape[1] != channels or wrong_size:
        raise ValueError(f"{owner}: images must be [B, {channels}, {side}, {side}], got {list(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"{owner}: images must be floating point and normalised, got {images.dtype}")

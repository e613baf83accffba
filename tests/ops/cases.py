# SPDX-License-Identifier: Apache-2.0
"""What every op is tried at: sizes, memory layouts, values, and the attention calls that each backend must serve.

A backend is tried at these rows by name; what it refuses is a committed list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Tiles are powers of two on every device, so one below, at and above them; primes; the lengths of real encoders
#: (ViT-B/32 50, text 77, ViT-B/16 197, ViT-L/14 257, at 336 pixels 577).
SIZES = (0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 50, 63, 64, 65, 77, 127, 128, 129, 197, 257, 577)

#: Sizes for tests that try pairs of them, or that differentiate numerically.
FEW_SIZES = (0, 1, 3, 17, 50)

#: Odd multiples of 8 included; 72 is SigLIP's, 80 and 88 those of the ViT-H and ViT-g towers, 104 ViT-bigG's.
HEAD_DIMS = (8, 16, 24, 32, 40, 48, 64, 72, 80, 88, 96, 104, 112, 128, 160, 192, 256)


def sliced(x: Tensor) -> Tensor:
    """`x` inside a larger tensor of NaN, its first element at an odd offset: a read beside it shows."""
    larger = x.new_full([size + 3 for size in x.shape], float("nan") if x.is_floating_point() else 1)
    view = larger[tuple(slice(1, 1 + size) for size in x.shape)]
    return view.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """`x` with its first dimension next to last in memory (for `[B, L, D]`: stored as `[L, B, D]`)."""
    return x.movedim(0, -2).contiguous().movedim(-2, 0) if x.ndim > 2 else x.t().contiguous().t()


def every_other(x: Tensor) -> Tensor:
    """`x` with NaN between the elements of its last dimension."""
    return torch.stack([x, torch.full_like(x, float("nan") if x.is_floating_point() else 1)], dim=-1)[..., 0]


def expanded(x: Tensor) -> Tensor:
    """The first entry of `x` repeated along the first dimension with stride 0 (other values than `x`)."""
    return x[:1].expand_as(x) if x.shape[0] > 0 else x


#: name: contiguous tensor -> a tensor of the same shape that lies otherwise; tests compare against its `.contiguous()`.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": sliced,
    "transposed": transposed,
    "every_other": every_other,
    "expanded": expanded,
}


def fill(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A tensor of the given kind of values.

    Args:
        kind: "normal"; "constant"; "zero"; "huge" (squares just fit the dtype's range over 64 terms); "tiny" (normal
            numbers whose squares are not); "nan" or "-inf" (normal, and the first entry's first element is that).
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    finfo = torch.finfo(dtype)
    if kind == "constant":
        x = torch.full(shape, 0.5, dtype=torch.float64)
    elif kind == "zero":
        x = torch.zeros(shape, dtype=torch.float64)
    elif kind == "huge":
        # float16 and bfloat16 are summed in float32, but results come back in their own range
        x = x.clamp(-4, 4) * (finfo.max**0.5 / 64)
    elif kind == "tiny":
        x = x * (finfo.tiny**0.75)
    elif kind in ("nan", "-inf") and x.numel():
        x.view(-1)[0] = float(kind)
    elif kind != "normal":
        raise ValueError(f"fill: unknown kind {kind!r}")
    return x.to(dtype)


VALUES = ("normal", "constant", "zero", "huge", "tiny")


@dataclass(frozen=True)
class AttentionCase:
    """One call of `vk.attention`.

    Attributes:
        B, Lq, Lk, H, Hk, D: sizes; Lk and Hk default to Lq and H.
        bias: leading sizes of the bias: "" none, "BH", "1H", "B1" or "11".
        key_mask: mask a third of the keys, and all of the last batch entry's.
    """

    B: int
    Lq: int
    H: int
    D: int
    Lk: int = -1
    Hk: int = -1
    bias: str = ""
    key_mask: bool = False
    is_causal: bool = False

    def __str__(self) -> str:
        flags = [f"bias{self.bias}" * bool(self.bias), "mask" * self.key_mask, "causal" * self.is_causal]
        sizes = f"B{self.B} L{self.Lq}x{self.keys} H{self.H}/{self.key_heads} D{self.D}"
        return " ".join([sizes, *filter(None, flags)])

    @property
    def keys(self) -> int:
        return self.Lq if self.Lk < 0 else self.Lk

    @property
    def key_heads(self) -> int:
        return self.H if self.Hk < 0 else self.Hk

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """q, k, v and, where the case has one, bias: the differentiable arguments."""
        B, Lk, Hk = self.B, self.keys, self.key_heads
        shapes = {"q": (B, self.Lq, self.H, self.D), "k": (B, Lk, Hk, self.D), "v": (B, Lk, Hk, self.D)}
        if self.bias:
            first = B if self.bias[0] == "B" else 1
            shapes["bias"] = (first, self.H if self.bias[1] == "H" else 1, self.Lq, Lk)
        tensors = {name: fill("normal", s, dtype, seed + i) for i, (name, s) in enumerate(shapes.items())}
        if self.bias and tensors["bias"].numel() > 1:
            # one hidden score, and one query of the first entry and head that sees nothing
            tensors["bias"][0, 0, -1, -1] = float("-inf")
            tensors["bias"][0, 0, 0] = float("-inf")
        return tensors

    def options(self) -> dict[str, Any]:
        """The other arguments."""
        options: dict[str, Any] = {"is_causal": self.is_causal}
        if self.key_mask:
            visible = torch.arange(self.B * self.keys).reshape(self.B, self.keys) % 3 != 1
            if self.B > 1:
                visible[-1] = False
            options["key_mask"] = visible
        return options


ATTENTION = (
    *(AttentionCase(2, length, 2, 16) for length in SIZES if length <= 129),
    *(AttentionCase(1, length, 2, 64) for length in (197, 257, 577)),
    *(AttentionCase(2, 17, 2, width) for width in HEAD_DIMS),
    AttentionCase(0, 5, 2, 16),
    AttentionCase(1, 1, 1, 8),
    # cross attention
    AttentionCase(2, 50, 2, 32, Lk=77),
    AttentionCase(2, 77, 2, 32, Lk=50),
    AttentionCase(3, 1, 4, 40, Lk=197),
    AttentionCase(2, 5, 2, 16, Lk=0),
    AttentionCase(2, 0, 2, 16, Lk=5),
    # grouped heads
    AttentionCase(2, 33, 6, 24, Hk=2),
    AttentionCase(2, 17, 8, 16, Lk=31, Hk=1, is_causal=True),
    # causal, with as many, more and fewer keys than queries
    AttentionCase(2, 77, 2, 64, is_causal=True),
    AttentionCase(2, 16, 2, 16, Lk=33, is_causal=True),
    AttentionCase(2, 33, 2, 16, Lk=16, is_causal=True),
    AttentionCase(2, 3, 2, 16, Lk=1, is_causal=True),
    # masks and biases
    AttentionCase(3, 50, 2, 64, key_mask=True),
    AttentionCase(3, 17, 4, 16, Lk=31, Hk=2, key_mask=True, is_causal=True),
    *(AttentionCase(2, 17, 2, 16, Lk=18, bias=bias) for bias in ("BH", "1H", "B1", "11")),
    AttentionCase(2, 65, 4, 32, bias="1H", is_causal=True),
    AttentionCase(3, 50, 4, 72, Hk=2, bias="BH", key_mask=True, is_causal=True),
)

# SPDX-License-Identifier: Apache-2.0
"""The accuracy rule of every op: against float64, at most 1.2 x the error of eager torch in the same dtype.

Where eager happens to be nearly exact, 4 ulp of the largest result are allowed instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR = 1.2
ULPS = 4


def worst_error(results: Tensor | Sequence[Tensor], exact: Tensor | Sequence[Tensor]) -> float:
    """Largest absolute difference over all elements of one tensor or of several draws; NaN where one is NaN."""
    pairs = zip(_as_list(results), _as_list(exact), strict=True)
    errors = [(r.double() - e.double()).abs().max().item() for r, e in pairs if e.numel()]
    return float("nan") if any(math.isnan(e) for e in errors) else max(errors, default=0.0)


def ulp(x: float, dtype: torch.dtype) -> float:
    """Distance of the numbers of `dtype` around `x`."""
    finfo = torch.finfo(dtype)
    return finfo.eps * 2.0 ** math.floor(math.log2(max(abs(x), finfo.tiny)))


def assert_as_accurate(
    ours: Tensor | Sequence[Tensor],
    eager: Tensor | Sequence[Tensor],
    exact: Tensor | Sequence[Tensor],
    what: str = "result",
    *,
    at_least: float = 0.0,
) -> None:
    """Fail unless `ours` obeys the rule; an error up to `at_least` is allowed in any case.

    Several draws of one problem are judged by the worst error of each side, because on a single small problem eager
    is sometimes exact by luck.
    """
    for mine, reference in zip(_as_list(ours), _as_list(exact), strict=True):
        shapes = f"shape {list(mine.shape)}, expected {list(reference.shape)}"
        assert mine.shape == reference.shape, f"{what}: {shapes}"
        assert torch.isfinite(mine).all(), f"{what}: not finite"
    dtype = _as_list(ours)[0].dtype
    largest = max((e.abs().max().item() for e in _as_list(exact) if e.numel()), default=0.0)
    allowed = max(FACTOR * worst_error(eager, exact), ULPS * ulp(largest, dtype), at_least)
    error = worst_error(ours, exact)
    eagers = f"eager's {worst_error(eager, exact):.3e}"
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} ({eagers})"


def rms_error(results: Tensor | Sequence[Tensor], exact: Tensor | Sequence[Tensor]) -> float:
    """Root of the mean squared difference over all elements of all draws."""
    pairs = zip(_as_list(results), _as_list(exact), strict=True)
    squares = torch.cat([(r.double() - e.double()).square().flatten() for r, e in pairs])
    return squares.mean().sqrt().item() if squares.numel() else 0.0


def assert_typically_as_accurate(
    ours: Tensor | Sequence[Tensor],
    eager: Tensor | Sequence[Tensor],
    exact: Tensor | Sequence[Tensor],
    what: str = "result",
    *,
    at_least: float = 0.0,
) -> None:
    """Fail unless `ours` obeys the rule in the mean, and its worst element is within four times eager's worst.

    For gradients of large products, where both errors are sums of many roundings: the mean over all elements compares
    the two programs, while the ratio of the two worst of some hundred independent roundings is mostly chance (a wrong
    element is wrong by orders of magnitude). Where eager is nearly exact, a mean error of 1 ulp (`at_least`, if that
    is more) and a worst one of 4 are allowed.
    """
    dtype = _as_list(ours)[0].dtype
    largest = max((e.abs().max().item() for e in _as_list(exact) if e.numel()), default=0.0)
    floor = max(ulp(largest, dtype), at_least)
    mean, eager_mean = rms_error(ours, exact), rms_error(eager, exact)
    worst, eager_worst = worst_error(ours, exact), worst_error(eager, exact)
    assert mean <= max(FACTOR * eager_mean, floor), f"{what}: mean error {mean:.3e}, eager's {eager_mean:.3e}"
    assert worst <= max(4 * eager_worst, ULPS * floor), (
        f"{what}: worst error {worst:.3e}, eager's {eager_worst:.3e}"
    )


def _as_list(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)

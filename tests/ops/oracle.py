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
) -> None:
    """Fail unless `ours` obeys the rule.

    Several draws of one problem are judged by the worst error of each side, because on a single small problem eager
    is sometimes exact by luck.
    """
    for mine, reference in zip(_as_list(ours), _as_list(exact), strict=True):
        shapes = f"shape {list(mine.shape)}, expected {list(reference.shape)}"
        assert mine.shape == reference.shape, f"{what}: {shapes}"
        assert torch.isfinite(mine).all(), f"{what}: not finite"
    dtype = _as_list(ours)[0].dtype
    largest = max((e.abs().max().item() for e in _as_list(exact) if e.numel()), default=0.0)
    allowed = max(FACTOR * worst_error(eager, exact), ULPS * ulp(largest, dtype))
    error = worst_error(ours, exact)
    eagers = f"eager's {worst_error(eager, exact):.3e}"
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} ({eagers})"


def _as_list(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)

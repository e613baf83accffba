# SPDX-License-Identifier: Apache-2.0
"""The accuracy rule of every op: against a float64 reference, at most 1.2 x the error of eager torch in the same dtype.

Where eager happens to be nearly exact, 4 ulp of the largest result are allowed instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR = 1.2
ULPS = 4


def worst_error(results: Tensor | Sequence[Tensor], exact: Tensor | Sequence[Tensor]) -> float:
    """Largest absolute difference over all elements of one tensor or of several draws; NaN where one is NaN."""
    pairs = zip(_as_list(results), _as_list(exact), strict=True)
    return max(((r.double() - e.double()).abs().max().item() if e.numel() else 0.0 for r, e in pairs), default=0.0)


def assert_as_accurate(
    ours: Tensor | Sequence[Tensor],
    eager: Tensor | Sequence[Tensor],
    exact: Tensor | Sequence[Tensor],
    what: str = "result",
) -> None:
    """Fail unless `ours` obeys the rule. Several draws of one problem are judged by the worst error of each side,
    because on a single small problem eager is sometimes exact by luck."""
    for mine, reference in zip(_as_list(ours), _as_list(exact), strict=True):
        assert mine.shape == reference.shape, f"{what}: shape {list(mine.shape)}, expected {list(reference.shape)}"
        assert torch.isfinite(mine).all(), f"{what}: not finite"
    dtype = _as_list(ours)[0].dtype
    largest = max((e.abs().max().item() for e in _as_list(exact) if e.numel()), default=0.0)
    allowed = max(FACTOR * worst_error(eager, exact), ULPS * torch.finfo(dtype).eps * largest)
    error = worst_error(ours, exact)
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} (eager's {worst_error(eager, exact):.3e})"


def _as_list(x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)

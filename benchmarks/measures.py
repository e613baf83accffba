# SPDX-License-Identifier: Apache-2.0
"""Times of calls, what is said of a list of them, and the distance of two results."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], Any], rounds: int, *, warmup: int = 1) -> float:
    """Median of `rounds` calls after `warmup` untimed ones."""
    for _ in range(warmup):
        call()
    return statistics.median(seconds(call) for _ in range(rounds))


def spread(values: Sequence[float]) -> float:
    """Interquartile range over median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def versus(ours: Sequence[float], peer: Sequence[float], unit: str) -> dict[str, float]:
    """Figures of a row: medians of the two in `unit`, their spreads, and the ratio of the medians, peer / ours.

    `ratio_spread` is that of the ratios of neighbouring calls: what slows both at once does not widen it.
    """
    ours_median, peer_median = statistics.median(ours), statistics.median(peer)
    return {
        unit: ours_median,
        "spread": spread(ours),
        f"peer_{unit}": peer_median,
        "peer_spread": spread(peer),
        "ratio": peer_median / ours_median,
        "ratio_spread": spread([p / o for p, o in zip(peer, ours, strict=True)]),
        "rounds": len(ours),
    }


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative distance of two results, as vectors. Timing two programs that compute different things says nothing."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def extra_mebibytes(call: Callable[[], Any]) -> float | None:
    """What a call adds to the resident memory at its highest, in MiB; None where the system cannot reset its peak.

    Outputs count, inputs do not. Free memory goes back to the system first, else the call could hide in it.
    """
    if sys.platform != "linux":
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
    except OSError:
        return None
    before = _kibibytes("VmRSS")
    call()
    return (_kibibytes("VmHWM") - before) / 1024


def _kibibytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

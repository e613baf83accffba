# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules as functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Returns the factor on the learning rate: a straight line up, then half a cosine down.

    Args:
        step: from 0 to ``steps - 1``; later steps get the floor.
        steps: how many there are in all.
        warmup: how many of them lead up to 1; at most all.
        floor: the factor at the end.

    Raises:
        ValueError: steps is not positive, or warmup or floor is out of range.

    Example:
        >>> [round(warmup_cosine(s, steps=6, warmup=2), 3) for s in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.25, 0.0]
    """
    if steps < 1:
        raise ValueError(f"warmup_cosine: steps must be positive, got {steps}")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup_cosine: warmup must lie between 0 and steps ({steps}), got {warmup}")
    if not 0 <= floor <= 1:
        raise ValueError(f"warmup_cosine: floor must lie between 0 and 1, got {floor}")
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

# SPDX-License-Identifier: Apache-2.0
"""The learning rate's shape."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from vlmkernels.train.schedule import warmup_cosine


def test_rises_in_a_straight_line_then_falls_to_the_floor() -> None:
    factors = [warmup_cosine(step, steps=100, warmup=10, floor=0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[99] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert warmup_cosine(500, steps=100, warmup=10, floor=0.1) == pytest.approx(0.1)


def test_halfway_down_is_the_middle() -> None:
    assert warmup_cosine(50, steps=101, warmup=0) == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 2])
def test_short_runs_have_finite_factors(steps: int) -> None:
    for warmup in range(steps + 1):
        assert all(math.isfinite(warmup_cosine(s, steps=steps, warmup=warmup)) for s in range(steps))


@pytest.mark.parametrize(
    ("wrong", "name"), [({"steps": 0, "warmup": 0}, "steps"), ({"steps": 5, "warmup": 6}, "warmup")]
)
def test_nonsense_is_refused(wrong: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"warmup_cosine: {name}"):
        warmup_cosine(0, **wrong)

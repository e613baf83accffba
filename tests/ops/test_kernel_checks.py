# SPDX-License-Identifier: Apache-2.0
"""The checks of the CPU kernels would notice what they look for."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import GuardedAllocations, Inside, guarded, run

from vlmkernels.ops._library import registered_ops


def test_the_guard_pages_are_really_there() -> None:
    assert (
        run("from kernel_checks import guarded; import torch; print(guarded(torch.ones(3)).sum().item())")
        == "3.0\n"
    )
    with pytest.raises(AssertionError, match="exit status -"):
        run("from kernel_checks import touch_a_guard_page; touch_a_guard_page()")


def test_a_guarded_copy_is_equal() -> None:
    x = torch.randn(5, 7).t()
    assert torch.equal(guarded(x), x)
    assert guarded(x).is_contiguous()
    assert guarded(torch.empty(0, 3)).shape == (0, 3)
    assert guarded(None) is None


def test_what_an_implementation_issues_is_noted() -> None:
    op = registered_ops()["linear"]
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    arguments = (x, weight, None, None, None, None, "cpu")
    with Inside({op: lambda x, weight, *rest: torch.mm(x, weight.t())}) as mode:
        x + 1  # outside
        op(*arguments)
    assert mode.ours == [op]
    assert mode.inside == ["t", "mm"]
    with Inside({}), pytest.raises(KeyError):
        op(*arguments)


def test_what_an_implementation_allocates_is_guarded() -> None:
    op = registered_ops()["linear"]
    x = torch.ones(2, 3)
    with GuardedAllocations({op: lambda x, *rest: torch.empty_like(x).copy_(x)}) as mode:
        result = op(x, x, None, None, None, None, "cpu")
    assert mode.count == 1
    assert torch.equal(result, x)

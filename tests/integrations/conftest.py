# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the drop-ins' tests: the packages they stand in for, and routing that does not depend on kernels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import ULPS, assert_typically_as_accurate, ulp
from peers.loading import import_open_clip
from torch import Tensor, nn

from vlmkernels.integrations import _attend


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every call of a drop-in goes to our attention, whatever backend this machine has; the list of those calls."""
    calls: list[dict[str, Any]] = []

    def serves(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> bool:
        calls.append({"q": q, "k": k, **options})
        return True

    monkeypatch.setattr(_attend, "kernel_serves", serves)
    return calls


@pytest.fixture
def unserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of a drop-in has a kernel: all of them end in torch's own function."""
    monkeypatch.setattr(_attend, "kernel_serves", lambda *args, **options: False)


def _import(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"needs {name}")


@pytest.fixture(scope="session")
def transformers(open_clip_or_none: ModuleType | None) -> ModuleType:
    return _import("transformers")


@pytest.fixture(scope="session")
def timm(open_clip_or_none: ModuleType | None) -> ModuleType:
    return _import("timm")


@pytest.fixture(scope="session")
def faiss() -> ModuleType:
    return _import("faiss")


@pytest.fixture(scope="session")
def open_clip_or_none() -> ModuleType | None:
    """First of all: it makes torchvision, which the others may import, load beside any build of torch."""
    return import_open_clip()


@pytest.fixture(scope="session")
def open_clip(open_clip_or_none: ModuleType | None) -> ModuleType:
    if open_clip_or_none is None:
        pytest.skip("needs open_clip and torchvision")
    return open_clip_or_none


#: Models of slightly different parameters that a comparison pools: on a single small problem either side may be exact
#: by luck.
DRAWS = 4


def variant(model: nn.Module, dtype: torch.dtype, draw: int) -> nn.Module:
    """A copy of a float32 model with every parameter scaled a little, in another dtype."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1 + draw / 16)
    return twin.to(dtype)


def assert_same_training(
    run: Callable[[torch.dtype, bool, int], Sequence[Tensor]], what: str = "gradients"
) -> None:
    """`run(dtype, ours, draw)` gives a few tensors: ours must be as near to float64 as the original's are.

    Each tensor is judged on its own scale; gradients that ought to vanish (biases of keys) on that of the largest.
    As everywhere, 4 ulp of the largest element are allowed in any case.
    """
    ours, theirs, exact = [], [], []
    for draw in range(DRAWS):
        tensors = [x.double() for x in run(torch.float64, False, draw)]
        largest = max(x.abs().max().item() for x in tensors)
        scales = [max(x.abs().max().item(), 1e-2 * largest) for x in tensors]
        assert len(tensors) > 0
        for target, values in (
            (exact, tensors),
            (theirs, run(torch.float32, False, draw)),
            (ours, run(torch.float32, True, draw)),
        ):
            target += [x / s for x, s in zip(values, scales, strict=True)]
    assert_typically_as_accurate(ours, theirs, exact, what, at_least=ULPS * ulp(1.0, torch.float32))


@pytest.fixture
def same_training() -> Callable[..., None]:
    return assert_same_training


@pytest.fixture
def varied() -> Callable[..., nn.Module]:
    return variant


@pytest.fixture
def ignored_warnings() -> Any:
    """For making models of other packages, which warn about their own future."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

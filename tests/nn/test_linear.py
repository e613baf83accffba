# SPDX-License-Identifier: Apache-2.0
"""`vk.nn.Linear`: torch's layer in everything but the product, which is the tile engine's where that is faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlmkernels as vk
from vlmkernels.nn import linear as module
from vlmkernels.ops import dispatch
from vlmkernels.ops.linear import outruns_torch


@pytest.fixture
def served_from_16_rows(monkeypatch) -> None:
    """`vk.linear` runs on a kernel for float32 and 16 rows or more, and on nothing else."""
    monkeypatch.setitem(dispatch._backends, "linear", [])
    few = "too few rows, or not float32"
    dispatch.register_backend(
        "linear",
        "cpu",
        lambda call: [] if call.facts["rows"] >= 16 and call.dtype == torch.float32 else [few],
    )


@pytest.mark.usefixtures("served_from_16_rows")
def test_the_dispatcher_decides() -> None:
    x, weight = torch.randn(4, 4, 32), torch.randn(8, 32)
    assert outruns_torch(x, weight)
    assert not outruns_torch(x[:3], weight)
    assert not outruns_torch(x.bfloat16(), weight.bfloat16())
    assert not outruns_torch(x.double(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not outruns_torch(x, weight)


@pytest.mark.usefixtures("served_from_16_rows")
def test_transforms_and_compiled_code_stay_with_torch() -> None:
    layer, x = vk.nn.Linear(32, 8), torch.randn(5, 20, 32)
    mapped = torch.func.vmap(layer)(x)
    torch.testing.assert_close(mapped, F.linear(x, layer.weight, layer.bias))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mapped)


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_torchs(monkeypatch, bias: bool) -> None:
    twin, layer = nn.Linear(40, 24, bias=bias), vk.nn.Linear(40, 24, bias=bias)
    layer.load_state_dict(twin.state_dict())
    calls = []
    monkeypatch.setattr(module, "outruns_torch", lambda x, weight: calls.append(x) or True)
    x = torch.randn(3, 50, 40)
    for of_layer, of_twin in zip(_run(layer, x), _run(twin, x), strict=True):
        torch.testing.assert_close(of_layer, of_twin)
    assert len(calls) == 1


def _run(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    return [out, *torch.autograd.grad(out.square().mean(), [x, *layer.parameters()])]

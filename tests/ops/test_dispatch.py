# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend: priorities, reasons, named backends, what is logged."""

from __future__ import annotations

import logging

import pytest
import torch

from vlmkernels.ops import dispatch
from vlmkernels.ops.dispatch import Call, choose, reasons_against, register_backend, registered_backends

CALL = Call("cpu", torch.float32, {"width": 64}, product_bytes=4 * 2**20)


@pytest.fixture(autouse=True)
def _no_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_backends", {})
    monkeypatch.setattr(dispatch, "_warned", set())


def able(call: Call) -> list[str]:
    return []


def narrow(call: Call) -> list[str]:
    return [] if call.facts["width"] <= 32 else [f"widths above 32 are not built (got {call.facts['width']})"]


def test_reference_serves_what_no_backend_serves() -> None:
    assert choose("op", CALL, None) == "reference"
    register_backend("op", "cpu", narrow)
    assert choose("op", CALL, None) == "reference"
    assert choose("op", CALL, "reference") == "reference"


def test_the_first_able_backend_in_order_of_priority_is_chosen() -> None:
    register_backend("op", "triton", able)
    register_backend("op", "cuda", narrow, priority=10)
    register_backend("op", "cpu", able, priority=5)
    assert registered_backends("op") == ["cuda", "cpu", "triton", "reference"]
    assert choose("op", CALL, None) == "cpu"
    assert choose("op", Call("cpu", torch.float32, {"width": 8}), None) == "cuda"


def test_ops_do_not_share_backends() -> None:
    register_backend("other", "cpu", able)
    assert registered_backends("op") == ["reference"]
    assert choose("op", CALL, None) == "reference"


def test_a_named_backend_that_can_serve_is_chosen_whatever_its_priority() -> None:
    register_backend("op", "cuda", able, priority=10)
    register_backend("op", "triton", able)
    assert choose("op", CALL, "triton") == "triton"


def test_a_named_backend_that_cannot_serve_is_an_error_with_the_reasons() -> None:
    register_backend("op", "cpu", lambda call: ["first reason", "second reason"])
    with pytest.raises(
        NotImplementedError,
        match=r"^vk\.op: backend 'cpu' cannot serve this call: first reason; second reason$",
    ):
        choose("op", CALL, "cpu")
    with pytest.raises(NotImplementedError, match=r"backend 'cuda' .*: there is no cuda kernel for this op"):
        choose("op", CALL, "cuda")


@pytest.mark.parametrize("backend", ["fast", "", "torch"])
def test_only_public_names_can_be_asked_for(backend: str) -> None:
    register_backend("op", "torch", able)
    with pytest.raises(ValueError, match=r"^vk\.op: backend must be None or one of \('reference', .*, got"):
        choose("op", CALL, backend)


def test_an_internal_choice_can_be_the_default() -> None:
    register_backend("op", "torch", able)
    assert choose("op", CALL, None) == "torch"


def test_a_backend_that_is_no_default_serves_when_named() -> None:
    register_backend("op", "cpu", able, not_default=narrow)
    assert choose("op", CALL, None) == "reference"
    assert choose("op", CALL, "cpu") == "cpu"
    assert choose("op", Call("cpu", torch.float32, {"width": 8}), None) == "cpu"


def test_reasons_against_is_empty_for_what_can_serve() -> None:
    register_backend("op", "cpu", narrow)
    assert reasons_against("op", "cpu", CALL) == ["widths above 32 are not built (got 64)"]
    assert reasons_against("op", "cpu", Call("cpu", torch.float32, {"width": 8})) == []
    assert reasons_against("op", "reference", CALL) == []
    assert reasons_against("op", "cuda", CALL) == ["there is no cuda kernel for this op"]


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_backend_is_registered_once(name: str) -> None:
    register_backend("op", "cpu", able)
    with pytest.raises(ValueError, match=f"op already has a backend '{name}'"):
        register_backend("op", name, able)


def test_inside_a_transform_only_the_reference_serves() -> None:
    register_backend("op", "cpu", able)
    seen: list[str] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(choose("op", CALL, None))
        seen.extend(reasons_against("op", "cpu", CALL))
        return x.sum()

    torch.vmap(function)(torch.ones(2, 3))
    torch.func.grad(function)(torch.ones(3))
    assert seen[0] == seen[2] == "reference"
    assert "torch.func transform" in seen[1]
    assert "torch.func transform" in seen[3]
    assert choose("op", CALL, None) == "cpu"


def test_choice_is_traced_by_the_compiler() -> None:
    register_backend("op", "cpu", narrow)

    def function(x: torch.Tensor) -> torch.Tensor:
        name = choose("op", Call(x.device.type, x.dtype, {"width": x.shape[-1]}, 4 * x.numel()), None)
        return x + 1 if name == "cpu" else x - 1

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for width in (8, 64):
        x = torch.zeros(2, width)
        assert torch.equal(compiled(x), function(x))
    batched = torch.compile(torch.vmap(function), fullgraph=True, backend="eager")
    assert torch.equal(batched(torch.zeros(2, 8)), torch.full((2, 8), -1.0))


def test_a_costly_fallback_warns_once_per_op(caplog: pytest.LogCaptureFixture) -> None:
    register_backend("op", "cpu", narrow)
    with caplog.at_level(logging.INFO, logger="vlmkernels"):
        for _ in range(3):
            choose("op", CALL, None)
        choose("other", CALL, None)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "vk.op runs on the reference, which writes the whole product (4.0 MiB here)" in caplog.messages[0]
    assert "cpu: widths above 32 are not built (got 64)" in caplog.messages[0]
    assert "no other backend is registered" in caplog.messages[1]


def test_a_cheap_fallback_is_logged_for_who_debugs(caplog: pytest.LogCaptureFixture) -> None:
    register_backend("op", "cpu", narrow)
    cheap = Call("cpu", torch.float32, {"width": 64})
    with caplog.at_level(logging.DEBUG, logger="vlmkernels"):
        choose("op", cheap, None)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "widths above 32" in caplog.messages[0]


def test_naming_the_reference_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="vlmkernels"):
        choose("op", CALL, "reference")
    assert not caplog.records

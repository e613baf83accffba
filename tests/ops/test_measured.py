# SPDX-License-Identifier: Apache-2.0
"""Defaults by committed results: classes of shapes, what `dispatch` makes of a table, and how rows become one.

The rows and tables here are invented.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import choose_defaults
import pytest
import torch

import vlmkernels as vk
from vlmkernels.ops import _attention_library, dispatch, measured
from vlmkernels.ops.dispatch import Call

ATTENTION: dict[str, Any] = {
    "head_dim": 64,
    "value_dim": 64,
    "heads": 12,
    "key_heads": 12,
    "queries": 197,
    "keys": 197,
    "dense_last": True,
    "bias": False,
    "bias_grad": False,
    "key_mask": False,
    "is_causal": False,
    "dropout": False,
    "return_lse": False,
    "gradient": False,
}
CLASS = "bfloat16 head 64 keys<=208"


def attention(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **facts: Any) -> Call:
    return Call(device, dtype, {**ATTENTION, **facts})


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An empty table that a test fills, read on a Hopper card."""
    table: dict[str, Any] = {}
    monkeypatch.setattr(measured, "_TABLE", table)
    monkeypatch.setattr(measured, "_architecture", lambda: "sm_90")
    return table


# Classes.


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({}, CLASS),
        ({"keys": 208, "queries": 208}, CLASS),
        ({"keys": 209, "queries": 209}, "bfloat16 head 64 keys<=288"),
        ({"keys": 5000, "queries": 5000}, "bfloat16 head 64 keys>4096"),
        ({"is_causal": True, "gradient": True}, f"{CLASS} causal gradient"),
        ({"key_mask": True}, f"{CLASS} key_mask"),
        ({"bias": True}, None),
        ({"key_heads": 4}, None),
        ({"queries": 1}, None),
        ({"return_lse": True}, None),
    ],
    ids=str,
)
def test_classes_of_attention(facts: dict[str, Any], name: str | None) -> None:
    assert measured.shape_class("attention", attention(**facts)) == name


def test_an_op_without_classes_has_none() -> None:
    assert measured.shape_class("attention_varlen", attention()) is None


SEEN: dict[str, Any] = {
    "clip_loss": lambda: vk.clip_loss(*torch.randn(2, 5, 8).unbind(0), 10.0),
    "siglip_loss": lambda: vk.siglip_loss(*torch.randn(2, 5, 8).unbind(0), 10.0, -10.0),
    "info_nce": lambda: vk.info_nce(*torch.randn(2, 5, 8).unbind(0), 10.0),
    "linear_cross_entropy": lambda: vk.linear_cross_entropy(
        torch.randn(5, 8), torch.randn(7, 8), torch.arange(5)
    ),
    "attention": lambda: vk.attention(*torch.randn(3, 2, 5, 2, 8).unbind(0)),
    "linear": lambda: vk.linear(torch.randn(3, 8), torch.randn(4, 8)),
    "quantized_linear": lambda: vk.quantized_linear(
        torch.randn(3, 32).half(), vk.quantize_weight(torch.randn(4, 32), "w8a8")
    ),
    "topk_similarity": lambda: vk.topk_similarity(torch.randn(2, 8), torch.randn(9, 8), 3),
    "zero_shot": lambda: vk.zero_shot(torch.randn(2, 8), torch.randn(9, 8)),
}


@pytest.mark.parametrize("op", SEEN)
def test_the_facts_of_real_calls_have_a_class(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    dispatch.registered_backends(op)
    for backend in dispatch._backends[op]:
        monkeypatch.setattr(backend, "reasons", lambda call: calls.append(call) or ["watched"])  # type: ignore[func-returns-value]
    SEEN[op]()
    assert calls and measured.shape_class(op, calls[0])


# What dispatch makes of a table.


def test_nothing_is_measured_in_an_empty_table(table: dict[str, Any]) -> None:
    assert measured.fastest("attention", attention()) is None
    assert measured.unless_fastest("attention", "cuda")(attention()) == [measured.UNMEASURED]


def test_a_winner_is_the_default_on_its_architecture_alone(
    table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    table["attention"] = {"sm_90": {CLASS: "cuda"}}
    not_default = measured.unless_fastest("attention", "cuda")
    assert not_default(attention()) == []
    assert not_default(attention(keys=300, queries=300)) == [measured.UNMEASURED]
    assert not_default(attention(dtype=torch.float16)) == [measured.UNMEASURED]
    assert not_default(attention(device="cpu")) == [measured.UNMEASURED]
    assert "cuda faster" in measured.unless_fastest("attention", "other")(attention())[0]
    monkeypatch.setattr(measured, "_architecture", lambda: "sm_80")
    assert not_default(attention()) == [measured.UNMEASURED]


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if kernels of every kind could run here."""
    for backend in dispatch._backends["attention"]:
        if backend.name in ("cuda", "triton"):
            monkeypatch.setattr(backend, "reasons", lambda call: [])
    monkeypatch.setattr(_attention_library, "_available", lambda name: True)


@pytest.mark.parametrize("winner", ["cuda", "torch_flash", "torch_cudnn", None])
def test_dispatch_takes_the_winner_and_else_triton(
    winner: str | None, table: dict[str, Any], able: None
) -> None:
    if winner:
        table["attention"] = {"sm_90": {CLASS: winner}}
    assert dispatch.choose("attention", attention(), None) == (winner or "triton")
    assert dispatch.choose("attention", attention(), "triton") == "triton"


def test_a_library_kernel_serves_no_gradient_and_no_option(table: dict[str, Any], able: None) -> None:
    table["attention"] = {
        "sm_90": dict.fromkeys((CLASS, f"{CLASS} gradient", f"{CLASS} key_mask"), "torch_cudnn")
    }
    assert dispatch.choose("attention", attention(gradient=True), None) == "triton"
    assert dispatch.choose("attention", attention(key_mask=True), None) == "triton"
    against = _attention_library.reasons("torch_cudnn")
    assert against(attention(gradient=True)) == ["its backward pass is not deterministic"]
    assert against(attention(head_dim=136, value_dim=136))[0].startswith(
        "head dims are multiples of 8 up to 128"
    )
    assert against(attention(device="cpu")) == ["it serves cuda tensors, not cpu"]


@pytest.mark.parametrize("name", [_attention_library.FLASH, _attention_library.CUDNN])
def test_a_library_kernel_gets_heads_first_and_gives_lengths_first(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = torch.randn(3, 2, 5, 3, 8).unbind(0)

    def op(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, scale: float
    ) -> tuple[torch.Tensor]:
        causal = rest[-2]
        return (torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale),)

    stand_in = type(
        "Aten", (), {f"_scaled_dot_product_{kind}_attention": staticmethod(op) for kind in ("flash", "cudnn")}
    )
    monkeypatch.setattr(torch.ops, "aten", stand_in)
    out = _attention_library.forward(name, q, k, v, True, 0.3)
    monkeypatch.undo()
    torch.testing.assert_close(out, vk.attention(q, k, v, is_causal=True, scale=0.3, backend="reference"))
    assert out.is_contiguous()


# From rows to a table.


def row(backend: str, ms: float | None = None, case: str = "one", **more: Any) -> dict[str, Any]:
    figures = {"failed": "it fell"} if ms is None else {"ms": ms, "spread": 0.01}
    common = {"op": "attention", "class": CLASS, "backend": backend, "arch": "sm_90", "machine": "card"}
    return {"name": f"{case} {backend}", **common, **figures, **more}


def chosen(*rows: dict[str, Any]) -> str | None:
    table = choose_defaults.choose(rows)
    return table["attention"]["sm_90"][CLASS]["fastest"] if table else None


def test_the_faster_kernel_wins_by_a_margin() -> None:
    assert chosen(row("triton", 1.0), row("cuda", 0.8)) == "cuda"
    assert chosen(row("triton", 1.0), row("cuda", 0.98)) is None
    assert chosen(row("triton", 0.8), row("cuda", 1.0)) is None


def test_it_must_win_every_row_of_the_class() -> None:
    first = (row("triton", 1.0), row("cuda", 0.5))
    assert chosen(*first, row("triton", 1.0, "two"), row("cuda", 1.01, "two")) == "cuda"
    assert chosen(*first, row("triton", 1.0, "two"), row("cuda", 1.1, "two")) is None
    assert chosen(*first, row("triton", 1.0, "two"), row("cuda", None, "two")) is None
    assert chosen(*first, row("triton", 1.0, "two")) is None


def test_a_kernel_whose_rival_failed_has_beaten_nobody() -> None:
    assert chosen(row("triton", None), row("cuda", 0.8)) is None


def test_a_library_kernel_is_chosen_by_the_name_that_dispatch_has() -> None:
    library = {
        "others_ms": {"SDPA cudnn": 0.5, "SDPA default": 0.4},
        "library": {"SDPA cudnn": "torch_cudnn"},
    }
    assert chosen(row("triton", 1.0, **library), row("cuda", 0.8, **library)) == "torch_cudnn"


def test_rows_become_a_file_and_the_file_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, file = tmp_path / "results", tmp_path / "measured.json"
    (results / "card").mkdir(parents=True)
    rows = [row("triton", 1.0), row("cuda", 0.8), {"name": "a row of a processor", "ratio": 1.0}]
    (results / "card" / "attention.json").write_text(json.dumps({"machine": {}, "rows": rows}))
    arguments = ["--results", str(results), "--table", str(file)]
    assert choose_defaults.main([*arguments, "--write"]) == 0
    assert "cuda, 1.25x the next, 1 rows" in capsys.readouterr().out
    assert measured.read_table(file) == {"attention": {"sm_90": {CLASS: "cuda"}}}
    assert choose_defaults.main([*arguments, "--check"]) == 0
    (results / "card" / "attention.json").write_text(json.dumps({"machine": {}, "rows": rows[:1]}))
    assert choose_defaults.main([*arguments, "--check"]) == 1


def test_the_shipped_table_is_what_the_committed_rows_decide() -> None:
    assert choose_defaults.main(["--check"]) == 0

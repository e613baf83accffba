# SPDX-License-Identifier: Apache-2.0
"""Linear layers on Triton, without a GPU: what a call launches, and that it compiles for both architectures.

Values are tested in `interpreted_linear.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_device import check_resources

import vlmkernels as vk
from vlmkernels.ops import _triton
from vlmkernels.ops.dispatch import Call, choose

pytestmark = pytest.mark.skipif(
    _triton.missing is not None or _triton.INTERPRETED,
    reason="needs triton, and kernels that are not interpreted",
)

#: One of every class of the tables: tokens of a batch of pictures, of a few, of a caption, of one step of decoding.
ROWS = (50432, 512, 77, 4)
#: Bytes of a thread's registers that may move to memory in the epilogue that multiplies by an activation's slope: it
#: runs once per tile, behind a loop that keeps everything.
SLOPE_SPILL = 256


def launches_of(
    arch: int,
    scheme: str,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backward: bool = False,
    activation: str | None = "gelu",
    k: int = 768,
    n: int = 3072,
) -> list[Any]:
    """What a layer (of "float", or quantized) launches on an architecture."""
    from triton_compile import as_if_on_a_gpu, distinct

    from vlmkernels.ops.triton._launch import recording

    # one row in memory, however many the call is told
    x = torch.zeros(1, k, dtype=dtype).expand(rows, k).requires_grad_(backward)
    bias = torch.zeros(n, dtype=dtype)
    weight = torch.zeros(n, k)
    with as_if_on_a_gpu(monkeypatch), recording(arch) as launches:
        if scheme == "float":
            y = vk.linear(x, weight.to(dtype), bias, activation=activation, backend="triton")
        else:
            qweight = vk.quantize_weight(weight, scheme)
            y = vk.quantized_linear(x, qweight, bias, activation=activation, backend="triton")
        if backward:
            y.backward(y.detach())
    return distinct(launches)


def names(launches: list[Any]) -> list[str]:
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]


def test_a_call_is_as_few_launches_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(launches_of(80, "float", 512, monkeypatch)) == ["linear"]
    assert names(launches_of(80, "w8a8", 512, monkeypatch)) == ["quantize_rows", "linear"]
    assert names(launches_of(80, "w4a16", 512, monkeypatch)) == ["linear"]
    assert names(launches_of(80, "w4a16", 1, monkeypatch)) == ["linear", "linear_finish"]


def test_backward_forms_the_product_again_only_for_a_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    def after(**options: Any) -> list[str]:
        return names(launches_of(80, rows=64, monkeypatch=monkeypatch, backward=True, n=64, **options))

    assert after(scheme="float", activation=None) == ["linear"]
    assert after(scheme="float") == ["linear", "linear"]
    assert after(scheme="w8a8", activation=None) == ["quantize_rows", "linear", "dequantize"]


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 4096, 4096), (16, 768, 3072), (64, 4096, 1024)])
def test_few_rows_split_k_by_their_shape_alone(
    rows: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    product, finish = launches_of(80, "w4a16", rows, monkeypatch, k=k, n=n)
    parts, part = finish.constants["PARTS"], product.arguments["part"]
    assert part % product.constants["DEPTH"] == 0
    assert (parts - 1) * part < k <= parts * part
    assert 128 <= product.grid <= 512
    assert product.arguments["out"].shape == (parts, rows, n)


def test_torch_multiplies_where_nothing_is_left_to_fuse() -> None:
    facts = {"activation": None, "x_dtype": torch.bfloat16, "result_dtype": torch.bfloat16}
    from vlmkernels.ops import _linear_triton

    call = Call("cuda", torch.bfloat16, facts)
    assert "nothing left to fuse" in _linear_triton.not_default(call)[0]
    assert _linear_triton.not_default(Call("cuda", torch.bfloat16, {**facts, "activation": "gelu"})) == []
    assert choose("linear", Call("meta", torch.bfloat16, facts), None) == "reference"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("scheme", ["float", "w8a8", "w4a16"])
def test_hot_kernels_compile_and_spill_nothing(
    scheme: str, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resources(launches_of(arch, scheme, ROWS[0], monkeypatch), arch)


def test_fp8_compiles_for_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    check_resources(launches_of(90, "fp8", ROWS[0], monkeypatch), 90)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scheme", ["float", "w8a8", "w8a16", "w4a16", "bf16", "fp8"])
def test_every_tile_compiles(scheme: str, rows: int, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if scheme == "fp8" and arch < 89:
        pytest.skip("e4m3 products need sm_89")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_resources(launches_of(arch, scheme, rows, monkeypatch, dtype), arch)
    check_resources(launches_of(arch, scheme, min(rows, 512), monkeypatch, backward=True), arch, SLOPE_SPILL)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu", "silu", "relu"])
def test_every_activation_compiles(activation: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resources(launches_of(arch, "w8a8", ROWS[0], monkeypatch, activation=activation), arch)


@pytest.mark.slow
def test_every_shape_on_the_interpreter() -> None:
    from triton_device import run_family

    run_family("linear", interpret=True, timeout=3600, marks="slow")

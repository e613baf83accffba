# SPDX-License-Identifier: Apache-2.0
"""Attention on Triton, without a GPU: what a call launches, and that it compiles for both architectures.

Values are tested in `interpreted_attention.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_device import check_resources

import vlmkernels as vk
from vlmkernels.ops import _triton

pytestmark = pytest.mark.skipif(
    _triton.missing is not None or _triton.INTERPRETED,
    reason="needs triton, and kernels that are not interpreted",
)

#: (B, H, L, D) of encoders, and whether causal: what is fast or nothing is.
HOT = [(64, 12, 50, 64), (8, 12, 197, 64), (8, 16, 257, 80), (4, 16, 577, 64), (4, 16, 729, 72)]
#: Beside them: one of every class of width and length of the tables.
OTHER = [
    (2, 8, 77, 64),
    (2, 2, 128, 64),
    (2, 2, 50, 128),
    (2, 2, 577, 128),
    (2, 2, 197, 96),
    (2, 2, 197, 256),
]
#: Bytes of a thread's registers that may move to memory in a kernel that is not hot. Float32 products run on the
#: general pipes, whose operands Triton keeps in registers for the whole width of a head.
WIDE_FLOAT32_SPILL = 4096


def launches_of(
    arch: int,
    shape: tuple[int, int, int, int],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = False,
    key_mask: bool = False,
    **options: Any,
) -> list[Any]:
    """What forward and backward of a packed call launch on an architecture."""
    from triton_compile import as_if_on_a_gpu, distinct

    from vlmkernels.ops.triton._launch import recording

    B, H, L, D = shape
    qkv = torch.zeros(B, L, 3, H, D, dtype=dtype, requires_grad=True)
    if bias:
        options["bias"] = torch.zeros(1, H, L, L, dtype=dtype, requires_grad=True)
    if key_mask:
        options["key_mask"] = torch.ones(B, L, dtype=torch.bool)
    with as_if_on_a_gpu(monkeypatch), recording(arch) as launches:
        vk.attention_qkvpacked(qkv, **options, backend="triton").sum().backward()
    return distinct(launches)


def names(launches: list[Any]) -> list[str]:
    return [launch.kernel.__name__.removeprefix("attention_").removesuffix("_kernel") for launch in launches]


def test_a_call_is_as_few_launches_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = (2, 4, 50, 64), (2, 4, 577, 64)
    assert names(launches_of(80, short, monkeypatch)) == ["forward", "whole"]
    assert names(launches_of(80, long, monkeypatch)) == ["forward", "by_queries", "by_keys"]
    assert names(launches_of(90, long, monkeypatch, bias=True)) == [
        "forward",
        "by_queries",
        "by_keys",
        "bias",
    ]
    assert names(launches_of(90, short, monkeypatch, key_mask=True)) == [
        *("visible_blocks", "forward", "visible_blocks", "whole")
    ]
    assert names(launches_of(90, (2, 4, 257, 64), monkeypatch)) == ["forward", "whole"]


@pytest.mark.parametrize(
    ("width", "parts"),
    [(8, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (88, (64, 32)),
     (96, (64, 32)), (104, (128, 0)), (128, (128, 0)), (136, (256, 0)), (192, (256, 0)), (256, (256, 0))],
)  # fmt: skip
def test_widths_are_cut_instead_of_padded(width: int, parts: tuple[int, int]) -> None:
    from vlmkernels.ops.triton import attention

    assert attention.parts(width) == parts


def test_strides_are_counted_in_vectors_where_they_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for width, unit in ((72, 8), (8, 8), (20, 1), (5, 1)):
        (forward, *_) = launches_of(80, (2, 3, 40, width), monkeypatch)
        assert forward.constants["UNIT"] == unit
        assert forward.arguments["q_strides"][2] * unit == width


def test_packed_gradients_are_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, whole) = launches_of(80, (2, 4, 50, 64), monkeypatch)
    grads = [whole.arguments[name] for name in ("grad_q", "grad_k", "grad_v")]
    assert len({g.untyped_storage().data_ptr() for g in grads}) == 1
    assert all(g.stride() == (50 * 3 * 4 * 64, 3 * 4 * 64, 64, 1) for g in grads)


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_work_above_the_diagonal_or_on_padding(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (forward, *_) = launches_of(80, (2, 4, 257, 64), monkeypatch, is_causal=is_causal)
    assert forward.grid == 2 * 4 * 5
    assert forward.constants["TAIL"] == (64 if is_causal else 16)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", HOT[:1] + HOT[4:], ids=str)
def test_hot_kernels_compile_and_spill_nothing(
    shape: tuple[int, int, int, int], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resources(launches_of(arch, shape, monkeypatch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", [*HOT, *OTHER], ids=str)
def test_every_tile_compiles(
    shape: tuple[int, int, int, int], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resources(launches_of(arch, shape, monkeypatch), arch)
    check_resources(launches_of(arch, shape, monkeypatch, torch.float32), arch, WIDE_FLOAT32_SPILL)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", [(2, 8, 77, 64), (4, 16, 577, 64), (4, 16, 729, 72)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"is_causal": True}, {"key_mask": True}, {"bias": True}, {"dropout_p": 0.1},
     {"is_causal": True, "key_mask": True, "bias": True, "dropout_p": 0.1}],
    ids=str,
)  # fmt: skip
def test_every_option_compiles(
    options: dict[str, Any], shape: tuple[int, int, int, int], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resources(launches_of(arch, shape, monkeypatch, **options), arch, spill=512)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_packed_sequences_compile(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_compile import as_if_on_a_gpu, distinct

    from vlmkernels.ops.triton._launch import recording

    ends = torch.tensor([0, 30, 100], dtype=torch.int32)
    q, k, v = (torch.zeros(100, heads, 72, dtype=torch.float16, requires_grad=True) for heads in (4, 2, 2))
    with as_if_on_a_gpu(monkeypatch), recording(arch) as launches:
        vk.attention_varlen(q, k, v, ends, ends, is_causal=True, backend="triton").sum().backward()
    check_resources(distinct(launches), arch, spill=512)


@pytest.mark.slow
def test_every_case_on_the_interpreter() -> None:
    from triton_device import run_family

    run_family("attention", interpret=True, timeout=3600, marks="slow")

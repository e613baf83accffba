# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the contrastive losses without running them: cubins, registers, memory, refusals."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from contrastive_problems import OPS, SQUARE, make
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton_device import check_resources

from vlmkernels.ops import _library, _triton
from vlmkernels.ops import contrastive as ops

pytestmark = pytest.mark.skipif(
    _triton.missing is not None or _triton.INTERPRETED,
    reason=_triton.missing or "kernels are interpreted here",
)

#: Bytes of a thread's stack that the kernels with a limit of 128 registers may spill to. Without the limit nothing is
#: spilled, but then one program has the multiprocessor to itself, and nothing multiplies during its epilogue.
SPILLED = {
    "_statistics_kernel": 64,
    "_gradients_kernel": 96,
    "_sigmoid_kernel": 16,
    "_combine_kernel": 0,
}


def launches(
    op: str, arch: int, dtype: torch.dtype, *, keep: bool, monkeypatch: Any, d: int = 256
) -> list[Any]:
    """What a call of some 2,000 rows would launch on an architecture."""
    from triton_compile import as_if_on_a_gpu, distinct

    from vlmkernels.ops.triton._launch import recording

    monkeypatch.setattr(ops, "KEEP_BYTES", 2**26 if keep else 0)
    problem = make(op, 256 if keep else 2048, None if op in SQUARE else 512 if keep else 32768, d)
    with as_if_on_a_gpu(monkeypatch), recording(arch) as recorded:
        problem.results(ops, backend="triton", compute_dtype=dtype)
    return distinct(recorded)


@pytest.mark.parametrize("op", ["clip_loss", "siglip_loss"])
def test_kernels_compile_for_sm_90(op, monkeypatch):
    check_resources(
        launches(op, 90, torch.bfloat16, keep=False, monkeypatch=monkeypatch), 90, by_kernel=SPILLED
    )


def test_kernels_compile_for_sm_80(monkeypatch):
    check_resources(
        launches("info_nce", 80, torch.float16, keep=False, monkeypatch=monkeypatch), 80, by_kernel=SPILLED
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_every_configuration_compiles(op, keep, dtype, arch, monkeypatch):
    for d in (256, 260):
        check_resources(
            launches(op, arch, dtype, keep=keep, monkeypatch=monkeypatch, d=d), arch, by_kernel=SPILLED
        )


# Memory, counted on tensors without storage: what a loss allocates, in the order in which it does.


class Memory(TorchDispatchMode):
    """Bytes of storages that are alive, at most, and of the largest one."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._given = {x.untyped_storage()._cdata for x in given}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == _library.NAMESPACE:
            with self:
                return IMPLEMENTATIONS[func](*args)
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                reference, size = StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()
                if reference.cdata in self._given:
                    continue
                self._alive[reference.cdata] = (reference, size)
                self.largest = max(self.largest, size)
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


class Forgetful(list):
    """Launches are not kept, or their tensors would be."""

    def append(self, launch: Any) -> None:
        pass


IMPLEMENTATIONS: dict[Any, Any] = {}


@pytest.fixture
def counted(monkeypatch):
    """`counted(op, N, D)`: extra bytes at most, and the largest tensor, of a loss and its backward on an sm_90."""
    from triton_compile import as_if_on_a_gpu

    from vlmkernels.ops import _contrastive_ops
    from vlmkernels.ops.triton import _launch, contrastive
    from vlmkernels.ops.triton._launch import recording

    IMPLEMENTATIONS.update(
        {
            _contrastive_ops.softmax_contrastive: _contrastive_ops._softmax_impl,
            _contrastive_ops.softmax_contrastive_backward: _contrastive_ops._softmax_backward_impl,
            _contrastive_ops.one_pass_contrastive: _contrastive_ops._one_pass_impl,
            _contrastive_ops.one_pass_contrastive_backward: _contrastive_ops._scaled_impl,
        }
    )
    # Two chunks each way allocate what all do, and a product in place allocates nothing.
    ranges = contrastive._ranges

    def few(*arguments: Any) -> Any:
        return ((batch, rows, cols[:2]) for batch, rows, cols in itertools.islice(ranges(*arguments), 2))

    monkeypatch.setattr(contrastive, "_ranges", few)
    monkeypatch.setattr(contrastive, "add_product", lambda sums, a, b: None)
    monkeypatch.setattr(contrastive, "write_scaled", lambda out, sums, factor: None)

    def count(op: str, n: int, d: int, m: int | None = None, backward: bool = True) -> tuple[int, int]:
        def features(rows: int) -> torch.Tensor:
            return torch.empty((rows, d), dtype=torch.bfloat16, device="meta", requires_grad=backward)

        arguments = [features(n), features(n if m is None else m)]
        if op == "linear_cross_entropy":
            arguments.append(torch.empty(n, dtype=torch.int64, device="meta"))
        else:
            arguments.append(torch.empty((), device="meta"))
        if op == "siglip_loss":
            arguments.append(torch.empty((), device="meta"))
        with as_if_on_a_gpu(monkeypatch), recording(90), Memory(arguments) as memory:
            monkeypatch.setattr(_launch, "_recorded", Forgetful())
            loss = getattr(ops, op)(*arguments, backend="triton")
            if backward:
                loss.backward()
        return memory.peak, memory.largest

    return count


@pytest.mark.parametrize("op", ["clip_loss", "siglip_loss"])
def test_memory_at_65536(op, counted):
    # gradients included: 4 N D of two bytes, and the workspace
    peak, _ = counted(op, 65536, 1024)
    assert peak <= 0.62e9, f"{peak / 1e9:.3f} GB"


def test_memory_of_a_captioning_head(counted):
    peak, _ = counted("linear_cross_entropy", 8192, 768, 49408)
    classes = 49408 * 768
    assert peak <= (4 + 2) * classes + 64 * 2**20 + 4 * 8192 * 768, f"{peak / 1e9:.3f} GB"


@pytest.mark.parametrize("op", ["clip_loss", "siglip_loss"])
def test_a_batch_of_a_million_allocates_no_square(op, counted):
    n, d = 2**20, 64
    for backward in (False, True):
        _, largest = counted(op, n, d, backward=backward)
        assert largest <= 4 * n * d


# What Triton refuses.

REFUSED = {
    "float64": "features and products are float32, bfloat16 or float16, not torch.float64",
    "mps": "it serves cuda tensors, not mps",
    "old": "kernels are for sm_80 and newer, not sm_75",
}


@pytest.mark.parametrize("op", OPS)
def test_what_is_refused_is_this_list(op, monkeypatch):
    from vlmkernels.ops.dispatch import Call, reasons_against

    def against(device: str, dtype: torch.dtype) -> list[str]:
        return reasons_against(op, "triton", Call(device, dtype, {"dtypes": (dtype, dtype), "width": 8}))

    assert against("mps", torch.float32) == [REFUSED["mps"]]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert against("cuda", torch.float32) == [REFUSED["old"]]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert against("cuda", torch.float64) == [REFUSED["float64"]]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert against("cuda", dtype) == []

# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of a TorchScript archive (OpenAI's CLIP files) without loading or running its code.

An archive is a zip with the module tree pickled in `data.pkl` and one raw file per storage. `torch.jit.load`
would compile the archive's code and run its `__setstate__` methods; here a pickle reader that knows five
names builds inert objects, of which only tensors are kept.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_torchscript", "read_torchscript"]

_STORAGE_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip that holds a TorchScript module rather than what `torch.save` writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of the module tree by dotted name, on CPU.

    Raises:
        ValueError: If the archive names anything but modules, tensors and plain containers, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next(
                name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")
            )
            root = pickled.removesuffix("data.pkl")
            with archive.open(pickled) as file:
                module = _reader(archive, root, file).load()
        tensors: dict[str, Tensor] = {}
        _collect(module, "", tensors, set())
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"load_checkpoint: cannot read the tensors of the TorchScript archive {path}: {error}. If you "
            "trust the file, convert it: safetensors.torch.save_file(torch.jit.load(path).state_dict(), new)"
        ) from error
    return tensors


def _collect(module: Any, prefix: str, tensors: dict[str, Tensor], seen: set[int]) -> None:
    # A hostile pickle may contain cycles.
    if id(module) in seen:
        return
    seen.add(id(module))
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        elif type(value).__name__ == "_Module":
            _collect(value, f"{prefix}{name}.", tensors, seen)


def _reader(archive: zipfile.ZipFile, root: str, file: Any) -> pickle.Unpickler:
    """Builds a pickle reader for one archive.

    Everything a pickle can reach is made anew for it, so that a hostile one has nothing of the process to
    change.
    """

    storages: dict[str, Tensor] = {}

    class _Module:
        """Stands for any TorchScript class: attributes, no behaviour."""

    def rebuild_tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        # as_strided refuses what lies outside of the storage.
        return storage.as_strided(tuple(size), tuple(stride), offset).clone()

    def rebuild_list(values: Any) -> Any:
        return values

    class _Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == "__torch__" or module.startswith("__torch__."):
                return _Module
            if module == "torch" and name in _STORAGE_DTYPES:
                return name
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return rebuild_tensor
            if module == "torch.jit._pickle" and name in _LISTS:
                return rebuild_list
            if (module, name) == ("collections", "OrderedDict"):
                return OrderedDict
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")

        def persistent_load(self, pid: Any) -> Tensor:
            if not (
                isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and pid[1] in _STORAGE_DTYPES
            ):
                raise pickle.UnpicklingError(f"it refers to an unknown object {pid!r}")
            _, kind, key, _, _ = pid
            if key not in storages:
                # A bytearray, because torch wants writable memory.
                raw = bytearray(archive.read(f"{root}data/{key}"))
                storages[key] = torch.frombuffer(raw, dtype=_STORAGE_DTYPES[kind]) if raw else torch.empty(0)
            return storages[key]

    return _Reader(file)

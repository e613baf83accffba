# SPDX-License-Identifier: Apache-2.0
"""Importing open_clip beside any build of torch."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import warnings
from types import ModuleType

import torch

_declared: list[torch.library.Library] = []  # torch drops declared operators with the library that holds them


def import_open_clip() -> ModuleType | None:
    """open_clip, or None where it or torchvision is not installed.

    It imports torchvision, whose compiled operators do not load beside every build of torch: declaring them (nothing
    here calls one) lets its Python side import.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or importlib.util.find_spec("open_clip") is None:
        return None
    folder = pathlib.Path(spec.origin).parent
    try:
        for extension in folder.glob("_C*.so"):
            torch.ops.load_library(str(extension))
    except OSError:
        names = {n for f in folder.rglob("*.py") for n in re.findall(r"torchvision::(\w+)", f.read_text())}
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in sorted(names):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor a) -> Tensor")
        _declared.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
    return open_clip

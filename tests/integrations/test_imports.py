# SPDX-License-Identifier: Apache-2.0
"""The drop-ins are there without the packages that they stand in for."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest
import torch

import vlmkernels as vk

PACKAGES = ("faiss", "open_clip", "timm", "transformers")

ABSENT = """
import sys
for name in {packages}:
    sys.modules[name] = None  # importing it raises ImportError
import torch
import vlmkernels as vk
from vlmkernels.integrations import faiss, open_clip, timm, torch as routing, transformers
features = torch.eye(4)
assert open_clip.ClipLoss()(features, features, 100.0).item() < 1e-6
model = torch.nn.MultiheadAttention(32, 4)
report = vk.integrations.convert(model, linear=True)
assert len(report.converted) == 2, report
with routing.sdpa():
    model(*[torch.randn(5, 2, 32)] * 3, need_weights=False)
for function in (transformers.register, lambda: faiss.to_faiss(vk.FlatIndex(3))):
    try:
        function()
    except ImportError as error:
        assert any(name in str(error) for name in {packages}), error
    else:
        raise AssertionError(function)
"""

UNASKED = """
import sys
import vlmkernels.integrations
loaded = [name for name in {packages} if name in sys.modules]
assert not loaded, loaded
"""


@pytest.mark.parametrize("program", [ABSENT, UNASKED], ids=["absent", "unasked"])
def test_packages_are_imported_only_when_asked_for(program):
    result = subprocess.run(
        [sys.executable, "-c", program.format(packages=PACKAGES)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_every_name_is_there():
    from vlmkernels import integrations

    for name in integrations.__all__:
        assert hasattr(integrations, name)
        assert name in dir(integrations)


@pytest.mark.parametrize("name", ["_convert", "faiss", "open_clip", "timm", "torch", "transformers"])
def test_the_examples_run(name):
    module = importlib.import_module(f"vlmkernels.integrations.{name}")
    results = doctest.testmod(module, extraglobs={"torch": torch, "vk": vk})
    assert results.failed == 0
    assert results.attempted > 0 or name in ("faiss", "timm", "transformers")

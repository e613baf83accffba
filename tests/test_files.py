# SPDX-License-Identifier: Apache-2.0
"""Writing files atomically."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

import vlmkernels as vk
from vlmkernels._files import write_atomically, write_text_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text_atomically(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_file_has_the_permissions_of_a_new_file_whoever_writes_it(tmp_path: Path) -> None:
    def private(temporary: Path) -> None:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))

    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "private", private)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "private")]
    assert modes[0] == modes[1]


def test_a_saved_model_has_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    vk.models.save_pretrained(vk.models.create("emoji-clip"), tmp_path / "model", dtype=torch.float16)
    plain = (tmp_path / "plain").stat().st_mode
    assert all(path.stat().st_mode == plain for path in (tmp_path / "model").iterdir())

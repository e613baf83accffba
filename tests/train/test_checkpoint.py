# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: everything comes back, writing is atomic, nothing foreign is accepted."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vlmkernels._files import write_text_atomically
from vlmkernels.train.checkpoint import load_checkpoint, read_progress, save_checkpoint
from vlmkernels.train.optim import Lion, WeightAverage


def _trained(optimizer_class: type, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, WeightAverage]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    average = WeightAverage(model, 0.9)
    for _ in range(3):
        _one_step(model, optimizer, average)
    return model, optimizer, average


def _one_step(model: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage) -> None:
    loss = model(torch.randn(8, 3)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    average.update(model)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, Lion])
def test_continuing_gives_the_same_bits(tmp_path: Path, optimizer_class: type) -> None:
    model, optimizer, average = _trained(optimizer_class)
    save_checkpoint(
        tmp_path / "c", model=model, optimizer=optimizer, average=average, progress={"step": 3, "x": [1, "a"]}
    )
    expected_draws = (random.random(), np.random.rand(), torch.rand(1))  # noqa: NPY002 (its state is what is tested)
    torch.manual_seed(99)
    _one_step(model, optimizer, average)

    other, other_optimizer, other_average = _trained(optimizer_class, seed=5)
    progress = load_checkpoint(tmp_path / "c", model=other, optimizer=other_optimizer, average=other_average)
    assert progress == {"step": 3, "x": [1, "a"]} == read_progress(tmp_path / "c")
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected_draws  # noqa: NPY002 (as above)
    torch.manual_seed(99)
    _one_step(other, other_optimizer, other_average)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert all(torch.equal(average.state[k], other_average.state[k]) for k in average.state)
    assert average.steps == other_average.steps


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    model, optimizer, _ = _trained(Lion)
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, average=None, progress={"step": 1})
    with pytest.raises(TypeError):
        save_checkpoint(
            tmp_path / "c", model=model, optimizer=optimizer, average=None, progress={"step": object()}
        )
    assert read_progress(tmp_path / "c") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_write_that_breaks_off_leaves_no_debris(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(tmp_path / "text", "\ud800")
    assert (tmp_path / "text").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_foreign_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, optimizer, average = _trained(Lion)
    parts = {"model": model, "optimizer": optimizer, "average": None}
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none", **parts)
    (tmp_path / "noise").write_bytes(b"\x80\x02not safetensors at all")
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        load_checkpoint(tmp_path / "noise", **parts)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="no training checkpoint"):
        load_checkpoint(tmp_path / "foreign", **parts)
    save_checkpoint(tmp_path / "c", **parts, progress={})
    (tmp_path / "cut").write_bytes((tmp_path / "c").read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or no safetensors"):
        load_checkpoint(tmp_path / "cut", **parts)
    with pytest.raises(ValueError, match="disagree on keeping a weight average"):
        load_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, average=average)
    with pytest.raises(ValueError, match="weights of another model"):
        load_checkpoint(tmp_path / "c", model=nn.Linear(1, 1), optimizer=optimizer, average=None)

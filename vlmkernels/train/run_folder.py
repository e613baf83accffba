# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its settings, its log, its checkpoint; and what may change when a run is continued."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmkernels._files import write_text_atomically
from vlmkernels.train.checkpoint import read_progress
from vlmkernels.train.config import TrainConfig

#: Settings that decide how a run is carried out and not what comes out of it.
FREE_ON_RESUME = (
    "output",
    "resume",
    "threads",
    "workers",
    "memory",
    "checkpoint_every",
    "log_every",
    "report",
)


@dataclass(frozen=True)
class RunFolder:
    """Paths in a run's folder, and the log.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def params(self) -> Path:
        """``params.json``: settings, command and versions."""
        return self.path / "params.json"

    @property
    def results(self) -> Path:
        """``results.jsonl``: a line every few steps, and a last one with the evaluation."""
        return self.path / "results.jsonl"

    @property
    def checkpoint(self) -> Path:
        """``checkpoint.safetensors``: the state of the training."""
        return self.path / "checkpoint.safetensors"

    @property
    def report(self) -> Path:
        """``report.html``."""
        return self.path / "report.html"

    def read_results(self) -> list[dict[str, Any]]:
        """Reads the log; a last line that a kill cut short is left out."""
        if not self.results.is_file():
            return []
        rows = []
        for line in self.results.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Takes lines out of the log that are later than ``step``, and the evaluation."""
        rows = [
            row
            for row in self.read_results()
            if row.get("step", step + 1) <= step and "evaluation" not in row
        ]
        write_text_atomically(self.results, "".join(json.dumps(row) + "\n" for row in rows))

    def append(self, row: dict[str, Any]) -> None:
        """Adds a line to the log."""
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def open_run(config: TrainConfig, *, write: bool = True) -> tuple[RunFolder, TrainConfig]:
    """Makes the folder of a new run, or finds the one to continue with the settings that it began with.

    Args:
        config: the settings; with ``resume`` only those in ``FREE_ON_RESUME`` may differ from the run's own, others
            must be left at their defaults or agree.
        write: whether this process makes folders.

    Returns:
        The folder, and the settings to go on with.

    Raises:
        ValueError: the folder holds a run already, or settings differ from those of the run to continue.
        FileNotFoundError: there is no run to continue.
    """
    path = Path(config.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    folder = RunFolder(path)
    if config.resume:
        if not folder.params.is_file():
            raise FileNotFoundError(f"train: there is no run to continue in {path} (no {folder.params.name})")
        saved = TrainConfig.from_dict(json.loads(folder.params.read_text(encoding="utf-8"))["settings"])
        return folder, _merge(config, saved)
    if folder.checkpoint.exists() or folder.results.exists():
        raise ValueError(
            f"train: {path} holds a run already; continue it with --resume, or choose another folder"
        )
    if write:
        path.mkdir(parents=True, exist_ok=True)
    return folder, dataclasses.replace(config, output=str(path))


def _merge(config: TrainConfig, saved: TrainConfig) -> TrainConfig:
    defaults = TrainConfig()
    values = saved.to_dict()
    for spec in dataclasses.fields(TrainConfig):
        name = spec.name
        wanted, before = getattr(config, name), getattr(saved, name)
        if name in FREE_ON_RESUME:
            values[name] = wanted
        elif wanted not in (before, getattr(defaults, name)):
            raise ValueError(
                f"train: the run to continue has {name} {before!r}; it cannot go on with {wanted!r}"
            )
    return TrainConfig.from_dict(values)


def has_checkpoint(folder: RunFolder) -> bool:
    """Whether the folder has a checkpoint that can be read."""
    if not folder.checkpoint.is_file():
        return False
    read_progress(folder.checkpoint)
    return True

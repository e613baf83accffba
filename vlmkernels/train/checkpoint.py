# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints: one safetensors file that is replaced atomically, and nothing that would execute code.

Tensors are the model's (``model/``), the optimiser's (``optimizer/<parameter>/<name>``), the weight average's
(``average/``) and torch's generator state; counters, the history of the run and the states of Python's and NumPy's
generators are JSON in the file's header. A kill at any moment leaves the previous checkpoint or the new one.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmkernels._files import write_atomically
from vlmkernels.train.optim import WeightAverage

FORMAT = "vlmkernels-checkpoint-1"


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    progress: dict[str, Any],
) -> None:
    """Writes everything that continuing bit for bit needs.

    Args:
        path: the file, replaced atomically.
        model: its ``state_dict`` is saved.
        optimizer: its per-parameter state must be tensors or numbers.
        average: the weight average, if there is one.
        progress: what JSON can hold: counters, history, settings.
    """
    from safetensors.torch import save_file

    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    numbers: dict[str, float] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers[f"{index}/{name}"] = value
    if average is not None:
        tensors |= {f"average/{name}": value for name, value in average.state.items()}
    tensors["rng/torch"] = torch.get_rng_state()
    header = {
        "progress": progress,
        "optimizer": numbers,
        "average_steps": None if average is None else average.steps,
        "rng": _generator_states(),
    }
    # safetensors refuses tensors that share memory (tied weights), so every tensor gets its own.
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    metadata = {"format": FORMAT, "state": json.dumps(header)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
) -> dict[str, Any]:
    """Restores what `save_checkpoint` wrote, generators included.

    Args:
        path: the file.
        model: receives the weights.
        optimizer: over the same parameters in the same order.
        average: receives the average; None where the run keeps none.

    Returns:
        The ``progress`` that was saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, is damaged, or does not fit the model or the settings.
    """
    path = Path(path)
    tensors, header = _read(path, tensors=True)
    expected = model.state_dict()
    weights = _part(tensors, "model/")
    if weights.keys() != expected.keys() or any(weights[k].shape != v.shape for k, v in expected.items()):
        raise ValueError(f"load_checkpoint: {path} holds the weights of another model")
    if (header["average_steps"] is None) != (average is None):
        raise ValueError(f"load_checkpoint: {path} and this run disagree on keeping a weight average")
    model.load_state_dict(weights)

    state: dict[int, dict[str, Any]] = {}
    for name, value in [*_part(tensors, "optimizer/").items(), *header["optimizer"].items()]:
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if average is not None:
        average.steps = header["average_steps"]
        for name, value in _part(tensors, "average/").items():
            average.state[name].copy_(value)
    torch.set_rng_state(tensors["rng/torch"])
    _restore_generators(header["rng"])
    return header["progress"]


def read_progress(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads only the ``progress`` of a checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint or is damaged.
    """
    return _read(Path(path), tensors=False)[1]["progress"]


def _read(path: Path, *, tensors: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"load_checkpoint: {path} is damaged or no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"load_checkpoint: {path} is no training checkpoint of vlmkernels")
    return found, json.loads(metadata["state"])


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _generator_states() -> dict[str, Any]:
    version, state, gauss = random.getstate()
    states: dict[str, Any] = {"python": [version, list(state), gauss]}
    if "numpy" in sys.modules:  # not imported: nobody drew from it
        name, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        states["numpy"] = [name, keys.tolist(), position, has_gauss, cached]
    return states


def _restore_generators(states: dict[str, Any]) -> None:
    version, state, gauss = states["python"]
    random.setstate((version, tuple(state), gauss))
    if "numpy" in states:
        import numpy as np

        name, keys, position, has_gauss, cached = states["numpy"]
        # The global generator is what user code may draw from; its state belongs to the run.
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002

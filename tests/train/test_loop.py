# SPDX-License-Identifier: Apache-2.0
"""A whole run: what it leaves, that it learns, and that an interrupted one ends in the same bits."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import vlmkernels
from vlmkernels.data import tokenizer_for, transform_for
from vlmkernels.models import load_checkpoint, load_state_dict_file
from vlmkernels.train import TrainConfig, TrainingFailed, train
from vlmkernels.train.run_folder import RunFolder


def _weights(folder: Path | str) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def test_a_run_leaves_its_files_and_a_model_that_loads(tiny: dict[str, Any]) -> None:
    result = train(TrainConfig(**tiny), command="the command")
    assert result.finished
    names = {path.name for path in result.folder.iterdir()}
    assert names == {
        "params.json",
        "results.jsonl",
        "checkpoint.safetensors",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
    }
    params = json.loads((result.folder / "params.json").read_text())
    assert params["settings"] == dataclasses.asdict(TrainConfig(**tiny))
    assert params["command"] == "the command"
    rows = [json.loads(line) for line in (result.folder / "results.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:-1]] == list(range(2, result.steps + 1, 2))
    assert rows[-1]["evaluation"] == result.evaluation.to_dict()

    model = load_checkpoint(result.folder)
    tokenizer = tokenizer_for(model)
    assert tokenizer(["a red circle"]).shape == (1, 16)
    assert transform_for(model).size == 16


def test_a_run_learns(tiny: dict[str, Any]) -> None:
    result = train(TrainConfig(**tiny | {"epochs": 80, "lr": 3e-3, "augment": 0.3, "val_share": 0.3}))
    rows = RunFolder(result.folder).read_results()
    assert rows[-2]["loss"] < 0.6 * rows[0]["loss"]
    recall, chance = result.evaluation.image_to_text.recall, result.evaluation.image_to_text.chance
    assert recall[1] > 2 * chance[1]


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "siglip"},
        {"loss": "clip", "label_smoothing": 0.1},
        {"optimizer": "lion", "lr": 3e-4, "average": 0.9},
        {"precision": "bfloat16", "save_dtype": "float16"},
        {"augment": 0.0, "val_share": 0.0, "grad_clip": 0.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_run(tiny: dict[str, Any], change: dict[str, Any]) -> None:
    result = train(TrainConfig(**tiny | {"epochs": 1} | change))
    assert result.finished
    stored, _ = load_state_dict_file(result.folder)
    assert stored["visual.proj"].dtype == getattr(torch, change.get("save_dtype", "float32"))
    assert (result.evaluation is None) == (change.get("val_share") == 0.0)


def test_micro_batches_change_the_losses_by_rounding_alone(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The tiny model has no batch norm; sums over micro-batches come in another order."""
    losses = []
    for micro_batch in (None, 5):
        output = str(tmp_path / str(micro_batch))
        result = train(TrainConfig(**tiny | {"micro_batch": micro_batch, "output": output, "lr": 1e-4}))
        losses.append([row["loss"] for row in RunFolder(result.folder).read_results()[:-1]])
    assert losses[0] == pytest.approx(
        losses[1], abs=5e-4
    )  # AdamW turns the sign of a tiny gradient into a step


def test_accumulated_batches_make_fewer_steps(tiny: dict[str, Any]) -> None:
    result = train(TrainConfig(**tiny | {"accumulate": 2, "layer_decay": 0.8, "beta1": 0.95, "beta2": 0.98}))
    rows = RunFolder(result.folder).read_results()
    assert result.steps == 8  # 4 epochs of 65 pairs: 16 batches of 16
    assert rows[-2]["epoch"] == 4.0


def test_emoji_are_trained_and_evaluated(tiny: dict[str, Any]) -> None:
    config = TrainConfig(
        **tiny | {"data": "emoji", "epochs": 0.1, "batch_size": 64, "views": 2, "report": True}
    )
    result = train(config)
    assert result.evaluation.image_to_text.database > 1500
    assert {style for _, style in result.evaluation.pictures} == {"twemoji"}
    assert len(result.evaluation.groups.classes) == 9
    page = (result.folder / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 18 + 80
    assert "http" not in page.replace("http-equiv", "")


def test_stopping_and_continuing_gives_the_same_bits(tiny: dict[str, Any], tmp_path: Path) -> None:
    change = {"average": 0.9, "optimizer": "lion", "lr": 1e-3}
    whole = train(TrainConfig(**tiny | change | {"output": str(tmp_path / "whole")}))
    config = TrainConfig(**tiny | change)
    calls = iter(range(1000))
    first = train(config, should_stop=lambda: next(calls) == 4)
    assert (first.finished, first.steps) == (False, 5)
    assert not (first.folder / "model.safetensors").exists()
    second = train(TrainConfig(output=config.output, resume=True, threads=1, log_every=2))
    assert (second.finished, second.steps) == (True, whole.steps)
    assert _weights(second.folder) == _weights(whole.folder)
    losses = [[row.get("loss") for row in RunFolder(r.folder).read_results()][:-1] for r in (whole, second)]
    assert losses[0][3:] == losses[1][3:]  # the third line averages over what came after the stop only


_RUN = """
import json, sys
from vlmkernels.train import TrainConfig, train
train(TrainConfig(**json.loads(sys.argv[1])))
"""


def _start(settings: dict[str, Any]) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(vlmkernels.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    # started here, and not where the source tree could be taken for the installed package
    folder = Path(__file__).parent
    return subprocess.Popen([sys.executable, "-c", _RUN, json.dumps(settings)], env=environment, cwd=folder)


def test_a_killed_run_continues_to_the_same_bits(tiny: dict[str, Any], tmp_path: Path) -> None:
    settings = tiny | {"epochs": 60, "checkpoint_every": 0.02, "log_every": 1}
    whole = train(TrainConfig(**settings | {"output": str(tmp_path / "whole")}))

    process = _start(settings)
    folder = RunFolder(Path(settings["output"]))
    try:
        deadline = time.monotonic() + 60
        while len(folder.read_results()) < 20 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (folder.path / "model.safetensors").exists()
    assert 1 <= len(folder.read_results()) < whole.steps

    resumed = train(TrainConfig(output=settings["output"], resume=True, threads=1, log_every=1))
    assert resumed.steps == whole.steps
    assert _weights(resumed.folder) == _weights(whole.folder)
    steps = [row["step"] for row in folder.read_results() if "loss" in row]
    assert steps == list(range(1, whole.steps + 1))


def test_a_folder_with_a_run_is_not_overwritten(tiny: dict[str, Any]) -> None:
    config = TrainConfig(**tiny | {"epochs": 1})
    train(config)
    with pytest.raises(ValueError, match="holds a run already"):
        train(config)


def test_continuing_with_other_settings_is_refused(tiny: dict[str, Any]) -> None:
    config = TrainConfig(**tiny | {"epochs": 1})
    train(config)
    with pytest.raises(ValueError, match=r"has lr 0\.\d+; it cannot go on with 0\.5"):
        train(dataclasses.replace(config, resume=True, lr=0.5))
    with pytest.raises(FileNotFoundError, match="no run to continue"):
        train(dataclasses.replace(config, resume=True, output=config.output + "-other"))


def test_a_finished_run_can_be_resumed_without_harm(tiny: dict[str, Any]) -> None:
    config = TrainConfig(**tiny | {"epochs": 1})
    first = train(config)
    before = _weights(first.folder)
    again = train(dataclasses.replace(config, resume=True))
    assert again.finished
    assert _weights(again.folder) == before
    rows = RunFolder(first.folder).read_results()
    assert ["evaluation" in row for row in rows] == [False] * (len(rows) - 1) + [True]


def test_a_loss_that_is_no_number_stops_the_run(tiny: dict[str, Any]) -> None:
    with pytest.raises(TrainingFailed, match="a lower lr"):
        train(TrainConfig(**tiny | {"lr": 1e12, "grad_clip": 0.0, "warmup": 0.0}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be positive"),
        ({"loss": "mse"}, "loss must be one of"),
        ({"warmup": 2.0}, "warmup must lie between 0 and 1"),
        ({"val_share": 1.0}, r"val_share must lie in \[0, 1\)"),
        ({"views": 2, "loss": "clip"}, "need loss multi_positive"),
        ({"resume": True}, "resume needs output"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"accumulate": 0}, "accumulate must be positive"),
        ({"layer_decay": 0.0}, r"layer_decay must lie in \(0, 1\]"),
        ({"beta2": 1.0}, r"beta2 must lie in \[0, 1\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ValueError, match="unknown setting 'learning_rate'"):
        TrainConfig.from_dict({"learning_rate": 1.0})

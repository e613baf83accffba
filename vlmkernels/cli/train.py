# SPDX-License-Identifier: Apache-2.0
"""Train a model on image-text pairs; without arguments: a small CLIP on the bundled emoji, with evaluation and report.

Several processes: `torchrun --nproc-per-node N -m vlmkernels train ...`; each takes its share of every epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vlmkernels.cli._models import print_json
from vlmkernels.train.config import TrainConfig
from vlmkernels.train.loop import Observer, TrainResult, train

HELP = "train a model on image-text pairs and write a report"

_SECONDS_BETWEEN_LINES = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every field of `TrainConfig`."""
    kinds = typing.get_type_hints(TrainConfig)
    for spec in dataclasses.fields(TrainConfig):
        name = "--" + spec.name.replace("_", "-")
        text = spec.metadata["help"].replace("%", "%%")
        if kinds[spec.name] is bool:
            parser.add_argument(
                name,
                action=argparse.BooleanOptionalAction if spec.default else "store_true",
                default=spec.default,
                help=text,
            )
        else:
            default = None if spec.default is dataclasses.MISSING else spec.default
            parser.add_argument(
                name,
                type=_converter(kinds[spec.name]),
                default=default,
                choices=spec.metadata.get("choices"),
                metavar=None if spec.metadata.get("choices") else spec.name.split("_")[-1].upper(),
                help=text,
            )


def _converter(kind: Any) -> Callable[[str], Any]:
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return _json_object if typing.get_origin(kind) is dict else kind


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


class _Lines(Observer):
    """Progress where there is no terminal: a line every few seconds."""

    def __init__(self) -> None:
        self.total, self.last = 0, 0.0

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def start(self, steps: int, done: int) -> None:
        self.total, self.last = steps, time.monotonic()

    def step(self, done: int, shown: dict[str, float]) -> None:
        now = time.monotonic()
        if done == self.total or now - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = now
            self.message(f"step {done}/{self.total}  {_shown(shown)}  ETA {_clock(shown['eta'])}")


class _Bar(Observer):
    """Progress on a terminal."""

    def __init__(self) -> None:
        self.bar: Any = None

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def start(self, steps: int, done: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=steps, initial=done, unit="step", desc="training", file=sys.stderr, dynamic_ncols=True
        )

    def step(self, done: int, shown: dict[str, float]) -> None:
        self.bar.set_postfix_str(_shown(shown), refresh=False)
        self.bar.update(done - self.bar.n)

    def finish(self) -> None:
        self.bar.close()


class _Silent(Observer):
    """Processes other than the first one."""


def _shown(shown: dict[str, float]) -> str:
    return f"loss {shown['loss']:.3f}  {shown['pairs_per_second']:,.0f} pairs/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _observer() -> Observer:
    if not _is_first():
        return _Silent()
    return _Bar() if sys.stderr.isatty() else _Lines()


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or TERM ends the run after the step at hand, with a checkpoint; a second one ends it "
    "at once."""
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        signal.signal(number, previous[signal.Signals(number)])
        asked.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():  # Python handles signals in no other
        yield lambda: False
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, note)
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(args: argparse.Namespace) -> int:
    """Trains, and prints where everything lies and what was measured."""
    values = {spec.name: getattr(args, spec.name) for spec in dataclasses.fields(TrainConfig)}
    values["model_options"] = values["model_options"] or {}
    config = TrainConfig(**values)
    command = shlex.join(["vlmkernels", *sys.argv[1:]])
    began = time.perf_counter()
    with _stop_on_signal() as should_stop:
        result = train(config, observer=_observer(), should_stop=should_stop, command=command)
    minutes = (time.perf_counter() - began) / 60
    if not _is_first():
        return 0 if result.finished else 1
    if args.json:
        print_json(_summary(result))
    elif not result.finished:
        print(
            f"stopped after step {result.steps}; continue with: vlmkernels train --resume --output "
            f"{shlex.quote(str(result.folder))}"
        )
    else:
        if result.evaluation is not None:
            print(result.evaluation.sentence())
        page = "report.html" if result.config.report else "model.safetensors"
        print(f"{minutes:.1f} minutes; {result.folder / page}")
    return 0 if result.finished else 1


def _summary(result: TrainResult) -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "steps": result.steps,
        "finished": result.finished,
        "seconds": result.seconds,
        "evaluation": None if result.evaluation is None else result.evaluation.to_dict(),
    }

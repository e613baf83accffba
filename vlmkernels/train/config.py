# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF009  (`_option` returns a dataclass field)
"""The settings of a training run: one dataclass that the command line, ``params.json`` and `train` share."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from vlmkernels.train.optim import OPTIMIZERS

LOSSES = ("auto", "clip", "siglip", "multi_positive")
PRECISIONS = ("auto", "float32", "bfloat16")


def _option(default: Any, text: str, **more: Any) -> Any:
    """A field with the sentence that the command line shows."""
    metadata = {"help": text, **more}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides how a run goes. The defaults train a small CLIP on the bundled emoji in minutes.

    Raises:
        ValueError: a value makes no sense; the message names it.
    """

    model: str = _option("emoji-clip", "model to train, one of `vlmkernels info`'s list")
    model_options: dict[str, Any] = _option(
        {}, 'fields of the model\'s configuration as JSON, such as {"embed_dim": 128}'
    )
    data: str = _option(
        "emoji",
        "emoji (bundled), or your own: a folder of pictures, a .csv/.tsv/.jsonl table, or .tar shards",
    )
    path_column: str | None = _option(None, "column of a table with the picture (default: found by name)")
    caption_column: str | None = _option(None, "column of a table with the caption (default: found by name)")
    val_share: float = _option(0.1, "share of your own pairs that is kept for the evaluation")
    output: str | None = _option(None, "folder of the run (default: runs/<date-time>)")
    resume: bool = _option(False, "continue the run in --output from its last checkpoint")
    epochs: float = _option(100.0, "passes over the data; for emoji, a pass shows every concept once")
    batch_size: int = _option(256, "captions that are contrasted with each other, over all processes")
    micro_batch: int | None = _option(
        None,
        "captions that run through the model at once; the gradients stay those of the batch (default: all)",
    )
    accumulate: int = _option(1, "batches whose gradients are averaged for a step of the optimiser")
    styles: str = _option(
        "noto,openmoji", "emoji: drawing styles to train on; retrieval is tested on the first one left out"
    )
    views: int = _option(
        1, "pictures per caption and step; 2: both training styles of each emoji", choices=(1, 2)
    )
    optimizer: str = _option("adamw", "optimiser", choices=OPTIMIZERS)
    lr: float = _option(1e-3, "peak learning rate; Lion wants 3 to 10 times less than AdamW")
    weight_decay: float = _option(
        0.1, "weight decay of the matrices; Lion wants 3 to 10 times more than AdamW"
    )
    beta1: float | None = _option(None, "first beta of the optimiser (default: 0.9)")
    beta2: float | None = _option(None, "second beta (default: 0.98 for AdamW, 0.99 for Lion)")
    layer_decay: float = _option(
        1.0, "factor on the learning rate from each block of a tower to the one before it"
    )
    warmup: float = _option(0.05, "share of the steps in which the learning rate rises")
    grad_clip: float = _option(1.0, "largest norm of the gradient; 0: no limit")
    average: float = _option(
        0.0, "decay of the moving average of the weights that is saved; 0: the weights themselves"
    )
    loss: str = _option(
        "auto", "auto: clip, or multi_positive where captions repeat in a batch", choices=LOSSES
    )
    label_smoothing: float | None = _option(
        None, "label smoothing of the clip loss (default: the model's own; CLIP 0, ALIGN 0.1)"
    )
    precision: str = _option("auto", "auto: bfloat16 where the processor has it", choices=PRECISIONS)
    augment: float = _option(1.0, "strength of the augmentation; 0: none")
    blend: float = _option(0.3, "share of emoji that are a mix of both styles")
    tones: float = _option(0.25, "share of people and hands shown with a skin tone")
    topics: float = _option(0.1, "share of emoji captions that say only what group they belong to")
    vocab_size: int = _option(4096, "size of the vocabulary that is learned from the captions")
    seed: int = _option(0, "seed of everything random")
    device: str = _option("cpu", "cpu or cuda")
    threads: int | None = _option(None, "CPU threads (default: torch's choice)")
    workers: int = _option(4, "threads that decode your own pictures")
    memory: float = _option(
        2.0, "GiB of your own pictures kept decoded; beyond, they are decoded when needed"
    )
    checkpoint_every: float = _option(60.0, "seconds between checkpoints")
    log_every: int = _option(10, "steps between lines of results.jsonl")
    save_dtype: str = _option(
        "float32", "dtype of the saved weights", choices=("float32", "float16", "bfloat16")
    )
    report: bool = _option(True, "write report.html at the end")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            allowed, value = spec.metadata.get("choices"), getattr(self, spec.name)
            if allowed and value not in allowed:
                raise ValueError(
                    f"train: {spec.name} must be one of {', '.join(map(str, allowed))}, got {value!r}"
                )
        positive = ("epochs", "batch_size", "accumulate", "lr", "log_every", "checkpoint_every", "workers")
        for name in (*positive, "memory"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train: {name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "grad_clip", "augment"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train: {name} must not be negative, got {getattr(self, name)}")
        for name in ("warmup", "blend", "tones", "topics"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train: {name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("average", "label_smoothing", "val_share", "beta1", "beta2"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train: {name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"train: layer_decay must lie in (0, 1], got {self.layer_decay}")
        for name in ("threads", "micro_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        if self.views == 2 and self.loss not in ("auto", "multi_positive"):
            raise ValueError(f"train: two views of a caption need loss multi_positive, got {self.loss!r}")
        if self.resume and self.output is None:
            raise ValueError("train: resume needs output, the folder of the run to continue")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, fit for JSON and for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Builds the settings from plain values; missing ones take their defaults.

        Raises:
            ValueError: a name is unknown, or a value makes no sense.
        """
        known = {spec.name for spec in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"train: unknown setting {name!r}; known are {', '.join(sorted(known))}")
        return cls(**values)

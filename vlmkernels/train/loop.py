# SPDX-License-Identifier: Apache-2.0
"""The training loop: from settings to a run folder with a model, an evaluation and a report.

One step: a batch as a function of the step, the model's losses under autocast, backward (in micro-batches where asked
for), AdamW or Lion, the model's own work after a step (`vlmkernels.models.training` says how a model states what it
needs). Everything random is drawn from the seed and the step, so that a run that was interrupted continues to the same
bits on a CPU with the same number of threads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmkernels import _version
from vlmkernels._files import write_text_atomically
from vlmkernels.data.draws import generator_for, key_for
from vlmkernels.data.tokenizer import Tokenizer
from vlmkernels.data.transforms import transform_for
from vlmkernels.models import create, save_pretrained
from vlmkernels.models.training import (
    ContrastiveOptions,
    Trainable,
    TrainingBatch,
    TrainingFacts,
    contrastive_loss,
    trainable_config,
)
from vlmkernels.train import distributed
from vlmkernels.train.batch_norm import synchronize_batch_norm
from vlmkernels.train.cached import CachedContrastive, unsynchronized
from vlmkernels.train.checkpoint import load_checkpoint, save_checkpoint
from vlmkernels.train.config import TrainConfig
from vlmkernels.train.corpora import Batch, EmojiCorpus, PairCorpus
from vlmkernels.train.evaluation import EmojiEvaluation, Encoder, NeighbourEvaluation, PairsEvaluation, trim
from vlmkernels.train.optim import DEFAULT_BETAS, WeightAverage, create_optimizer
from vlmkernels.train.run_folder import RunFolder, has_checkpoint, open_run
from vlmkernels.train.schedule import warmup_cosine

logger = logging.getLogger(__name__)

_DROPOUT, _WORDING = 100, 101  # what a key is for; `corpora` has the others


class TrainingFailed(RuntimeError):
    """The loss is no longer a number."""


class Observer:
    """Is told how a run goes; this one does not listen."""

    def message(self, text: str) -> None:
        """Says what happens now."""

    def start(self, steps: int, done: int) -> None:
        """The steps begin; ``done`` of them were done before the run was interrupted."""

    def step(self, done: int, shown: dict[str, float]) -> None:
        """A step is done; ``shown`` has loss, pairs_per_second and eta (seconds)."""

    def finish(self) -> None:
        """The steps are over."""


@dataclass
class TrainResult:
    """What a run left.

    Attributes:
        folder: where everything lies.
        config: the settings it ran with.
        steps: how many steps it has done by now.
        finished: whether those are all; if not, it was asked to stop and can be continued.
        evaluation: None where the run is not finished or nothing was kept for it.
        seconds: wall time by part.
    """

    folder: Path
    config: TrainConfig
    steps: int
    finished: bool
    evaluation: EmojiEvaluation | PairsEvaluation | NeighbourEvaluation | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def has_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether the device multiplies bfloat16 faster than float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Private, but the only question torch answers in all of its versions; absent means an old one: no.
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def train(
    config: TrainConfig,
    *,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] | None = None,
    command: str | None = None,
) -> TrainResult:
    """Trains a model, evaluates it and writes the report.

    Args:
        config: the settings.
        observer: is told how it goes.
        should_stop: asked after every step; True writes a checkpoint and returns.
        command: what to show in the report as the way to repeat the run.

    Returns:
        Where the files are and what was measured. The folder holds ``params.json``, ``results.jsonl``,
        ``checkpoint.safetensors`` and, once finished, ``model.safetensors``, ``config.json``, ``tokenizer.json`` and
        ``report.html``.

    Raises:
        ValueError: settings or data make no sense.
        FileNotFoundError: there is no such data, or no run to continue.
        TrainingFailed: the loss became NaN or infinite.
    """
    began = time.perf_counter()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with distributed.join(config.device) as processes:
        return _train(
            config, processes, observer or Observer(), command, should_stop or (lambda: False), began
        )


def _train(
    config: TrainConfig,
    processes: distributed.Processes,
    observer: Observer,
    command: str | None,
    should_stop: Callable[[], bool],
    began: float,
) -> TrainResult:
    # a function of its own, so that nothing of the run is left when the processes part
    with contextlib.ExitStack() as stack:
        folder, config = open_run(config, write=processes.is_first)
        run = _Run(config, folder, processes, observer, command)
        run.prepare(stack)
        run.clock("set-up", began)
        finished = run.steps_until_done(should_stop)
        if finished and processes.is_first:
            run.finish()
        return TrainResult(folder.path, config, run.step, finished, run.evaluation, run.seconds)


class _Run:
    """The state of a run, and its phases in the order in which `train` calls them."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        processes: distributed.Processes,
        observer: Observer,
        command: str | None,
    ) -> None:
        self.config, self.folder, self.processes, self.observer = config, folder, processes, observer
        self.command = command
        self.step = 0
        self.seconds: dict[str, float] = {}
        self.evaluation: EmojiEvaluation | PairsEvaluation | NeighbourEvaluation | None = None
        bf16 = config.precision == "bfloat16" or (
            config.precision == "auto" and has_bfloat16(processes.device)
        )
        self.precision = "bfloat16" if bf16 else "float32"

    def clock(self, part: str, since: float) -> None:
        """Adds the time since ``since`` to a part of the run."""
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - since

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that the model computes in."""
        return torch.autocast(
            self.processes.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        )

    def prepare(self, stack: contextlib.ExitStack) -> None:
        """Opens the data, learns the vocabulary, makes model and optimiser, continues from a checkpoint."""
        config = self.config
        torch.manual_seed(config.seed)
        options = _model_options(config)
        sketch = _new_model(config.model, options)
        size = trainable_config(sketch).vision.image_size
        self.corpus = self._open_corpus(size, stack)
        self.observer.message(self.corpus.describe())
        self.tokenizer: Tokenizer | None = None
        if sketch.needs_text:
            self.tokenizer = Tokenizer.train(self._captions(sketch), config.vocab_size)
            options |= {"text": options.get("text", {}) | {"vocab_size": self.tokenizer.vocab_size}}
        torch.manual_seed(config.seed)
        self.model = _new_model(config.model, options).to(self.processes.device)
        if self.tokenizer is not None:
            self.tokenizer.context_length = trainable_config(self.model).text.context_length
        self.transform = transform_for(self.model)
        self.total = max(1, round(config.epochs * self._steps_per_epoch))
        self.warmup = min(self.total, round(config.warmup * self.total))
        self.model.prepare_training(
            TrainingFacts(
                self.total,
                max(1, round(self._steps_per_epoch)),
                self.corpus.batch_size,
                tokenizer=self.tokenizer,
                **self.corpus.facts(),
            )
        )
        defaults = DEFAULT_BETAS[config.optimizer]
        self.optimizer = create_optimizer(
            config.optimizer,
            self.model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=(
                defaults[0] if config.beta1 is None else config.beta1,
                defaults[1] if config.beta2 is None else config.beta2,
            ),
            layer_decay=config.layer_decay,
        )
        self.average = WeightAverage(self.model, config.average) if config.average else None
        if config.resume and has_checkpoint(self.folder):
            self._restore()
        elif self.processes.is_first:
            self._write_params()
            self.folder.rewind(0)
        if config.micro_batch and type(self.model).training_losses is not Trainable.training_losses:
            raise ValueError(
                f"train: micro_batch is for models whose loss is contrastive alone; {config.model} has an objective of "
                "its own"
            )
        self.losses: torch.nn.Module = self.model if config.micro_batch else _Losses(self.model)
        if self.processes.group is not None:
            synchronize_batch_norm(self.model, self.processes.group)
            self.losses = torch.nn.parallel.DistributedDataParallel(
                self.losses, find_unused_parameters=self.model.may_leave_unused
            )
        batch, world = self.corpus.batch_size, self.processes.world_size
        micro_batch = config.micro_batch or batch
        # As many on every process, since they meet in batch norm, and none of them empty.
        self.parts = min(math.ceil(math.ceil(batch / world) / micro_batch), batch // world)
        self.contrast = CachedContrastive(
            self.losses, self._contrastive_loss, micro_batch=micro_batch, context=self.autocast
        )

    @property
    def _steps_per_epoch(self) -> float:
        return self.corpus.steps_per_epoch / self.config.accumulate

    def _open_corpus(self, size: int, stack: contextlib.ExitStack) -> EmojiCorpus | PairCorpus:
        config, processes = self.config, self.processes
        shared: dict[str, Any] = {
            "batch_size": config.batch_size,
            "seed": config.seed,
            "augment": config.augment,
            "rank": processes.rank,
            "world_size": processes.world_size,
        }
        if config.data == "emoji":
            return EmojiCorpus(
                size,
                styles=tuple(style.strip() for style in config.styles.split(",")),
                views=config.views,
                blend=config.blend,
                tones=config.tones,
                topics=config.topics,
                **shared,
            )
        from vlmkernels.data.sources import PictureStore, open_source

        source = open_source(
            config.data, path_column=config.path_column, caption_column=config.caption_column
        )
        # A third larger than the model's pictures, so that zooming in does not blur.
        store = PictureStore(source, size * 4 // 3, memory=int(config.memory * 2**30), workers=config.workers)
        stack.enter_context(store)
        if source.skipped:
            logger.warning("%s", source.summary())
            self.observer.message(source.summary())
        return PairCorpus(store, size, val_share=config.val_share, **shared)

    def _write_params(self) -> None:
        content = {
            "settings": self.config.to_dict(),
            "command": self.command,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "processes": self.processes.world_size,
            "data": self.corpus.describe(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "model": trainable_config(self.model).to_dict(),
            "steps": self.total,
            "versions": {
                "vlmkernels": _version.__version__,
                "torch": torch.__version__,
                "python": sys.version.split()[0],
            },
        }
        write_text_atomically(self.folder.params, json.dumps(content, indent=2) + "\n")

    def _restore(self) -> None:
        progress = load_checkpoint(
            self.folder.checkpoint, model=self.model, optimizer=self.optimizer, average=self.average
        )
        if progress["vocabulary"] != self._vocabulary():
            raise ValueError("train: the data's captions changed since the run began; it cannot be continued")
        self.step, self.seconds = progress["step"], progress["seconds"]
        if self.processes.is_first:
            self.folder.rewind(self.step)
        self.observer.message(f"continuing after step {self.step} of {self.total}")

    def steps_until_done(self, should_stop: Callable[[], bool]) -> bool:
        """Does the remaining steps; returns whether all are done."""
        config = self.config
        before = self.seconds.get("training", 0.0)
        began = saved = time.perf_counter()
        first = self.step
        self.model.train()
        self.observer.start(self.total, self.step)
        window: list[dict[str, torch.Tensor]] = []
        window_pairs, window_began = 0, began
        stopped = False
        while self.step < self.total and not stopped:
            losses, factor, pairs = self._train_step()
            self.step += 1
            self.model.after_step(self.step, self.total)
            if self.average is not None:
                self.average.update(self.model)
            window.append(losses)
            window_pairs += pairs * self.processes.world_size
            now = time.perf_counter()
            if self.step % config.log_every == 0 or self.step == self.total:
                means = {name: float(torch.stack([w[name] for w in window]).mean()) for name in losses}
                mean = means.pop("loss")
                if not math.isfinite(mean):
                    raise TrainingFailed(
                        f"train: the loss is {mean} at step {self.step}; a lower lr than {config.lr} may help"
                    )
                row = {
                    "step": self.step,
                    "epoch": round(self.step * config.accumulate / self.corpus.steps_per_epoch, 3),
                    "loss": round(mean, 5),
                    **{name: round(value, 5) for name, value in means.items()},
                    "lr": config.lr * factor,
                    **self._logit_scale(),
                    "pairs_per_second": round(window_pairs / max(now - window_began, 1e-9), 1),
                    "seconds": round(before + now - began, 2),
                }
                if self.processes.is_first:
                    self.folder.append(row)
                rate = (now - began) / (self.step - first)
                shown = {k: row[k] for k in ("loss", "pairs_per_second")} | {
                    "eta": rate * (self.total - self.step)
                }
                self.observer.step(self.step, shown)
                window, window_pairs, window_began = [], 0, now
            stopped = self.processes.any(should_stop()) and self.step < self.total
            if stopped or self.step == self.total or now - saved >= config.checkpoint_every:
                self.seconds["training"] = before + now - began
                self._save_checkpoint()
                saved = time.perf_counter()
        self.observer.finish()
        return not stopped

    def _logit_scale(self) -> dict[str, float]:
        scale = getattr(self.model, "logit_scale", None)
        return {} if scale is None else {"logit_scale": round(float(scale.detach().exp()), 3)}

    def _train_step(self) -> tuple[dict[str, torch.Tensor], float, int]:
        """One step; returns its losses, the factor on the learning rate, and how many pairs this process saw."""
        config = self.config
        factor = warmup_cosine(self.step, steps=self.total, warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        losses, pairs = [], 0
        for i in range(config.accumulate):
            number, last = self.step * config.accumulate + i, i == config.accumulate - 1
            batch = self._batch(number)
            # Dropout and the like draw from torch's generator: seeded per batch, it needs no memory of earlier ones.
            # They, and a model's own wording of captions, are all that depends on how many processes share the batch.
            torch.manual_seed(key_for(config.seed, _DROPOUT, number, self.processes.rank))
            losses.append(self._add_gradients(batch, last=last))
            pairs += len(batch.names)
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        return {name: torch.stack([x[name] for x in losses]).mean() for name in losses[0]}, factor, pairs

    def _add_gradients(self, batch: TrainingBatch, *, last: bool) -> dict[str, torch.Tensor]:
        """Adds a batch's share of the step's gradients; returns its losses."""
        weight = 1 / self.config.accumulate
        if self.config.micro_batch:
            loss = self.contrast(
                batch.images, batch.ids, weight=weight, synchronize=last, parts=self.parts, batch=batch
            )
            return {"loss": loss}
        with contextlib.nullcontext() if last else unsynchronized(self.losses):
            with self.autocast():
                losses = self.losses(batch)
            (losses["loss"] * weight).backward()
        return {name: value.detach() for name, value in losses.items()}

    def _contrastive_loss(self, batch: TrainingBatch, **features: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(batch, smoothing=self.model.default_label_smoothing, **features)

    def _batch(self, number: int) -> TrainingBatch:
        """Draws a batch and brings it to what the model takes."""
        model, device = self.model, self.processes.device
        drawn = self.corpus.batch(
            number, second_view=model.needs_second_view, single_source=model.needs_single_source
        )

        def normalized(x: torch.Tensor) -> torch.Tensor:
            return self.transform.normalize(x.mul(255.0)).to(device)

        batch = TrainingBatch(
            images=normalized(drawn.images),
            ids=None,
            image_labels=drawn.image_labels.to(device),
            text_labels=drawn.text_labels.to(device),
            second_images=None if drawn.second is None else normalized(drawn.second),
            names=[concept.name for concept in drawn.concepts],
            keywords=drawn.keywords,
            group=torch.tensor([concept.group for concept in drawn.concepts], device=device),
            subgroup=torch.tensor([concept.subgroup for concept in drawn.concepts], device=device),
            source=drawn.source.to(device),
            options=self._contrastive_options(),
        )
        if self.tokenizer is not None:
            generator = generator_for(self.config.seed, _WORDING, number, self.processes.rank)
            texts = model.training_texts(drawn.concepts, drawn.keywords, drawn.source, generator)
            ids = self.tokenizer(drawn.texts if texts is None else texts)
            batch.ids = trim(ids, self.tokenizer.end_id).to(device)
            if model.needs_descriptions:
                self._describe(batch, drawn, self.tokenizer)
        return batch

    def _describe(self, batch: TrainingBatch, drawn: Batch, tokenizer: Tokenizer) -> None:
        """Adds the keywords of each pair as descriptions."""
        most = self.model.max_descriptions
        words = [words[:most] for words in drawn.keywords]
        mask = torch.tensor([[j < len(w) for j in range(most)] for w in words]).view(len(words), most)
        ids = tokenizer([word for w in words for word in w]) if mask.any() else torch.zeros(0, 1)
        ids = trim(ids.long(), tokenizer.end_id)
        table = torch.zeros(len(words), most, ids.shape[1], dtype=torch.int64)
        table[mask] = ids
        device = self.processes.device
        batch.description_ids, batch.description_mask = table.to(device), mask.to(device)

    def _contrastive_options(self) -> ContrastiveOptions:
        name = self.config.loss
        if name == "auto":
            name = self.model.default_loss if self.corpus.one_to_one else "multi_positive"
        return ContrastiveOptions(name, self.config.label_smoothing, self.processes.group)

    def _captions(self, model: Trainable) -> list[str]:
        """The captions that the vocabulary is learned from: the data's, and the model's own wordings."""
        return [*self.corpus.captions(), *model.vocabulary_texts(**self.corpus.facts())]

    def _vocabulary(self) -> dict[str, Any] | None:
        return None if self.tokenizer is None else self.tokenizer.to_dict()

    def _save_checkpoint(self) -> None:
        if not self.processes.is_first:
            return
        began = time.perf_counter()
        progress = {"step": self.step, "seconds": self.seconds, "vocabulary": self._vocabulary()}
        save_checkpoint(
            self.folder.checkpoint,
            model=self.model,
            optimizer=self.optimizer,
            average=self.average,
            progress=progress,
        )
        logger.debug("checkpoint after step %d in %.2f s", self.step, time.perf_counter() - began)

    def finish(self) -> None:
        """Saves the model, evaluates what was saved, writes the last line of the log and the report."""
        config = self.config
        began = time.perf_counter()
        if self.average is not None:
            self.model.load_state_dict(self.average.state)
        dtype = getattr(torch, config.save_dtype)
        with torch.no_grad():
            for value in self.model.state_dict().values():
                if value.is_floating_point():
                    value.copy_(value.to(dtype))
        self.model.eval()
        save_pretrained(self.model, self.folder.path, self.tokenizer, dtype=dtype)
        self.observer.message("evaluating")
        encoder = Encoder(self.model, self.tokenizer)
        if hasattr(self.model, "encode_text"):
            self.evaluation = self.corpus.evaluate(encoder)
        elif hasattr(self.model, "encode_image"):
            self.evaluation = self.corpus.evaluate_images(encoder)
        self.clock("evaluation", began)
        row: dict[str, Any] = {"step": self.step, "evaluation": None, "seconds_by_part": self.seconds}
        if self.evaluation is not None:
            row["evaluation"] = self.evaluation.to_dict()
        self.folder.append(row)
        if config.report:
            from vlmkernels.train.report import write_report

            began = time.perf_counter()
            write_report(self.folder, self.evaluation, self.seconds)
            self.clock("report", began)


class _Losses(torch.nn.Module):
    """The model's losses as a forward pass, which is what several processes synchronise."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        return self.model.training_losses(batch)  # type: ignore[operator]


def _new_model(name: str, options: dict[str, Any]) -> Any:
    model = create(name, **options)
    try:
        trainable_config(model)
    except ValueError as error:
        raise ValueError(f"train: {name}: {error}") from error
    return model


def _model_options(config: TrainConfig) -> dict[str, Any]:
    """The overrides of the model's configuration; the sigmoid loss starts from its paper's scale and bias."""
    options = json.loads(json.dumps(config.model_options))
    if config.loss == "siglip":
        options.setdefault("init_logit_scale", math.log(10.0))
        options.setdefault("init_logit_bias", -10.0)
    return options

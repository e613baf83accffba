# SPDX-License-Identifier: Apache-2.0
"""Training: settings, loop, optimisers, schedules, checkpoints, evaluation and report. Names only."""

from vlmkernels.train.batch_norm import synchronize_batch_norm
from vlmkernels.train.cached import CachedContrastive
from vlmkernels.train.config import TrainConfig
from vlmkernels.train.distributed import under_torchrun
from vlmkernels.train.evaluation import (
    Classification,
    EmojiEvaluation,
    Encoder,
    PairsEvaluation,
    Retrieval,
    classification,
    evaluate_emoji,
    evaluate_pairs,
    retrieval,
)
from vlmkernels.train.loop import Observer, TrainingFailed, TrainResult, train
from vlmkernels.train.optim import Lion, WeightAverage, create_optimizer, lion_step, parameter_groups
from vlmkernels.train.schedule import warmup_cosine

__all__ = [
    "CachedContrastive",
    "Classification",
    "EmojiEvaluation",
    "Encoder",
    "Lion",
    "Observer",
    "PairsEvaluation",
    "Retrieval",
    "TrainConfig",
    "TrainResult",
    "TrainingFailed",
    "WeightAverage",
    "classification",
    "create_optimizer",
    "evaluate_emoji",
    "evaluate_pairs",
    "lion_step",
    "parameter_groups",
    "retrieval",
    "synchronize_batch_norm",
    "train",
    "under_torchrun",
    "warmup_cosine",
]

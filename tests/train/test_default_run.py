# SPDX-License-Identifier: Apache-2.0
"""The run that `vlmkernels train` makes without arguments: five minutes on two cores, and what it must reach."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vlmkernels.train import TrainConfig, train
from vlmkernels.train.loop import has_bfloat16


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_default_run_is_good_and_short_enough(tmp_path: Path) -> None:
    result = train(TrainConfig(output=str(tmp_path / "run")))
    print(result.evaluation.sentence(), result.seconds)
    assert result.evaluation.image_to_text.recall[1] >= 0.20
    assert result.evaluation.text_to_image.recall[1] >= 0.20
    assert result.evaluation.image_to_text.recall[10] >= 0.45
    assert result.evaluation.groups.accuracy >= 3 * result.evaluation.groups.chance
    assert (result.folder / "report.html").stat().st_size > 50_000
    if has_bfloat16() and (os.cpu_count() or 1) >= 2 and torch.get_num_threads() >= 2:
        assert sum(result.seconds.values()) < 300

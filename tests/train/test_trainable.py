# SPDX-License-Identifier: Apache-2.0
"""Models with objectives of their own in the loop: what they ask for they get, what they return is logged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vlmkernels import models
from vlmkernels.data import emoji
from vlmkernels.models import Trainable, VisionConfig, _registry, load_checkpoint
from vlmkernels.models._config import ModelConfig
from vlmkernels.train import TrainConfig, train
from vlmkernels.train.corpora import EmojiCorpus
from vlmkernels.train.run_folder import RunFolder


@dataclass(frozen=True)
class TwinConfig(ModelConfig):
    vision: VisionConfig = field(default_factory=lambda: VisionConfig(16, 1, 64, 8))
    embed_dim: int = 8


class Twin(Trainable, nn.Module):
    """Two views of a picture must agree with a momentum copy; no text."""

    needs_text = False
    needs_second_view = True

    def __init__(self, config: TwinConfig) -> None:
        super().__init__()
        self.config = config
        self.net = nn.Linear(3 * 16 * 16, config.embed_dim)
        self.momentum = nn.Linear(3 * 16 * 16, config.embed_dim).requires_grad_(False)

    def encode_image(self, images: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return self.net(images.flatten(1))

    def prepare_training(self, facts) -> None:
        self.facts = facts

    def training_losses(self, batch) -> dict[str, torch.Tensor]:
        assert batch.ids is None
        assert batch.second_images.shape == batch.images.shape
        assert not torch.equal(batch.second_images, batch.images)
        self.seen = batch
        distance = (
            self.net(batch.images.flatten(1)) - self.momentum(batch.second_images.flatten(1))
        ).square()
        return {"loss": distance.mean(), "largest_distance": distance.max()}

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        self.momentum.weight.lerp_(self.net.weight, step / total)


@pytest.fixture(autouse=True)
def without_evaluation(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Encoding the whole emoji set takes longer than these runs."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(EmojiCorpus, "evaluate", lambda self, encoder: None)
        monkeypatch.setattr(EmojiCorpus, "evaluate_images", lambda self, encoder: None)


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> list[Twin]:
    monkeypatch.setattr(_registry, "_MODELS", dict(_registry._MODELS))
    monkeypatch.setattr(_registry, "_ARCHITECTURES", dict(_registry._ARCHITECTURES))
    made: list[Twin] = []

    @models.register_model("twin")
    def build(**overrides: Any) -> Twin:
        made.append(Twin(TwinConfig().override(**overrides)))
        return made[-1]

    models.register_architecture("Twin", Twin, TwinConfig)
    return made


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": "twin",
        "output": str(folder),
        "epochs": 0.4,
        "batch_size": 128,
        "precision": "float32",
        "threads": 1,
        "log_every": 1,
        "report": False,
    } | more


def test_its_losses_are_logged_and_the_model_loads(twin: list[Twin], tmp_path: Path) -> None:
    result = train(TrainConfig(**settings(tmp_path / "run", report=True)))
    rows = RunFolder(result.folder).read_results()
    assert all(row["largest_distance"] > row["loss"] > 0 for row in rows[:-1])
    assert "logit_scale" not in rows[0]
    assert not (result.folder / "tokenizer.json").exists()
    model = twin[-1]
    loaded = load_checkpoint(result.folder)
    assert type(loaded) is Twin
    assert loaded.config == model.config
    assert torch.equal(loaded.momentum.weight, model.momentum.weight)
    # the last step's momentum is 1
    torch.testing.assert_close(model.momentum.weight, model.net.weight)
    assert "Largest distance" in (result.folder / "report.html").read_text()


@pytest.mark.slow
def test_pictures_without_text_are_evaluated_by_their_neighbours(twin: list[Twin], tmp_path: Path) -> None:
    result = train(TrainConfig(**settings(tmp_path / "run", report=True)))
    figures = result.evaluation.to_dict()
    assert set(figures) == {"names", "groups", "subgroups"}
    # even a random projection of the pixels finds the same drawing more often than chance
    assert figures["names"]["recall"]["R@1"] > 5 * figures["names"]["chance"]["R@1"]
    assert "nearest neighbour" in result.evaluation.sentence()
    assert "Nearest neighbour: subgroup" in (result.folder / "report.html").read_text()


def test_what_is_known_of_a_batch(twin: list[Twin], tmp_path: Path) -> None:
    train(TrainConfig(**settings(tmp_path / "run", epochs=0.1)))
    model, data = twin[-1], emoji.load()
    facts, batch = model.facts, model.seen
    assert facts.sources == emoji.TRAIN_STYLES
    by_label = {concept.label: concept for concept in facts.concepts}
    assert not any(data.emojis[label].held_out for label in by_label)
    for row, label in enumerate(batch.text_labels.tolist()):
        entry = data.emojis[label]
        assert batch.names[row] == by_label[label].name == emoji.spoken_name(entry)
        assert facts.groups[batch.group[row]] == entry.group
        assert facts.subgroups[batch.subgroup[row]] == entry.subgroup
        assert facts.sources[batch.source[row]] in entry.styles
        assert batch.keywords[row] == entry.keywords


def test_continuing_gives_the_same_bits(twin: list[Twin], tmp_path: Path) -> None:
    whole = train(TrainConfig(**settings(tmp_path / "whole")))
    calls = iter(range(100))
    config = TrainConfig(**settings(tmp_path / "cut"))
    assert not train(config, should_stop=lambda: next(calls) == 2).finished
    second = train(TrainConfig(output=config.output, resume=True, threads=1, log_every=1))
    assert second.finished
    files = [(r.folder / "model.safetensors").read_bytes() for r in (whole, second)]
    assert files[0] == files[1]


def test_descriptions_and_texts_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Described(models.CLIP):
        needs_descriptions = True
        max_descriptions = 3
        needs_single_source = True

        def training_texts(self, concepts, keywords, source, generator):
            assert len(set(source.tolist())) == 1
            return [f"{concept.name} by {int(s)}" for concept, s in zip(concepts, source, strict=True)]

        def vocabulary_texts(self, concepts=(), groups=(), subgroups=(), sources=()):
            return [f"by {i}" for i in range(len(sources))]

        def training_losses(self, batch):
            seen.append(batch)
            return super().training_losses(batch)

    monkeypatch.setattr(_registry, "_MODELS", dict(_registry._MODELS))
    monkeypatch.setattr(_registry, "_ARCHITECTURES", dict(_registry._ARCHITECTURES))
    options = {
        "embed_dim": 16,
        "vision": {"image_size": 16, "width": 32, "patch_size": 8, "heads": 2, "stem": "patch"},
        "text": {"layers": 1, "width": 32, "heads": 2, "context_length": 16},
    }
    config = models.CLIP.from_config("emoji-clip").config
    models.register_model("described")(lambda **more: Described(config.override(**more)))
    train(TrainConfig(**settings(tmp_path / "run", model="described", model_options=options, epochs=0.5)))
    batch = seen[0]
    n = len(batch.names)
    assert batch.description_ids.shape[:2] == batch.description_mask.shape == (n, 3)
    assert batch.description_mask.sum(1).tolist() == [min(3, len(words)) for words in batch.keywords]
    assert (batch.description_ids.any(2) == batch.description_mask).all()
    assert {int(b.source[0]) for b in seen} == {0, 1}


def test_who_asks_for_a_second_view_does_not_change_the_first() -> None:
    one = EmojiCorpus(16, batch_size=64, blend=0.0).batch(0, second_view=True)
    assert one.second is not None
    plain = EmojiCorpus(16, batch_size=64, blend=0.0).batch(0)
    assert torch.equal(one.images, plain.images)
    assert one.texts == plain.texts
    assert plain.second is None


def test_what_cannot_be_trained_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_registry, "_MODELS", dict(_registry._MODELS))
    models.register_model("linear")(lambda: nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"train: linear: expected a model that can be trained .*got Linear"):
        train(TrainConfig(**settings(tmp_path / "run", model="linear")))

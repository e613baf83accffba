# SPDX-License-Identifier: Apache-2.0
"""The models with objectives of their own, as the training loop uses them: facts, a batch, losses, a step, a folder."""

import pytest
import torch

import vlmkernels as vk
from vlmkernels.models.training import Concept, ContrastiveOptions, TrainingBatch, TrainingFacts

NAMES = (
    "cmd-emoji",
    "concentration-emoji",
    "diffusion-emoji",
    "grain-emoji",
    "mmc-emoji",
    "prefix-emoji",
    "selfie-emoji",
)
#: Sizes that keep these tests short.
OPTIONS = {
    "cmd-emoji": {"prototypes": 32, "swin": {"depths": (1, 1)}},
    "diffusion-emoji": {"image_size": 16, "dit": {"layers": 1, "width": 32}},
    "grain-emoji": {"vision": {"layers": 1}, "decoder_layers": 1},
    "mmc-emoji": {"prototypes": 32, "vision": {"layers": 1}},
}
COUNT = 8


def facts() -> TrainingFacts:
    concepts = tuple(Concept(i, f"thing {i}", i % 3, i % 5) for i in range(COUNT))
    groups, subgroups = ("food", "flags", "signs"), ("fruit", "country-flag", "arrow", "vegetable", "warning")
    return TrainingFacts(10, 5, COUNT, concepts, groups, subgroups, ("noto", "openmoji"))


def batch(model, source: int) -> TrainingBatch:
    size = model.config.vision.image_size
    ids = torch.randint(1, 4000, (COUNT, 6))
    ids[:, 0], ids[:, 4], ids[:, 5] = 4094, 4095, 0
    descriptions = torch.randint(1, 4000, (COUNT, 5, 4))
    descriptions[..., 0], descriptions[..., 3] = 4094, 4095
    labels = torch.arange(COUNT)
    return TrainingBatch(
        torch.randn(COUNT, 3, size, size),
        ids if model.needs_text else None,
        labels,
        labels,
        torch.randn(COUNT, 3, size, size) if model.needs_second_view else None,
        descriptions if model.needs_descriptions else None,
        torch.arange(5) < torch.arange(COUNT)[:, None] if model.needs_descriptions else None,
        group=labels % 3,
        subgroup=labels % 5,
        source=torch.full((COUNT,), source),
        options=ContrastiveOptions(),
    )


@pytest.fixture(params=NAMES)
def model(request):
    torch.manual_seed(0)
    built = vk.models.create(request.param, **OPTIONS.get(request.param, {}))
    built.prepare_training(facts())
    return built.train()


@pytest.mark.parametrize("source", [0, 1])
def test_a_step_lowers_the_loss_of_its_batch(model, source):
    drawn = batch(model, source)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    standing = {name: value.clone() for name, value in model.named_buffers()}
    seen = []
    for _ in range(4):
        torch.manual_seed(3)  # what a step draws (masks, crops, timesteps) is the same each time
        for name, value in model.named_buffers():  # nor do the teachers' centres move the loss
            value.copy_(standing[name])
        losses = model.training_losses(drawn)
        assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append(float(losses["loss"].detach()))
    model.after_step(1, 10)
    assert seen[-1] < seen[0]


def test_a_model_travels_through_a_folder(model, tmp_path):
    for _ in range(2):
        model.training_losses(batch(model, 1))["loss"].backward()
    model.after_step(3, 10)
    model.eval()
    vk.models.save_pretrained(model, tmp_path)
    loaded = vk.models.load_checkpoint(tmp_path)
    assert loaded.config == model.config
    for (name, one), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    torch.manual_seed(5)
    if hasattr(model, "encode_image"):
        images = batch(model, 0).images
        assert torch.equal(model.encode_image(images), loaded.encode_image(images))


def test_prefix_words_labels_for_the_first_source_and_leaves_captions_alone():
    model = vk.models.create("prefix-emoji")
    model.prepare_training(facts())
    concepts = list(facts().concepts)
    generator = torch.Generator().manual_seed(0)
    labels = model.training_texts(concepts, [()] * COUNT, torch.zeros(COUNT, dtype=torch.int64), generator)
    assert all(
        ("country flag" in text) == (c.subgroup == 1) for text, c in zip(labels, concepts, strict=True)
    )
    assert (
        model.training_texts(concepts, [()] * COUNT, torch.ones(COUNT, dtype=torch.int64), generator) is None
    )
    assert "an emoji of the kind country flag" in model.vocabulary_texts(subgroups=facts().subgroups)


def test_models_without_what_they_need_say_so():
    one = TrainingBatch(torch.zeros(4, 3, 48, 48), None, torch.arange(4), torch.arange(4))
    for name in ("mmc-emoji", "cmd-emoji"):
        with pytest.raises(ValueError, match="training needs a second view"):
            vk.models.create(name, **OPTIONS[name]).training_losses(one)
    for name in ("grain-emoji", "prefix-emoji"):
        with pytest.raises(ValueError, match="training needs texts"):
            vk.models.create(name).training_losses(one)
    with pytest.raises(ValueError, match="training needs groups or texts"):
        vk.models.create("diffusion-emoji").training_losses(one)
    with pytest.raises(ValueError, match="needs data with groups"):
        vk.models.create("concentration-emoji").prepare_training(TrainingFacts(1, 1, 1))
    with pytest.raises(ValueError, match="data of as many groups at most, got 0"):
        vk.models.create("diffusion-emoji").prepare_training(TrainingFacts(1, 1, 1))

# SPDX-License-Identifier: Apache-2.0
"""GRAIN: the identities of its specification, and what the region losses do on scenes of emoji."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import vlmkernels as vk
from vlmkernels.models.grain import (
    CONFIG_EMOJI,
    Grain,
    GrainConfig,
    best_boxes,
    box_iou,
    collage,
    description_prompt,
    generalized_iou,
    match_boxes,
    region_description_loss,
)


@pytest.fixture
def model() -> Grain:
    return Grain(CONFIG_EMOJI).eval()


def ids_of(*shape: int) -> torch.Tensor:
    ids = torch.randint(1, 4000, shape)
    ids[..., 0], ids[..., -1] = 4094, 4095
    return ids


def annotated(count: int = 3, slots: int = 4) -> tuple[torch.Tensor, ...]:
    """Images, captions, descriptions, boxes, and slots of which the first image has 2, the second 4, the third 1."""
    available = torch.arange(slots) < torch.tensor([2, 4, 1])[:count, None]
    boxes = 0.2 + 0.4 * torch.rand(count, slots, 4)
    return torch.randn(count, 3, 64, 64), ids_of(count, 6), ids_of(count, slots, 5), boxes, available


@pytest.mark.parametrize(("targets", "queries"), [(1, 1), (1, 5), (3, 5), (5, 5), (4, 4)])
def test_matching_equals_brute_force(targets, queries):
    for _ in range(20):
        cost = torch.randn(targets, queries)
        found = match_boxes(cost)
        best = min(
            sum(float(cost[t, q]) for t, q in enumerate(p))
            for p in itertools.permutations(range(queries), targets)
        )
        assert len(set(found.tolist())) == targets
        assert float(cost[torch.arange(targets), found].sum()) == pytest.approx(best, abs=1e-5)


def test_generalized_iou_of_equal_disjoint_and_touching_boxes():
    box = torch.tensor([0.3, 0.4, 0.2, 0.1])
    assert generalized_iou(box, box).item() == pytest.approx(1.0, abs=1e-6)
    far = torch.tensor([0.9, 0.9, 0.05, 0.05], requires_grad=True)
    value = generalized_iou(box, far)
    assert value < 0
    (gradient,) = torch.autograd.grad(value, far)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    half = torch.tensor([0.35, 0.4, 0.1, 0.1])  # the right half of the box
    assert box_iou(box, half).item() == pytest.approx(0.5, abs=1e-6)


def test_without_region_losses_it_is_a_clip_with_the_image_query():
    model = Grain(CONFIG_EMOJI.override(box_weight=0.0, description_weight=0.0)).eval()
    images, captions, descriptions, boxes, available = annotated()
    loss = model(images, captions, descriptions, boxes, available)["loss"]
    pair = model.encode_image(images, normalize=True), model.encode_text(captions, normalize=True)
    assert torch.allclose(loss, vk.clip_loss(*pair, model.logit_scale.exp()), rtol=1e-5)


@pytest.mark.parametrize(
    ("weight", "part"),
    [("contrastive_weight", "l_ic"), ("box_weight", "l_box"), ("description_weight", "l_rd")],
)
def test_each_weight_removes_its_term(model, weight, part):
    batch = annotated()
    full = model(*batch)
    less = Grain(CONFIG_EMOJI.override(**{weight: 0.0})).eval()
    less.load_state_dict(model.state_dict())
    assert torch.allclose(less(*batch)["loss"], full["loss"] - full[part], rtol=1e-4)


def test_permuting_the_targets_of_an_image_changes_nothing(model):
    images, captions, descriptions, boxes, available = annotated()
    first = model(images, captions, descriptions, boxes, available)
    order = torch.tensor([2, 0, 3, 1])
    second = model(images, captions, descriptions[:, order], boxes[:, order], available[:, order])
    for name in ("l_ic", "l_box", "l_rd"):
        assert torch.allclose(first[name], second[name], rtol=1e-4), name


def test_an_image_without_boxes_adds_nothing_to_the_region_losses(model):
    images, captions, descriptions, boxes, available = annotated()
    without = available.clone()
    without[2] = False
    all_three = model(images, captions, descriptions, boxes, without)
    two = model(images[:2], captions[:2], descriptions[:2], boxes[:2], available[:2])
    for name in ("l_box", "l_rd"):
        assert torch.allclose(all_three[name], two[name], rtol=1e-4), name
    none = model(images, captions, descriptions, boxes, torch.zeros_like(available))
    assert none["l_box"] == 0 and none["l_rd"] == 0 and none["loss"].isfinite()
    none["loss"].backward()


def test_a_degenerate_box_is_dropped_from_boxes_and_descriptions_alike(model):
    images, captions, descriptions, boxes, available = annotated()
    boxes[1, 0, 2] = 0.0
    marked = model(images, captions, descriptions, boxes, available)
    available = available.clone()
    available[1, 0] = False
    unmarked = model(images, captions, descriptions, boxes, available)
    assert torch.allclose(marked["loss"], unmarked["loss"], rtol=1e-5)


def test_region_loss_is_one_directional_cross_entropy():
    regions, descriptions = torch.randn(3, 8), torch.randn(7, 8)
    index = torch.tensor([6, 0, 3])
    logits = 5.0 * F.normalize(regions, dim=-1) @ F.normalize(descriptions, dim=-1).T
    expected = F.cross_entropy(logits, index)
    assert torch.allclose(region_description_loss(regions, descriptions, index, 5.0), expected, rtol=1e-5)


def test_auxiliary_losses_are_off_by_default_and_add_the_other_layers(model):
    batch = annotated()
    deep = Grain(CONFIG_EMOJI.override(auxiliary_loss=True)).eval()
    deep.load_state_dict(model.state_dict())
    plain, more = model(*batch), deep(*batch)
    assert more["l_box"] > plain["l_box"]
    assert torch.equal(more["l_rd"], plain["l_rd"])


def test_published_sizes():
    config = GrainConfig()
    assert (config.vision.layers, config.text.layers, config.decoder_layers) == (12, 12, 6)
    assert (config.match_weights, config.box_factor, config.dropout) == ((5.0, 2.0), 1.5, 0.1)
    shallow = {"vision": {"layers": 1}, "text": {"layers": 1, "vocab_size": 100}, "decoder_layers": 1}
    model = Grain(config.override(**shallow))
    assert model.query_embed.shape == (6, 512)
    assert model.memory_proj.weight.shape == (512, 768) and model.memory_proj.bias is None
    assert model.visual.positional_embedding.shape == (197, 768)
    assert model.visual.transformer.resblocks[0].attn.q_norm.weight.shape == (64,)
    layer = sum(p.numel() for p in model.decoder[0].parameters())
    assert layer == 8 * (512 * 512 + 512) + 2 * 512 * 2048 + 512 + 2048 + 6 * 512


def test_best_boxes_take_the_highest_scores_above_the_threshold():
    scores = torch.tensor([0.2, 0.9, 0.4, 0.31, 0.5, 0.6, 0.35])
    assert best_boxes(torch.rand(7, 4), scores).tolist() == [1, 5, 4, 2, 6]
    assert best_boxes(torch.rand(7, 4), scores, threshold=0.55).tolist() == [1, 5]
    assert best_boxes(torch.rand(0, 4), torch.rand(0)).tolist() == []


def test_descriptions_are_worded_by_their_first_word():
    assert description_prompt("a {}", "deer", "antlers") == "a deer which has antlers"
    assert description_prompt("a {}", "deer", "an animal") == "a deer which is an animal"


def test_class_features_are_plain_means(model):
    ids = [ids_of(3, 5), ids_of(2, 5)]
    means = model.class_features(ids)
    assert torch.allclose(means[1], model.encode_text(ids[1], normalize=True).mean(0), atol=1e-6)
    assert means.norm(dim=-1).max() < 1
    assert torch.allclose(model.class_features(ids, renormalize=True).norm(dim=-1), torch.ones(2))


def test_collage_pastes_pictures_where_its_boxes_say():
    images = torch.arange(1.0, 9.0).view(8, 1, 1, 1).expand(8, 3, 64, 64)
    made = collage(images, torch.full((3,), -1.0))
    assert made.images.shape == (2, 3, 64, 64) and made.boxes.shape == (2, 4, 4)
    for c, slot in made.available.nonzero().tolist():
        x, y, width, height = (64 * made.boxes[c, slot]).tolist()
        assert made.images[c, 0, int(y), int(x)] == made.members[c, slot] + 1
        shown = (made.images[c, 0] == made.members[c, slot] + 1).sum()
        assert shown.item() == pytest.approx(width * height, rel=0.15)
    assert sorted(made.members.flatten().tolist()) == list(range(8))


def test_bad_input_is_named(model):
    images, captions, descriptions, boxes, available = annotated()
    with pytest.raises(ValueError, match=r"Grain: expected boxes \[B, T, 4\]"):
        model(images, captions, descriptions, boxes[:, :3], available)
    with pytest.raises(ValueError, match="T at most 5"):
        model(images, captions, ids_of(3, 6, 5), torch.rand(3, 6, 4), torch.ones(3, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 64, 64\]"):
        model.encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="T at most Q"):
        match_boxes(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="at least 4 images"):
        collage(torch.zeros(3, 3, 8, 8), torch.zeros(3))

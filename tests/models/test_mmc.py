# SPDX-License-Identifier: Apache-2.0
"""MMC: prompting patches, separation, losses; segmentation of scenes of emoji by features learned without labels."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import vlmkernels as vk
from vlmkernels.models.mmc import CONFIG_EMOJI, MMC, MMCConfig, block_masks
from vlmkernels.models.prompt_segmentation import (
    draw_segmentation,
    object_patches,
    prompt_patch_segment,
    prompt_similarity,
    segmentation_scores,
    similarity_separation,
)

GRID = (6, 5)


def test_segmentation_ignores_scale_and_rotation_of_the_features():
    features = torch.randn(30, 8)
    mask = prompt_patch_segment(features, 7, 0.2, GRID)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    scaled = 5.0 * torch.rand(30, 1).add(0.1) * features @ rotation
    assert torch.equal(prompt_patch_segment(scaled, 7, 0.2, GRID), mask)


def test_thresholds_select_all_shrink_and_keep_the_prompt():
    features = torch.randn(30, 8)
    assert prompt_patch_segment(features, 3, -1.0, GRID).all()
    masks = [prompt_patch_segment(features, 3, theta, GRID).flatten() for theta in (-0.2, 0.0, 0.3, 0.9, 1.0)]
    for wider, narrower in itertools.pairwise(masks):
        assert (narrower & ~wider).sum() == 0
    assert all(mask[3] for mask in masks)


def test_the_mask_equals_brute_force():
    features = torch.randn(30, 8)
    expected = [F.cosine_similarity(features[4], f, dim=0) >= 0.1 for f in features]
    assert prompt_patch_segment(features, 4, 0.1, GRID).flatten().tolist() == [bool(x) for x in expected]


def test_similarities_are_upsampled_before_the_threshold():
    features = torch.randn(30, 8)
    similarity = prompt_similarity(features, 9, GRID)
    large = F.interpolate(similarity[None, None], (24, 20), mode="bilinear", align_corners=False)[0, 0]
    assert torch.equal(prompt_patch_segment(features, 9, 0.3, GRID, (24, 20)), large >= 0.3)


def test_one_hot_objects_are_segmented_and_separated_perfectly():
    labels = torch.arange(3).repeat_interleave(10)
    features, masks = torch.eye(3)[labels], (labels.view(GRID) == torch.arange(3).view(3, 1, 1))
    assert torch.equal(segmentation_scores(features, masks, GRID, thresholds=(0.5,)), torch.ones(3, 1))
    found = similarity_separation(features, labels)
    assert (found["overlap"], found["auc"], found["intra"], found["inter"]) == (0.0, 1.0, 1.0, 0.0)


def test_random_features_separate_nothing():
    labels = torch.arange(300) % 4
    found = similarity_separation(torch.randn(300, 16), labels)
    assert found["auc"] == pytest.approx(0.5, abs=0.02)
    assert found["overlap"] > 0.9


def test_auc_equals_sklearn_with_ties():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    features = torch.randint(-1, 2, (40, 3)).float() + 0.5
    labels = torch.randint(0, 3, (40,))
    row, column = torch.triu_indices(40, 40, 1)
    cosines = (F.normalize(features, dim=-1)[row] * F.normalize(features, dim=-1)[column]).sum(-1)
    expected = metrics.roc_auc_score((labels[row] == labels[column]).numpy(), cosines.numpy())
    assert similarity_separation(features, labels)["auc"] == pytest.approx(expected, abs=1e-6)


def test_separation_within_images_leaves_other_pairs_out():
    features, labels = torch.randn(20, 8), torch.arange(20) % 2
    images = torch.arange(2).repeat_interleave(10)
    found = similarity_separation(features, labels, images=images)
    parts = [
        similarity_separation(
            features[i::1][images == i] if i < 0 else features[images == i], labels[images == i]
        )
        for i in (0, 1)
    ]
    assert found["intra"] == pytest.approx(sum(p["intra"] for p in parts) / 2, abs=1e-6)
    without = labels.clone()
    without[3] = -1
    assert similarity_separation(features, without) != similarity_separation(features, labels)


def test_prompts_lie_on_patches_that_are_mostly_covered():
    mask = torch.zeros(1, 12, 10, dtype=torch.bool)
    mask[0, :2, :2] = True  # one patch of 2 x 2
    mask[0, 4, 4] = True  # a quarter of another
    assert object_patches(mask, GRID).nonzero().tolist() == [[0, 0]]


def test_the_picture_shows_image_similarity_and_mask():
    image = torch.full((3, 24, 20), 100, dtype=torch.uint8)
    picture = draw_segmentation(image, torch.randn(30, 8), 7, 0.3, GRID)
    assert picture.shape == (3, 24, 60) and picture.dtype == torch.uint8
    assert picture[:, 4, 8].tolist() == [255, 0, 0]  # a corner of patch 7: row 1, column 2
    assert picture[:, 23, 19].tolist() == [100, 100, 100]


@pytest.mark.parametrize("ratio", [(0.3, 0.7), (0.5, 0.5), (0.0, 0.0)])
def test_block_masks_cover_their_share(ratio):
    masks = block_masks(50, 8, ratio)
    share = masks.float().mean(1)
    assert share.min() >= ratio[0] - 0.01 and share.max() <= ratio[1] + 0.01
    if ratio == (0.5, 0.5):
        # Blocks, not salt: a hidden patch has more hidden neighbours than chance gives it.
        grid = masks.view(-1, 8, 8)
        assert (grid[:, :, 1:] & grid[:, :, :-1]).sum() > 0.3 * grid[:, :, 1:].numel()


@pytest.fixture
def model() -> MMC:
    torch.manual_seed(0)
    return MMC(CONFIG_EMOJI.override(vision={"layers": 1}, prototypes=64)).eval()


def views(count: int = 4) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    masks = block_masks(count, 8, (0.3, 0.7)), block_masks(count, 8, (0.3, 0.7))
    return torch.randn(count, 3, 48, 48), torch.randn(count, 3, 48, 48), masks


@pytest.mark.parametrize(
    ("weight", "part"), [("mim_weight", "l_mim"), ("momentum_weight", "l_mom"), ("contrast_weight", "l_con")]
)
def test_each_weight_removes_exactly_its_term(model, weight, part):
    full = model(*views())
    less = MMC(model.config.override(**{weight: 0.0})).eval()
    less.load_state_dict(model.state_dict())
    without = less(*views())
    assert part not in without
    assert torch.allclose(without["loss"], full["loss"] - full[part], rtol=1e-5)


def test_the_contrast_with_teacher_as_student_is_info_nce(model):
    first, second, _ = views()
    none = torch.zeros(4, 64, dtype=torch.bool)
    found = model(first, second, (none, none))["l_con"]
    a, b = (model.student(model.student.backbone(x))[1] for x in (first, second))
    expected = vk.info_nce(a, b, 5.0) + vk.info_nce(b, a, 5.0)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_the_teacher_gets_no_gradient_and_sees_no_mask(model):
    first, second, masks = views()
    model(first, second, masks)["loss"].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is not None for p in model.student.parameters())
    seen = []
    model.teacher.network.backbone.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(first, second, masks)
    assert len(seen) == 1 and len(seen[0]) == 1 and torch.equal(seen[0][0], torch.cat([first, second]))


def test_pixels_are_judged_where_they_were_hidden(model):
    first, second, masks = views()
    none = torch.zeros(4, 64, dtype=torch.bool)
    assert model(first, second, (none, none))["l_mim"] == 0
    with torch.no_grad():
        model.pixel_head.weight.zero_()
        model.pixel_head.bias.fill_(0.5)
    hidden = torch.cat(masks)
    patches = F.unfold(torch.cat([first, second]), 6, stride=6).transpose(1, 2)
    expected = (patches - 0.5).abs().mean(-1)[hidden].mean()
    assert torch.allclose(model(first, second, masks)["l_mim"], expected, rtol=1e-5)


@pytest.mark.parametrize("fill", ["token", "noise"])
def test_hidden_pixels_do_not_reach_the_student(fill):
    model = MMC(CONFIG_EMOJI.override(mask_fill=fill, vision={"layers": 1}, prototypes=64)).eval()
    first, second, masks = views()
    pixels = masks[0].view(4, 1, 8, 8).repeat_interleave(6, 2).repeat_interleave(6, 3)
    other = torch.where(pixels, torch.randn_like(first), first)
    losses = []
    for images in (first, other):
        torch.manual_seed(5)
        seen = []
        hook = model.student.backbone.norm.register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out)
        )
        model(images, second, masks)
        hook.remove()
        losses.append(seen[0])
    assert torch.equal(*losses)


def test_the_teacher_follows_and_the_temperature_rises(model):
    before = model.teacher.network.backbone.patch_embed.weight.clone()
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1.0)
    model.after_step(1, 100)
    moved = model.teacher.network.backbone.patch_embed.weight - before
    assert torch.allclose(moved, torch.full_like(moved, 0.02), atol=1e-4)  # 1 - momentum
    assert model.teacher.temperature(0.04, 0.07, 0.3) == pytest.approx(0.041, abs=1e-4)
    model.after_step(100, 100)
    assert model.teacher.temperature(0.04, 0.07, 0.3) == 0.07


def test_training_moves_both_centres_and_evaluation_none(model):
    model(*views())
    assert model.centre.abs().max() == 0
    model.train()(*views())
    assert model.centre.abs().max() > 0 and model.patch_centre.abs().max() > 0
    assert not model.teacher.network.training


def test_patch_features_leave_the_class_token_out(model):
    images = torch.randn(2, 3, 48, 48)
    tokens = model.teacher.network.backbone(images)
    assert torch.equal(model.patch_features(images), tokens[:, 1:])
    assert torch.equal(model.encode_image(images), tokens[:, 0])


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match=r"features must be \[6 \* 5, d\]"):
        prompt_patch_segment(torch.randn(31, 4), 0, 0.5, GRID)
    with pytest.raises(ValueError, match=r"prompt_index must lie in \[0, 30\)"):
        prompt_patch_segment(torch.randn(30, 4), 30, 0.5, GRID)
    with pytest.raises(ValueError, match="pairs inside objects and pairs between"):
        similarity_separation(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask_fill must be one of"):
        MMCConfig(mask_fill="zeros")
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 48, 48\]"):
        model(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))

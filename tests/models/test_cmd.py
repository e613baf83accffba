# SPDX-License-Identifier: Apache-2.0
"""CMD and its Swin backbone: timm's numbers, the loss's identities; fine-grained retrieval of emoji."""

import pytest
import torch
import torch.nn.functional as F

from vlmkernels.models.cmd import (
    CMD,
    CONFIG_EMOJI,
    CMDConfig,
    CMDLoss,
    ViewOutput,
    random_crops,
    region_match,
    retrieval_metrics,
)
from vlmkernels.models.swin import Swin, SwinConfig


def test_swin_equals_timm():
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    peer = timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=4, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4), num_classes=0
    ).eval()
    config = SwinConfig(64, 4, 32, (2, 2), (2, 4), 4, 0.0)
    ours = Swin(config).eval()
    state = {}
    for name, value in peer.state_dict().items():
        name = name.replace("patch_embed.proj", "patch_embed").replace("patch_embed.norm", "patch_norm")
        if "relative_position_index" in name or "attn_mask" in name:
            continue
        if "downsample" in name:  # timm's stage begins with the merge, ours ends with it
            stage = int(name.split(".")[1])
            name = f"merges.{stage - 1}." + name.split("downsample.")[1]
        else:
            name = name.replace("layers.", "stages.").replace(".blocks.", ".")
        name = name.replace("attn.relative_position_bias_table", "relative_bias")
        name = name.replace("attn.qkv.weight", "attn.in_proj_weight").replace(
            "attn.qkv.bias", "attn.in_proj_bias"
        )
        name = name.replace("attn.proj", "attn.out_proj")
        name = name.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        state[name] = value
    ours.load_state_dict(state)
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        expected = peer.forward_features(images).flatten(1, 2)
        assert torch.allclose(ours(images), expected, atol=2e-5)


def test_swin_tiny_has_the_published_size():
    model = Swin(SwinConfig())
    assert sum(p.numel() for p in model.parameters()) == 27_519_354
    assert model.config.out_width == 768


def test_windows_of_a_padded_map_do_not_see_the_padding():
    model = Swin(SwinConfig(32, 4, 16, (2, 2), (2, 2), 4, 0.0)).eval()
    images = torch.randn(1, 3, 24, 24)  # 6 x 6 tokens in windows of 4
    out = model(images)
    assert out.shape == (1, 9, 32) and out.isfinite().all()
    # The padding's tokens come from zeros: a bias there would reach the others if they attended to it.
    with torch.no_grad():
        first = model.stages[0][0]
        x = torch.randn(1, 6, 6, 16)
        before = first._attend(x)
        alone = first._attend(x[:, 4:, 4:])  # the last window's four real tokens by themselves
    assert torch.allclose(before[:, 4:, 4:], alone, atol=1e-5)


def view(count: int = 3, regions: int = 5, prototypes: int = 12, width: int = 8) -> ViewOutput:
    return ViewOutput(
        torch.randn(count, prototypes),
        torch.randn(count, regions, prototypes),
        torch.randn(count, regions, width),
        torch.full((count, regions), 1 / regions),
    )


def loss_of(**options) -> CMDLoss:
    return CMDLoss(12, **options).eval()


def test_without_the_inter_term_it_is_esvit_and_without_regions_half_of_dino():
    student, teacher = [view(), view(), view(regions=2)], [view(), view()]
    full = loss_of()(student, teacher, 0.05)
    esvit = loss_of(inter_weight=0.0)(student, teacher, 0.05)["loss"]
    assert torch.allclose(esvit, full["loss"] - full["l_inter"], rtol=1e-5)
    dino = torch.stack(
        [
            -((t.image_logits / 0.05).softmax(-1) * (s.image_logits / 0.1).log_softmax(-1)).sum(-1).mean()
            for a, t in enumerate(teacher)
            for b, s in enumerate(student)
            if a != b
        ]
    ).mean()
    alone = loss_of(inter_weight=0.0, region_weight=0.0)(student, teacher, 0.05)["loss"]
    assert torch.allclose(alone, 0.5 * dino, rtol=1e-5)


def test_region_match_equals_brute_force_and_ignores_scale():
    student, teacher = torch.randn(2, 6, 8), torch.randn(2, 4, 8)
    found = region_match(student, teacher)
    for b in range(2):
        for i in range(6):
            cosines = [F.cosine_similarity(student[b, i], teacher[b, j], dim=0).item() for j in range(4)]
            assert found[b, i] == max(range(4), key=cosines.__getitem__)
    assert torch.equal(region_match(3 * student, 0.2 * teacher), found)


def test_regions_are_matched_from_student_to_teacher():
    teacher = view()
    order = torch.tensor([3, 0, 4, 1, 2])
    student = ViewOutput(
        teacher.image_logits, teacher.region_logits[:, order], teacher.regions[:, order], teacher.weights
    )
    found = loss_of()([view(), student], [teacher], 0.1)
    q = (teacher.region_logits / 0.1).softmax(-1)
    assert torch.allclose(found["l_region"], -(q * q.log()).sum(-1).mean(), rtol=1e-5)


def test_equal_outputs_and_temperatures_leave_the_entropy():
    one = view()
    found = loss_of()([view(), one], [one], 0.1)
    q = (one.image_logits / 0.1).softmax(-1)
    assert torch.allclose(found["l_image"], -(q * q.log()).sum(-1).mean(), rtol=1e-5)


def test_the_inter_term_is_zero_where_regions_agree_with_the_image():
    one = view()
    agreeing = ViewOutput(
        one.image_logits, one.image_logits[:, None].expand(-1, 5, -1), one.regions, one.weights
    )
    found = loss_of()([view(), agreeing], [agreeing], 0.1)
    assert found["l_inter"].item() == pytest.approx(0.0, abs=1e-6)
    assert found["l_inter_teacher"].item() == pytest.approx(0.0, abs=1e-6)
    assert loss_of()([view(), view()], [view()], 0.1)["l_inter"] > 0


def test_the_bag_is_a_weighted_mean():
    one = view()
    weights = torch.rand(3, 5).softmax(-1)
    weighted = ViewOutput(one.image_logits, one.region_logits, one.regions, weights)
    bag = (weights.unsqueeze(-1) * (one.region_logits / 0.1).softmax(-1)).sum(1)
    expected = F.kl_div((one.image_logits / 0.1).log_softmax(-1), bag, reduction="batchmean")
    assert torch.allclose(loss_of()([view(), weighted], [view()], 0.1)["l_inter"], expected, rtol=1e-4)


def test_the_released_lines_stay_finite_and_tiny():
    student, teacher = [view(), view()], [view()]
    released = loss_of(inter="released")(student, teacher, 0.05)
    z, targets = student[1].image_logits / 0.1, (student[1].region_logits / 0.1).sum(1)
    positive = targets > 0
    expected = (targets[positive] * (targets[positive].log() - z[positive])).sum() / targets.numel()
    assert torch.allclose(released["l_inter"], expected, rtol=1e-4)
    q, bag = (
        (teacher[0].image_logits / 0.05).softmax(-1),
        (teacher[0].region_logits / 0.05).softmax(-1).sum(1),
    )
    assert torch.allclose(
        released["l_inter_teacher"], F.kl_div(q, bag, reduction="sum") / q.numel(), rtol=1e-4
    )


@pytest.fixture
def model() -> CMD:
    torch.manual_seed(0)
    return CMD(CONFIG_EMOJI.override(aggregator="attention", prototypes=32))


def test_no_gradient_reaches_the_teacher_and_every_part_of_the_student_learns(model):
    model.teacher.progress.fill_(0.5)  # past the epoch of frozen last layers
    model.train()
    out = model([torch.randn(2, 3, 48, 48)] * 2, [torch.randn(2, 3, 24, 24)])
    out["loss"].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert [n for n, p in model.student.named_parameters() if p.grad is None] == []


def test_last_layers_are_fixed_at_first_and_centres_move_in_training_alone(model):
    views = [torch.randn(2, 3, 48, 48)] * 2
    model.eval()
    model(views)
    assert model.criterion.centre.abs().max() == 0
    model.train()
    model(views)["loss"].backward()
    assert model.student.image_head.prototypes.grad is None
    assert model.criterion.centre.abs().max() > 0 and model.criterion.region_centre.abs().max() > 0
    assert not torch.equal(model.criterion.centre, model.criterion.region_centre)


def test_views_of_two_sizes_make_their_pairs(model):
    out = model.eval()([torch.randn(2, 3, 48, 48)] * 2, [torch.randn(2, 3, 24, 24)] * 3)
    assert out["loss"].isfinite() and set(out) == {
        "loss",
        "l_image",
        "l_region",
        "l_inter",
        "l_inter_teacher",
    }
    weights = model.region_weights(torch.randn(2, 3, 48, 48))
    assert weights.shape == (2, 36)
    assert torch.allclose(weights.sum(1), torch.ones(2))


def test_crops_cover_their_area():
    across = torch.linspace(0, 1, 64).expand(500, 3, 64, 64)
    crops = random_crops(across, 16, (0.25, 0.25), ratio=(1.0, 1.0))
    span = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert torch.allclose(span, torch.full((500,), 0.5 * 15 / 16 * 64 / 63), atol=0.02)
    assert torch.equal(
        random_crops(across[:2], 64, (1.0, 1.0), ratio=(1.0, 1.0)).round(decimals=4),
        across[:2].round(decimals=4),
    )


def test_retrieval_metrics_of_a_small_gallery():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0], [1.0, 0.3]])
    labels = torch.tensor([0, 1, 0, 1, 0])
    found = retrieval_metrics(features, labels, queries=torch.tensor([True, False, False, False, False]))
    assert found == {"rank1": 0.0, "rank5": 1.0, "map": pytest.approx((1 / 2 + 2 / 3) / 2)}
    with pytest.raises(ValueError, match="no query has its label"):
        retrieval_metrics(features, torch.arange(5))


def test_published_settings():
    config = CMDConfig()
    assert (config.swin.window, config.prototypes, config.local_crops) == (14, 65536, 8)
    assert (config.teacher_temperature, config.momentum) == ((0.04, 0.07), 0.996)


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match=r"expected \[B, T, C\] and \[B, U, C\]"):
        region_match(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="inter must be one of"):
        CMDConfig(inter="js")
    with pytest.raises(ValueError, match="a student's view that is not the teacher's"):
        loss_of()([view()], [view()], 0.1)
    with pytest.raises(ValueError, match="multiples of 4"):
        model.student.backbone(torch.zeros(1, 3, 30, 30))

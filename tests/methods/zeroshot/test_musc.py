# SPDX-License-Identifier: Apache-2.0
"""MuSc: each step against a loop, what no picture may change, memory, and blotches on jittered emoji."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from torch import Tensor

from vlmkernels.methods.zeroshot import auroc
from vlmkernels.methods.zeroshot.musc import MuSc, lnamd, musc, mutual_score, patch_tokens, rscin
from vlmkernels.models import CLIP, CLIPConfig, TextConfig, VisionConfig


def test_single_patches_are_layer_norm_alone() -> None:
    x = torch.randn(3, 16, 7, dtype=torch.float64)
    normed = F.layer_norm(x, (16, 7), eps=1e-5)  # over channels and places together
    torch.testing.assert_close(lnamd(x, 1), F.normalize(normed, dim=2))


@pytest.mark.parametrize("r", [3, 5])
def test_neighbourhoods_count_the_padding(r: int) -> None:
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    normed = F.layer_norm(x, (20, 6), eps=1e-5).transpose(1, 2).reshape(2, 6, 4, 5)
    windows = F.unfold(normed, r, padding=r // 2).view(2, 6, r * r, 20)
    torch.testing.assert_close(lnamd(x, r, grid=(4, 5)), F.normalize(windows.mean(2).transpose(1, 2), dim=2))


@pytest.mark.parametrize(("n", "top", "kept"), [(8, 0.3, 2), (8, 1.0, 7), (3, 0.3, 1)])
def test_mutual_scores_against_a_double_loop(unit_rows, n: int, top: float, kept: int) -> None:
    z = unit_rows(n, 9, 5)
    expected = torch.empty(n, 9, dtype=torch.float64)
    for i in range(n):
        for u in range(9):
            best = sorted(float((z[i, u] - z[j]).norm(dim=1).min()) for j in range(n) if j != i)
            expected[i, u] = sum(best[:kept]) / kept
    torch.testing.assert_close(mutual_score(z, top), expected)


def test_equal_pictures_are_perfectly_normal(unit_rows) -> None:
    z = unit_rows(1, 12, 8, dtype=torch.float32).repeat(5, 1, 1)
    assert (mutual_score(z) == 0).all()


def test_close_matches_do_not_cancel(unit_rows) -> None:
    """Distances of 1e-4: in float32 2 - 2 cos of them is rounding; blank patches (zero rows) match each other."""
    z = unit_rows(1, 30, 64).repeat(4, 1, 1)
    z = z + 1e-5 * torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[:, :2] = 0
    z = z.float()
    expected = torch.stack(
        [
            torch.stack([torch.cdist(a.double(), b.double()).amin(1) for j, b in enumerate(z) if j != i], 1)
            .topk(2, dim=1, largest=False)
            .values.mean(1)
            for i, a in enumerate(z)
        ]
    )
    torch.testing.assert_close(mutual_score(z, 0.7), expected.float(), rtol=1e-5, atol=0)
    assert (mutual_score(z, 0.7)[:, :2] == 0).all()


def test_order_of_pictures_does_not_matter(unit_rows) -> None:
    layers, features = [torch.randn(7, 16, 6), torch.randn(7, 16, 4)], unit_rows(7, 5, dtype=torch.float32)
    order = torch.randperm(7)
    scores, maps = musc(layers, features, size=12)
    again, moved = musc([t[order] for t in layers], features[order], size=12)
    torch.testing.assert_close(again, scores[order])
    torch.testing.assert_close(moved, maps[order])
    assert maps.shape == (7, 12, 12)


def test_groups_are_scored_apart() -> None:
    layers = [torch.randn(8, 16, 6)]
    _, maps = musc(layers, None, rs=(1,), parts=2)
    _, even = musc([layers[0][::2]], None, rs=(1,))
    torch.testing.assert_close(maps[::2], even)


def test_smoothing_over_similar_pictures(unit_rows) -> None:
    scores, g = torch.rand(9, dtype=torch.float64), unit_rows(9, 4).abs()
    s = (scores - scores.min()) / (scores.max() - scores.min())
    torch.testing.assert_close(rscin(scores, g, (1,)), s)
    w = g / g.norm(dim=1, keepdim=True)
    w = w @ w.T
    expected = torch.zeros(9, dtype=torch.float64)
    for k in (1, 3):
        kept = torch.zeros_like(w).scatter(1, w.topk(k).indices, w.topk(k).values)
        expected += kept / kept.sum(1, keepdim=True) @ s / 2
    torch.testing.assert_close(rscin(scores, g, (1, 3)), expected)
    assert not rscin(torch.ones(3), torch.eye(3)).any()


def test_no_matrix_of_all_patches_is_made() -> None:
    """20 pictures of 64 patches: all pairs would be 1.6 million numbers."""
    z = F.normalize(torch.randn(20, 64, 16), dim=2)
    with LargestTensor() as largest:
        mutual_score(z)
    assert largest.elements <= max(
        20 * 64 * 20, z.numel(), 2**18
    )  # the workspace of the search is 64 KiB or so


def test_block_outputs_are_the_models_own() -> None:
    vision = VisionConfig(image_size=32, layers=4, width=32, patch_size=8, heads=2)
    model = CLIP(
        CLIPConfig(16, vision, TextConfig(vocab_size=50, context_length=8, width=32, layers=1, heads=2))
    ).eval()
    images = torch.randn(3, 3, 32, 32)
    tokens = patch_tokens(model, images)
    assert [list(t.shape) for t in tokens] == [[3, 16, 32]] * 4
    with torch.no_grad():
        torch.testing.assert_close(tokens[-1], model.visual.forward_tokens(images)[:, 1:])
    assert patch_tokens(model, torch.randn(2, 3, 64, 64), blocks=[1])[0].shape == (2, 64, 32)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="odd"):
        lnamd(torch.zeros(1, 4, 2), 2)
    with pytest.raises(ValueError, match="no grid"):
        lnamd(torch.zeros(1, 5, 2), 1)
    with pytest.raises(ValueError, match="at least 2"):
        mutual_score(torch.zeros(1, 4, 2))
    with pytest.raises(ValueError, match="groups"):
        musc([torch.zeros(4, 4, 2)], None, parts=3)
    with pytest.raises(ValueError, match="windows"):
        rscin(torch.zeros(2), torch.eye(2), (3,))
    with pytest.raises(TypeError, match="vision transformer"):
        patch_tokens(torch.nn.Linear(2, 2), torch.zeros(1, 3, 4, 4))


def jittered(picture: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Versions of a picture shifted by up to a pixel, brighter or darker, with noise."""
    out = []
    for _ in range(count):
        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        light = 1 + 0.1 * float(torch.rand((), generator=generator) - 0.5)
        noise = 4 * torch.randn(picture.shape, generator=generator)
        out.append((picture.roll(shift, (1, 2)).float() * light + noise).clamp(0, 255))
    return torch.stack(out)


def blotched(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each picture with a dark square in it, and where."""
    masks = torch.zeros(len(pictures), 64, 64, dtype=torch.bool)
    for i in range(len(pictures)):
        y, x = torch.randint(16, 40, (2,), generator=generator).tolist()
        masks[i, y : y + 8, x : x + 8] = True
        pictures[i] = torch.where(masks[i], torch.tensor([60.0, 30.0, 90.0])[:, None, None], pictures[i])
    return pictures, masks


def measured(encoder, emojis, designs: list[str], seed: int, top: float) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    index = {e.name: e.index for e in emojis.emojis}
    good, bad, where = [], [], []
    for name in designs:
        picture = emojis.image(index[name], "twemoji")
        good.append(jittered(picture, 24 // len(designs), generator))
        pictures, masks = blotched(jittered(picture, 6 // len(designs), generator), generator)
        bad.append(pictures)
        where.append(masks)
    pictures = torch.cat([*good, *bad]).round().to(torch.uint8)
    masks = torch.cat([torch.zeros(24, 64, 64, dtype=torch.bool), *where])
    truth = masks.flatten(1).any(1)
    found = MuSc(encoder, size=96, top=top, rs=(1, 3), smooth=False).predict(pictures)
    shrunk = F.interpolate(masks[:, None].float(), size=(96, 96)) > 0.5
    distance = (pictures.float() - pictures.float().mean(0)).flatten(1).norm(dim=1)
    noisy = found.scores + found.scores.std() * torch.randn(len(truth), generator=generator)
    smoothed = rscin(noisy, encoder.images(pictures), (1, 2, 3))
    return {
        "picture": auroc(found.scores, truth),
        "pixel": auroc(found.maps, shrunk[:, 0]),
        "mean picture": auroc(distance, truth),
        "noisy": auroc(noisy, truth),
        "smoothed": auroc(smoothed, truth),
    }


@pytest.mark.slow
def test_blotches_on_emoji(encoder, emojis, record_claim) -> None:
    one = [measured(encoder, emojis, ["red apple"], seed, 0.3) for seed in (0, 1)]
    mixed = {
        top: [measured(encoder, emojis, ["red apple", "hot beverage"], s, top) for s in (0, 1)]
        for top in (0.3, 1.0)
    }

    def mean(rows: list[dict[str, float]], key: str) -> float:
        return sum(r[key] for r in rows) / len(rows)

    picture, pixel, baseline = (mean(one, k) for k in ("picture", "pixel", "mean picture"))
    few, every = (mean(mixed[t], "picture") for t in (0.3, 1.0))
    mixed_baseline = mean(mixed[0.3], "mean picture")
    noisy, smoothed = mean(one, "noisy"), mean(one, "smoothed")
    record_claim(
        system="MuSc",
        claim="pasted blotches are found and located among unlabelled pictures",
        expected="pixel AUROC far above 0.5; picture AUROC at least that of the distance to the mean picture",
        seen=f"pixel {pixel:.3f}, picture {picture:.3f}, mean picture {baseline:.3f}; two designs mixed: picture "
        f"{few:.3f}, mean picture {mixed_baseline:.3f}",
        holds=pixel > 0.8 and picture >= baseline and few > mixed_baseline,
        seeds=[0, 1],
    )
    record_claim(
        system="MuSc",
        claim="the best matching 30% of the pictures are a better reference than all, once two designs are mixed",
        expected="picture AUROC with top = 0.3 above top = 1.0",
        seen=f"{few:.3f} against {every:.3f}",
        holds=few > every,
        seeds=[0, 1],
    )
    record_claim(
        system="MuSc",
        claim="RsCIN repairs noisy picture scores",
        expected="AUROC after smoothing above that of the noisy scores",
        seen=f"{smoothed:.3f} against {noisy:.3f}",
        holds=smoothed > noisy,
        seeds=[0, 1],
    )
    assert pixel > 0.8 and picture > 0.8


def test_a_blotch_lights_up(encoder, emojis) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = jittered(emojis.image(3000, "twemoji"), 8, generator)
    pictures[7:], masks = blotched(pictures[7:].clone(), generator)
    found = MuSc(encoder, size=96, rs=(1,), smooth=False).predict(pictures.round().to(torch.uint8))
    assert int(found.scores.argmax()) == 7
    y, x = divmod(int(found.maps[7].argmax()), 96)
    rows, columns = masks[0].nonzero().T
    assert abs(y * 64 / 96 - float(rows.float().mean())) < 10
    assert abs(x * 64 / 96 - float(columns.float().mean())) < 10

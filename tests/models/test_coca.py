# SPDX-License-Identifier: Apache-2.0
"""CoCa and SyCoCa: the identities of their specification."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import vlmkernels as vk
from vlmkernels.models import CoCa, CoCaConfig, SyCoCa, TrainingBatch, attentive_mask, coca_loss, create
from vlmkernels.models.sycoca import patchify
from vlmkernels.models.training import ContrastiveOptions

START, END = 97, 98
SMALL = {
    "embed_dim": 64,
    "vision": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text": {"vocab_size": 99, "context_length": 10, "width": 64, "layers": 2, "heads": 2},
}


def build(name="coca-emoji", **changes):
    torch.manual_seed(3)
    model = create(name, **SMALL | changes)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim:
                p.add_(0.1 * torch.randn_like(p))
    return model


def batch(count=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 97, (count, 10), generator=generator)
    ids[:, 0] = START
    for row, length in zip(ids, itertools.cycle((4, 7, 9, 5)), strict=False):
        row[length] = END
        row[length + 1 :] = 0
    return images, ids


@pytest.mark.parametrize(
    ("name", "total", "image", "text"),
    [
        ("coca_ViT-B-32", 253.56, 89.16, 63.43),
        ("coca_ViT-L-14", 638.45, 306.72, 123.65),
        ("coca_base", 440.34, 86.40, 134.66),
    ],
)
def test_parameter_counts(name, total, image, text):
    with torch.device("meta"):
        model = create(name)
    for module, millions in ((model, total), (model.visual, image), (model.text, text)):
        assert round(sum(p.numel() for p in module.parameters()) / 1e6, 2) == millions


def test_without_the_caption_loss_it_is_clip():
    model = build()
    images, ids = batch()
    out = model(images, ids)
    expected = vk.clip_loss(out["image_features"], out["text_features"], out["logit_scale"])
    torch.testing.assert_close(coca_loss(model, out, ids, w_cap=0.0), expected)


def test_the_caption_loss_is_that_of_the_logits():
    model = build()
    images, ids = batch()
    logits = model.caption_logits(images, ids)
    assert logits.shape == (4, 10, 99)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
    found = coca_loss(model, model(images, ids), ids, w_con=0.0, w_cap=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_training_losses_are_their_weighted_sum():
    model = build(contrastive_weight=0.5, caption_weight=3.0)
    images, ids = batch()
    labels = torch.arange(4)
    losses = model.training_losses(TrainingBatch(images, ids, labels, labels))
    torch.testing.assert_close(losses["loss"], 0.5 * losses["contrastive"] + 3.0 * losses["caption"])
    torch.testing.assert_close(losses["loss"], coca_loss(model, model(images, ids), ids, 0.5, 3.0))
    # two views of each picture: both are captioned
    pairs = TrainingBatch(images.repeat(2, 1, 1, 1), ids, labels.repeat(2), labels)
    pairs.options = ContrastiveOptions("multi_positive")
    two = model.training_losses(pairs)
    torch.testing.assert_close(two["caption"], losses["caption"])


def test_causality():
    model = build()
    images, ids = batch()
    logits, features = model.caption_logits(images, ids), model.encode_text(ids)
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 96 + 1
    assert torch.equal(model.caption_logits(images, changed)[:, :3], logits[:, :3])
    assert not torch.equal(model.caption_logits(images, changed)[:, 3], logits[:, 3])
    assert not torch.equal(model.encode_text(changed), features)
    other = model(images.flip(0), ids)
    assert torch.equal(other["text_features"], model(images, ids)["text_features"])
    assert torch.equal(model(images, changed)["image_features"], model(images, ids)["image_features"])


@pytest.mark.parametrize("correct", [True, False])
def test_cutting_padding_changes_nothing(correct):
    model = build(correct_cls_mask=correct)
    _, ids = batch(2)  # at most 8 tokens
    torch.testing.assert_close(model.encode_text(ids[:, :8]), model.encode_text(ids), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model.encode_text(ids[:1, :5]), model.encode_text(ids[:1]), rtol=1e-5, atol=1e-6
    )


def test_the_correct_mask_hides_padding_and_the_released_one_shows_one_position_of_it():
    _, ids = batch(1)  # tokens 0..4, then padding
    for correct, moves in ((True, []), (False, [5])):
        model = build(correct_cls_mask=correct)
        before = model.encode_text(ids)
        seen = []
        for position in range(5, 10):
            with torch.no_grad():
                model.text.positional_embedding[position] += 1.0
            after = model.encode_text(ids)
            seen += [] if torch.equal(before, after) else [position]
            before = after
        assert seen == moves


@pytest.mark.parametrize("pooler", ["queries", "cascade", "none"])
def test_poolers(pooler):
    model = build(pooler=pooler, pool_queries=7)
    features, tokens = model.encode_image_tokens(batch()[0])
    assert features.shape == (4, 64)
    assert tokens.shape == (4, {"queries": 6, "cascade": 7, "none": 16}[pooler], 64)
    model.training_losses(TrainingBatch(*batch(), torch.arange(4), torch.arange(4)))["loss"].backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused


def test_one_query_over_equal_keys_is_the_mean_of_the_values():
    pool = vk.nn.AttentionPool(16, 2)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        pool.attn.in_proj_weight[16:32] = 0.0  # keys do not depend on x
        v = F.linear(pool.ln_k(x), pool.attn.in_proj_weight[32:], pool.attn.in_proj_bias[32:])
        expected = pool.attn.out_proj(v.mean(1))
        torch.testing.assert_close(pool(x)[:, 0], expected, rtol=1e-5, atol=1e-6)


def naive(model, images, length, min_length=0):
    text = torch.full((len(images), 1), START)
    while text.shape[1] < length:
        ids = F.pad(text, (0, 10 - text.shape[1]))
        logits = model.caption_logits(images, ids)[:, text.shape[1] - 1]
        if text.shape[1] < min_length:
            logits[:, END] = -torch.inf
        text = torch.cat([text, logits.argmax(1, keepdim=True)], dim=1)
    return text


@pytest.mark.parametrize("correct", [True, False])
def test_greedy_with_a_cache_is_greedy_without(correct):
    model = build(correct_cls_mask=correct)
    images, _ = batch()
    with torch.no_grad():
        expected = naive(model, images, 9)
    found = model.generate(images, start_id=START, end_id=END, max_length=9)
    for row, wanted in zip(found.tolist(), expected.tolist(), strict=True):
        end = wanted.index(END) + 1 if END in wanted else 8
        assert row[:end] == wanted[:end]


def test_a_prompt_is_continued():
    model = build()
    images, _ = batch()
    whole = model.generate(images, start_id=START, end_id=END, max_length=9)
    again = model.generate(images, whole[:, :4].contiguous(), start_id=START, end_id=END, max_length=9)
    assert torch.equal(again, whole)


def test_a_beam_as_wide_as_all_texts_finds_the_best_one():
    """With length penalty 0 the score is the text's log-probability; three tokens leave few texts to try."""
    model = build(text={**SMALL["text"], "vocab_size": 6})
    images = batch(2)[0]
    found = model.generate(
        images, start_id=4, end_id=5, max_length=4, method="beam", beams=36, length_penalty=0.0
    )
    for row in range(2):
        best, score = None, -float("inf")
        with torch.no_grad():
            for words in itertools.product(range(6), repeat=2):
                # what ends early is one text, and the last token is an end by force
                cut = words[: words.index(5)] if 5 in words else words
                text = [4, *cut] + [5] * (len(cut) < 2)
                ids = F.pad(torch.tensor([text]), (0, 10 - len(text)))
                logs = F.log_softmax(model.caption_logits(images[row : row + 1], ids)[0], dim=-1)
                total = float(sum(logs[i, text[i + 1]] for i in range(len(text) - 1)))
                if len(cut) == 2:
                    # forced: the beam search adds the best third token's gain and then writes the end
                    total += float(logs[2].max())
                if total > score:
                    best, score = [*text, 5][:4] if len(cut) == 2 else text, total
        assert found[row].tolist()[: len(best)] == best


def test_one_beam_is_greedy_and_sampling_from_the_best_token_too():
    model = build()
    images, _ = batch()
    options = {"start_id": START, "end_id": END, "max_length": 9}
    greedy = model.generate(images, **options)
    assert torch.equal(model.generate(images, method="top_k", top_k=1, **options), greedy)
    assert torch.equal(model.generate(images, method="top_p", top_p=1e-6, **options), greedy)
    beam = model.generate(images, method="beam", beams=1, **options)
    assert torch.equal(beam[:, :3], greedy[:, :3])


def test_sampling_repeats_with_its_generator_and_keeps_to_the_nucleus():
    from vlmkernels.models.generation import GenerationConfig, _filtered

    model = build()
    images, _ = batch()
    draws = [
        model.generate(
            images,
            start_id=START,
            end_id=END,
            method="top_p",
            top_p=0.9,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert draws[0].shape != draws[2].shape or not torch.equal(draws[0], draws[2])
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = [
        _filtered(logits, GenerationConfig(method="top_p", top_p=p)).isfinite().sum()
        for p in (0.4, 0.6, 0.9, 1.0)
    ]
    assert kept == [1, 2, 3, 4]


def test_generation_refuses_what_makes_no_sense():
    model, images = build(), batch()[0]
    for options, message in (
        ({"method": "magic"}, "method must be one of"),
        ({"max_length": 11}, "at most the context length 10, got 11"),
        ({"min_length": 10}, r"min_length must lie in \[0, max_length = 10\)"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(images, start_id=START, end_id=END, **options)
    with pytest.raises(ValueError, match="pooler must be one of"):
        CoCaConfig(pooler="mean")


def test_removing_cross_attention_leaves_retrieval_alone():
    model = build()
    images, ids = batch()
    before = model(images, ids)
    with torch.no_grad():
        for block in model.text_decoder.cross_attn:
            block.attn.out_proj.weight.zero_()
            block.attn.out_proj.bias.zero_()
    after = model(images, ids)
    for name in ("image_features", "text_features"):
        assert torch.equal(before[name], after[name])
    # and the caption no longer depends on the picture
    assert torch.equal(after["hidden"], model(images.flip(0), ids)["hidden"])


# --- SyCoCa


def sycoca(**changes):
    model = build("sycoca-emoji", **changes)
    images, ids = batch()
    labels = torch.arange(4)
    return model, TrainingBatch(images, ids, labels, labels)


def test_sycoca_without_its_additions_is_coca():
    model, pairs = sycoca(mim_weight=0.0, ic_keep=1.0)
    twin = model.captioner()
    assert type(twin) is CoCa
    assert torch.equal(model.training_losses(pairs)["loss"], twin.training_losses(pairs)["loss"])
    assert twin.text.cls_emb.data_ptr() == model.text.cls_emb.data_ptr()
    assert torch.equal(
        twin.generate(pairs.images, start_id=START, end_id=END),
        model.generate(pairs.images, start_id=START, end_id=END),
    )


@pytest.mark.parametrize("mode", ["high", "low", "random"])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0])
def test_attentive_mask_has_exactly_k_per_row(mode, ratio):
    mask = attentive_mask(torch.randn(5, 16, 8), torch.randn(5, 8), ratio, mode)
    assert (mask.sum(1) == max(1, round(ratio * 16))).all()


def test_attentive_mask_is_a_sort_and_follows_permutations():
    patches, texts = torch.randn(5, 16, 8), torch.randn(5, 8)
    scores = F.cosine_similarity(patches, texts[:, None], dim=-1)
    for mode, largest in (("high", True), ("low", False)):
        mask = attentive_mask(patches, texts, 0.25, mode)
        for row in range(5):
            order = sorted(range(16), key=lambda k: float(scores[row, k]), reverse=largest)
            assert set(mask[row].nonzero()[:, 0].tolist()) == set(order[:4])
        shuffle = torch.randperm(16)
        assert torch.equal(attentive_mask(patches[:, shuffle], texts, 0.25, mode), mask[:, shuffle])
    with pytest.raises(ValueError, match="mode must be one of"):
        attentive_mask(patches, texts, 0.5, "best")


def test_only_hidden_patches_have_a_loss_and_hidden_pixels_are_not_seen():
    model, pairs = sycoca()
    masked = attentive_mask(torch.randn(4, 16, 8), torch.randn(4, 8), 0.5)
    predicted, target = model.reconstruction(pairs.images, pairs.ids, masked)
    assert predicted.shape == target.shape == (4, 16, 3 * 64)
    predicted.retain_grad()
    (predicted - target).abs().mean(-1)[masked].mean().backward()
    assert (predicted.grad[~masked] == 0).all()
    assert (predicted.grad[masked] != 0).all()
    # other pixels under the mask: the same prediction
    noise = torch.randn_like(pairs.images)
    cells = masked.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    again, _ = model.reconstruction(torch.where(cells, noise, pairs.images), pairs.ids, masked)
    assert torch.equal(again, predicted)


def test_padding_does_not_reach_the_image_decoder():
    model, pairs = sycoca()
    masked = attentive_mask(torch.randn(4, 16, 8), torch.randn(4, 8), 0.5)
    full, _ = model.reconstruction(pairs.images, pairs.ids, masked)
    with torch.no_grad():
        model.text.positional_embedding[9] += 1.0  # padding in every row
    again, _ = model.reconstruction(pairs.images, pairs.ids, masked)
    assert torch.equal(full[:2], again[:2])


def test_no_gradient_through_the_relevance():
    """With only the local tasks, the joint projections get no gradient: they are used by the relevance alone."""
    model, pairs = sycoca(contrastive_weight=0.0)
    model.training_losses(pairs)["loss"].backward()
    for p in (model.visual.proj, model.text.text_projection, model.text.ln_final.weight):
        assert p.grad is None or not p.grad.any()
    assert model.mask_token.grad.any()


def test_patchify_is_in_the_order_of_the_patch_convolution():
    model, pairs = sycoca()
    patches = patchify(pairs.images, 8)
    expected = model.visual.conv1(pairs.images).flatten(2).transpose(1, 2)
    found = patches @ model.visual.conv1.weight.flatten(1).t()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_normalized_targets():
    model, pairs = sycoca(normalize_target=True)
    masked = torch.ones(4, 16, dtype=torch.bool)
    _, target = model.reconstruction(pairs.images, pairs.ids, masked)
    torch.testing.assert_close(target.mean(-1), torch.zeros(4, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.std(-1), torch.ones(4, 16), rtol=0, atol=1e-4)


def test_sycoca_refuses_what_it_cannot_mask():
    with pytest.raises(ValueError, match="needs pooler 'none'"):
        create("sycoca-emoji", pooler="queries")
    with pytest.raises(ValueError, match=r"mim_ratio must lie in \(0, 1\]"):
        create("sycoca-emoji", mim_ratio=0.0)
    assert isinstance(create("sycoca-emoji"), SyCoCa)

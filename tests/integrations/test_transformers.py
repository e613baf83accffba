# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="vlmkernels" against "eager": values, gradients, and how masks arrive."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmkernels.integrations.transformers import NAME, attention_forward, attention_mask, register

pytestmark = pytest.mark.usefixtures("ignored_warnings")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "eos_token_id": 49,
    "bos_token_id": 48,
    "pad_token_id": 1,
}
TEXT = {**SIZES, **TEXT}
VISION = {**SIZES, "image_size": 16, "patch_size": 8}
LENGTHS = (12, 7, 4)


def words(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 48, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS if padded else (12, 12, 12)):
        ids[row, length - 1] = 49
        ids[row, length:], mask[row, length:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def build(transformers: Any, name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny model of random weights, and its images where it takes some."""
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    if name == "clip":
        config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
        return transformers.CLIPModel(config), {"pixel_values": images}
    if name == "siglip":
        config = transformers.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=VISION)
        return transformers.SiglipModel(config), {"pixel_values": images}
    if name == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**VISION)), {"pixel_values": images}
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**TEXT)), {}
    one_block = {
        "in_channels": [32],
        "out_channels": [16],
        "depthwise_padding": [],
        "kernel_sizes": [3],
        "strides": [1],
        "num_block_repeats": [1],
        "expand_ratios": [1],
    }
    scales = {"image_size": 16, "hidden_dim": 16, "width_coefficient": 1.0, "depth_coefficient": 1.0}
    config = transformers.AlignConfig(
        text_config=TEXT, vision_config={**one_block, **scales}, projection_dim=16
    )
    return transformers.AlignModel(config), {"pixel_values": images}


NAMES = ("clip", "siglip", "vit", "bert", "align")


def outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a training step depends on: similarities, or the states of tokens that are there."""
    out = model(**inputs)
    if "logits_per_image" in out:
        return torch.stack([out.logits_per_image, out.logits_per_text])
    hidden = out.last_hidden_state
    return hidden[inputs["attention_mask"].bool()] if "attention_mask" in inputs else hidden


def decoder(transformers: Any, kind: str = "Llama", **options: Any) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")
    sizes = {**TEXT, "max_position_embeddings": 32, "num_key_value_heads": 2, "pad_token_id": None}
    torch.manual_seed(3)
    return getattr(transformers, f"{kind}ForCausalLM")(config(**sizes, **options)).eval()


@pytest.fixture(autouse=True)
def registered(transformers: Any) -> None:
    assert register() == register() == NAME


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_eagers(transformers, served, same_training, varied, name, padded):
    model, images = build(transformers, name)
    inputs = images if name == "vit" else {**images, **words(padded)}

    def run(dtype: torch.dtype, ours: bool, draw: int) -> list[torch.Tensor]:
        twin = varied(model, dtype, draw).eval()  # eval: no dropout, and the statistics of batches stay
        twin.set_attn_implementation(NAME if ours else "eager")
        typed = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
        out = outputs(twin, typed)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
        return [out.detach(), *(p.grad for p in twin.parameters() if p.grad is not None)]

    same_training(run, "outputs and gradients")
    assert served


def test_padding_stays_a_mask_over_keys(transformers, served):
    model, _ = build(transformers, "bert")
    model.set_attn_implementation(NAME)
    model(**words(True))
    assert len(served) == 2
    for call in served:
        assert call["bias"] is None and not call["is_causal"]
        assert torch.equal(call["key_mask"], words(True)["attention_mask"].bool())


def test_nothing_is_masked_where_nothing_is_padded(transformers, served):
    model, _ = build(transformers, "bert")
    model.set_attn_implementation(NAME)
    model(**words(False))
    assert all(call["bias"] is None and call["key_mask"] is None and not call["is_causal"] for call in served)


@pytest.mark.parametrize("padded", [False, True])
def test_a_causal_tower_stays_causal_with_its_padding(transformers, served, padded):
    model = build(transformers, "clip")[0].text_model
    model.set_attn_implementation(NAME)
    model(**words(padded))
    assert len(served) == 2
    for call in served:
        assert call["bias"] is None and call["is_causal"] is True
        assert (call["key_mask"] is not None) == padded


@pytest.mark.parametrize("side", ["left", "right"])
def test_grouped_heads_with_padding(transformers, served, side):
    model = decoder(transformers)
    ids = torch.randint(2, 48, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    if side == "right":
        mask = mask.flip(1)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation(NAME)
        logits = model(input_ids=ids, attention_mask=mask).logits
    assert {call["k"].shape[2] for call in served} == {2}
    kept = mask.bool()
    torch.testing.assert_close(logits[kept], expected[kept], rtol=1e-4, atol=1e-5)  # two layers of roundings


def test_chunks_after_a_cache_see_all_before_them(transformers, served):
    model = decoder(transformers)
    ids = torch.randint(2, 48, (2, 10))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids).logits
        model.set_attn_implementation(NAME)
        first = model(input_ids=ids[:, :4], use_cache=True)
        second = model(input_ids=ids[:, 4:9], past_key_values=first.past_key_values, use_cache=True)
        third = model(input_ids=ids[:, 9:], past_key_values=second.past_key_values)
    logits = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)  # two layers of roundings
    assert all(call["bias"] is None for call in served)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_gives_eagers_tokens(transformers, served, cache):
    model = decoder(transformers)
    ids = torch.randint(2, 48, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    tokens = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
        tokens.append(model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **options))
    assert served and torch.equal(*tokens)


def test_a_sliding_window_is_a_pattern(transformers, served):
    model = decoder(transformers, "Mistral", sliding_window=4)
    ids = torch.randint(2, 48, (2, 9))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids).logits
        model.set_attn_implementation(NAME)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(call["bias"] is not None for call in served)


def test_position_biases_are_added(transformers, served):
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    inputs = words(True)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = outputs(model, inputs)
        model.set_attn_implementation(NAME)
        ours = outputs(model, inputs)
    if not served:
        pytest.skip("this transformers does not take T5's attention from the interface")
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_of_the_users_own_is_applied_as_it_is(transformers, served, kind):
    """No causality is added to it, not even in a causal model."""
    model = decoder(transformers)
    ids = torch.randint(2, 48, (2, 9))
    visible = torch.rand(2, 1, 9, 9) < 0.5
    visible |= torch.eye(9, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids, attention_mask=additive).logits
        model.set_attn_implementation(NAME)
        ours = model(input_ids=ids, attention_mask=visible if kind == "bool" else additive).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_dropout_trains_and_follows_the_seed(transformers, served):
    model, _ = build(transformers, "bert")
    model.config.hidden_dropout_prob = 0.0
    config = transformers.BertConfig(**TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    model = transformers.BertModel(config, add_pooling_layer=False).train()
    model.set_attn_implementation(NAME)

    def run(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        out = outputs(model, words(True))
        weight = model.encoder.layer[0].attention.self.query.weight
        return out.detach(), torch.autograd.grad(out.square().sum(), weight)[0]

    first, again, other = run(0), run(0), run(1)
    assert {call["dropout_p"] for call in served} == {0.5}
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], outputs(model.eval(), words(True)))


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_it_compiles_into_one_graph(transformers, name):
    model, images = build(transformers, name)
    model.eval().set_attn_implementation(NAME)
    inputs = {**images, **words(True)}
    with torch.no_grad():
        expected = outputs(model, inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(outputs(compiled, inputs), expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_served_is_refused(transformers):
    q = torch.randn(1, 2, 3, 8)
    for option in ({"softcap": 30.0}, {"s_aux": torch.zeros(2)}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is not served"):
            attention_forward(torch.nn.Identity(), q, q, q, None, **option)


def test_masks_without_padding(transformers):
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    causal = {"mask_function": causal_mask_function}
    both = {"mask_function": bidirectional_mask_function, "allow_is_bidirectional_skip": True}
    ones = torch.ones(2, 5, dtype=torch.bool)
    assert attention_mask(2, 5, 5, **causal) is None
    assert attention_mask(2, 5, 5, attention_mask=ones, **causal) is None
    assert attention_mask(2, 5, 5, attention_mask=ones, **both) is None
    assert attention_mask(2, 3, 5, q_offset=2, **causal).shape == (2, 5)
    # A model that combines masks forbids the skips and gets the whole pattern.
    whole = attention_mask(2, 5, 5, attention_mask=ones, allow_is_causal_skip=False, **causal)
    assert torch.equal(whole, ones[:, None, :, None] & torch.ones(5, 5, dtype=torch.bool).tril())
    one_hidden = ones.clone()
    one_hidden[1, 4] = False
    assert torch.equal(attention_mask(2, 5, 5, attention_mask=one_hidden, **causal), one_hidden)
    assert torch.equal(
        attention_mask(2, 5, 5, attention_mask=one_hidden, **both), one_hidden[:, None, None, :]
    )
    assert attention_mask(
        2, 5, 5, attention_mask=one_hidden, mask_function=bidirectional_mask_function
    ).shape == (
        2,
        1,
        5,
        5,
    )

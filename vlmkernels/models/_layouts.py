# SPDX-License-Identifier: Apache-2.0
"""State-dict layouts of CLIP: OpenAI, open_clip (plain and custom text), transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["EXTRAS", "convert_state_dict", "layer_indices", "strip_wrappers", "to_openai"]

_LAYOUTS = ("openai", "open_clip", "open_clip_custom", "transformers")
# Scalars that OpenAI's archives store beside the weights.
EXTRAS = ("input_resolution", "context_length", "vocab_size")
# Text tower names of the OpenAI layout; open_clip's custom-text models prefix them with "text.".
_TEXT_NAMES = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
_HF_BLOCK = (
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
_HF_NAMES = (
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.weight", "visual.ln_pre.weight"),  # transformers spells it so
    ("vision_model.pre_layrnorm.bias", "visual.ln_pre.bias"),
    ("vision_model.post_layernorm.weight", "visual.ln_post.weight"),
    ("vision_model.post_layernorm.bias", "visual.ln_post.bias"),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.weight", "ln_final.weight"),
    ("text_model.final_layer_norm.bias", "ln_final.bias"),
    ("logit_scale", "logit_scale"),
    ("logit_bias", "logit_bias"),
)
_HF_TRANSPOSED = (("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection"))
_HF_TOWERS = (("vision_model.", "visual.transformer."), ("text_model.", "transformer."))


def convert_state_dict(state_dict: dict[str, Tensor], to: str) -> dict[str, Tensor]:
    """Brings a CLIP state dict to another layout; the source layout is recognised.

    Tensors are renamed, packed, split and transposed, never computed with: there and back is the identity.

    Args:
        state_dict: Weights in any known layout.
        to: "openai", "open_clip" (the same names), "open_clip_custom" (open_clip's models with a custom text
            tower: prefix `text.`) or "transformers" (`CLIPModel`; ViT only).

    Returns:
        A new dict. Tensors are shared with the input except where the layouts pack or transpose them.

    Raises:
        ValueError: If `to` is unknown, the source is not recognised, or the target cannot express the model.
    """
    if to not in _LAYOUTS:
        raise ValueError(f"convert_state_dict: to must be one of {list(_LAYOUTS)}, got {to!r}")
    openai = to_openai(strip_wrappers(state_dict))
    if to == "open_clip_custom":
        return {
            f"text.{name}" if name.startswith(_TEXT_NAMES) else name: value for name, value in openai.items()
        }
    return _to_transformers(openai) if to == "transformers" else openai


def strip_wrappers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops what DistributedDataParallel and torch.compile put in front of every name."""
    out = dict(state_dict)
    for prefix in ("module.", "_orig_mod."):
        while out and all(name.startswith(prefix) for name in out):
            out = {name.removeprefix(prefix): value for name, value in out.items()}
    return out


def to_openai(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    if "vision_model.embeddings.class_embedding" in state_dict:
        return _from_transformers(state_dict)
    unsupported = {
        "visual.trunk.": "its image tower is a timm model",
        "text.transformer.embeddings.": "its text tower is a transformers model",
        "vision_model.head.": "it is a SigLIP model",
    }
    for prefix, reason in unsupported.items():
        if any(name.startswith(prefix) for name in state_dict):
            raise ValueError(f"convert_state_dict: cannot read this checkpoint: {reason} (names {prefix}*)")
    out = {name: value for name, value in state_dict.items() if name not in EXTRAS}
    if "text.token_embedding.weight" in out:
        out = {name.removeprefix("text."): value for name, value in out.items()}
    stem = "visual.conv1.proj.weight" if "visual.conv1.proj.weight" in out else "visual.conv1.weight"
    needed = (stem, "token_embedding.weight", "positional_embedding", "text_projection")
    missing = [name for name in needed if name not in out]
    if missing:
        raise ValueError(
            "convert_state_dict: expected the OpenAI, open_clip or transformers layout of CLIP, but "
            f"{missing} are missing; the first names are {list(state_dict)[:5]}"
        )
    return out


def _from_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    source = {name: value for name, value in state_dict.items() if not name.endswith(".position_ids")}
    out: dict[str, Tensor] = {}
    for theirs, ours in _HF_NAMES:
        if theirs in source:
            out[ours] = source.pop(theirs)
    for theirs, ours in _HF_TRANSPOSED:
        if theirs in source:
            out[ours] = source.pop(theirs).t().contiguous()
    for their_tower, our_tower in _HF_TOWERS:
        for i in layer_indices(source, their_tower + "encoder.layers."):
            their, our = f"{their_tower}encoder.layers.{i}.", f"{our_tower}resblocks.{i}."
            for kind in ("weight", "bias"):
                names = [f"{their}self_attn.{part}_proj.{kind}" for part in "qkv"]
                if all(name in source for name in names):
                    out[f"{our}attn.in_proj_{kind}"] = torch.cat([source.pop(name) for name in names])
                for theirs, ours in _HF_BLOCK:
                    if f"{their}{theirs}.{kind}" in source:
                        out[f"{our}{ours}.{kind}"] = source.pop(f"{their}{theirs}.{kind}")
    if source:
        raise ValueError(
            f"convert_state_dict: unknown names in a transformers CLIP checkpoint: {sorted(source)[:5]}"
        )
    return out


def _to_transformers(openai: dict[str, Tensor]) -> dict[str, Tensor]:
    source = dict(openai)
    out: dict[str, Tensor] = {}
    for theirs, ours in _HF_NAMES:
        if ours in source:
            out[theirs] = source.pop(ours)
    for theirs, ours in _HF_TRANSPOSED:
        if ours in source:
            out[theirs] = source.pop(ours).t().contiguous()
    for their_tower, our_tower in _HF_TOWERS:
        for i in layer_indices(source, our_tower + "resblocks."):
            their, our = f"{their_tower}encoder.layers.{i}.", f"{our_tower}resblocks.{i}."
            for kind in ("weight", "bias"):
                for part, value in zip("qkv", source.pop(f"{our}attn.in_proj_{kind}").chunk(3), strict=True):
                    # Clones: safetensors refuses tensors that share storage.
                    out[f"{their}self_attn.{part}_proj.{kind}"] = value.clone()
                for theirs, ours in _HF_BLOCK:
                    out[f"{their}{theirs}.{kind}"] = source.pop(f"{our}{ours}.{kind}")
    if source:
        raise ValueError(
            "convert_state_dict: transformers' CLIPModel is a plain ViT with a class token and cannot hold "
            f"{sorted(source)[:5]}"
        )
    return out


def layer_indices(names: Iterable[str], prefix: str) -> list[int]:
    """The sorted distinct integers that follow `prefix` in the names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return sorted({int(match[1]) for name in names if (match := pattern.match(name))})

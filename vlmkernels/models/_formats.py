# SPDX-License-Identifier: Apache-2.0
"""Layouts that are no plain CLIP: CoCa, ViTamin and SigLIP of open_clip, SigLIP and ALIGN of transformers.

Each `Format` says by which names it is recognised, how its names become ours, and how the configuration follows from
the weights and from what lies beside them. Plain CLIPs are in `_layouts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vlmkernels.models import align
from vlmkernels.models._config import ModelConfig
from vlmkernels.models._layouts import layer_indices
from vlmkernels.models._renaming import Rule, from_ours, to_ours
from vlmkernels.models.align import ALIGNConfig, EfficientNetConfig
from vlmkernels.models.clip import TextConfig, VisionConfig
from vlmkernels.models.coca import CoCaConfig
from vlmkernels.models.siglip import SigLIPConfig
from vlmkernels.models.vitamin import ViTaminCLIPConfig, ViTaminConfig

__all__ = ["FORMATS", "Format", "find_format"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """A layout of one architecture.

    Attributes:
        layout: "open_clip" or "transformers".
        architecture: Name of the architecture that it holds.
        marks: Names by which it is recognised; all must be there.
        rules: Their names and ours.
        infer: `infer(our state dict, configuration beside the weights, act)` gives the configuration.
        ignored: Beginnings of names that are left out.
    """

    layout: str
    architecture: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...]
    infer: Callable[[State, dict[str, Any], str | None], ModelConfig]
    ignored: tuple[str, ...] = ()

    def read(self, state: State) -> tuple[State, list[str]]:
        """Renames to ours; returns the names nobody knows, too."""
        return to_ours({k: v for k, v in state.items() if not k.startswith(self.ignored)}, self.rules)

    def write(self, state: State) -> State:
        """Renames from ours; raises ValueError where the layout has no place for a tensor."""
        return from_ours(state, self.rules)


def find_format(state: State) -> Format | None:
    """Returns the format whose marks are all there; None = none of them."""
    return next((f for f in FORMATS if all(mark in state for mark in f.marks)), None)


def _same(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, name) for name in names)


def _open_clip_blocks(prefix: str) -> tuple[Rule, ...]:
    """open_clip's residual blocks, whose names are ours."""
    parts = ("ln_1.@", "attn.in_proj_@", "attn.out_proj.@", "ln_2.@", "mlp.c_fc.@", "mlp.c_proj.@")
    return _same(*(f"{prefix}.#.{part}" for part in parts))


def _timm_blocks(qkv: str = "attn.qkv.@") -> tuple[Rule, ...]:
    theirs, ours = "visual.trunk.blocks.#.", "visual.transformer.resblocks.#."
    return (
        Rule(theirs + "norm1.@", ours + "ln_1.@"),
        Rule(theirs + qkv, ours + "attn.in_proj_@"),
        Rule(theirs + "attn.proj.@", ours + "attn.out_proj.@"),
        Rule(theirs + "norm2.@", ours + "ln_2.@"),
    )


def _fc(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}.fc1.@", f"{ours}.c_fc.@"), Rule(f"{theirs}.fc2.@", f"{ours}.c_proj.@")


def _layers(state: State, prefix: str) -> int:
    return len(layer_indices(state, prefix))


def _other_mlp(state: State, name: str, width: int, factor: int = 4) -> int | None:
    hidden = state[name].shape[0]
    return None if hidden == factor * width else hidden


def _grid(state: State, has_class: bool) -> int:
    return math.isqrt(state["visual.positional_embedding"].shape[0] - has_class)


def _heads(width: int, given: int | None = None) -> int | None:
    """What the configuration says, or 16 for widths whose heads are wider than 64; None = width / 64."""
    return given if given is not None else {1152: 16, 1280: 16, 1408: 16, 1664: 16}.get(width)


# --- CoCa, open_clip

_PROJECTIONS = tuple(f"attn.{part}_proj_weight" for part in "qkv")
_POOL = ("query", "ln_q.@", "ln_k.@", "attn.in_proj_@", "attn.out_proj.@", *_PROJECTIONS)
_COCA = (
    *_same("visual.conv1.weight", "visual.class_embedding", "visual.positional_embedding", "visual.proj"),
    *_same("visual.ln_pre.@", "visual.ln_post.@", "logit_scale"),
    *_open_clip_blocks("visual.transformer.resblocks"),
    *_same(*(f"visual.attn_pool.{part}" for part in _POOL)),
    *_same(
        "text.token_embedding.weight", "text.positional_embedding", "text.cls_emb", "text.text_projection"
    ),
    *_same("text.ln_final.@", "text_decoder.ln_final.@"),
    *_open_clip_blocks("text.transformer.resblocks"),
    *_open_clip_blocks("text_decoder.resblocks"),
    *_open_clip_blocks("text_decoder.cross_attn"),
    *_same("text_decoder.cross_attn.#.ln_1_kv.@"),
    *_same(*(f"text_decoder.cross_attn.#.{part}" for part in _PROJECTIONS)),
    Rule("text_decoder.text_projection", "text_decoder.output.weight", "transpose"),
)


def _infer_coca(state: State, beside: dict[str, Any], act: str | None) -> CoCaConfig:
    vision, text = beside.get("vision_cfg", {}), beside.get("text_cfg", {})
    width, _, patch, _ = state["visual.conv1.weight"].shape
    vocabulary, text_width = state["text.token_embedding.weight"].shape
    pool = state.get("visual.attn_pool.query")
    heads = beside.get("multimodal_cfg", {}).get("heads", text.get("heads"))
    if heads != text.get("heads"):
        raise ValueError(
            f"load_checkpoint: both halves of CoCa's text side need as many heads, got {text.get('heads')} and {heads}"
        )
    return CoCaConfig(
        embed_dim=state["visual.proj"].shape[1],
        vision=VisionConfig(
            _grid(state, True) * patch,
            _layers(state, "visual.transformer.resblocks."),
            width,
            patch,
            width // vision["head_width"] if "head_width" in vision else _heads(width),
            _other_mlp(state, "visual.transformer.resblocks.0.mlp.c_fc.weight", width),
        ),
        text=TextConfig(
            vocabulary,
            state["text.positional_embedding"].shape[0] - 1,
            text_width,
            _layers(state, "text.transformer.resblocks."),
            text.get("heads"),
            _other_mlp(state, "text.transformer.resblocks.0.mlp.c_fc.weight", text_width),
        ),
        decoder_layers=_layers(state, "text_decoder.resblocks."),
        pooler="none" if pool is None else "queries",
        pool_queries=256 if pool is None else pool.shape[0],
        pool_heads=vision.get("attn_pooler_heads", 8),
        act=act or ("quick_gelu" if beside.get("quick_gelu") else "gelu"),
        correct_cls_mask=text.get("correct_cls_mask", False),
        pad_id=text.get("pad_id", 0),
    )


# --- ViTamin, open_clip (a timm trunk and a text tower under "text.")

_BACKBONE = "visual.trunk.patch_embed.backbone."
_VITAMIN = (
    Rule(_BACKBONE + "stem.conv1.@", "visual.stem_conv1.@"),
    Rule(_BACKBONE + "stem.norm1.@", "visual.stem_norm.@"),
    Rule(_BACKBONE + "stem.conv2.@", "visual.stem_conv2.@"),
    *(
        Rule(f"{_BACKBONE}stages.#.#.{theirs}.@", f"visual.stages.#.#.{ours}.@")
        for theirs, ours in (
            ("pre_norm", "pre_norm"),
            ("conv1_1x1", "conv1_1x1"),
            ("conv2_kxk", "conv2_kxk"),
            ("conv3_1x1", "conv3_1x1"),
            ("shortcut.expand", "expand"),
        )
    ),
    Rule(_BACKBONE + "pool.norm.@", "visual.down_norm.@"),
    Rule(_BACKBONE + "pool.proj.@", "visual.down_conv.@"),
    Rule("visual.trunk.pos_embed", "visual.positional_embedding", "row"),
    *_timm_blocks(),
    *(
        Rule(f"visual.trunk.blocks.#.mlp.{part}.@", f"visual.transformer.resblocks.#.mlp.{part}.@")
        for part in ("norm", "w0", "w1", "w2")
    ),
    Rule("visual.trunk.fc_norm.@", "visual.fc_norm.@"),
    Rule("visual.head.proj.weight", "visual.head.weight"),
    *(
        Rule("text." + ours, ours)
        for ours in (
            "token_embedding.weight",
            "positional_embedding",
            "ln_final.@",
            "text_projection",
            *(rule.ours for rule in _open_clip_blocks("transformer.resblocks")),
        )
    ),
    *_same("logit_scale"),
)


def _infer_vitamin(state: State, beside: dict[str, Any], act: str | None) -> ViTaminCLIPConfig:
    stages = [state[f"visual.stages.{i}.0.conv3_1x1.weight"].shape[0] for i in (0, 1)]
    depths = [_layers(state, f"visual.stages.{i}.") for i in (0, 1)]
    width = state["visual.down_conv.weight"].shape[0]
    vocabulary, text_width = state["token_embedding.weight"].shape
    return ViTaminCLIPConfig(
        embed_dim=state["visual.head.weight"].shape[0],
        vision=ViTaminConfig(
            16 * _grid(state, False),
            state["visual.stem_conv1.weight"].shape[0],
            (stages[0], stages[1]),
            (depths[0], depths[1]),
            width,
            _layers(state, "visual.transformer.resblocks."),
            _heads(width),
        ),
        text=TextConfig(
            vocabulary,
            state["positional_embedding"].shape[0],
            text_width,
            _layers(state, "transformer.resblocks."),
            _heads(text_width, beside.get("text_cfg", {}).get("heads")),
            _other_mlp(state, "transformer.resblocks.0.mlp.c_fc.weight", text_width),
        ),
        act=act or ("quick_gelu" if beside.get("quick_gelu") else "gelu"),
    )


# --- SigLIP, open_clip (a timm trunk) and transformers

_SIGLIP_OPEN_CLIP = (
    Rule("visual.trunk.patch_embed.proj.@", "visual.conv1.@"),
    Rule("visual.trunk.pos_embed", "visual.positional_embedding", "row"),
    *_timm_blocks(),
    *_fc("visual.trunk.blocks.#.mlp", "visual.transformer.resblocks.#.mlp"),
    Rule("visual.trunk.norm.@", "visual.ln_post.@"),
    Rule("visual.trunk.attn_pool.latent", "visual.attn_pool.query", "token"),
    Rule(
        ("visual.trunk.attn_pool.q.@", "visual.trunk.attn_pool.kv.@"),
        "visual.attn_pool.attn.in_proj_@",
        shares=(1, 2),
    ),
    Rule("visual.trunk.attn_pool.proj.@", "visual.attn_pool.attn.out_proj.@"),
    Rule("visual.trunk.attn_pool.norm.@", "visual.attn_pool.norm.@"),
    *_fc("visual.trunk.attn_pool.mlp", "visual.attn_pool.mlp"),
    *_same("text.token_embedding.weight", "text.positional_embedding", "text.ln_final.@"),
    *_same("text.text_projection.@", "logit_scale", "logit_bias"),
    *_open_clip_blocks("text.transformer.resblocks"),
)


def _transformers_blocks(tower: str, ours: str) -> tuple[Rule, ...]:
    theirs, ours = f"{tower}.encoder.layers.#.", f"{ours}.transformer.resblocks.#."
    return (
        Rule(theirs + "layer_norm1.@", ours + "ln_1.@"),
        Rule(
            (theirs + "self_attn.q_proj.@", theirs + "self_attn.k_proj.@", theirs + "self_attn.v_proj.@"),
            ours + "attn.in_proj_@",
        ),
        Rule(theirs + "self_attn.out_proj.@", ours + "attn.out_proj.@"),
        Rule(theirs + "layer_norm2.@", ours + "ln_2.@"),
        *_fc(theirs + "mlp", ours + "mlp"),
    )


_SIGLIP_TRANSFORMERS = (
    Rule("vision_model.embeddings.patch_embedding.@", "visual.conv1.@"),
    Rule("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    *_transformers_blocks("vision_model", "visual"),
    Rule("vision_model.post_layernorm.@", "visual.ln_post.@"),
    Rule("vision_model.head.probe", "visual.attn_pool.query", "token"),
    Rule("vision_model.head.attention.in_proj_@", "visual.attn_pool.attn.in_proj_@"),
    Rule("vision_model.head.attention.out_proj.@", "visual.attn_pool.attn.out_proj.@"),
    Rule("vision_model.head.layernorm.@", "visual.attn_pool.norm.@"),
    *_fc("vision_model.head.mlp", "visual.attn_pool.mlp"),
    Rule("text_model.embeddings.token_embedding.weight", "text.token_embedding.weight"),
    Rule("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
    *_transformers_blocks("text_model", "text"),
    Rule("text_model.final_layer_norm.@", "text.ln_final.@"),
    Rule("text_model.head.@", "text.text_projection.@"),
    *_same("logit_scale", "logit_bias"),
)


def _siglip(
    state: State, act: str, text_act: str | None, heads: int | None, text_heads: int | None
) -> SigLIPConfig:
    width, _, patch, _ = state["visual.conv1.weight"].shape
    vocabulary, text_width = state["text.token_embedding.weight"].shape
    half = (0.5, 0.5, 0.5)
    return SigLIPConfig(
        VisionConfig(
            _grid(state, False) * patch,
            _layers(state, "visual.transformer.resblocks."),
            width,
            patch,
            _heads(width, heads),
            _other_mlp(state, "visual.transformer.resblocks.0.mlp.c_fc.weight", width),
            pool="mean",
            image_mean=half,
            image_std=half,
        ),
        TextConfig(
            vocabulary,
            state["text.positional_embedding"].shape[0],
            text_width,
            _layers(state, "text.transformer.resblocks."),
            _heads(text_width, text_heads),
            _other_mlp(state, "text.transformer.resblocks.0.mlp.c_fc.weight", text_width),
        ),
        act,
        text_act,
    )


def _infer_siglip_open_clip(state: State, beside: dict[str, Any], act: str | None) -> SigLIPConfig:
    text = beside.get("text_cfg", {})
    tanh = text.get("act_kwargs", {}).get("approximate") == "tanh"
    # timm's towers have the exact GELU unless their name says otherwise.
    return _siglip(state, act or "gelu", act or ("gelu_tanh" if tanh else "gelu"), None, text.get("heads"))


def _infer_siglip_transformers(state: State, beside: dict[str, Any], act: str | None) -> SigLIPConfig:
    vision, text = beside.get("vision_config") or {}, beside.get("text_config") or {}
    named = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    first, second = (
        named.get(t.get("hidden_act", ""), t.get("hidden_act", "gelu_tanh")) for t in (vision, text)
    )
    # Where the configuration is there and leaves heads out, transformers' default holds.
    default = 12 if beside else None
    return _siglip(
        state,
        act or first,
        act or second,
        vision.get("num_attention_heads", default),
        text.get("num_attention_heads", default),
    )


# --- ALIGN, transformers

_LAYER, _BLOCK = "text_model.encoder.layer.#.", "vision_model.encoder.blocks.#."
_ALIGN = (
    Rule("vision_model.embeddings.convolution.weight", "visual.stem_conv.weight"),
    Rule("vision_model.embeddings.batchnorm.*", "visual.stem_bn.*"),
    Rule(_BLOCK + "expansion.expand_conv.weight", "visual.blocks.#.expand_conv.weight"),
    Rule(_BLOCK + "expansion.expand_bn.*", "visual.blocks.#.expand_bn.*"),
    Rule(_BLOCK + "depthwise_conv.depthwise_conv.weight", "visual.blocks.#.depthwise_conv.weight"),
    Rule(_BLOCK + "depthwise_conv.depthwise_norm.*", "visual.blocks.#.depthwise_bn.*"),
    Rule(_BLOCK + "squeeze_excite.reduce.@", "visual.blocks.#.squeeze_reduce.@"),
    Rule(_BLOCK + "squeeze_excite.expand.@", "visual.blocks.#.squeeze_expand.@"),
    Rule(_BLOCK + "projection.project_conv.weight", "visual.blocks.#.project_conv.weight"),
    Rule(_BLOCK + "projection.project_bn.*", "visual.blocks.#.project_bn.*"),
    Rule("text_model.embeddings.word_embeddings.weight", "text.token_embedding.weight"),
    Rule("text_model.embeddings.position_embeddings.weight", "text.positional_embedding"),
    Rule("text_model.embeddings.token_type_embeddings.weight", "text.type_embedding.weight"),
    Rule("text_model.embeddings.LayerNorm.@", "text.ln_embedding.@"),
    Rule(
        tuple(f"{_LAYER}attention.self.{part}.@" for part in ("query", "key", "value")),
        "text.blocks.#.attn.in_proj_@",
    ),
    Rule(_LAYER + "attention.output.dense.@", "text.blocks.#.attn.out_proj.@"),
    Rule(_LAYER + "attention.output.LayerNorm.@", "text.blocks.#.ln_1.@"),
    Rule(_LAYER + "intermediate.dense.@", "text.blocks.#.mlp.c_fc.@"),
    Rule(_LAYER + "output.dense.@", "text.blocks.#.mlp.c_proj.@"),
    Rule(_LAYER + "output.LayerNorm.@", "text.blocks.#.ln_2.@"),
    Rule("text_projection.@", "text.proj.@"),
    *_same("temperature"),
)


def _infer_align(state: State, beside: dict[str, Any], act: str | None) -> ALIGNConfig:
    text = beside.get("text_config") or {}
    vocabulary, width = state["text.token_embedding.weight"].shape
    return ALIGNConfig(
        state["text.proj.weight"].shape[0],
        _infer_efficientnet(state, beside.get("vision_config")),
        TextConfig(
            vocabulary,
            state["text.positional_embedding"].shape[0],
            width,
            _layers(state, "text.blocks."),
            text.get("num_attention_heads"),
            _other_mlp(state, "text.blocks.0.mlp.c_fc.weight", width),
            text.get("hidden_dropout_prob", 0.1),
        ),
        pad_id=text.get("pad_token_id", 0),
    )


def _infer_efficientnet(state: State, vision: dict[str, Any] | None) -> EfficientNetConfig:
    """From transformers' configuration; without it, the published size with as many blocks and stem channels."""
    if vision is None:
        found = _layers(state, "visual.blocks."), state["visual.stem_conv.weight"].shape[0]
        for config in (c.vision for c in align.CONFIGS.values()):
            blocks = sum(config.repeats(stage[0]) for stage in config.stages)
            if (blocks, config.channels(config.stem)) == found:
                return EfficientNetConfig(
                    config.image_size, config.width_factor, config.depth_factor, port_padding=True
                )
        raise ValueError(
            f"load_checkpoint: an EfficientNet of {found[0]} blocks and {found[1]} stem channels is none of the "
            "published ones; keep config.json beside the weights"
        )
    base = EfficientNetConfig()
    names = ("num_block_repeats", "kernel_sizes", "strides", "expand_ratios", "out_channels")
    columns = [vision.get(name, [stage[i] for stage in base.stages]) for i, name in enumerate(names)]
    return EfficientNetConfig(
        # transformers' default of 600 belongs to the original B7; ALIGN was trained at 289
        vision.get("image_size", base.image_size),
        vision.get("width_coefficient", base.width_factor),
        vision.get("depth_coefficient", base.depth_factor),
        tuple(zip(*columns, strict=True)),
        drop_connect=vision.get("drop_connect_rate", base.drop_connect),
        port_padding=True,
    )


FORMATS = (
    Format(
        "open_clip",
        "CoCa",
        ("text.cls_emb", "text_decoder.text_projection", "visual.proj"),
        _COCA,
        _infer_coca,
        ("text.attn_mask", "text_decoder.attn_mask"),
    ),
    Format(
        "open_clip",
        "ViTamin",
        (_BACKBONE + "stem.conv1.weight", "text.token_embedding.weight"),
        _VITAMIN,
        _infer_vitamin,
        ("text.attn_mask",),
    ),
    Format(
        "open_clip",
        "SigLIP",
        ("visual.trunk.attn_pool.latent", "text.token_embedding.weight"),
        _SIGLIP_OPEN_CLIP,
        _infer_siglip_open_clip,
        ("text.attn_mask",),
    ),
    Format(
        "transformers",
        "SigLIP",
        ("vision_model.head.probe", "text_model.head.weight"),
        _SIGLIP_TRANSFORMERS,
        _infer_siglip_transformers,
        ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"),
    ),
    Format(
        "transformers",
        "ALIGN",
        ("vision_model.embeddings.convolution.weight", "temperature"),
        _ALIGN,
        _infer_align,
        # BERT's pooler, which ALIGN does not use
        ("text_model.pooler.", "text_model.embeddings.position_ids", "text_model.embeddings.token_type_ids"),
    ),
)

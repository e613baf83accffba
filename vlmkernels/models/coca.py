# SPDX-License-Identifier: Apache-2.0
"""CoCa: one image encoder and one text decoder cut in half, trained by a contrastive and a captioning loss.

Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models" (2022); layout, defaults and mask of
open_clip, whose released weights load. The lower half of the decoder sees no image and gives the text embedding; the
upper half cross-attends to image tokens and predicts the caption. Both losses share one forward pass::

    L = w_con * clip(normalize(v), normalize(w)) + w_cap * CE(logits[:, :-1], y[:, 1:])       (w_con 1, w_cap 2)

Shapes: images `[B, 3, S, S]`; ids `[B, L]`, L at most the context length C (76: with the class token 77), padded with
0; image tokens `[B, K, D_k]`; features `[B, E]`.

Departures and choices:

* `pooler`: "queries" is open_clip's (one pool of 256 queries, of which query 0 is the contrastive vector and 1..255
  are the captioner's tokens); "cascade" is the paper's (256 queries for the captioner, and one query on top of them
  for the contrastive vector, recalled); "none" takes the class token and the patches, as open_clip's `coca_base`.
* Ids shorter than the context keep the class token at the last position C, so that cutting padding changes nothing.
* The class token may not attend to padding. Released weights were trained with that mask shifted by one column; so
  `correct_cls_mask=False` is the default and reproduces them.
* Pad id 0 is also a byte of the vocabulary ("!" inside a word): where it occurs it leaves loss and mask.
* A decoder layer is open_clip's: self-attention and MLP, then cross-attention and a second MLP. The paper's three sizes
  come to 446, 899 and 2,440 million parameters so, against 383, 787 and 2,100 (recalled) with one MLP a layer.
* The caption loss never writes its logits (`vk.linear_cross_entropy`); the decoder's matrix starts with std
  width^-0.5 (open_clip leaves it as allocated).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._config import ModelConfig
from vlmkernels.models._registry import register_architecture, register_model
from vlmkernels.models.clip import (
    TextConfig,
    TextTransformer,
    VisionConfig,
    VisionTransformer,
    check_ids,
    check_images,
    clamp_log_scale_,
    default_heads,
    init_text_block,
    normalize_features,
)
from vlmkernels.models.generation import GenerationConfig, KeyValueCache, generate
from vlmkernels.models.training import Trainable, TrainingBatch, contrastive_loss
from vlmkernels.nn.attention import AttentionPool, MultiheadCrossAttention
from vlmkernels.nn.linear import Linear
from vlmkernels.nn.transformer import MLP, LayerNorm, TransformerBlock
from vlmkernels.ops.attention import attention
from vlmkernels.ops.contrastive import clip_loss, linear_cross_entropy
from vlmkernels.systems import register_system

__all__ = ["CONFIGS", "CoCa", "CoCaConfig", "CrossAttentionBlock", "TextDecoder", "coca_loss"]

POOLERS = ("queries", "cascade", "none")


@dataclass(frozen=True)
class CoCaConfig(ModelConfig):
    """A whole CoCa.

    Attributes:
        embed_dim: Width E of the joint space; the poolers' width, too.
        vision: Image tower, a ViT with a class token.
        text: Unimodal half; the multimodal half has its width and heads.
        decoder_layers: Blocks of the multimodal half.
        pooler: "queries", "cascade" or "none" (see the top of this file).
        pool_queries: Queries of the pool, open_clip's contrastive one included.
        pool_heads: Heads of the pools.
        act: Activation of every MLP.
        correct_cls_mask: Mask padding where it is, not one column later as in the released weights.
        contrastive_weight: Weight of the contrastive loss.
        caption_weight: Weight of the captioning loss.
        pad_id: Id of padding.
        init_logit_scale: Initial `logit_scale`, in log.
        name: Name of the configuration, for reports.
    """

    embed_dim: int = 512
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=lambda: TextConfig(context_length=76))
    decoder_layers: int = 12
    pooler: str = "queries"
    pool_queries: int = 256
    pool_heads: int = 8
    act: str = "gelu"
    correct_cls_mask: bool = False
    contrastive_weight: float = 1.0
    caption_weight: float = 2.0
    pad_id: int = 0
    init_logit_scale: float = math.log(1 / 0.07)
    name: str = ""

    def __post_init__(self) -> None:
        if self.pooler not in POOLERS:
            raise ValueError(f"CoCaConfig: pooler must be one of {list(POOLERS)}, got {self.pooler!r}")
        if self.vision.is_resnet or self.vision.pool != "class":
            raise ValueError("CoCaConfig: vision must be a ViT with pool='class'")
        if self.pooler == "queries" and self.pool_queries < 2:
            raise ValueError(
                f"CoCaConfig: pool_queries must be at least 2 (one is the contrastive one), got {self.pool_queries}"
            )

    @property
    def image_token_width(self) -> int:
        """Width D_k of the image tokens that the decoder attends to."""
        return self.vision.width if self.pooler == "none" else self.embed_dim


class ImageEncoder(VisionTransformer):
    """CLIP's ViT with poolers that give a contrastive vector and tokens for the captioner."""

    def __init__(self, config: CoCaConfig, **block: Any) -> None:
        super().__init__(config.vision, config.embed_dim, **block)
        width = config.embed_dim
        self.pooler = config.pooler
        if config.pooler == "none":
            return
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(config.vision.width**-0.5 * torch.randn(width, width))
        self.attn_pool = AttentionPool(
            width,
            config.pool_heads,
            queries=config.pool_queries,
            context_width=config.vision.width,
            norm_layer=LayerNorm,
        )
        if config.pooler == "cascade":
            self.attn_pool_contrastive = AttentionPool(width, config.pool_heads, norm_layer=LayerNorm)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:  # [B, N + 1, D]
        """Turns the encoder's tokens into the feature `[B, E]` and the captioner's tokens `[B, K, D_k]`."""
        if self.pooler == "cascade":
            tokens = self.attn_pool(x)
            pooled = self.attn_pool_contrastive(tokens)[:, 0]
            return self.ln_post(pooled) @ self.proj, tokens
        if self.pooler == "queries":
            x = self.attn_pool(x)
        x = self.ln_post(x)
        return x[:, 0] @ self.proj, x[:, 1:]

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.forward_tokens(x))[0]


class UnimodalText(nn.Module):
    """The lower half of the decoder: causal, without images; its appended class token gives the text's vector."""

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        text = config.text
        self.pad_id, self.correct_cls_mask = config.pad_id, config.correct_cls_mask
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.cls_emb = nn.Parameter(0.01 * torch.randn(text.width))
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(text.context_length + 1, text.width))
        self.transformer = TextTransformer(text, act=config.act)
        self.ln_final = LayerNorm(text.width)
        self.text_projection = nn.Parameter(text.width**-0.5 * torch.randn(text.width, config.embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def key_mask(self, ids: Tensor) -> Tensor:
        """Which positions of `[tokens, class token]` may be attended to, bool `[B, L + 1]`."""
        valid = ids != self.pad_id
        always = torch.ones_like(valid[:, :1])
        return torch.cat([valid, always] if self.correct_cls_mask else [always, valid], dim=1)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # [B, L]
        """Returns the feature `[B, E]` and the tokens `[B, L, D]`, which are not normalised."""
        length, context = ids.shape[1], self.positional_embedding.shape[0] - 1
        if length < context:
            # The shifted mask lets the class token see one position of padding; keep one.
            ids = F.pad(ids, (0, 1), value=self.pad_id)
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        class_token = self.cls_emb + self.positional_embedding[-1]
        x = torch.cat([x, class_token.expand(len(x), 1, -1)], dim=1)
        x = self.transformer(x, key_mask=self.key_mask(ids))
        return self.ln_final(x[:, -1]) @ self.text_projection, x[:, :length]


class CrossAttentionBlock(nn.Module):
    """`x += attn(ln_1(x), ln_1_kv(context)); x += mlp(ln_2(x))`.

    Args:
        width: Width D of the queries.
        heads: Number of heads.
        context_width: Width of the attended tokens; None = width.
        mlp_width: Hidden width of the MLP; None = 4 D.
        act: Activation of the MLP.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        mlp_width: int | None = None,
        act: str = "gelu",
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.ln_1_kv = LayerNorm(width if context_width is None else context_width)
        self.attn = MultiheadCrossAttention(width, heads, context_width=context_width)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, mlp_width or 4 * width, act=act)

    def forward(self, x: Tensor, context: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Transforms `[B, L, D]`; `key_mask` bool `[B, K]`, True = may be attended to."""
        x = x + self.attn(self.ln_1(x), self.ln_1_kv(context), key_mask=key_mask)
        return x + self.mlp(self.ln_2(x))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Projects a context once for many `step`s: two `[B, K, H, D/H]`."""
        return self.attn.project_context(self.ln_1_kv(context))

    def step(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """`forward` with projected keys and values."""
        q = self.attn.project_queries(self.ln_1(x))
        out = cast(Tensor, attention(q, *keys_values, backend=self.attn.backend))
        x = x + self.attn.out_proj(out.flatten(2))
        return x + self.mlp(self.ln_2(x))


class TextDecoder(nn.Module):
    """The upper half: per layer a causal self-attention block, then a cross-attention block; then LN and the logits.

    Args:
        text: Width, heads and vocabulary.
        layers: Number of layers.
        context_width: Width of the image tokens.
        act: Activation of the MLPs.
    """

    def __init__(self, text: TextConfig, layers: int, context_width: int, act: str) -> None:
        super().__init__()
        heads = text.heads or default_heads("TextConfig", text.width)
        same = replace(text, layers=layers)
        self.resblocks = nn.ModuleList(
            TransformerBlock(text.width, heads, mlp_width=text.mlp_width, act=act, is_causal=True)
            for _ in range(layers)
        )
        self.cross_attn = nn.ModuleList(
            CrossAttentionBlock(
                text.width, heads, context_width=context_width, mlp_width=text.mlp_width, act=act
            )
            for _ in range(layers)
        )
        self.ln_final = LayerNorm(text.width)
        self.output = Linear(text.width, text.vocab_size, bias=False)
        for block in self.resblocks:
            init_text_block(block.attn, block.mlp, same)
        for block in self.cross_attn:
            init_text_block(block.attn, block.mlp, same)
        nn.init.normal_(self.output.weight, std=text.width**-0.5)

    def forward(self, image_tokens: Tensor, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Returns the hidden states `[B, L, D]` whose product with `output` are the logits.

        Args:
            image_tokens: `[B, K, D_k]`.
            x: The unimodal half's tokens `[B, L, D]`.
            key_mask: Bool `[B, K]`, image tokens that may be attended to; None = all.
        """
        for block, cross in zip(self.resblocks, self.cross_attn, strict=True):
            x = cross(block(x), image_tokens, key_mask=key_mask)
        return self.ln_final(x)


class CoCa(Trainable, nn.Module):
    """Image encoder, unimodal text half, multimodal text half, and the scale of the contrastive logits.

    Args:
        config: What to build.

    Attributes:
        config: The configuration it was built from.
        tokenizer_state: Contents of the tokenizer file that came with the weights; or None.

    Example:
        >>> import torch, vlmkernels as vk
        >>> model = vk.models.create("coca-emoji")
        >>> model.generate(torch.zeros(2, 3, 48, 48), start_id=4094, end_id=4095, max_length=6).shape[0]
        2
    """

    no_weight_decay = ("positional_embedding", ".query")

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer_state: dict[str, Any] | None = None
        self.visual = ImageEncoder(config, act=config.act)
        self.text = UnimodalText(config)
        self.text_decoder = TextDecoder(
            config.text, config.decoder_layers, config.image_token_width, config.act
        )
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))

    def encode_image_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes normalised images to features `[B, E]` and the captioner's tokens `[B, K, D_k]`."""
        check_images("CoCa", images, self.config.vision.image_size)
        return self.visual.pool(self.visual.forward_tokens(images.to(self.visual.proj.dtype)))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:  # [B, 3, S, S]
        """Encodes normalised images to features `[B, E]`."""
        features, _ = self.encode_image_tokens(images)
        return normalize_features(features) if normalize else features

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:  # [B, L]
        """Encodes ids to features `[B, E]`, read at the appended class token."""
        check_ids("CoCa", ids, self.config.text.context_length)
        features, _ = self.text(ids)
        return normalize_features(features) if normalize else features

    def forward(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Encodes pairs for `coca_loss`.

        Returns:
            `image_features` and `text_features` `[B, E]`, normalised; `logit_scale`, exponentiated; `hidden`
            `[B, L, D]`, whose product with `text_decoder.output` are the caption's logits: position t predicts
            token t + 1.
        """
        check_ids("CoCa", ids, self.config.text.context_length)
        image_features, image_tokens = self.encode_image_tokens(images)
        text_features, text_tokens = self.text(ids)
        return {
            "image_features": normalize_features(image_features),
            "text_features": normalize_features(text_features),
            "logit_scale": self.logit_scale.float().exp(),
            "hidden": self.text_decoder(image_tokens, text_tokens),
        }

    def caption_logits(self, images: Tensor, ids: Tensor) -> Tensor:
        """Logits `[B, L, V]` of the tokens that follow each position."""
        return self.text_decoder.output(self(images, ids)["hidden"])

    def caption_loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the next tokens, padding ignored; hidden `[B, L, D]`, ids `[B, L]`."""
        targets = ids[:, 1:].long()
        return linear_cross_entropy(
            hidden[:, :-1], self.text_decoder.output.weight, targets, ignore_index=self.config.pad_id
        )

    def training_losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Weighted sum of the contrastive and the captioning loss; every view of a picture is captioned."""
        ids = batch.captions
        image_features, image_tokens = self.encode_image_tokens(batch.images)
        text_features, text_tokens = self.text(ids)
        views = len(batch.images) // len(ids)
        hidden = self.text_decoder(image_tokens, text_tokens.repeat(views, 1, 1))
        contrastive = contrastive_loss(
            batch,
            normalize_features(image_features),
            normalize_features(text_features),
            self.logit_scale.float().exp(),
        )
        caption = self.caption_loss(hidden, ids.repeat(views, 1))
        config = self.config
        total = config.contrastive_weight * contrastive + config.caption_weight * caption
        return {"loss": total, "contrastive": contrastive, "caption": caption}

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,  # [B, 3, S, S]
        prompt: Tensor | None = None,  # [B, P]
        *,
        start_id: int = 49406,
        end_id: int = 49407,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Writes captions, in eval mode, with cached keys and values: a step costs one token, not the whole prefix.

        Args:
            images: Normalised `[B, 3, S, S]`.
            prompt: int64 `[B, P]` to continue, start included; None = the start token.
            start_id: OpenAI's vocabulary has 49406.
            end_id: OpenAI's vocabulary has 49407.
            generator: For sampling.
            **options: Fields of `GenerationConfig`; max_length defaults to 30 or the context length.

        Returns:
            int64 ids `[B, at most max_length]`.

        Raises:
            ValueError: If an option makes no sense, or the texts would not fit the context.
        """
        context = self.config.text.context_length
        config = GenerationConfig(**{"max_length": min(30, context)} | options)
        if config.max_length > context:
            raise ValueError(
                f"CoCa.generate: max_length must be at most the context length {context}, got {config.max_length}"
            )
        if prompt is None:
            prompt = torch.full((len(images), 1), start_id, device=images.device)
        check_ids("CoCa.generate", prompt, context)
        was_training = self.training
        self.eval()
        try:
            _, tokens = self.encode_image_tokens(images)
            decoder = _CaptionDecoder(self, tokens, config.max_length)
            return generate(
                decoder, prompt.long(), config, end_id=end_id, pad_id=self.config.pad_id, generator=generator
            )
        finally:
            self.train(was_training)

    def clamp_logit_scale(self) -> None:
        """Clamps `logit_scale` to [0, ln 100] in place."""
        clamp_log_scale_(self.logit_scale)


class _CaptionDecoder:
    """Both halves of the text side, one token at a time."""

    def __init__(self, model: CoCa, image_tokens: Tensor, length: int) -> None:
        self.text: Any = model.text
        self.decoder: Any = model.text_decoder
        self.position = 0
        self.valid: Tensor | None = None
        self.unimodal = [KeyValueCache(length) for _ in self.text.transformer.resblocks]
        self.multimodal = [KeyValueCache(length) for _ in self.decoder.resblocks]
        layers: list[Any] = list(model.text_decoder.cross_attn)
        self.images = [layer.keys_values(image_tokens) for layer in layers]

    def step(self, tokens: Tensor) -> Tensor:
        x = self.text.token_embedding(tokens)[:, None] + self.text.positional_embedding[self.position]
        self.position += 1
        mask = self.text.key_mask(tokens[:, None])
        # The shifted mask looks at the token before: a padding token hides the position after it.
        if self.text.correct_cls_mask:
            known, self.valid = self.valid, mask[:, :1]
            seen = self.valid if known is None else torch.cat([known, self.valid], dim=1)
            self.valid = seen
        else:
            seen = mask[:, :1] if self.valid is None else self.valid
            self.valid = torch.cat([seen, mask[:, 1:]], dim=1)
        for block, cache in zip(self.text.transformer.resblocks, self.unimodal, strict=True):
            x = x + cache.attend(block.attn, block.ln_1(x), key_mask=seen)
            x = x + block.mlp(block.ln_2(x))
        layers = zip(
            self.decoder.resblocks, self.multimodal, self.decoder.cross_attn, self.images, strict=True
        )
        for block, cache, cross, keys_values in layers:
            x = x + cache.attend(block.attn, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
            x = cross.step(x, keys_values)
        return self.decoder.output(self.decoder.ln_final(x[:, -1]))

    def reorder(self, rows: Tensor) -> None:
        for cache in (*self.unimodal, *self.multimodal):
            cache.reorder(rows)
        self.images = [(k[rows], v[rows]) for k, v in self.images]
        if self.valid is not None:
            self.valid = self.valid[rows]


def coca_loss(
    model: CoCa, out: dict[str, Tensor], ids: Tensor, w_con: float = 1.0, w_cap: float = 2.0
) -> Tensor:
    """`w_con * contrastive + w_cap * captioning` of what `model(images, ids)` returned."""
    contrastive = clip_loss(out["image_features"].float(), out["text_features"].float(), out["logit_scale"])
    return w_con * contrastive + w_cap * model.caption_loss(out["hidden"], ids)


CONFIGS: dict[str, CoCaConfig] = {
    # open_clip
    "coca_ViT-B-32": CoCaConfig(),
    "coca_ViT-L-14": CoCaConfig(
        768, VisionConfig(224, 24, 1024, 14), TextConfig(context_length=76, width=768), pool_heads=8
    ),
    "coca_base": CoCaConfig(
        512, VisionConfig(288, 12, 768, 18), TextConfig(64000, 76, width=768), pooler="none"
    ),
    # The paper's three sizes (recalled): decoder halves of 12, 12 and 18 layers, poolers in cascade.
    "coca-paper-base": CoCaConfig(
        768,
        VisionConfig(288, 12, 768, 18),
        TextConfig(64000, 76, 768, 12),
        12,
        "cascade",
        correct_cls_mask=True,
    ),
    "coca-paper-large": CoCaConfig(
        1024,
        VisionConfig(288, 24, 1024, 18),
        TextConfig(64000, 76, 1024, 12),
        12,
        "cascade",
        correct_cls_mask=True,
    ),
    "coca-paper": CoCaConfig(
        1408,
        VisionConfig(288, 40, 1408, 18),
        TextConfig(64000, 76, 1408, 18),
        18,
        "cascade",
        correct_cls_mask=True,
    ),
    # Small enough to train on a CPU in minutes
    "coca-emoji": CoCaConfig(
        embed_dim=128,
        vision=VisionConfig(
            image_size=48, layers=2, width=128, patch_size=8, image_mean=(0.5,) * 3, image_std=(0.5,) * 3
        ),
        text=TextConfig(4096, 24, 128, 2),
        decoder_layers=2,
        pool_queries=17,
        pool_heads=4,
        correct_cls_mask=True,
    ),
}
CONFIGS = {name: replace(config, name=name) for name, config in CONFIGS.items()}


def _register(name: str) -> None:
    @register_model(name)
    def build(**overrides: Any) -> CoCa:
        return CoCa(CONFIGS[name].override(**overrides)).eval()


for _name in CONFIGS:
    _register(_name)
register_architecture("CoCa", CoCa, CoCaConfig)
register_system(
    "CoCa",
    "CoCa: Contrastive Captioners are Image-Text Foundation Models",
    "model + pretraining objective",
)(CoCa)

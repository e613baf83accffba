# SPDX-License-Identifier: Apache-2.0
"""SigLIP's towers: a ViT pooled by an attention head, and a bidirectional text encoder pooled at its last position.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), and SigLIP 2 (2025), whose towers have the same
shapes. The loss is `vk.siglip_loss`: each pair decides by itself, with a learned scale and bias.

Shapes: images `[B, 3, S, S]` scaled to [-1, 1]; ids `[B, L]`; features `[B, E]`, E = width of both towers.

Where it differs from CLIP: no class token and no norm before the blocks; biases in the patch convolution and in the
text's projection; LayerNorm eps 1e-6; text is neither causal nor masked, so that padding is part of the input: shorter
rows are padded to the context length. Which GELU a checkpoint wants depends on who trained it: transformers' port says
tanh, open_clip's towers say exact for images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._config import ModelConfig
from vlmkernels.models._registry import register_architecture, register_model
from vlmkernels.models.clip import (
    TextConfig,
    VisionConfig,
    check_ids,
    check_images,
    clamp_log_scale_,
    default_heads,
    normalize_features,
)
from vlmkernels.models.training import Trainable
from vlmkernels.nn.attention import MultiheadCrossAttention
from vlmkernels.nn.linear import Linear
from vlmkernels.nn.transformer import MLP, LayerNorm, Transformer

__all__ = ["CONFIGS", "AttentionPoolHead", "SigLIP", "SigLIPConfig"]

_norm = partial(LayerNorm, eps=1e-6)


def _half() -> tuple[float, float, float]:
    return (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class SigLIPConfig(ModelConfig):
    """A whole SigLIP.

    Attributes:
        vision: Image tower; its width is that of the joint space.
        text: Text tower.
        act: Activation of the image tower's MLPs.
        text_act: Activation of the text tower's MLPs; None = act.
        pad_id: Fills ids up to the context length (1 in the published vocabularies).
        init_logit_scale: Initial `logit_scale`, in log.
        init_logit_bias: Initial `logit_bias`.
        name: Name of the configuration, for reports.
    """

    vision: VisionConfig = field(
        default_factory=lambda: VisionConfig(
            patch_size=16, pool="mean", image_mean=_half(), image_std=_half()
        )
    )
    text: TextConfig = field(default_factory=lambda: TextConfig(32000, 64, 768))
    act: str = "gelu_tanh"
    text_act: str | None = None
    pad_id: int = 1
    init_logit_scale: float = math.log(10.0)
    init_logit_bias: float = -10.0
    name: str = ""

    @property
    def embed_dim(self) -> int:
        """Width E of the joint space."""
        return self.vision.width


class AttentionPoolHead(nn.Module):
    """One learned query attends over all tokens; then `x + mlp(norm(x))`.

    Args:
        width: Width D.
        heads: Number of heads.
        mlp_width: Hidden width of the MLP.
        act: Its activation.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, act: str) -> None:
        super().__init__()
        self.query = nn.Parameter(width**-0.5 * torch.randn(width))
        self.attn = MultiheadCrossAttention(width, heads)
        self.norm = _norm(width)
        self.mlp = MLP(width, mlp_width, act=act)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D] -> [B, D]
        x = self.attn(self.query.expand(len(x), 1, -1), x)[:, 0]
        return x + self.mlp(self.norm(x))


class SigLIPVision(nn.Module):
    """Patches, positions, blocks, norm, attention pool: `[B, 3, S, S] -> [B, D]`."""

    def __init__(self, config: VisionConfig, act: str) -> None:
        super().__init__()
        width = config.width
        heads = config.heads or default_heads("VisionConfig", width)
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(config.grid**2, width))
        self.transformer = Transformer(
            width,
            config.layers,  # type: ignore[arg-type]
            heads,
            mlp_width=config.mlp_width,
            act=act,
            dropout=config.dropout,
            drop_path=config.drop_path,
            norm_layer=_norm,
        )
        self.ln_post = _norm(width)
        self.attn_pool = AttentionPoolHead(width, heads, config.mlp_width or 4 * width, act)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Returns the normalised tokens `[B, N, D]`."""
        x = self.conv1(x).flatten(2).transpose(1, 2) + self.positional_embedding
        return self.ln_post(self.transformer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.attn_pool(self.forward_tokens(x))


class SigLIPText(nn.Module):
    """Embeddings, bidirectional blocks, norm, last position, linear head: `[B, C] -> [B, E]`."""

    def __init__(self, config: TextConfig, embed_dim: int, act: str) -> None:
        super().__init__()
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.transformer = Transformer(
            width,
            config.layers,
            config.heads or default_heads("TextConfig", width),
            mlp_width=config.mlp_width,
            act=act,
            dropout=config.dropout,
            drop_path=config.drop_path,
            norm_layer=_norm,
        )
        self.ln_final = _norm(width)
        self.text_projection = Linear(width, embed_dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding)
        return self.text_projection(self.ln_final(x[:, -1]))


class SigLIP(Trainable, nn.Module):
    """Image tower, text tower, scale and bias of their similarities.

    Args:
        config: What to build.

    Attributes:
        config: The configuration it was built from.
        tokenizer_state: Contents of the tokenizer file that came with the weights; or None.
    """

    default_loss = "siglip"
    image_resize = "squash"  # what `vk.data.transform_for` does with pictures that are no squares

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        if config.vision.is_resnet or config.vision.pool != "mean" or config.vision.stem != "patch":
            raise ValueError("SigLIPConfig: vision must be a ViT with pool='mean' and stem='patch'")
        self.config = config
        self.tokenizer_state: dict[str, Any] | None = None
        self.visual = SigLIPVision(config.vision, config.act)
        self.text = SigLIPText(config.text, config.embed_dim, config.text_act or config.act)
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        self.logit_bias = nn.Parameter(torch.tensor(config.init_logit_bias))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:  # [B, 3, S, S]
        """Encodes normalised images to features `[B, E]`."""
        check_images("SigLIP", images, self.config.vision.image_size)
        features = self.visual(images.to(self.logit_scale.dtype))
        return normalize_features(features) if normalize else features

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:  # [B, L]
        """Encodes ids to features `[B, E]`; rows shorter than the context are padded to it."""
        context = self.config.text.context_length
        check_ids("SigLIP", ids, context)
        ids = F.pad(ids, (0, context - ids.shape[1]), value=self.config.pad_id)
        features = self.text(ids)
        return normalize_features(features) if normalize else features

    def forward(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Encodes pairs for a loss: `SigLipLoss()(**model(images, ids))`."""
        return {
            "image_features": self.encode_image(images, normalize=True),
            "text_features": self.encode_text(ids, normalize=True),
            "logit_scale": self.logit_scale.float().exp(),
            "logit_bias": self.logit_bias.float(),
        }

    def clamp_logit_scale(self) -> None:
        """Clamps `logit_scale` to [0, ln 100] in place."""
        clamp_log_scale_(self.logit_scale)


def _size(
    width: int,
    layers: int,
    patch: int,
    image_size: int,
    *,
    vocab: int = 32000,
    context: int = 64,
    heads: int | None = None,
    mlp_width: int | None = None,
) -> SigLIPConfig:
    vision = VisionConfig(
        image_size, layers, width, patch, heads, mlp_width, pool="mean", image_mean=_half(), image_std=_half()
    )
    return SigLIPConfig(vision, TextConfig(vocab, context, width, layers, heads, mlp_width))


_SO400M: dict[str, Any] = {"width": 1152, "layers": 27, "heads": 16, "mlp_width": 4304}
_SIZES: dict[str, dict[str, Any]] = {
    **{
        f"ViT-B-16-{{}}-{s}": {"width": 768, "layers": 12, "patch": 16, "image_size": s}
        for s in (224, 256, 384, 512)
    },
    **{f"ViT-L-16-{{}}-{s}": {"width": 1024, "layers": 24, "patch": 16, "image_size": s} for s in (256, 384)},
    **{f"ViT-SO400M-14-{{}}-{s}": {"patch": 14, "image_size": s, **_SO400M} for s in (224, 378)},
    # 384 is no multiple of 14: the last rows are not seen, as in the original
}
CONFIGS: dict[str, SigLIPConfig] = {
    name.format(version).removesuffix("-224"): _size(**size, vocab=vocab)
    for version, vocab in (("SigLIP", 32000), ("SigLIP2", 256000))
    for name, size in _SIZES.items()
}
# released with texts of 16 tokens
CONFIGS["ViT-SO400M-14-SigLIP"] = CONFIGS["ViT-SO400M-14-SigLIP"].override(text={"context_length": 16})
# Small enough to train on a CPU in minutes
CONFIGS["siglip-emoji"] = SigLIPConfig(
    VisionConfig(48, 2, 128, 8, pool="mean", image_mean=_half(), image_std=_half()),
    TextConfig(4096, 24, 128, 1),
    pad_id=0,
)
CONFIGS = {name: replace(config, name=name) for name, config in CONFIGS.items()}


def _register(name: str) -> None:
    @register_model(name)
    def build(**overrides: Any) -> SigLIP:
        return SigLIP(CONFIGS[name].override(**overrides)).eval()


for _name in CONFIGS:
    _register(_name)
register_architecture("SigLIP", SigLIP, SigLIPConfig)

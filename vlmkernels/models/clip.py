# SPDX-License-Identifier: Apache-2.0
"""CLIP: an image and a text encoder trained so that matching pairs are the most similar ones of their batch.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021). Image towers:
a ViT (patch stem as in the paper, or the convolutional stem of Xiao et al., "Early Convolutions Help
Transformers See Better", 2021) and the paper's modified ResNet. Module names are those of OpenAI's
checkpoints.

Shapes: images `[B, 3, S, S]` float, normalised (see `vk.data.transform_for`); ids `[B, L]` integer, L at most
the context length, the end token being the largest id of the vocabulary; features `[B, E]`.

Departures: shorter id rows than the context length are accepted (the text tower is causal, so rows cut after
the end token give the same features); the ViT may pool by the mean of its patches, drop patches, branches and
activations in training; a learned `logit_bias` where configured. All of these are off in the published
models.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._config import ModelConfig
from vlmkernels.models._registry import register_architecture, register_model
from vlmkernels.models.training import Trainable
from vlmkernels.nn.attention import AttentionPool2d, MultiheadSelfAttention
from vlmkernels.nn.losses import SigLipLoss
from vlmkernels.nn.transformer import MLP, LayerNorm, Transformer
from vlmkernels.systems import register_system

__all__ = [
    "CLIP",
    "CONFIGS",
    "CLIPConfig",
    "ConvStem",
    "ModifiedResNet",
    "TextConfig",
    "TextTransformer",
    "VisionConfig",
    "VisionTransformer",
]

_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTH = 64
_MAX_LOG_SCALE = math.log(100.0)


def default_heads(owner: str, width: int) -> int:
    if width % _HEAD_WIDTH:
        raise ValueError(
            f"{owner}: heads must be given where width is no multiple of {_HEAD_WIDTH}, got width {width}"
        )
    return width // _HEAD_WIDTH


@dataclass(frozen=True)
class VisionConfig:
    """Image tower.

    Attributes:
        image_size: Side S of the square input.
        layers: Number of transformer blocks; four stage depths make it a modified ResNet.
        width: Width of the transformer, or of the ResNet's first stage.
        patch_size: Side of a patch; the convolutional stem downsamples by it.
        heads: Attention heads; None = width / 64 (ResNet: 32 width / 64, in its pool).
        mlp_width: Hidden width of the MLPs; None = 4 width.
        stem: "patch" (one strided convolution) or "conv" (3x3 convolutions, then a 1x1).
        stem_channels: Channels of the 3x3 convolutions of the conv stem; empty = doubling up to width.
        stem_strides: Their strides, with product patch_size; empty = 2 each.
        pool: "class" (a class token) or "mean" (mean of the patches, no class token).
        patch_dropout: Share of patches dropped in training (Li et al., "FLIP", 2022).
        dropout: Dropout in the blocks, in training.
        drop_path: Stochastic depth rate of the last block, in training.
        image_mean: Mean that `vk.data.transform_for` subtracts, per channel.
        image_std: Deviation that `vk.data.transform_for` divides by, per channel.
    """

    image_size: int = 224
    layers: int | tuple[int, int, int, int] = 12
    width: int = 768
    patch_size: int = 32
    heads: int | None = None
    mlp_width: int | None = None
    stem: str = "patch"
    stem_channels: tuple[int, ...] = ()
    stem_strides: tuple[int, ...] = ()
    pool: str = "class"
    patch_dropout: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    image_mean: tuple[float, float, float] = _OPENAI_MEAN
    image_std: tuple[float, float, float] = _OPENAI_STD

    def __post_init__(self) -> None:
        # JSON and users give lists; frozen and hashable wants tuples.
        for name in ("layers", "stem_channels", "stem_strides", "image_mean", "image_std"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name, allowed in (("stem", ("patch", "conv")), ("pool", ("class", "mean"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"VisionConfig: {name} must be one of {list(allowed)}, got {getattr(self, name)!r}"
                )
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ValueError(f"VisionConfig: patch_dropout must be in [0, 1), got {self.patch_dropout}")
        if self.is_resnet:
            if len(self.layers) != 4 or self.image_size % 32:  # type: ignore[arg-type]
                raise ValueError(
                    "VisionConfig: a ResNet needs four stage depths and an image_size divisible by 32, "
                    f"got layers {self.layers} and image_size {self.image_size}"
                )
        elif self.image_size % self.patch_size:
            raise ValueError(
                "VisionConfig: image_size must be a multiple of patch_size, got "
                f"{self.image_size} and {self.patch_size}"
            )

    @property
    def is_resnet(self) -> bool:
        """Whether the tower is a modified ResNet."""
        return isinstance(self.layers, tuple)

    @property
    def grid(self) -> int:
        """Side of the grid of patches, or of the ResNet's last feature map."""
        return self.image_size // (32 if self.is_resnet else self.patch_size)

    def build(self, embed_dim: int, **block: Any) -> nn.Module:
        """Builds the tower `[B, 3, S, S] -> [B, embed_dim]`; other towers' configurations bring a `build` too.

        Args:
            embed_dim: Width of the output.
            **block: Passed to every transformer block (act, and the classes of attention, norm and MLP).
        """
        if self.is_resnet:
            return ModifiedResNet(self, embed_dim)
        return VisionTransformer(self, embed_dim, **block)


@dataclass(frozen=True)
class TextConfig:
    """Text tower.

    Attributes:
        vocab_size: Size V of the vocabulary; its largest id is the end token.
        context_length: Most tokens of a text, start and end included.
        width: Width of the transformer.
        layers: Number of blocks.
        heads: Attention heads; None = width / 64.
        mlp_width: Hidden width of the MLPs; None = 4 width.
        dropout: Dropout in the blocks, in training.
        drop_path: Stochastic depth rate of the last block, in training.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    layers: int = 12
    heads: int | None = None
    mlp_width: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0


@dataclass(frozen=True)
class CLIPConfig(ModelConfig):
    """A whole CLIP.

    Attributes:
        embed_dim: Width E of the joint space.
        vision: Image tower.
        text: Text tower.
        act: Activation of every MLP: OpenAI's weights need "quick_gelu", most of open_clip's "gelu".
        init_logit_scale: Initial `logit_scale`, in log.
        init_logit_bias: Initial `logit_bias` for the sigmoid loss; None = the model has none.
        name: Name of the configuration, for reports.
    """

    embed_dim: int = 512
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    act: str = "quick_gelu"
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None
    name: str = ""


class Bottleneck(nn.Module):
    """ResNet bottleneck whose strides are average pools, so that every convolution has stride 1."""

    expansion = 4

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        out_width = width * self.expansion
        self.conv1 = nn.Conv2d(in_width, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, out_width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_width)
        self.downsample: nn.Module | None = None
        if stride > 1 or in_width != out_width:
            pool = (
                "-1",
                nn.AvgPool2d(stride),
            )  # the name keeps the convolution at "0", as in OpenAI's checkpoints
            conv = ("0", nn.Conv2d(in_width, out_width, 1, bias=False))
            self.downsample = nn.Sequential(OrderedDict([pool, conv, ("1", nn.BatchNorm2d(out_width))]))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.avgpool(F.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: three-convolution stem, anti-aliased strides, attention pool; `[B, 3, S, S] -> [B, E]`.

    Args:
        config: Image tower with four stage depths.
        embed_dim: Width E of the output.
    """

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        in_width = width
        stages = []
        for stage, depth in enumerate(config.layers):  # type: ignore[arg-type]
            stage_width = width * 2**stage
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck(in_width, stage_width, stride=2 if stage and not block else 1))
                in_width = stage_width * Bottleneck.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        heads = config.heads or default_heads("VisionConfig", in_width)
        self.attnpool = AttentionPool2d(config.grid, in_width, heads, embed_dim)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(F.relu(self.bn3(self.conv3(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.attnpool(x)


class ConvStem(nn.Module):
    """Convolutional stem: strided 3x3 convolutions with batch norm and ReLU, then a 1x1 to the model's width.

    Xiao et al. 2021, section 3 and appendix: it replaces the patch convolution and costs about one block.

    Args:
        config: Image tower; patch_size must be the product of the strides.

    Raises:
        ValueError: If strides and channels do not fit each other or patch_size.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        depth = len(config.stem_channels) or len(config.stem_strides) or round(math.log2(config.patch_size))
        strides = config.stem_strides or (2,) * depth
        channels = config.stem_channels or tuple(max(config.width >> i, 8) for i in reversed(range(depth)))
        if len(strides) != len(channels) or math.prod(strides) != config.patch_size:
            raise ValueError(
                "VisionConfig: the stem needs one stride per convolution with product patch_size, got "
                f"stem_channels {channels}, stem_strides {strides} and patch_size {config.patch_size}"
            )
        in_channels = 3
        blocks = []
        for out_channels, stride in zip(channels, strides, strict=True):
            conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU()))
            in_channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.proj = nn.Conv2d(in_channels, config.width, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, D, grid, grid]
        return self.proj(self.blocks(x))


class VisionTransformer(nn.Module):
    """CLIP's ViT: stem, class token, positions, ln_pre, blocks, ln_post, projection.

    Maps `[B, 3, S, S]` to `[B, E]`.

    Args:
        config: Image tower.
        embed_dim: Width E of the output.
        **block: Passed to every block (act, and the classes of attention, norm and MLP).
    """

    def __init__(self, config: VisionConfig, embed_dim: int, **block: Any) -> None:
        super().__init__()
        width = config.width
        self.patch_dropout = config.patch_dropout
        norm_layer = block.get("norm_layer", LayerNorm)
        if config.stem == "conv":
            self.conv1: nn.Module = ConvStem(config)
        else:
            self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        std = width**-0.5
        if config.pool == "class":
            self.class_embedding = nn.Parameter(std * torch.randn(width))
        else:
            self.register_parameter("class_embedding", None)
        tokens = config.grid**2 + (config.pool == "class")
        self.positional_embedding = nn.Parameter(std * torch.randn(tokens, width))
        self.ln_pre = norm_layer(width)
        self.transformer = Transformer(
            width,
            config.layers,  # type: ignore[arg-type]
            config.heads or default_heads("VisionConfig", width),
            mlp_width=config.mlp_width,
            dropout=config.dropout,
            drop_path=config.drop_path,
            **block,
        )
        self.ln_post = norm_layer(width)
        self.proj = nn.Parameter(std * torch.randn(width, embed_dim))

    def _drop_patches(self, patches: Tensor) -> Tensor:
        """Keeps a random subset of each image's patches `[B, N, D]`, in no particular order."""
        keep = max(1, round(patches.shape[1] * (1.0 - self.patch_dropout)))
        kept = torch.rand(patches.shape[:2], device=patches.device).topk(keep, dim=1).indices
        return patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[2]))

    def forward_tokens(
        self, x: Tensor, *, masked: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Returns the last block's tokens: the class token, if there is one, then the patches.

        Args:
            x: Images `[B, 3, S, S]`.
            masked: Bool `[B, N]`, patches whose embedding `mask_token` replaces before positions are added.
            mask_token: `[D]`.

        Returns:
            `[B, N or N + 1, D]`.
        """
        x = self.conv1(x).flatten(2).transpose(1, 2)
        if masked is not None:
            if mask_token is None:
                raise ValueError("VisionTransformer.forward_tokens: masked needs a mask_token")
            x = torch.where(masked.unsqueeze(-1), mask_token.to(x.dtype), x)
        has_class = self.class_embedding is not None
        # Under autocast the convolution gives half precision; the sum promotes, so the residual stream is
        # float32.
        x = x + self.positional_embedding[has_class:]
        if self.training and self.patch_dropout > 0.0:
            x = self._drop_patches(x)
        if has_class:
            class_token = self.class_embedding + self.positional_embedding[0]
            x = torch.cat([class_token.expand(x.shape[0], 1, -1), x], dim=1)
        return self.transformer(self.ln_pre(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_tokens(x)
        pooled = x[:, 0] if self.class_embedding is not None else x.mean(dim=1)
        return self.ln_post(pooled) @ self.proj


class TextTransformer(Transformer):
    """The causal stack of the text tower; its embeddings are the CLIP's own, as in OpenAI's layout.

    Args:
        config: Text tower.
        **block: Passed to every block (act, and the classes of attention, norm and MLP).
    """

    def __init__(self, config: TextConfig, **block: Any) -> None:
        super().__init__(
            config.width,
            config.layers,
            config.heads or default_heads("TextConfig", config.width),
            mlp_width=config.mlp_width,
            dropout=config.dropout,
            drop_path=config.drop_path,
            is_causal=True,
            **block,
        )
        for block_ in self.resblocks:
            if isinstance(block_.attn, MultiheadSelfAttention) and isinstance(block_.mlp, MLP):
                init_text_block(block_.attn, block_.mlp, config)


def init_text_block(attention: Any, mlp: Any, config: TextConfig) -> None:
    """OpenAI's scheme: outputs into the residual stream shrink with depth; biases stay as torch sets them."""
    attention_std = config.width**-0.5
    residual_std = attention_std * (2 * config.layers) ** -0.5
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if getattr(attention, name, None) is not None:
            nn.init.normal_(getattr(attention, name), std=attention_std)
    nn.init.normal_(attention.out_proj.weight, std=residual_std)
    nn.init.normal_(mlp.c_fc.weight, std=(2 * config.width) ** -0.5)
    nn.init.normal_(mlp.c_proj.weight, std=residual_std)


class CLIP(Trainable, nn.Module):
    """Image tower, text tower and the scale of their similarities.

    Args:
        config: What to build.
        attention_layer: Class of the self-attention (see `vk.nn.TransformerBlock`).
        norm_layer: Class of the norms.
        mlp_layer: Class of the MLPs.

    Attributes:
        config: The configuration it was built from.
        tokenizer_state: Contents of the tokenizer file that came with the weights, for
            `vk.data.tokenizer_for`; or None.

    Under FSDP2, which shards no scalar parameters, `fully_shard(model, ignored_params={model.logit_scale})` leaves the
    scale on every rank; its gradient is then averaged by the caller.

    Example:
        >>> import torch, vlmkernels as vk
        >>> model = vk.models.create("emoji-clip")
        >>> out = model(torch.zeros(2, 3, 48, 48), torch.tensor([[4094, 5, 4095], [4094, 6, 4095]]))
        >>> sorted(out), out["image_features"].shape
        (['image_features', 'logit_scale', 'text_features'], torch.Size([2, 256]))
    """

    def __init__(
        self,
        config: CLIPConfig,
        *,
        attention_layer: Callable[..., nn.Module] = MultiheadSelfAttention,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        mlp_layer: Callable[..., nn.Module] = MLP,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer_state: dict[str, Any] | None = None
        text = config.text
        block = {
            "act": config.act,
            "attention_layer": attention_layer,
            "norm_layer": norm_layer,
            "mlp_layer": mlp_layer,
        }
        self.visual = config.vision.build(config.embed_dim, **block)
        self.transformer = TextTransformer(text, **block)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(text.context_length, text.width))
        self.ln_final = norm_layer(text.width)
        self.text_projection = nn.Parameter(text.width**-0.5 * torch.randn(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        if config.init_logit_bias is None:
            self.register_parameter("logit_bias", None)
        else:
            self.logit_bias = nn.Parameter(torch.tensor(config.init_logit_bias))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @classmethod
    def from_config(cls, config: str | CLIPConfig, **overrides: Any) -> CLIP:
        """Builds a CLIP from a configuration or the name of a published one, in eval mode.

        Raises:
            ValueError: If the name or an override is unknown.
        """
        if isinstance(config, str):
            name = config.replace("/", "-").replace("@", "-").removesuffix("px")
            if name not in CONFIGS:
                raise ValueError(f"CLIP.from_config: expected one of {sorted(CONFIGS)}, got {config!r}")
            config = CONFIGS[name]
        return cls(config.override(**overrides)).eval()

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:  # [B, 3, S, S]
        """Encodes normalised images.

        Args:
            images: Float `[B, 3, S, S]`; cast to the weights' dtype.
            normalize: Scale each feature to length 1.

        Returns:
            Features `[B, E]`.

        Raises:
            ValueError: If the shape is not `[B, 3, S, S]`.
            TypeError: If images are not floating point.
        """
        check_images("CLIP", images, self.config.vision.image_size)
        features = self.visual(images.to(self.positional_embedding.dtype))
        return normalize_features(features) if normalize else features

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:  # [B, L]
        """Encodes token ids; the feature is read at the first occurrence of the largest id, the end token.

        Args:
            ids: int32 or int64 `[B, L]`, L at most the context length.
            normalize: Scale each feature to length 1.

        Returns:
            Features `[B, E]`.

        Raises:
            ValueError: If the shape is not `[B, L]` with a fitting L.
            TypeError: If ids are not integers.
        """
        check_ids("CLIP", ids, self.config.text.context_length)
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = self.transformer(x)
        # argmax gives the first of equal maxima, so ids padded with the end token (transformers) work as
        # well.
        end = ids.argmax(dim=-1)
        x = x[torch.arange(x.shape[0], device=x.device), end]
        # The norm is per token, so it may follow the selection.
        features = self.ln_final(x) @ self.text_projection
        return normalize_features(features) if normalize else features

    def forward(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Encodes pairs for a loss: `ClipLoss()(**model(images, ids))`.

        Returns:
            `image_features` and `text_features` `[B, E]`, normalised, `logit_scale` exponentiated and, where
            configured, `logit_bias`.
        """
        half = self.logit_scale.dtype in (torch.float16, torch.bfloat16)
        out = {
            "image_features": self.encode_image(images, normalize=True),
            "text_features": self.encode_text(ids, normalize=True),
            "logit_scale": (self.logit_scale.float() if half else self.logit_scale).exp(),
        }
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias.float() if half else self.logit_bias
        return out

    def clamp_logit_scale(self) -> None:
        """Clamps `logit_scale` to [0, ln 100] in place; the paper does so after each optimiser step."""
        clamp_log_scale_(self.logit_scale)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recomputes each transformer block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.gradient_checkpointing = enabled


def check_images(owner: str, images: Tensor, size: int) -> None:
    """Raises ValueError or TypeError unless images are floating `[B, 3, size, size]`."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
        raise ValueError(
            f"{owner}.encode_image: images must be [B, 3, {size}, {size}], got {list(images.shape)}"
        )
    if not images.is_floating_point():
        raise TypeError(
            f"{owner}.encode_image: images must be floating point and normalised "
            f"(vk.data.transform_for(model)), got {images.dtype}"
        )


def check_ids(owner: str, ids: Tensor, limit: int) -> None:
    """Raises ValueError or TypeError unless ids are integers `[B, L]` with L from 1 to limit."""
    if ids.ndim != 2 or not 1 <= ids.shape[1] <= limit:
        raise ValueError(
            f"{owner}.encode_text: ids must be [B, L] with L from 1 to {limit}, got {list(ids.shape)}"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{owner}.encode_text: ids must be int32 or int64, got {ids.dtype}")


@torch.no_grad()
def clamp_log_scale_(logit_scale: Tensor) -> None:
    """Clamps a logit scale in log to [0, ln 100] in place."""
    logit_scale.clamp_(0.0, _MAX_LOG_SCALE)


def normalize_features(x: Tensor) -> Tensor:
    """Scales vectors `[..., E]` to length 1."""
    # The sum of squares needs float32 where the features are half precision.
    if x.dtype in (torch.float16, torch.bfloat16):
        return F.normalize(x.float(), dim=-1).to(x.dtype)
    return F.normalize(x, dim=-1)


def _vit(
    embed_dim: int, layers: int, width: int, patch: int, text_width: int, size: int = 224, **more: Any
) -> CLIPConfig:
    vision = VisionConfig(size, layers, width, patch, more.get("heads"), more.get("mlp_width"))
    text = TextConfig(width=text_width, layers=more.get("text_layers", 12))
    return CLIPConfig(embed_dim, vision, text, act=more.get("act", "quick_gelu"))


def _resnet(
    embed_dim: int, layers: tuple[int, int, int, int], width: int, text_width: int, size: int
) -> CLIPConfig:
    return CLIPConfig(embed_dim, VisionConfig(size, layers, width), TextConfig(width=text_width))


CONFIGS: dict[str, CLIPConfig] = {
    # OpenAI
    "RN50": _resnet(1024, (3, 4, 6, 3), 64, 512, 224),
    "RN101": _resnet(512, (3, 4, 23, 3), 64, 512, 224),
    "RN50x4": _resnet(640, (4, 6, 10, 6), 80, 640, 288),
    "RN50x16": _resnet(768, (6, 8, 18, 8), 96, 768, 384),
    "RN50x64": _resnet(1024, (3, 15, 36, 10), 128, 1024, 448),
    "ViT-B-32": _vit(512, 12, 768, 32, 512),
    "ViT-B-16": _vit(512, 12, 768, 16, 512),
    "ViT-L-14": _vit(768, 24, 1024, 14, 768),
    "ViT-L-14-336": _vit(768, 24, 1024, 14, 768, 336),
    # open_clip; its weights were trained with the exact GELU
    "ViT-H-14": _vit(1024, 32, 1280, 14, 1024, heads=16, text_layers=24, act="gelu"),
    "ViT-g-14": _vit(1024, 40, 1408, 14, 1024, heads=16, mlp_width=6144, text_layers=24, act="gelu"),
    "ViT-bigG-14": _vit(1280, 48, 1664, 14, 1280, heads=16, mlp_width=8192, text_layers=32, act="gelu"),
    # Small enough to train on a CPU in minutes
    "emoji-clip": CLIPConfig(
        embed_dim=256,
        vision=VisionConfig(
            image_size=48,
            layers=1,
            width=256,
            patch_size=16,
            stem="conv",
            stem_channels=(32, 64, 128, 192, 256),
            stem_strides=(2, 2, 2, 1, 2),
            pool="mean",
        ),
        text=TextConfig(vocab_size=4096, context_length=32, width=128, layers=1),
        act="gelu",
    ),
}
CONFIGS = {name: replace(config, name=name) for name, config in CONFIGS.items()}


def _register(name: str) -> None:
    @register_model(name)
    def build(**overrides: Any) -> CLIP:
        return CLIP.from_config(name, **overrides)


for _name in CONFIGS:
    _register(_name)

register_architecture("CLIP", CLIP, CLIPConfig)

register_system(
    "CLIP",
    "Learning Transferable Visual Models From Natural Language Supervision",
    "model + pretraining objective + zero-shot inference method",
)(CLIP)
register_system("SigLIP", "Sigmoid Loss for Language Image Pre-Training", "pretraining objective")(SigLipLoss)

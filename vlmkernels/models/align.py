# SPDX-License-Identifier: Apache-2.0
"""ALIGN: EfficientNet for images, BERT for text, trained on barely filtered pairs with a label-smoothed loss.

Jia et al., "Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision" (2021); sizes
and recipe of coyo-align, layout of transformers' `AlignModel`. With u, v normalised and a learned temperature tau::

    Z = u v^t / tau          L = (CE_0.1(Z) + CE_0.1(Z^t)) / 2      (labels smoothed by 0.1)

Shapes: images `[B, 3, S, S]` scaled to [-1, 1] (no ImageNet statistics); ids `[B, L]` padded with 0, the first one
being the start token; features `[B, E]`, E = 640.

Choices:

* tau divides and is not in log space; `after_step` keeps it above 0.001.
* The text's vector is the first position's last hidden state, not BERT's tanh pooler, which is not kept.
* B7's channels are E, so that it has no projection; other sizes have a linear layer.
* Padding of strided convolutions is TensorFlow's "same" (more on the right and below). transformers' port pads odd
  sizes as if they were even: `port_padding=True` gives its numbers, and is set where its weights are loaded.
* Stochastic depth drops whole samples, as in TensorFlow; transformers' port drops single elements.
* Batch norm averages over the batch at hand: the "virtual batches" of 16 of the original imitate its hardware.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._config import ModelConfig
from vlmkernels.models._registry import register_architecture, register_model
from vlmkernels.models.clip import TextConfig, check_ids, check_images, default_heads, normalize_features
from vlmkernels.models.training import Trainable, TrainingBatch, contrastive_loss
from vlmkernels.nn.attention import MultiheadSelfAttention
from vlmkernels.nn.linear import Linear
from vlmkernels.nn.transformer import MLP, DropPath, LayerNorm
from vlmkernels.ops.contrastive import clip_loss
from vlmkernels.systems import register_system

__all__ = [
    "ALIGN",
    "CONFIGS",
    "ALIGNConfig",
    "AltText",
    "BertText",
    "EfficientNet",
    "EfficientNetConfig",
    "align_loss",
    "alt_text_filter",
]

# repeats, kernel, stride, expansion, channels of each stage of B0
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_SMALLEST_TEMPERATURE = 1e-3


@dataclass(frozen=True)
class EfficientNetConfig:
    """Image tower.

    Attributes:
        image_size: Side S of the square input.
        width_factor: Multiplies the channels (B7: 2.0).
        depth_factor: Multiplies the repeats (B7: 3.1).
        stages: (repeats, kernel, stride, expansion, channels) of each stage before scaling.
        stem: Channels of the stem before scaling.
        drop_connect: Stochastic depth rate that the last block would have.
        norm_momentum: Share of each batch in the running statistics (TensorFlow counts from the other end: 0.99).
        port_padding: Pad odd sizes as transformers' port does.
        image_mean: Mean that `vk.data.transform_for` subtracts, per channel.
        image_std: Deviation that `vk.data.transform_for` divides by, per channel.
    """

    image_size: int = 289
    width_factor: float = 2.0
    depth_factor: float = 3.1
    stages: tuple[tuple[int, int, int, int, int], ...] = _STAGES
    stem: int = 32
    drop_connect: float = 0.2
    norm_momentum: float = 0.01
    port_padding: bool = False
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(tuple(stage) for stage in self.stages))
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def channels(self, base: int) -> int:
        """Scales channels: to the nearest multiple of 8, and never below 90% of the exact number."""
        exact = base * self.width_factor
        rounded = max(8, int(exact + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * exact else rounded

    def repeats(self, base: int) -> int:
        """Scales repeats, rounding up."""
        return math.ceil(base * self.depth_factor)


@dataclass(frozen=True)
class ALIGNConfig(ModelConfig):
    """A whole ALIGN.

    Attributes:
        embed_dim: Width E of the joint space.
        vision: Image tower.
        text: Text tower, a BERT with dropout; its context length is the table of positions.
        pad_id: Id of padding, which nothing attends to.
        init_temperature: Initial temperature.
        name: Name of the configuration, for reports.
    """

    embed_dim: int = 640
    vision: EfficientNetConfig = field(default_factory=EfficientNetConfig)
    text: TextConfig = field(default_factory=lambda: TextConfig(30522, 512, 768, 12, dropout=0.1))
    pad_id: int = 0
    init_temperature: float = 1.0
    name: str = ""


class _SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding."""

    def __init__(
        self,
        in_width: int,
        width: int,
        kernel: int,
        *,
        stride: int,
        groups: int = 1,
        port_padding: bool = False,
    ) -> None:
        super().__init__(in_width, width, kernel, stride=stride, groups=groups, bias=False)
        self.port_padding = port_padding

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]

        def both_sides(size: int) -> tuple[int, int]:
            if self.port_padding and stride > 1:
                total = kernel - 2
            else:
                total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            return total // 2, total - total // 2

        pad = (*both_sides(x.shape[3]), *both_sides(x.shape[2]))
        if len(set(pad)) > 1:
            return super().forward(F.pad(x, pad))
        return F.conv2d(x, self.weight, None, self.stride, pad[0], self.dilation, self.groups)


class MBConv(nn.Module):
    """Expand, depthwise, squeeze-excite, project; residual where shape allows.

    Args:
        in_width: Channels of the input.
        width: Channels of the output.
        kernel: Side of the depthwise kernel.
        stride: Stride of the depthwise convolution.
        expansion: Hidden channels per input channel; 1 = no expansion.
        residual: Whether input and output are added.
        drop_path: Rate of dropping the block per sample, in training.
        port_padding: See `EfficientNetConfig`.
        norm_layer: Called as `norm_layer(channels)`.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        kernel: int,
        stride: int,
        expansion: int,
        *,
        residual: bool,
        drop_path: float = 0.0,
        port_padding: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        hidden, reduced = in_width * expansion, max(1, in_width // 4)
        if expansion != 1:
            self.expand_conv: nn.Module | None = nn.Conv2d(in_width, hidden, 1, bias=False)
            self.expand_bn: nn.Module | None = norm_layer(hidden)
        else:
            self.expand_conv = self.expand_bn = None
        self.depthwise_conv = _SameConv(
            hidden, hidden, kernel, stride=stride, groups=hidden, port_padding=port_padding
        )
        self.depthwise_bn = norm_layer(hidden)
        self.squeeze_reduce = nn.Conv2d(hidden, reduced, 1)
        self.squeeze_expand = nn.Conv2d(reduced, hidden, 1)
        self.project_conv = nn.Conv2d(hidden, width, 1, bias=False)
        self.project_bn = norm_layer(width)
        self.residual = residual
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand_conv is not None and self.expand_bn is not None:
            y = F.silu(self.expand_bn(self.expand_conv(y)))
        y = F.silu(self.depthwise_bn(self.depthwise_conv(y)))
        gate = self.squeeze_expand(F.silu(self.squeeze_reduce(y.mean((2, 3), keepdim=True))))
        y = self.project_bn(self.project_conv(y * gate.sigmoid()))
        return x + self.drop_path(y) if self.residual else y


class EfficientNet(nn.Module):
    """EfficientNet without its top convolution, averaged over positions: `[B, 3, S, S] -> [B, E]`.

    Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (2019).

    Args:
        config: Its sizes.
        embed_dim: Width E of the output; a linear layer where the last stage has other channels.
    """

    def __init__(self, config: EfficientNetConfig, embed_dim: int) -> None:
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=config.norm_momentum)
        width = config.channels(config.stem)
        self.stem_conv = _SameConv(3, width, 3, stride=2, port_padding=config.port_padding)
        self.stem_bn = norm(width)
        total = sum(config.repeats(stage[0]) for stage in config.stages)
        self.blocks = nn.ModuleList()
        for repeats, kernel, stride, expansion, base in config.stages:
            for repeat in range(config.repeats(repeats)):
                out_width = config.channels(base)
                self.blocks.append(
                    MBConv(
                        width,
                        out_width,
                        kernel,
                        stride if repeat == 0 else 1,
                        expansion,
                        # TensorFlow adds wherever shapes agree; a stage's first block changes them in every size but
                        # in the first stage of those whose stem has its channels, where transformers does not add.
                        residual=repeat > 0,
                        drop_path=config.drop_connect * len(self.blocks) / total,
                        port_padding=config.port_padding,
                        norm_layer=norm,
                    )
                )
                width = out_width
        self.proj = None if width == embed_dim else Linear(width, embed_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem_bn(self.stem_conv(x)))
        for block in self.blocks:
            x = block(x)
        x = x.mean((2, 3))
        return x if self.proj is None else self.proj(x)


class BertBlock(nn.Module):
    """Post-norm block: `x = ln_1(x + attn(x)); x = ln_2(x + mlp(x))`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.width
        heads = config.heads or default_heads("TextConfig", width)
        self.attn = MultiheadSelfAttention(width, heads, dropout=config.dropout)
        self.ln_1 = LayerNorm(width, eps=1e-12)
        self.mlp = MLP(width, config.mlp_width or 4 * width)
        self.ln_2 = LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        x = self.ln_1(x + self.dropout(self.attn(x, key_mask=key_mask)))
        return self.ln_2(x + self.dropout(self.mlp(x)))


class BertText(nn.Module):
    """BERT's encoder, read at the first position: ids `[B, L] -> [B, E]`.

    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2018).

    Args:
        config: Its sizes.
        embed_dim: Width E of the output.
        pad_id: Id of padding.
    """

    def __init__(self, config: TextConfig, embed_dim: int, pad_id: int) -> None:
        super().__init__()
        width = config.width
        self.pad_id = pad_id
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(config.context_length, width))
        self.type_embedding = nn.Embedding(2, width)  # of sentence pairs: only row 0 is used here
        self.ln_embedding = LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BertBlock(config) for _ in range(config.layers))
        self.proj = Linear(width, embed_dim)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, MultiheadSelfAttention):
                nn.init.normal_(module.in_proj_weight, std=0.02)

    def forward(self, ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = (
            self.token_embedding(ids)
            + self.positional_embedding[: ids.shape[1]]
            + self.type_embedding.weight[0]
        )
        x = self.dropout(self.ln_embedding(x))
        mask = ids != self.pad_id if key_mask is None else key_mask
        for block in self.blocks:
            x = block(x, mask)
        return self.proj(x[:, 0])


class ALIGN(Trainable, nn.Module):
    """Image tower, text tower and the temperature of their similarities.

    Args:
        config: What to build.

    Attributes:
        config: The configuration it was built from.
        tokenizer_state: Contents of the tokenizer file that came with the weights; or None.
    """

    default_label_smoothing = 0.1
    image_resize = "squash_crop"  # what `vk.data.transform_for` does with pictures

    def __init__(self, config: ALIGNConfig) -> None:
        super().__init__()
        self.config = config
        self.tokenizer_state: dict[str, Any] | None = None
        self.visual = EfficientNet(config.vision, config.embed_dim)
        self.text = BertText(config.text, config.embed_dim, config.pad_id)
        self.temperature = nn.Parameter(torch.tensor(config.init_temperature))

    @property
    def logit_scale(self) -> Tensor:
        """The scale that other models hold, in log: `-ln(temperature)`."""
        return -self.temperature.log()

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:  # [B, 3, S, S]
        """Encodes images scaled to [-1, 1] to features `[B, E]`."""
        check_images("ALIGN", images, self.config.vision.image_size)
        features = self.visual(images.to(self.temperature.dtype))
        return normalize_features(features) if normalize else features

    def encode_text(
        self, ids: Tensor, normalize: bool = False, *, key_mask: Tensor | None = None
    ) -> Tensor:  # [B, L]
        """Encodes ids to features `[B, E]`; `key_mask` bool `[B, L]`, None = what is not padding."""
        check_ids("ALIGN", ids, self.config.text.context_length)
        features = self.text(ids, key_mask)
        return normalize_features(features) if normalize else features

    def forward(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Encodes pairs: normalised features, and `logit_scale` = 1 / temperature."""
        return {
            "image_features": self.encode_image(images, normalize=True),
            "text_features": self.encode_text(ids, normalize=True),
            "logit_scale": 1.0 / self.temperature.float(),
        }

    def training_losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The contrastive loss with smoothed labels, and the temperature for the log."""
        out = self(batch.images, batch.captions)
        loss = contrastive_loss(batch, smoothing=self.default_label_smoothing, **out)
        return {"loss": loss, "temperature": self.temperature.detach()}

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Keeps the temperature positive."""
        self.temperature.clamp_(min=_SMALLEST_TEMPERATURE)


def align_loss(
    image_features: Tensor,  # [N, E]
    text_features: Tensor,  # [N, E]
    temperature: Tensor | float,
    label_smoothing: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """`(1 - eps) CE + eps mean_j(-log p_ij)` of `Z = u v^t / temperature`, over both directions.

    Args:
        image_features: Normalised.
        text_features: Normalised.
        temperature: Positive divisor, with gradient where it is a tensor.
        label_smoothing: eps.
        reduction: "mean" of the two directions (transformers) or their "sum" (coyo-align).

    Raises:
        ValueError: If the reduction is another one.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"align_loss: reduction must be 'mean' or 'sum', got {reduction!r}")
    loss = clip_loss(image_features, text_features, 1.0 / temperature, label_smoothing=label_smoothing)
    return 2.0 * loss if reduction == "sum" else loss


@dataclass(frozen=True)
class AltText:
    """A pair as the filter sees it.

    Attributes:
        image: Identifies the picture.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        text: Its alt-text.
    """

    image: str
    width: int
    height: int
    text: str


def alt_text_filter(
    pairs: Sequence[AltText],
    *,
    min_side: int = 200,
    max_aspect: float = 3.0,
    max_texts_per_image: int = 1000,
    max_images_per_text: int = 10,
    len_range: tuple[int, int] = (3, 20),
    vocabulary: Iterable[str] | None = None,
) -> list[AltText]:
    """The paper's light filter (recalled): what is small, thin, repeated or oddly worded is left out.

    Counts are taken over what arrives, and every pair is judged by itself, so that the order does not matter; a second
    pass finds nothing more to remove, as counts only fall. The pornography filter and the removal of near-duplicates of
    test pictures need models and test sets, and are not here.

    Args:
        pairs: What was collected.
        min_side: Smallest length of the shorter side.
        max_aspect: Largest ratio of the longer to the shorter side.
        max_texts_per_image: Pictures with more different texts go.
        max_images_per_text: Texts on more different pictures go.
        len_range: Fewest and most words of a text.
        vocabulary: Known words (the paper: the 100 million most frequent words and word pairs); None = any.

    Returns:
        The pairs that stay, in their order.
    """
    known = None if vocabulary is None else {word.lower() for word in vocabulary}
    texts_of: dict[str, set[str]] = {}
    images_of: dict[str, set[str]] = {}
    for pair in pairs:
        texts_of.setdefault(pair.image, set()).add(pair.text)
        images_of.setdefault(pair.text, set()).add(pair.image)

    def stays(pair: AltText) -> bool:
        short, long = sorted((pair.width, pair.height))
        words = pair.text.lower().split()
        return (
            short >= min_side
            and long <= max_aspect * short
            and len_range[0] <= len(words) <= len_range[1]
            and len(texts_of[pair.image]) <= max_texts_per_image
            and len(images_of[pair.text]) <= max_images_per_text
            and (known is None or known.issuperset(words))
        )

    return [pair for pair in pairs if stays(pair)]


def _bert(width: int, layers: int) -> TextConfig:
    return TextConfig(30522, 512, width, layers, dropout=0.1)


CONFIGS: dict[str, ALIGNConfig] = {
    # coyo-align and transformers' align-base
    "align-b7-base": ALIGNConfig(text=_bert(768, 12)),
    "align-b7-large": ALIGNConfig(text=_bert(1024, 24)),
    "align-b3-mini": ALIGNConfig(640, EfficientNetConfig(289, 1.2, 1.4), _bert(256, 4)),
    # Small enough to train on a CPU in minutes
    "align-emoji": ALIGNConfig(
        128,
        EfficientNetConfig(
            48,
            1.0,
            1.0,
            ((1, 3, 1, 1, 16), (1, 3, 2, 4, 32), (1, 5, 2, 4, 64), (1, 3, 2, 4, 128)),
            16,
            norm_momentum=0.1,  # a run of minutes has few steps for its statistics
        ),
        TextConfig(4096, 32, 128, 2, dropout=0.1),
        init_temperature=0.1,
    ),
}
CONFIGS = {name: replace(config, name=name) for name, config in CONFIGS.items()}


def _register(name: str) -> None:
    @register_model(name)
    def build(**overrides: Any) -> ALIGN:
        return ALIGN(CONFIGS[name].override(**overrides)).eval()


for _name in CONFIGS:
    _register(_name)
register_architecture("ALIGN", ALIGN, ALIGNConfig)
register_system(
    "ALIGN",
    "Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision",
    "model + pretraining recipe",
)(ALIGN)

# SPDX-License-Identifier: Apache-2.0
"""SyCoCa: CoCa with the missing local direction, rebuilding hidden patches from the visible ones and the caption.

Ma et al., "SyCoCa: Symmetrizing Contrastive Captioners with Attentive Masking for Multimodal Alignment" (2024). No
official code was found: the four components and three heads are the paper's; what is marked (reconstructed) is built on
CoCa. With patches V, class token v, text tokens W, class token w of a picture and its caption::

    relevance of patch k    a_k = < norm(P_v V_k), norm(P_t w) >       without gradient (reconstructed: v's projection)
    L_ITC                   contrastive loss of v and w, of the whole picture
    L_IC                    caption from the rho_ic N most relevant patches
    L_TG                    pixels of the rho_m N most relevant patches, hidden in the input, from what is left and W:
                            mean absolute error over hidden patches (reconstructed: L1 as SimMIM, averaged over pixels)
    L = 1 L_ITC + 2 L_IC + 1 L_TG                                      (1 and 2 are CoCa's; the last reconstructed)

Captioning keeps the relevant patches and the reconstruction hides them: opposite ends (direction reconstructed). The
masked picture is encoded once more: masking after the encoder would leak what is hidden. The image decoder mirrors the
text decoder: bidirectional self-attention, then cross-attention to the text tokens, padding masked. It is dropped at
inference (`captioner`).

Not found in any source: masking ratios (0.5 and 0.5 here), decoder depth (that of the text decoder), optimiser.
Image tower and poolers: a class token and patches, pooler "none".
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._registry import register_architecture, register_model
from vlmkernels.models.clip import TextConfig, VisionConfig, default_heads, normalize_features
from vlmkernels.models.coca import CoCa, CoCaConfig, CrossAttentionBlock
from vlmkernels.models.training import TrainingBatch, contrastive_loss
from vlmkernels.nn.linear import Linear
from vlmkernels.nn.transformer import LayerNorm, TransformerBlock
from vlmkernels.systems import register_system

__all__ = ["ImageDecoder", "SyCoCa", "SyCoCaConfig", "attentive_mask", "patchify"]

MASKINGS = ("high", "low", "random")


@dataclass(frozen=True)
class SyCoCaConfig(CoCaConfig):
    """A whole SyCoCa: the fields of `CoCaConfig`, with pooler "none", and these.

    Attributes:
        ic_keep: Share of patches that the captioner sees; 1 = all, as CoCa.
        mim_ratio: Share of patches that are hidden and rebuilt.
        masking: Which ones both tasks pick: "high" (the most relevant to the caption), "low" or "random".
        mim_weight: Weight of the reconstruction; 0 = no image decoder pass, as CoCa.
        normalize_target: Rebuild each patch's pixels with mean 0 and deviation 1.
    """

    pooler: str = "none"
    ic_keep: float = 0.5
    mim_ratio: float = 0.5
    masking: str = "high"
    mim_weight: float = 1.0
    normalize_target: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooler != "none" or self.vision.stem != "patch":
            raise ValueError("SyCoCaConfig: needs pooler 'none' and vision.stem 'patch'")
        _check_masking(self.masking)
        for name in ("ic_keep", "mim_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"SyCoCaConfig: {name} must lie in (0, 1], got {getattr(self, name)}")


def _check_masking(mode: str) -> None:
    if mode not in MASKINGS:
        raise ValueError(f"attentive_mask: mode must be one of {list(MASKINGS)}, got {mode!r}")


@torch.no_grad()
def attentive_mask(
    patch_emb: Tensor,  # [B, N, E]
    text_emb: Tensor,  # [B, E]
    ratio: float,
    mode: str = "high",
) -> Tensor:
    """Picks `round(ratio N)` patches of each picture, at least one, by their cosine with its text.

    Args:
        patch_emb: Patches in the joint space, of any length.
        text_emb: The picture's own text.
        ratio: Share of patches.
        mode: "high" picks the most similar, "low" the least, "random" any (torch's generator draws).

    Returns:
        Bool `[B, N]`; equal patches are taken in their order. No gradient passes.

    Raises:
        ValueError: If the mode is unknown.
    """
    _check_masking(mode)
    if mode == "random":
        scores = torch.rand(patch_emb.shape[:2], device=patch_emb.device)
    else:
        scores = torch.einsum("bne,be->bn", normalize_features(patch_emb), normalize_features(text_emb))
    count = max(1, round(ratio * patch_emb.shape[1]))
    order = scores.sort(dim=1, descending=mode != "low", stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cuts images `[B, 3, S, S]` into `[B, (S/p)^2, 3 p^2]`, in the order of the patch convolution's output."""
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


class ImageDecoder(nn.Module):
    """The text decoder's mirror image: patches attend to each other, then to the text; a linear head gives pixels.

    Args:
        vision: Width, heads and patch size.
        layers: Number of layers.
        context_width: Width of the text tokens.
        act: Activation of the MLPs.
    """

    def __init__(self, vision: VisionConfig, layers: int, context_width: int, act: str) -> None:
        super().__init__()
        width = vision.width
        heads = vision.heads or default_heads("VisionConfig", width)
        self.resblocks = nn.ModuleList(TransformerBlock(width, heads, act=act) for _ in range(layers))
        self.cross_attn = nn.ModuleList(
            CrossAttentionBlock(width, heads, context_width=context_width, act=act) for _ in range(layers)
        )
        self.ln_final = LayerNorm(width)
        self.pixels = Linear(width, 3 * vision.patch_size**2)

    def forward(self, x: Tensor, text_tokens: Tensor, *, key_mask: Tensor) -> Tensor:
        """Rebuilds patches `[B, N, D] -> [B, N, 3 p^2]`; `key_mask` bool `[B, L]`, True = a word."""
        for block, cross in zip(self.resblocks, self.cross_attn, strict=True):
            x = cross(block(x), text_tokens, key_mask=key_mask)
        return self.pixels(self.ln_final(x))


class SyCoCa(CoCa):
    """CoCa with an image decoder.

    Args:
        config: What to build.
    """

    config: SyCoCaConfig

    def __init__(self, config: SyCoCaConfig) -> None:
        super().__init__(config)
        vision = config.vision
        self.mask_token = nn.Parameter(vision.width**-0.5 * torch.randn(vision.width))
        self.image_decoder = ImageDecoder(vision, config.decoder_layers, config.text.width, config.act)

    def captioner(self) -> CoCa:
        """Returns the CoCa that is left without the image decoder; weights are shared."""
        names = {spec.name for spec in fields(CoCaConfig)}
        config = CoCaConfig(**{name: getattr(self.config, name) for name in names})
        with torch.device("meta"):
            model = CoCa(config)
        shared = {
            name: value
            for name, value in self.state_dict(keep_vars=True).items()
            if name in model.state_dict()
        }
        model.load_state_dict(shared, assign=True)
        model.tokenizer_state = self.tokenizer_state
        return model.train(self.training)

    def reconstruction(
        self,
        images: Tensor,  # [B, 3, S, S]
        ids: Tensor,  # [B, L]
        masked: Tensor,  # [B, N]
        text_tokens: Tensor | None = None,  # [B, L, D]
    ) -> tuple[Tensor, Tensor]:
        """Hides patches and rebuilds them.

        Args:
            images: Normalised.
            ids: The captions; which tokens are words is read from them.
            masked: Bool, True = hidden.
            text_tokens: The unimodal half's tokens; None = computed.

        Returns:
            Predicted and true pixels of all patches, `[B, N, 3 p^2]`.
        """
        if text_tokens is None:
            _, text_tokens = self.text(ids)
        hidden = self.visual.forward_tokens(images, masked=masked, mask_token=self.mask_token)
        _, patches = self.visual.pool(hidden)
        predicted = self.image_decoder(patches, text_tokens, key_mask=ids != self.config.pad_id)
        target = patchify(images, self.config.vision.patch_size)
        if self.config.normalize_target:
            mean, deviation = target.mean(-1, keepdim=True), target.std(-1, keepdim=True)
            target = (target - mean) / (deviation + 1e-6)
        return predicted, target

    def losses(
        self,
        images: Tensor,  # [V * B, 3, S, S]
        ids: Tensor,  # [B, L]
        batch: TrainingBatch | None = None,
        *,
        ic_keep: float | None = None,
        mim_ratio: float | None = None,
        masking: str | None = None,
    ) -> dict[str, Tensor]:
        """All losses of a batch of pairs.

        Args:
            images: Normalised.
            ids: Captions.
            batch: Labels and options of the contrastive loss; None = picture b belongs to caption b.
            ic_keep: Overrides the configuration.
            mim_ratio: Overrides the configuration.
            masking: Overrides the configuration.

        Returns:
            Scalars "itc", "ic", "tgmim" and their weighted sum "loss".
        """
        config = self.config
        masking = masking or config.masking
        keep = config.ic_keep if ic_keep is None else ic_keep
        image_features, patches = self.encode_image_tokens(images)
        text_features, text_tokens = self.text(ids)
        views = len(images) // len(ids)
        captions, tokens, texts = (
            x.repeat(views, *[1] * (x.ndim - 1)) for x in (ids, text_tokens, text_features)
        )
        if batch is None:
            rows = torch.arange(len(ids), device=ids.device)
            batch = TrainingBatch(images, ids, rows.repeat(views), rows)
        itc = contrastive_loss(
            batch,
            normalize_features(image_features),
            normalize_features(text_features),
            self.logit_scale.float().exp(),
        )
        joint = (patches @ self.visual.proj).detach()
        seen = None if keep >= 1 else attentive_mask(joint, texts, keep, masking)
        ic = self.caption_loss(self.text_decoder(patches, tokens, key_mask=seen), captions)
        loss = config.contrastive_weight * itc + config.caption_weight * ic
        if config.mim_weight == 0:
            return {"loss": loss, "itc": itc, "ic": ic, "tgmim": torch.zeros_like(itc)}
        masked = attentive_mask(joint, texts, config.mim_ratio if mim_ratio is None else mim_ratio, masking)
        predicted, target = self.reconstruction(images, captions, masked, tokens)
        tgmim = (predicted - target).abs().mean(-1)[masked].mean()
        return {"loss": loss + config.mim_weight * tgmim, "itc": itc, "ic": ic, "tgmim": tgmim}

    def training_losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """`losses` of a step."""
        return self.losses(batch.images, batch.captions, batch)


CONFIGS: dict[str, SyCoCaConfig] = {
    # CoCa's base sizes of open_clip (reconstructed: the paper's own were not found)
    "sycoca-base": SyCoCaConfig(
        512, VisionConfig(224, 12, 768, 16), TextConfig(context_length=76), correct_cls_mask=True
    ),
    # Small enough to train on a CPU in minutes
    "sycoca-emoji": SyCoCaConfig(
        embed_dim=128,
        vision=VisionConfig(
            image_size=48, layers=2, width=128, patch_size=8, image_mean=(0.5,) * 3, image_std=(0.5,) * 3
        ),
        text=TextConfig(4096, 24, 128, 2),
        decoder_layers=2,
        correct_cls_mask=True,
    ),
}
CONFIGS = {name: replace(config, name=name) for name, config in CONFIGS.items()}


def _register(name: str) -> None:
    @register_model(name)
    def build(**overrides: Any) -> SyCoCa:
        return SyCoCa(CONFIGS[name].override(**overrides)).eval()


for _name in CONFIGS:
    _register(_name)
register_architecture("SyCoCa", SyCoCa, SyCoCaConfig)
register_system(
    "SyCoCa",
    "SyCoCa: Symmetrizing Contrastive Captioners with Attentive Masking for Multimodal Alignment",
    "model + pretraining objective",
)(SyCoCa)

# SPDX-License-Identifier: Apache-2.0
"""The whole generator: autoencoder, condition, denoiser and schedule; its loss, its samples.

Condition dropout replaces a sample's condition by a learned null condition, so that the network learns both halves of
classifier-free guidance. A batch draws a timestep per sample.

Shapes: images `[B, C, S, S]`; latents `[B, c, s, s]`; conditions int64 `[B]` (classes) or ids `[B, L]` (texts).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.models._checks import check_ids, check_images, require_one_of, require_positive, require_share
from vlmkernels.models._config import ModelConfig
from vlmkernels.models._registry import register_model
from vlmkernels.models.clip import TextConfig, VisionConfig
from vlmkernels.models.diffusion.autoencoder import IdentityAutoencoder, KLAutoencoder, KLAutoencoderConfig
from vlmkernels.models.diffusion.denoiser import DiT, DiTConfig
from vlmkernels.models.diffusion.schedule import KINDS, NoiseSchedule, sample
from vlmkernels.models.diffusion.unet import UNet, UNetConfig
from vlmkernels.nn.transformer import LayerNorm, Transformer

__all__ = ["ClassContext", "DiffusionConfig", "LatentDiffusion", "TextContext"]


@dataclass(frozen=True)
class DiffusionConfig(ModelConfig):
    """A latent (or pixel) diffusion model.

    Attributes:
        image_size: Side S of the images.
        channels: Channels of the images.
        denoiser: "dit" or "unet".
        dit: Sizes of the DiT; its size and channels are those of the latents.
        unet: Sizes of the U-Net, likewise.
        autoencoder: "identity" (pixels) or "kl".
        kl: Sizes of the KL autoencoder.
        pixel_scale: s of the identity autoencoder, 1 / std(pixels).
        condition: "class" or "text".
        classes: Number of classes, for "class".
        text: Sizes of the text encoder, for "text".
        schedule: "linear" (tiny images) or "scaled_linear" (Stable Diffusion).
        timesteps: T.
        prediction: "noise" or "velocity".
        condition_dropout: Share of samples that train without their condition.
        vision: Image size, mean and deviation for `vk.data.transform_for`; pixels come out in [-1, 1].
        name: Name of the configuration, for reports.
    """

    image_size: int = 8
    channels: int = 1
    denoiser: str = "dit"
    dit: DiTConfig = field(default_factory=DiTConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: str = "identity"
    kl: KLAutoencoderConfig = field(default_factory=KLAutoencoderConfig)
    pixel_scale: float = 1.0
    condition: str = "class"
    classes: int = 10
    text: TextConfig = field(
        default_factory=lambda: TextConfig(width=64, layers=2, heads=4, context_length=32)
    )
    schedule: str = "linear"
    timesteps: int = 1000
    prediction: str = "noise"
    condition_dropout: float = 0.1
    name: str = ""

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "channels", "classes", "timesteps", "pixel_scale")
        require_share(self, "condition_dropout")
        require_one_of(
            self,
            denoiser=("dit", "unet"),
            autoencoder=("identity", "kl"),
            condition=("class", "text"),
            prediction=("noise", "velocity"),
            schedule=KINDS,
        )

    @property
    def vision(self) -> VisionConfig:
        """What `vk.data.transform_for` reads: pixels from -1 to 1."""
        half = (0.5, 0.5, 0.5)
        return VisionConfig(self.image_size, patch_size=self.image_size, image_mean=half, image_std=half)

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Channels and side of the latents."""
        if self.autoencoder == "identity":
            return self.channels, self.image_size
        return self.kl.latent_channels, self.image_size // 2**self.kl.downsamplings


class ClassContext(nn.Module):
    """Classes int64 `[B]` to tokens `[B, 2, D]`: a start token and the class's; class -1 is the null condition."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, condition: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, None]:
        """Returns tokens and no mask; rows where `dropped` is True get the null condition."""
        if condition.ndim != 1 or condition.dtype != torch.int64:
            raise ValueError(
                f"ClassContext: expected classes int64 [B], got {condition.dtype} {list(condition.shape)}"
            )
        rows = torch.where(condition < 0, self.classes, condition)
        if dropped is not None:
            rows = torch.where(dropped, self.classes, rows)
        token = self.table(rows)
        return torch.stack([self.start.to(token.dtype).expand_as(token), token], dim=1), None

    def null(self, count: int) -> Tensor:
        """The null condition for `count` samples."""
        return torch.full((count,), -1, device=self.start.device)


class TextContext(nn.Module):
    """Token ids `[B, L]` to encoded tokens `[B, L, D]` and their mask; the row of one 0 is the null condition.

    Words attend to each other in both directions; what follows the end token (the largest id) is masked.
    """

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(config.context_length, config.width))
        self.transformer = Transformer(
            config.width, config.layers, config.heads or max(1, config.width // 64)
        )
        self.ln_final = LayerNorm(config.width)
        self.proj = nn.Linear(config.width, width)
        self.null_token = nn.Parameter(0.02 * torch.randn(width))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, condition: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns tokens and their mask; rows where `dropped` is True get the null token alone."""
        check_ids("TextContext", condition, self.config.context_length)
        end = condition.argmax(dim=-1, keepdim=True)
        mask = torch.arange(condition.shape[1], device=condition.device) <= end
        x = self.token_embedding(condition) + self.positional_embedding[: condition.shape[1]]
        x = self.proj(self.ln_final(self.transformer(x, key_mask=mask)))
        null = (condition == 0).all(-1)
        if dropped is not None:
            null = null | dropped
        first = torch.arange(condition.shape[1], device=condition.device) == 0
        x = torch.where((null.unsqueeze(-1) & first).unsqueeze(-1), self.null_token.to(x.dtype), x)
        return x, torch.where(null.unsqueeze(-1), first, mask)

    def null(self, count: int) -> Tensor:
        """The null condition for `count` samples."""
        return torch.zeros(count, 1, dtype=torch.int64, device=self.null_token.device)


class LatentDiffusion(nn.Module):
    """Autoencoder, condition, denoiser and schedule.

    Args:
        config: What to build.

    Attributes:
        config: The configuration it was built from.

    Example:
        >>> import torch, vlmkernels as vk
        >>> model = vk.models.create("diffusion-digits")
        >>> model.sample(torch.tensor([3, 7]), steps=2).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(self, config: DiffusionConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DiffusionConfig()
        self.tokenizer_state: dict[str, Any] | None = None
        channels, size = config.latent_shape
        self.schedule = NoiseSchedule(config.schedule, config.timesteps)
        if config.autoencoder == "identity":
            self.autoencoder: IdentityAutoencoder | KLAutoencoder = IdentityAutoencoder(config.pixel_scale)
        else:
            self.autoencoder = KLAutoencoder(config.kl.override(channels=config.channels))
            self.autoencoder.requires_grad_(False)  # trained by itself, before
        sizes = {"channels": channels, "size": size}
        if config.denoiser == "dit":
            dit = config.dit.override(**sizes)
            self.denoiser: DiT | UNet = DiT(dit)
            width = dit.context_width or dit.width
        else:
            unet = config.unet.override(**sizes)
            self.denoiser = UNet(unet)
            width = unet.context_width or unet.width
        if config.condition == "class":
            self.context: ClassContext | TextContext = ClassContext(config.classes, width)
        else:
            self.context = TextContext(config.text, width)

    def encode(self, images: Tensor, *, draw: bool = False) -> Tensor:
        """Returns latents of images `[B, C, S, S]`: the posterior's mean, or a draw from it."""
        check_images("LatentDiffusion.encode", images, self.config.image_size, self.config.channels)
        with torch.no_grad():
            return self.autoencoder.encode(images, sample=draw)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns images of latents."""
        return self.autoencoder.decode(latents)

    def predict_noise(
        self, z_t: Tensor, t: Tensor, context: Tensor, context_mask: Tensor | None = None
    ) -> Tensor:
        """Returns the predicted noise, whatever the network predicts."""
        out = self.denoiser(z_t, t, context, context_mask).to(z_t.dtype)
        return out if self.config.prediction == "noise" else self.schedule.noise_from_velocity(z_t, t, out)

    def forward(
        self,
        images: Tensor,  # [B, C, S, S]
        condition: Tensor,  # [B] or [B, L]
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The denoising loss of a batch, the mean of `(prediction - target)^2` over every element.

        Args:
            images: In the range of training.
            condition: Classes or ids.
            t: int64 `[B]`; None = drawn uniformly, one per sample.
            noise: Shaped as the latents; None = drawn.
            dropped: Bool `[B]`, samples without condition; None = drawn in training, none in evaluation.

        Returns:
            `{"loss": scalar}`.
        """
        z = self.encode(images, draw=True)
        if t is None:
            t = torch.randint(self.config.timesteps, (len(z),), device=z.device)
        if noise is None:
            noise = torch.randn_like(z)
        if dropped is None and self.training:
            dropped = torch.rand(len(z), device=z.device) < self.config.condition_dropout
        context, mask = self.context(condition, dropped)
        z_t = self.schedule.add_noise(z, t, noise)
        target = noise if self.config.prediction == "noise" else self.schedule.velocity(z, t, noise)
        out = self.denoiser(z_t, t, context, mask)
        return {"loss": (out.float() - target.float()).square().mean()}

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        *,
        steps: int = 50,
        guidance: float = 2.0,
        eta: float = 0.0,
        clamp: float | None = None,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Draws images for conditions; see `vlmkernels.models.diffusion.sample`.

        Args:
            condition: Classes `[B]` or ids `[B, L]`.
            steps: DDIM steps.
            guidance: w.
            eta: 0 deterministic, 1 as DDPM.
            clamp: Limit of the predicted latents' magnitude.
            generator: A CPU generator.
            start: Noise to start from.

        Returns:
            Images `[B, C, S, S]`.
        """
        context, mask = self.context(condition)
        null, null_mask = self.context(self.context.null(len(condition)))
        if null.shape[1] < context.shape[1]:  # one call for both halves needs one length
            pad = context.shape[1] - null.shape[1]
            null = torch.cat([null, null.new_zeros(len(null), pad, null.shape[2])], dim=1)
            null_mask = torch.cat([null_mask, null_mask.new_zeros(len(null), pad)], dim=1)
        channels, size = self.config.latent_shape
        latents = sample(
            self.predict_noise,
            self.schedule,
            (len(condition), channels, size, size),
            context,
            null,
            steps=steps,
            guidance=guidance,
            eta=eta,
            clamp=clamp,
            generator=generator,
            start=start,
            context_mask=mask,
            null_mask=null_mask,
        )
        return self.decode(latents)


CONFIG_DIGITS = DiffusionConfig(name="diffusion-digits")
CONFIG_EMOJI = DiffusionConfig(
    image_size=32,
    channels=3,
    dit=DiTConfig(patch_size=4, width=128, layers=4, heads=4),
    pixel_scale=1.6,
    classes=10,
    name="diffusion-emoji",
)
CONFIG_LATENT = DiffusionConfig(
    image_size=256,
    channels=3,
    dit=DiTConfig(patch_size=2, width=384, layers=12, heads=6),
    autoencoder="kl",
    kl=KLAutoencoderConfig(width=64, downsamplings=3),
    condition="text",
    text=TextConfig(),
    schedule="scaled_linear",
    name="diffusion-latent-256",
)


@register_model("diffusion-digits")
def _digits(**overrides: Any) -> LatentDiffusion:
    """The measured model on 8 x 8 digits: 377k parameters, 4 blocks of width 64."""
    return LatentDiffusion(CONFIG_DIGITS.override(**overrides))


@register_model("diffusion-emoji")
def _emoji(**overrides: Any) -> LatentDiffusion:
    return LatentDiffusion(CONFIG_EMOJI.override(**overrides))


@register_model("diffusion-latent-256")
def _latent(**overrides: Any) -> LatentDiffusion:
    return LatentDiffusion(CONFIG_LATENT.override(**overrides))

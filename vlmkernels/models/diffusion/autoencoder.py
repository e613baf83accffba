# SPDX-License-Identifier: Apache-2.0
"""What lies between pixels and latents: the identity, and a small convolutional autoencoder with a KL penalty."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._checks import require_positive
from vlmkernels.models._config import ModelConfig

__all__ = ["IdentityAutoencoder", "KLAutoencoder", "KLAutoencoderConfig"]

_MAX_LOG_VARIANCE = 20.0


class IdentityAutoencoder(nn.Module):
    """Latents are the pixels times `scale`: for digits and small emoji.

    Args:
        scale: s = 1 / std(pixels), so that latents have unit variance.
    """

    factor = 1

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Returns latents; there is nothing to sample."""
        return self.scale * images

    def decode(self, latents: Tensor) -> Tensor:
        """Returns pixels."""
        return latents / self.scale


@dataclass(frozen=True)
class KLAutoencoderConfig(ModelConfig):
    """Sizes of a `KLAutoencoder`.

    Attributes:
        channels: Channels of the images.
        latent_channels: Channels of the latents.
        width: Channels of the first block; each further block doubles them.
        downsamplings: Halvings of the side: 2 = a factor of 4, 3 = a factor of 8.
        scale: s, multiplies the latents: 0.18215 in Stable Diffusion 1 and 2, 0.13025 in SDXL (reconstructed); chosen
            so that their deviation is 1 (`calibrate`).
        kl_weight: Weight of the KL term.
    """

    channels: int = 3
    latent_channels: int = 4
    width: int = 32
    downsamplings: int = 2
    scale: float = 0.18215
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        require_positive(self, "channels", "latent_channels", "width", "downsamplings", "scale")


class _Residual(nn.Module):
    """`x + conv(act(norm(conv(act(norm(x))))))`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.GroupNorm(min(8, channels), channels),
            nn.GroupNorm(min(8, channels), channels),
        )
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class KLAutoencoder(nn.Module):
    """Convolutional variational autoencoder, `[B, C, S, S]` to latents `[B, 4, S / f, S / f]`.

    The loss is `L1 + 1e-6 KL` (reconstructed).

    Args:
        config: Sizes.
    """

    scale: Tensor

    def __init__(self, config: KLAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = 2**config.downsamplings
        self.register_buffer("scale", torch.tensor(config.scale))
        width = config.width
        encoder: list[nn.Module] = [nn.Conv2d(config.channels, width, 3, padding=1)]
        for level in range(config.downsamplings):
            inner = width * 2**level
            encoder += [_Residual(inner), nn.Conv2d(inner, 2 * inner, 3, stride=2, padding=1)]
        top = width * self.factor
        encoder += [
            _Residual(top),
            nn.GroupNorm(8, top),
            nn.SiLU(),
            nn.Conv2d(top, 2 * config.latent_channels, 1),
        ]
        self.encoder = nn.Sequential(*encoder)
        decoder: list[nn.Module] = [nn.Conv2d(config.latent_channels, top, 3, padding=1), _Residual(top)]
        for level in reversed(range(config.downsamplings)):
            inner = width * 2**level
            decoder += [
                nn.Upsample(scale_factor=2, mode="nearest"),
                nn.Conv2d(2 * inner, inner, 3, padding=1),
            ]
            decoder += [_Residual(inner)]
        decoder += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, config.channels, 3, padding=1)]
        self.decoder = nn.Sequential(*decoder)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance of the unscaled latents."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, _MAX_LOG_VARIANCE)

    def encode(
        self, images: Tensor, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Returns scaled latents: a draw from the posterior in training, its mean for a classifier."""
        mean, log_variance = self.posterior(images)
        if sample:
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            mean = mean + (0.5 * log_variance).exp() * noise
        return self.scale * mean

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images of scaled latents."""
        return self.decoder(latents / self.scale)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns `loss`, `l1`, `kl` (mean over latent elements) and `reconstruction` of a batch."""
        mean, log_variance = self.posterior(images)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        reconstruction = self.decoder(latents)
        l1 = (reconstruction - images).abs().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return {"loss": l1 + self.config.kl_weight * kl, "l1": l1, "kl": kl, "reconstruction": reconstruction}

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> float:
        """Sets `scale` so that latents of these images have unit deviation, and returns it."""
        self.scale.copy_(1 / self.posterior(images)[0].std())
        return float(self.scale)

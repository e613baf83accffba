# SPDX-License-Identifier: Apache-2.0
"""A small latent diffusion model: schedule, sampler, denoisers, autoencoders, the generator. Names only."""

from vlmkernels.models.diffusion.autoencoder import IdentityAutoencoder, KLAutoencoder, KLAutoencoderConfig
from vlmkernels.models.diffusion.denoiser import DiT, DiTConfig
from vlmkernels.models.diffusion.latent import ClassContext, DiffusionConfig, LatentDiffusion, TextContext
from vlmkernels.models.diffusion.schedule import NoiseSchedule, guided, sample
from vlmkernels.models.diffusion.unet import UNet, UNetConfig

__all__ = [
    "ClassContext",
    "DiT",
    "DiTConfig",
    "DiffusionConfig",
    "IdentityAutoencoder",
    "KLAutoencoder",
    "KLAutoencoderConfig",
    "LatentDiffusion",
    "NoiseSchedule",
    "TextContext",
    "UNet",
    "UNetConfig",
    "guided",
    "sample",
]

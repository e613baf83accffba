# SPDX-License-Identifier: Apache-2.0
"""The noise schedule, the DDIM step, classifier-free guidance and the sampler. No networks here.

Ho et al., "Denoising Diffusion Probabilistic Models" (2020); Song et al., "Denoising Diffusion Implicit Models" (2021);
Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022). Standard formulas (reconstructed).

Notation: `z` data (latents or pixels), `e` noise, `z_t = sqrt(abar_t) z + sqrt(1 - abar_t) e`, t = 0 .. T - 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "NoiseSchedule", "guided", "sample"]

KINDS = ("scaled_linear", "linear")


class NoiseSchedule(nn.Module):
    """Betas and their cumulative products.

    "scaled_linear" is `linspace(sqrt(0.00085), sqrt(0.012), T)^2`, of the Stable Diffusion family; "linear" is
    `linspace(1e-4, 0.02, T)`, better for tiny images: it ends at abar = 4.0e-5 instead of 4.7e-3, so that samples that
    start from pure noise are not biased by what the last step leaves of the data.

    Args:
        kind: "scaled_linear" or "linear".
        steps: T.

    Attributes:
        betas: float32 `[T]`.
        alphas_cumprod: abar, float32 `[T]` (products taken in float64).

    Raises:
        ValueError: If the kind is unknown or steps is not positive.

    Example:
        >>> schedule = NoiseSchedule("scaled_linear")
        >>> round(float(schedule.alphas_cumprod[499]), 5)
        0.27767
    """

    betas: Tensor
    alphas_cumprod: Tensor

    def __init__(self, kind: str = "linear", steps: int = 1000) -> None:
        super().__init__()
        if kind not in KINDS or steps < 1:
            raise ValueError(
                f"NoiseSchedule: expected a kind of {KINDS} and steps > 0, got {kind!r} and {steps}"
            )
        self.kind, self.steps = kind, steps
        if kind == "linear":
            betas = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
        else:
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64).square()
        # Not saved: a checkpoint holds the kind, and stays loadable where T changes.
        self.register_buffer("betas", betas.float(), persistent=False)
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float(), persistent=False)

    def abar(self, t: Tensor | int, like: Tensor) -> Tensor:
        """abar at t, shaped to broadcast against `like`; t = -1 is the data itself, abar = 1."""
        t = torch.as_tensor(t, device=like.device)
        value = torch.where(t < 0, 1.0, self.alphas_cumprod.to(like.device)[t.clamp(min=0)]).to(like.dtype)
        return value.view(-1, *[1] * (like.ndim - 1)) if value.ndim else value

    def add_noise(self, z: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:  # [B, ...], [B], [B, ...]
        """`sqrt(abar_t) z + sqrt(1 - abar_t) e`."""
        abar = self.abar(t, z)
        return abar.sqrt() * z + (1 - abar).sqrt() * noise

    def predict_data(self, z_t: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """The data that `add_noise` would have turned into z_t with this noise."""
        abar = self.abar(t, z_t)
        return (z_t - (1 - abar).sqrt() * noise) / abar.sqrt()

    def predict_noise(self, z_t: Tensor, t: Tensor | int, z: Tensor) -> Tensor:
        """The noise that leads from z to z_t."""
        abar = self.abar(t, z_t)
        return (z_t - abar.sqrt() * z) / (1 - abar).sqrt()

    def velocity(self, z: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """The target of v-prediction, `sqrt(abar_t) e - sqrt(1 - abar_t) z` (Salimans and Ho 2022)."""
        abar = self.abar(t, z)
        return abar.sqrt() * noise - (1 - abar).sqrt() * z

    def noise_from_velocity(self, z_t: Tensor, t: Tensor | int, v: Tensor) -> Tensor:
        """`e = sqrt(abar_t) v + sqrt(1 - abar_t) z_t`."""
        abar = self.abar(t, z_t)
        return abar.sqrt() * v + (1 - abar).sqrt() * z_t

    def posterior(self, z: Tensor, z_t: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Mean and variance of `q(z_{t-1} | z_t, z)` (Ho et al. 2020, equation 7); the variance broadcasts."""
        t = torch.as_tensor(t, device=z.device)
        abar, before = self.abar(t, z), self.abar(t - 1, z)
        beta = 1 - abar / before
        mean = before.sqrt() * beta / (1 - abar) * z + (1 - beta).sqrt() * (1 - before) / (1 - abar) * z_t
        return mean, (1 - before) / (1 - abar) * beta

    def timesteps(self, steps: int) -> list[int]:
        """Evenly spaced indices from T - 1 to 0.

        Raises:
            ValueError: If steps is not in [1, T].
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"NoiseSchedule.timesteps: steps must lie in [1, {self.steps}], got {steps}")
        return torch.linspace(self.steps - 1, 0, steps, dtype=torch.float64).round().long().tolist()

    def ddim_step(
        self,
        z_t: Tensor,
        noise: Tensor,
        t: int,
        s: int,
        *,
        eta: float = 0.0,
        fresh: Tensor | None = None,
        clamp: float | None = None,
    ) -> Tensor:
        """One step from t to an earlier s (Song et al. 2021, equation 12); s = -1 gives the data.

        Args:
            z_t: State at t.
            noise: Predicted noise.
            t: From.
            s: To, smaller than t.
            eta: 0 deterministic, 1 the DDPM posterior's variance.
            fresh: Noise for eta > 0, shaped as z_t.
            clamp: Limit of the predicted data's magnitude; the noise is then recomputed from what was clamped.

        Raises:
            ValueError: If s is not smaller than t, or eta > 0 comes without fresh noise.
        """
        if s >= t or (eta > 0 and fresh is None):
            raise ValueError(
                f"NoiseSchedule.ddim_step: expected s < t, and fresh noise where eta > 0, got t {t}, s {s}, eta {eta}"
            )
        data = self.predict_data(z_t, t, noise)
        if clamp is not None:
            data = data.clamp(-clamp, clamp)
            noise = self.predict_noise(z_t, t, data)
        now, then = self.abar(t, z_t), self.abar(s, z_t)
        sigma = eta * ((1 - then) / (1 - now)).sqrt() * (1 - now / then).sqrt()
        out = then.sqrt() * data + (1 - then - sigma.square()).clamp(min=0).sqrt() * noise
        return out if fresh is None else out + sigma * fresh


def guided(
    predict: Callable[..., Tensor],
    z_t: Tensor,
    t: Tensor,
    context: Tensor,
    null_context: Tensor | None,
    guidance: float,
    **masks: Tensor | None,
) -> Tensor:
    """Classifier-free guidance, `e_null + w (e_c - e_null)`, both halves in one call.

    Args:
        predict: `predict(z_t, t, context, context_mask=)` to predicted noise.
        z_t: `[B, ...]`.
        t: int64 `[B]`.
        context: Condition, `[B, L, D]`.
        null_context: The empty condition, `[B, L, D]`; None is allowed where guidance is 1.
        guidance: w; 1 = conditional, 0 = unconditional, and then one half is computed.
        **masks: `context_mask` and `null_mask`, bool `[B, L]`, True = a token to attend to.

    Returns:
        The guided noise, `[B, ...]`.
    """
    mask, null_mask = masks.get("context_mask"), masks.get("null_mask")
    if guidance == 1.0:
        return predict(z_t, t, context, context_mask=mask)
    if null_context is None:
        raise ValueError(f"guided: guidance {guidance} needs a null context")
    if guidance == 0.0:
        return predict(z_t, t, null_context, context_mask=null_mask)
    both_masks = None
    if mask is not None or null_mask is not None:
        filled = (
            torch.ones(c.shape[:2], dtype=torch.bool, device=c.device) if m is None else m
            for c, m in ((null_context, null_mask), (context, mask))
        )
        both_masks = torch.cat(list(filled))
    noise = predict(
        torch.cat([z_t, z_t]), torch.cat([t, t]), torch.cat([null_context, context]), context_mask=both_masks
    )
    null, conditional = noise.chunk(2)
    return null + guidance * (conditional - null)


@torch.no_grad()
def sample(
    predict: Callable[..., Tensor],
    schedule: NoiseSchedule,
    shape: tuple[int, ...],
    context: Tensor,
    null_context: Tensor | None = None,
    *,
    steps: int = 50,
    guidance: float = 2.0,
    eta: float = 0.0,
    clamp: float | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    **masks: Tensor | None,
) -> Tensor:
    """Draws samples by DDIM.

    Args:
        predict: See `guided`.
        schedule: The noise schedule that the network was trained with.
        shape: Of the samples, `[B, ...]`.
        context: Condition, `[B, L, D]`.
        null_context: The empty condition.
        steps: Number of DDIM steps.
        guidance: See `guided`.
        eta: See `NoiseSchedule.ddim_step`.
        clamp: See `NoiseSchedule.ddim_step`.
        generator: A CPU generator; the same state gives the same samples on every device.
        start: The noise to start from, instead of drawing it.
        **masks: See `guided`.

    Returns:
        Samples in the space of the data that the network was trained on.

    Raises:
        ValueError: If shapes do not fit or steps is out of range.
    """
    if len(context) != shape[0] or (start is not None and tuple(start.shape) != tuple(shape)):
        raise ValueError(
            f"sample: expected one context a sample and start of shape {list(shape)}, got {list(context.shape)}"
            f"{'' if start is None else f' and {list(start.shape)}'}"
        )
    device = context.device

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    z = draw() if start is None else start.to(device)
    grid = schedule.timesteps(steps)
    for t, s in zip(grid, [*grid[1:], -1], strict=True):
        now = torch.full((shape[0],), t, device=device)
        noise = guided(predict, z, now, context, null_context, guidance, **masks)
        fresh = draw() if eta > 0 else None
        z = schedule.ddim_step(z, noise, t, s, eta=eta, fresh=fresh, clamp=clamp)
    return z

# SPDX-License-Identifier: Apache-2.0
"""Diffusion Classifier: zero-shot classification with a conditional diffusion model, without training.

Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier" (2023); timesteps, stages and noise as in the
authors' code. Noise is added to the image, the network predicts it under each candidate prompt, and the prompt with
the smallest mean error wins: by the variational bound this approximates `argmax_c log p(x | c)`. Candidates are pruned
in stages.

    e(c, t, noise) = mean d(noise, eps(sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, t, c))

One noise tensor per evaluated timestep, the same for all prompts (and images): differing noise destroys accuracy. No
guidance, uniform weights over t. `x0` is the posterior *mean* of the autoencoder times its scale, in [-1, 1] before.
Winoground figures compare p(x | c) of different images, which is why image and group scores are poor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.models.diffusion.latent import LatentDiffusion
from vlmkernels.models.diffusion.schedule import NoiseSchedule
from vlmkernels.systems import register_system

__all__ = ["STAGES", "DiffusionClassifier", "stage_timesteps", "winoground"]

_LOSSES = ("l1", "l2", "huber", "kl", "l2+kl")

#: The commands of the paper's repository: samples per stage, prompts kept, loss.
STAGES: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
    "cifar10": ((50, 500), (5, 1), "l1"),
    "pets": ((25, 250), (5, 1), "l1"),
    "stl10": ((100, 500), (5, 1), "l1"),
    "food": ((20, 50, 100, 500), (20, 10, 5, 1), "l2"),
    "aircraft": ((20, 50, 100, 500), (20, 10, 5, 1), "l2"),
    "flowers": ((20, 50, 100, 500), (20, 10, 5, 1), "l1"),
    "imagenet": ((50, 100, 500, 1000), (500, 50, 10, 1), "l2"),
    "objectnet": ((50, 100, 500, 1000), (25, 10, 5, 1), "l2"),
}


def stage_timesteps(n_samples: Sequence[int], steps: int = 1000) -> list[list[int]]:
    """The timesteps that each stage evaluates anew.

    The grid has m = max(n_samples) values from T // m // 2 in steps of T // m; stage n takes `[len // n // 2 ::
    len // n][:n]` of it, less those done before. Stages are not nested for every grid: with m = 1000 those of 50 and
    100 are disjoint, and stage 2 ends with 150 timesteps.

    Args:
        n_samples: Timesteps per stage.
        steps: T.

    Raises:
        ValueError: If a stage has no timesteps or more than T.

    Example:
        >>> first, second = stage_timesteps([50, 500])
        >>> first[:3], len(second), second[:3]
        ([11, 31, 51], 450, [1, 3, 5])
    """
    if not n_samples or min(n_samples) < 1 or max(n_samples) > steps:
        raise ValueError(f"stage_timesteps: expected stages of 1 to {steps} timesteps, got {list(n_samples)}")
    most = max(n_samples)
    step = steps // most
    grid = list(range(step // 2, steps, step))[:most]
    done: set[int] = set()
    stages = []
    for n in n_samples:
        stride = len(grid) // n
        new = [t for t in grid[stride // 2 :: stride][:n] if t not in done]
        done.update(new)
        stages.append(new)
    return stages


@register_system(
    "Diffusion Classifier",
    "Your Diffusion Model is Secretly a Zero-Shot Classifier",
    "zero-shot inference method",
)
class DiffusionClassifier:
    """Classifies by denoising errors.

    Args:
        denoiser: `denoiser(x_t [B, ...], t int64 [B], conditions [B, ...])` to predicted noise `[B, ...]`; with "kl"
            it may give twice the channels, the second half interpolating the log-variance between the posterior's and
            beta (Nichol and Dhariwal 2021). Or a `LatentDiffusion`.
        schedule: A `NoiseSchedule`; None = the model's own.
        loss: "l1", "l2", "huber", or of class-conditional models "kl" (bits between the true posterior and the
            model's) and "l2+kl".
        batch_size: Rows per call of the denoiser.

    Raises:
        ValueError: If the loss is unknown or the schedule missing.
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, Tensor, Tensor], Tensor] | LatentDiffusion,
        schedule: NoiseSchedule | None = None,
        *,
        loss: str = "l2",
        batch_size: int = 512,
    ) -> None:
        if loss not in _LOSSES:
            raise ValueError(f"DiffusionClassifier: loss must be one of {list(_LOSSES)}, got {loss!r}")
        if isinstance(denoiser, LatentDiffusion):
            model = denoiser
            schedule = model.schedule if schedule is None else schedule

            def denoise(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
                context, mask = model.context(condition)
                return model.predict_noise(x_t, t, context, mask)

            self.denoise: Callable[[Tensor, Tensor, Tensor], Tensor] = denoise
        else:
            self.denoise = denoiser
        if schedule is None:
            raise ValueError("DiffusionClassifier: a schedule must be given with a plain denoiser")
        self.schedule, self.loss, self.batch_size = schedule, loss, batch_size

    def _distance(self, x0: Tensor, x_t: Tensor, t: int, noise: Tensor, out: Tensor) -> Tensor:
        """Mean error per row, `[B]`."""
        predicted, variance_part = out, None
        if out.shape[1] == 2 * x_t.shape[1] and out.shape[2:] == x_t.shape[2:]:
            predicted, variance_part = out.chunk(2, dim=1)
        predicted = predicted.float()
        if self.loss == "l1":
            distance = (predicted - noise).abs()
        elif self.loss == "huber":
            distance = F.huber_loss(predicted, noise.expand_as(predicted), reduction="none")
        else:
            distance = (predicted - noise).square()
        if "kl" in self.loss:
            kl = self._divergence(x0, x_t, t, predicted, variance_part)
            distance = kl if self.loss == "kl" else distance + kl
        return distance.flatten(1).mean(1)

    def _divergence(
        self, x0: Tensor, x_t: Tensor, t: int, predicted: Tensor, variance_part: Tensor | None
    ) -> Tensor:
        """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) per element, in bits."""
        mean, variance = self.schedule.posterior(x0, x_t, t)
        model_mean, _ = self.schedule.posterior(self.schedule.predict_data(x_t, t, predicted), x_t, t)
        # The first step's posterior has no variance; the next one's stands in, as in the DDPM code.
        least = self.schedule.posterior(x0, x_t, 1)[1] if t == 0 else variance
        log_variance = least.log()
        model_log_variance = log_variance
        if variance_part is not None:
            share = (variance_part.float() + 1) / 2
            model_log_variance = share * self.schedule.betas[t].log() + (1 - share) * log_variance
        ratio = log_variance - model_log_variance
        squares = (mean - model_mean).square() * (-model_log_variance).exp()
        return 0.5 * (ratio.exp() - 1 - ratio + squares) / math.log(2.0)

    @torch.no_grad()
    def errors(
        self, x0: Tensor, conditions: Tensor, active: Tensor, timesteps: Sequence[int], noise: Tensor
    ) -> Tensor:
        """Mean errors of some prompts at some timesteps.

        Args:
            x0: `[N, ...]`, as the denoiser was trained on.
            conditions: `[P, ...]`.
            active: int64 `[N, A]`, which prompts each image is tried with.
            timesteps: K of them.
            noise: `[K, ...]`, one tensor per timestep, shared by all prompts.

        Returns:
            float32 `[N, A, K]`.
        """
        count, prompts = active.shape
        out = torch.empty(count, prompts, len(timesteps))
        images = torch.arange(count).repeat_interleave(prompts)
        flat = active.flatten()
        for k, t in enumerate(timesteps):
            parts = []
            for rows in torch.arange(len(flat)).split(self.batch_size):
                data = x0[images[rows]]
                x_t = self.schedule.add_noise(data, t, noise[k])
                now = torch.full((len(rows),), t, device=x0.device)
                predicted = self.denoise(x_t, now, conditions[flat[rows]])
                parts.append(self._distance(data, x_t, t, noise[k], predicted).cpu())
            out[..., k] = torch.cat(parts).view(count, prompts)
        return out

    def classify(
        self,
        x0: Tensor,  # [N, ...]
        conditions: Tensor,  # [P, ...]
        n_samples: Sequence[int] = (50, 500),
        keep: Sequence[int] = (5, 1),
        *,
        class_index: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Classifies images, pruning prompts in stages.

        Args:
            x0: Latents (posterior means, scaled) or pixels, `[N, ...]`.
            conditions: One row per prompt, `[P, ...]`.
            n_samples: Timesteps per stage (see `stage_timesteps`); `STAGES` has the paper's.
            keep: Prompts kept after each stage; the last is 1. Prompts are pruned, not classes.
            class_index: int64 `[P]`, the class of every prompt; None = each prompt its own.
            generator: A CPU generator for the noise.
            noise: `[K, ...]` for all K timesteps in the order of evaluation, instead of drawing it.

        Returns:
            Classes int64 `[N]`, and float32 `[N, P]`, each prompt's mean error over the timesteps it was tried at.
            Equal errors go to the lower prompt.

        Raises:
            ValueError: If stages and keep do not fit.
        """
        if len(n_samples) != len(keep) or not len(keep) or keep[-1] != 1 or min(keep) < 1:
            raise ValueError(
                "DiffusionClassifier.classify: keep must have a positive number per stage and end with 1, got "
                f"n_samples {list(n_samples)} and keep {list(keep)}"
            )
        count, prompts = len(x0), len(conditions)
        if prompts < 1 or (class_index is not None and class_index.shape != (prompts,)):
            raise ValueError(
                f"DiffusionClassifier.classify: class_index must be [{prompts}], one per prompt, got "
                f"{None if class_index is None else list(class_index.shape)}"
            )
        stages = stage_timesteps(n_samples, self.schedule.steps)
        total = sum(map(len, stages))
        if noise is None:
            noise = torch.randn(total, *x0.shape[1:], generator=generator)
        if len(noise) < total:
            raise ValueError(
                f"DiffusionClassifier.classify: noise must have {total} rows, one per timestep, got {len(noise)}"
            )
        noise = noise.to(x0)
        sums = torch.zeros(count, prompts, dtype=torch.float64)
        tried = torch.zeros(count, prompts)
        active = torch.arange(prompts).expand(count, -1)
        used = 0
        for timesteps, kept in zip(stages, keep, strict=True):
            found = self.errors(x0, conditions, active, timesteps, noise[used : used + len(timesteps)])
            used += len(timesteps)
            sums.scatter_add_(1, active, found.sum(-1, dtype=torch.float64))
            tried.scatter_add_(1, active, torch.full_like(active, len(timesteps), dtype=torch.float32))
            means = sums.gather(1, active) / tried.gather(1, active)
            best = means.argsort(dim=1, stable=True)[:, :kept]
            # In the order of prompts, so that equal errors stay with the lower one in the next stage, too.
            active = active.gather(1, best).sort(dim=1).values
        winner = active[:, 0]
        errors = (sums / tried).float()
        return (winner if class_index is None else class_index.cpu()[winner]), errors

    def pair_scores(
        self,
        x0: Tensor,  # [I, ...]
        conditions: Tensor,  # [C, ...]
        *,
        interval: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scores `[I, C]` of every image with every caption: minus the mean error over every `interval`-th timestep."""
        timesteps = list(range(interval // 2, self.schedule.steps, interval))
        noise = torch.randn(len(timesteps), *x0.shape[1:], generator=generator).to(x0)
        active = torch.arange(len(conditions)).expand(len(x0), -1)
        return -self.errors(x0, conditions, active, timesteps, noise).mean(-1)


def winoground(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [..., 2, 2]
    """Winoground's three outcomes of scores `[..., image, caption]`, whose pairs lie on the diagonal.

    Returns:
        Bool `(text, image, group)`: each image prefers its caption; each caption its image; both.
    """
    own = scores.diagonal(dim1=-2, dim2=-1)
    other_caption = scores.flip(-1).diagonal(dim1=-2, dim2=-1)
    other_image = scores.flip(-2).diagonal(dim1=-2, dim2=-1)
    text, image = (own > other_caption).all(-1), (own > other_image).all(-1)
    return text, image, text & image

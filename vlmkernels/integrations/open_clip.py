# SPDX-License-Identifier: Apache-2.0
"""open_clip: its losses on ours, and which of its modules `convert` routes to our attention.

The losses take what open_clip's take, by position and by name, so a training script changes one import. They
need no open_clip.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.ops.contrastive import clip_loss, linear_cross_entropy, siglip_loss

__all__ = ["CaptionHead", "ClipLoss", "CoCaLoss", "SigLipLoss", "is_attention", "why_not"]


class _Distributed(nn.Module):
    """What the losses share: the group whose batches make up one problem."""

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.rank = rank
        self.world_size = world_size
        self.group = group

    def _group(self) -> Any:
        if self.world_size == 1 and self.group is None:
            return None
        where = f"vk.integrations.open_clip.{type(self).__name__}"
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                f"{where}: world_size is {self.world_size}, but torch.distributed is not initialised"
            )
        group = dist.group.WORLD if self.group is None else self.group
        size = dist.get_world_size(group)
        if size != self.world_size:
            raise ValueError(
                f"{where}: world_size must be the number of ranks in the group, {size}, got {self.world_size}"
            )
        return group

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}"


class ClipLoss(_Distributed):
    """open_clip's `ClipLoss` on `vk.clip_loss`: the logits are never written.

    With several processes the value is that of the whole batch on every rank, and gradients are those of
    `gather_with_grad=True`: after DDP's averaging they equal one process's. open_clip with
    `gather_with_grad=False` divides the features' gradients by the number of ranks, and with `local_loss=True`
    returns the loss of the rank's own rows; both options are accepted and change nothing here.

    Args:
        local_loss: accepted; no rank forms the whole matrix either way.
        gather_with_grad: accepted; gradients are always complete.
        cache_labels: accepted; there are no labels to cache.
        rank: accepted; the group knows it.
        world_size: the number of ranks; with more than 1, the batch is that of all of them.
        use_horovod: must be False.
        group: a `torch.distributed` process group; None: the default one where `world_size` exceeds 1.

    Raises:
        NotImplementedError: `use_horovod`; in a call, where `vk.clip_loss` does not serve groups.
        ValueError: in a call, where `world_size` is not that of the group.

    Example:
        >>> loss = vk.integrations.open_clip.ClipLoss()
        >>> features = torch.eye(4)
        >>> loss(features, features, torch.tensor(100.0), output_dict=True)["contrastive_loss"].item() < 1e-6
        True
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(rank, world_size, group)
        if use_horovod:
            raise NotImplementedError(
                f"vk.integrations.open_clip.{type(self).__name__}: use_horovod is not served; use "
                "torch.distributed"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The scalar loss, or `{"contrastive_loss": loss}` with `output_dict`."""
        loss = clip_loss(
            image_features, text_features, logit_scale, logit_bias=logit_bias, group=self._group()
        )
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_Distributed):
    """open_clip's `SigLipLoss` on `vk.siglip_loss`.

    With several processes the value is that of the whole batch on every rank (open_clip: the rank's own
    images against all texts, which averages to it); gradients after DDP's averaging are the same.

    Args:
        cache_labels: accepted; there are no labels to cache.
        rank: accepted; the group knows it.
        world_size: the number of ranks; with more than 1, the batch is that of all of them.
        dist_impl: None, "bidir", "shift", "reduce" or "gather"; accepted, the group's communication is ours.
        group: a `torch.distributed` process group; None: the default one where `world_size` exceeds 1.

    Raises:
        ValueError: another `dist_impl`; in a call, where `world_size` is not that of the group.

    Example:
        >>> features = torch.eye(4)
        >>> round(vk.integrations.open_clip.SigLipLoss()(features, features, 10.0, -10.0).item(), 4)
        0.6933
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(rank, world_size, group)
        known = (None, "bidir", "shift", "reduce", "gather")
        if dist_impl not in known:
            raise ValueError(
                f"vk.integrations.open_clip.SigLipLoss: dist_impl must be one of {known}, got {dist_impl!r}"
            )
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl or "bidir"

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Any:
        """The scalar loss, or `{"contrastive_loss": loss}` with `output_dict`."""
        bias = 0.0 if logit_bias is None else logit_bias
        loss = siglip_loss(image_features, text_features, logit_scale, bias, group=self._group())
        return {"contrastive_loss": loss} if output_dict else loss


class CaptionHead(NamedTuple):
    """The two factors of caption logits, for a `CoCaLoss` that never writes their product."""

    hidden: Tensor  # [B, L, D]
    weight: Tensor  # [K, D], one row per word


class CoCaLoss(ClipLoss):
    """open_clip's `CoCaLoss`: `clip_loss_weight * vk.clip_loss` and `caption_loss_weight * cross-entropy`.

    The caption loss is torch's where the model has computed logits. A model that hands over
    `CaptionHead(hidden, weight)` instead gets `vk.linear_cross_entropy`, which never writes the
    `[B * L, vocabulary]` logits.

    Args:
        caption_loss_weight: factor of the caption loss.
        clip_loss_weight: factor of the contrastive loss; 0 leaves it out.
        pad_id: labels of this value count nowhere.
        local_loss: as in `ClipLoss`, as are the rest.
        gather_with_grad: accepted.
        cache_labels: accepted.
        rank: accepted.
        world_size: the number of ranks; with more than 1, the contrastive batch is that of all of them.
        use_horovod: must be False.
        group: a `torch.distributed` process group.

    Raises:
        NotImplementedError: as `ClipLoss`.
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, group=group
        )
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.pad_id = pad_id

    def forward(  # type: ignore[override]  # open_clip's arguments differ in the same way
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logits: Tensor | CaptionHead,  # [B, L, K]
        labels: Tensor,  # [B, L]
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> Any:
        """`(contrastive, caption)`, weighted, or a dict of `contrastive_loss` and `caption_loss`."""
        if self.clip_loss_weight:
            contrastive = self.clip_loss_weight * super().forward(image_features, text_features, logit_scale)
        else:
            contrastive = image_features.new_zeros(())
        if isinstance(logits, CaptionHead):
            caption = linear_cross_entropy(logits.hidden, logits.weight, labels, ignore_index=self.pad_id)
        else:
            # Rows of words, not open_clip's [B, K, L]: torch's log-softmax over a middle dimension is slow.
            caption = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=self.pad_id)
        caption = self.caption_loss_weight * caption
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


def is_attention(module: nn.Module) -> bool:
    """Whether a module is open_clip's own `Attention` (its other blocks hold `nn.MultiheadAttention`)."""
    return any(base.__module__ == "open_clip.transformer" for base in type(module).__mro__) and hasattr(
        module, "use_fsdpa"
    )


def why_not(module: nn.Module) -> str | None:
    """Why an open_clip `Attention` cannot be converted, or None."""
    attention = cast(Any, module)
    if attention.logit_scale is not None:
        return "it uses scaled cosine attention, which writes its scores"
    if not attention.use_fsdpa:
        return "its use_fsdpa is off, so it writes its scores itself"
    return None

# SPDX-License-Identifier: Apache-2.0
"""Batch norm over the batch of all processes, on any device; torch's SyncBatchNorm is for GPUs alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["synchronize_batch_norm"]


def synchronize_batch_norm(model: nn.Module, group: dist.ProcessGroup) -> int:
    """Lets every batch norm of a model take its statistics over the batches of all processes, in place.

    Parameters, buffers and state dict stay; in eval mode nothing changes. The processes may hold unequal numbers of
    rows. Gradients are those of the sum of the processes' losses, as DDP's averaging and `vk.clip_loss(group=)` want.

    Args:
        model: any module.
        group: the processes, all of which run the same layers in the same order.

    Returns:
        How many layers it has changed.
    """
    changed = 0
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            original = type(module)
            if not issubclass(original, _GroupBatchNorm):
                module.__class__ = type(f"Group{original.__name__}", (_GroupBatchNorm, original), {})
            module.group = group  # type: ignore[assignment]
            changed += 1
    return changed


class _GroupBatchNorm(_BatchNorm):
    """Goes in front of a batch norm's own class."""

    group: dist.ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        out, mean, variance, count = _Normalize.apply(input, self.weight, self.bias, self.eps, self.group)
        if self.track_running_stats:
            assert self.num_batches_tracked is not None and self.running_mean is not None
            assert self.running_var is not None
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                unbiased = variance * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var), share)
        return out


class _Normalize(torch.autograd.Function):
    """`(x - mean) / sqrt(variance + eps) * weight + bias`, mean and variance over all rows of the group.

    Also gives mean, variance (biased) and the number of values per channel, without gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [d for d in range(x.ndim) if d != 1]
        count = torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64, device=x.device)
        mean = values.mean(dims).double()
        spread = (values - _channels(mean.to(values.dtype), x)).square().sum(dims).double()
        # Every process adds the parts up in the same order, so that all continue with the same bits.
        sent = torch.cat([mean, spread, count])
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, sent, group=group)
        means, spreads, counts = torch.stack(parts).split([x.shape[1], x.shape[1], 1], dim=1)
        total = counts.sum(0)
        mean = (means * counts).sum(0) / total
        variance = (spreads + (means - mean).square() * counts).sum(0) / total

        inverse = (variance + eps).rsqrt().to(values.dtype)
        normal = (values - _channels(mean.to(values.dtype), x)) * _channels(inverse, x)
        out = normal if weight is None else normal * _channels(weight, x)
        if bias is not None:
            out = out + _channels(bias, x)
        ctx.save_for_backward(normal, inverse, weight, total)
        ctx.group, ctx.has_bias = group, bias is not None
        ctx.mark_non_differentiable(mean, variance, total)
        return out.to(x.dtype), mean, variance, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        normal, inverse, weight, total = ctx.saved_tensors
        grad = grad_out.to(normal.dtype)
        dims = [d for d in range(grad.ndim) if d != 1]
        mine = torch.stack([grad.sum(dims), (grad * normal).sum(dims)]).double()
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(ctx.group))]
        dist.all_gather(parts, mine, group=ctx.group)
        shift, slope = (torch.stack(parts).sum(0) / total).to(normal.dtype)
        grad_x = grad - _channels(shift, grad) - normal * _channels(slope, grad)
        scale = inverse if weight is None else inverse * weight
        grad_x = grad_x * _channels(scale, grad)
        return (
            grad_x.to(grad_out.dtype),
            None if weight is None else mine[1].to(weight.dtype),
            mine[0].to(normal.dtype) if ctx.has_bias else None,
            None,  # eps
            None,  # group
        )


def _channels(x: Tensor, like: Tensor) -> Tensor:
    """[C] in the place of dimension 1."""
    return x.view(1, -1, *[1] * (like.ndim - 2))

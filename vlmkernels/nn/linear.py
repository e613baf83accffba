# SPDX-License-Identifier: Apache-2.0
"""`nn.Linear` that takes the tile engine where that is faster than torch's own product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.ops.linear import linear, outruns_torch

__all__ = ["Linear", "project"]


def project(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """`x @ weight.T + bias` by `vk.linear` where `vk.linear` says that it is the faster one, else by torch."""
    return linear(x, weight, bias, backend="cpu") if outruns_torch(x, weight) else F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` with the same parameters, computed by `project`."""

    def forward(self, input: Tensor) -> Tensor:  # [..., K]
        return project(input, self.weight, self.bias)

# SPDX-License-Identifier: Apache-2.0
"""How large the largest tensor is that a piece of code makes: for tests that some matrix never exists."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Watches what every operation returns::

        with LargestTensor() as largest:
            loss.backward()
        assert largest.elements < N * N

    Attributes:
        elements: of the tensor that has most.
        nbytes: of the tensor that takes most.
        storage_bytes: of the largest memory that a tensor lies in, which a view shares with its base.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.nbytes = self.storage_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
                self.nbytes = max(self.nbytes, x.nbytes)
                self.storage_bytes = max(self.storage_bytes, x.untyped_storage().nbytes())
        return result

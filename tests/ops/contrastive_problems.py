# SPDX-License-Identifier: Apache-2.0
"""Inputs for the tests of the contrastive losses: a `Problem` is one call, on the public ops or on the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import ULPS, assert_as_accurate, assert_typically_as_accurate, ulp
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops import _triton
from vlmkernels.ops import contrastive as ops
from vlmkernels.ops.reference import contrastive as reference

OPS = ("clip_loss", "siglip_loss", "multi_positive_loss", "info_nce", "linear_cross_entropy")
SQUARE = ("clip_loss", "siglip_loss")  # as many texts as images

#: Backends that a test of the contract runs with: Triton's kernels take cpu tensors where they are interpreted.
BACKENDS = [
    "reference",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(_native.cpu_reason is not None, reason=str(_native.cpu_reason))
    ),
    *(["triton"] if _triton.INTERPRETED else []),
]

DRAWS = 3  # problems of one shape, where there is no reason for another number

#: The names of the two operands of each op's product.
OPERANDS = {
    "clip_loss": ("image_features", "text_features"),
    "siglip_loss": ("image_features", "text_features"),
    "multi_positive_loss": ("image_features", "text_features"),
    "info_nce": ("queries", "keys"),
    "linear_cross_entropy": ("hidden", "weight"),
}


@dataclass(frozen=True)
class Problem:
    """One call: `tensors` are differentiable, `options` are everything else; both by argument name."""

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same call with every differentiable tensor in another dtype."""
        return replace(self, tensors={name: x.to(dtype) for name, x in self.tensors.items()})

    def on(self, device: str) -> Problem:
        """The same call with every tensor on a device."""
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return replace(
            self, tensors={name: x.to(device) for name, x in self.tensors.items()}, options=options
        )

    def but(self, **arguments: Any) -> Problem:
        """The same call with some arguments replaced (None drops a tensor)."""
        tensors = {name: arguments.pop(name, x) for name, x in self.tensors.items()}
        return replace(
            self,
            tensors={name: x for name, x in tensors.items() if x is not None},
            options=self.options | arguments,
        )

    def loss(self, functions: ModuleType, **keywords: Any) -> Tensor:
        """The result of the call."""
        return getattr(functions, self.op)(**self.tensors, **self.options, **keywords)

    def results(
        self, functions: ModuleType, *, upstream: Tensor | float = 1.0, **keywords: Any
    ) -> dict[str, Tensor]:
        """The loss and the gradient of every differentiable tensor, for this gradient of the loss."""
        leaves = replace(
            self, tensors={name: x.detach().requires_grad_() for name, x in self.tensors.items()}
        )
        loss = leaves.loss(functions, **keywords)
        upstream = torch.as_tensor(upstream).to(loss).expand(loss.shape)
        grads = torch.autograd.grad(loss, list(leaves.tensors.values()), upstream, materialize_grads=True)
        return {
            "loss": loss.detach(),
            **{f"gradient of {name}": g for name, g in zip(leaves.tensors, grads, strict=True)},
        }


def make(
    op: str,
    n: int,
    m: int | None = None,
    d: int = 16,
    *,
    lead: tuple[int, ...] = (),
    seed: int = 0,
    scale: float = 14.0,
) -> Problem:
    """A float32 problem with aligned pairs: N rows, M columns (default N), width D, `lead` independent problems."""
    generator = torch.Generator().manual_seed(seed + 1000 * n + d)
    m = n if m is None else m

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(max(high, 1), shape, generator=generator)

    left, right = random(*lead, n, d), 0.5 * random(*lead, m, d)
    aligned = min(n, m)
    right[..., :aligned, :] += left[..., :aligned, :]
    left, right = F.normalize(left, dim=-1), F.normalize(right, dim=-1)
    first, second = OPERANDS[op]
    tensors = {first: left, second: right, "logit_scale": torch.tensor(scale)}
    options: dict[str, Any] = {}
    if op == "clip_loss":
        tensors["logit_bias"] = torch.tensor(-1.5)
        options["label_smoothing"] = 0.1 if seed % 2 else 0.0
    elif op == "siglip_loss":
        tensors["logit_bias"] = torch.tensor(-6.0)
    elif op == "multi_positive_loss":
        classes = max(1, (n + m) // 3)
        options["image_labels"] = integers(classes, *lead, n) - 1
        options["text_labels"] = integers(classes, *lead, m) - 1
        # one pair in common, or the loss of a tiny problem is NaN
        if aligned > 0:
            options["text_labels"][..., 0] = options["image_labels"][..., 0]
    elif op == "info_nce":
        options["positives"] = integers(m, *lead, n)
        options["key_mask"] = torch.rand(*lead, m, generator=generator) < 0.8
        options["key_mask"].scatter_(-1, options["positives"], True)
    else:
        tensors[second] = random(m, d)
        tensors["logit_scale"] = torch.tensor(1.3)
        tensors["bias"] = random(m)
        options["targets"] = integers(m, *lead, n)
        options["targets"].view(-1)[1::5] = -100
        options["label_smoothing"] = 0.1 if seed % 2 else 0.0
    return Problem(op, tensors, options)


def shapes(op: str) -> Iterator[tuple[int, int, int]]:
    """(N, M, D) that an op is tried at: small, prime, token counts, around each size of the CPU's tiles."""
    yield from (
        (1, 1, 1),
        (2, 2, 3),
        (3, 3, 8),
        (7, 7, 47),
        (8, 8, 48),
        (9, 9, 49),
        (31, 31, 64),
        (47, 47, 100),
    )
    yield from (
        (48, 48, 2),
        (49, 49, 512),
        (50, 50, 64),
        (77, 77, 8),
        (127, 127, 3),
        (128, 128, 16),
        (129, 129, 17),
    )
    yield from (
        (197, 197, 64),
        (239, 239, 15),
        (240, 240, 48),
        (241, 241, 100),
        (257, 257, 33),
        (513, 513, 7),
    )
    if op not in SQUARE:
        yield from ((1, 300, 8), (17, 241, 64), (50, 77, 3), (8, 1000, 49), (128, 480, 16))
    if op in ("multi_positive_loss", "linear_cross_entropy"):
        yield from ((300, 1, 8), (241, 17, 64), (77, 50, 3))


def assert_accurate(
    problems: Sequence[Problem],
    ours: Sequence[dict[str, Tensor]],
    *,
    upstream: Tensor | float = 1.0,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """The results of some draws obey the accuracy rule: the loss, and the gradient of every input."""
    eager = [p.results(reference, upstream=upstream, compute_dtype=compute_dtype) for p in problems]
    exact = [p.to(torch.float64).results(reference, upstream=upstream) for p in problems]
    first, second = OPERANDS[problems[0].op]
    features = torch.cat([p.tensors[name].double().flatten() for p in problems for name in (first, second)])
    largest_feature = features.abs().max().item()
    dots = [p.tensors[first].double() @ p.tensors[second].double().mT for p in problems]
    largest_upstream = torch.as_tensor(upstream).abs().max().item()
    rows = problems[0].tensors[first].shape[-2]
    weight = largest_upstream / (rows if problems[0].options.get("reduction", "mean") == "mean" else 1)
    for name in exact[0]:
        triple = [[results[name] for results in side] for side in (ours, eager, exact)]
        if name == "loss":
            # the loss of a fitted problem is the logarithm of a float32 sum just above 1
            assert_as_accurate(*triple, name, at_least=ulp(1.0, torch.float32))
        elif exact[0][name].ndim == 0:
            # a sum over all pairs whose two halves, what is expected and what is observed, cancel
            half = max(dot.abs().max().item() for dot in dots) if name == "gradient of logit_scale" else 1.0
            assert_as_accurate(*triple, name, at_least=ULPS * ulp(half * weight * rows, torch.float32))
        elif compute_dtype in (torch.bfloat16, torch.float16) and name != "gradient of bias":
            # the gradient tile is rounded to this dtype before it is multiplied, in eager's reference only its product
            scale = max(p.tensors["logit_scale"].abs().item() for p in problems)
            rounding = torch.finfo(compute_dtype).eps / 2 * weight * scale * largest_feature
            assert_typically_as_accurate(*triple, name, at_least=rounding)
        else:
            assert_typically_as_accurate(*triple, name)


def draws(op: str, n: int, m: int, d: int) -> list[Problem]:
    """Some problems of one shape: as many more as they are smaller, so that chance evens out."""
    return [
        make(op, n, m, d, seed=seed) for seed in range(16 if n * m <= 1000 else 8 if n * m <= 10000 else 3)
    ]


def check_accuracy(
    problems: Sequence[Problem],
    *,
    upstream: Tensor | float = 0.37,
    compute_dtype: torch.dtype | None = None,
    backend: str = "cpu",
    device: str = "cpu",
) -> None:
    """A backend's kernels obey the accuracy rule, for the loss and for the gradient of every input."""
    settings = {"backend": backend, "upstream": upstream, "compute_dtype": compute_dtype}
    ours = [p.on(device).results(ops, **settings) for p in problems]
    ours = [{name: x.cpu() for name, x in results.items()} for results in ours]
    assert_accurate(problems, ours, upstream=upstream, compute_dtype=compute_dtype)


def row_gradient(problem: Problem) -> Tensor:
    """A gradient for the unreduced loss, one random number per row."""
    rows = problem.tensors[OPERANDS[problem.op][0]].shape[:-1]
    return torch.randn(rows, generator=torch.Generator().manual_seed(7))

# SPDX-License-Identifier: Apache-2.0
"""One small call of every op and kind, for what is tried on a GPU whatever the op: graphs, streams, devices, bounds.

As a program it runs them all, forward and backward, and compares with the reference: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python tests/ops/gpu_calls.py --backend cuda
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import vlmkernels as vk

Tensors = dict[str, Tensor]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Of the largest entry: a few roundings of the dtype, and of the sums; the suites of the families hold kernels to more.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2**-7, torch.bfloat16: 2**-5}


@dataclass(frozen=True)
class Problem:
    """An op on small tensors of odd sizes.

    Attributes:
        op: public name without `vk.`.
        inputs: `inputs(size)`, float32 on the CPU; `size` multiplies the first dimension.
        call: `call(inputs, backend)`, the results.
        leaves: names of the inputs that have gradients.
        exact: whether results are compared with float64 operands, or, where a rounding to codes lies between, with the
            reference on the same ones.
    """

    op: str
    inputs: Callable[[int], Tensors]
    call: Callable[[Tensors, str | None], Sequence[Tensor]]
    leaves: tuple[str, ...] = ()
    exact: bool = True

    def place(self, device: torch.device | str, dtype: torch.dtype, size: int = 1) -> Tensors:
        """The inputs on a device; floating ones in a dtype, the leaves with gradients."""
        placed = {}
        for name, x in self.inputs(size).items():
            x = x.to(device, dtype) if x.is_floating_point() and x.ndim else x.to(device)
            placed[name] = x.requires_grad_() if name in self.leaves else x
        return placed

    def run(self, inputs: Tensors, backend: str | None) -> list[Tensor]:
        """Results, then the gradients of their weighted sum."""
        results = list(self.call(inputs, backend))
        if not self.leaves:
            return [x.detach() for x in results]
        weighted = [(x * _weights(x)).sum() for x in results if x.is_floating_point() and x.requires_grad]
        grads = torch.autograd.grad(sum(weighted), [inputs[name] for name in self.leaves])
        return [*(x.detach() for x in results), *grads]

    def expected(self, inputs: Tensors) -> list[Tensor]:
        """What the reference makes of the inputs' values."""
        wide = {
            name: (x.detach().double() if self.exact and x.is_floating_point() else x.detach().clone())
            for name, x in inputs.items()
        }
        for name in self.leaves:
            wide[name].requires_grad_()
        return self.run(wide, "reference")


def _weights(x: Tensor) -> Tensor:
    """Different for each element, the same on every device."""
    return torch.linspace(0.5, 1.5, max(x.numel(), 1), device=x.device).to(x.dtype)[: x.numel()].view(x.shape)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _features(size: int) -> Tensors:
    image = F.normalize(_normal(37 * size, 40), dim=-1)
    text = F.normalize(image + 0.1 * _normal(37 * size, 40, seed=1), dim=-1)
    labels = torch.arange(37 * size) % 9
    return {
        "image": image,
        "text": text,
        "scale": torch.tensor(20.0),
        "bias": torch.tensor(-10.0),
        "labels": labels,
    }


def _qkv(size: int) -> Tensors:
    mask = torch.arange(45) < torch.arange(2 * size)[:, None] % 2 * 20 + 25
    return {"qkv": _normal(2 * size, 45, 3, 3, 40), "mask": mask}


def _packed(size: int) -> Tensors:
    lengths = torch.tensor([0, 33, 0, 70, 17] * size)
    return {"qkv": _normal(int(lengths.sum()), 3, 3, 40), "ends": lengths.cumsum(0).int()}


def _varlen(x: Tensors, backend: str | None) -> Sequence[Tensor]:
    return [vk.attention_varlen(*x["qkv"].unbind(1), x["ends"], x["ends"], is_causal=True, backend=backend)]


def _layer(size: int) -> Tensors:
    return {
        "x": _normal(43 * size, 96),
        "weight": _normal(56, 96, seed=1) / 10,
        "bias": _normal(56, seed=2),
        "residual": _normal(43 * size, 56, seed=3),
    }


def _quantized(scheme: str) -> Problem:
    def call(x: Tensors, backend: str | None) -> Sequence[Tensor]:
        weight = x["weight"]
        # kept with the tensor: what a CUDA graph captures is the layer alone
        if scheme not in weight.__dict__:
            weight.__dict__[scheme] = vk.quantize_weight(weight.detach(), scheme)
        qweight = weight.__dict__[scheme]
        options = {"activation": "gelu", "residual": x["residual"], "backend": backend}
        return [vk.quantized_linear(x["x"], qweight, x["bias"], **options)]

    return Problem("quantized_linear", _layer, call, ("x", "bias", "residual"), exact=False)


def _search(size: int) -> Tensors:
    return {"queries": _normal(19 * size, 40), "database": _normal(777, 40, seed=1)}


PROBLEMS = {
    "clip_loss": Problem(
        "clip_loss",
        _features,
        lambda x, b: [vk.clip_loss(x["image"], x["text"], x["scale"], backend=b)],
        ("image", "text", "scale"),
    ),
    "siglip_loss": Problem(
        "siglip_loss",
        _features,
        lambda x, b: [vk.siglip_loss(x["image"], x["text"], x["scale"], x["bias"], backend=b)],
        ("image", "text", "scale", "bias"),
    ),
    "multi_positive_loss": Problem(
        "multi_positive_loss",
        _features,
        lambda x, b: [
            vk.multi_positive_loss(x["image"], x["text"], x["scale"], x["labels"], x["labels"], backend=b)
        ],
        ("image", "text", "scale"),
    ),
    "info_nce": Problem(
        "info_nce",
        _features,
        lambda x, b: [vk.info_nce(x["image"], x["text"], x["scale"], backend=b)],
        ("image", "text", "scale"),
    ),
    "linear_cross_entropy": Problem(
        "linear_cross_entropy",
        _features,
        lambda x, b: [
            vk.linear_cross_entropy(x["image"], x["text"], x["labels"], logit_scale=x["scale"], backend=b)
        ],
        ("image", "text"),
    ),
    "attention": Problem(
        "attention", _qkv, lambda x, b: [vk.attention_qkvpacked(x["qkv"], backend=b)], ("qkv",)
    ),
    "attention, causal and masked": Problem(
        "attention",
        _qkv,
        lambda x, b: [vk.attention_qkvpacked(x["qkv"], key_mask=x["mask"], is_causal=True, backend=b)],
        ("qkv",),
    ),
    "attention_varlen": Problem("attention_varlen", _packed, _varlen, ("qkv",)),
    "linear": Problem(
        "linear",
        _layer,
        lambda x, b: [
            vk.linear(x["x"], x["weight"], x["bias"], activation="gelu", residual=x["residual"], backend=b)
        ],
        ("x", "weight", "bias", "residual"),
    ),
    **{
        f"quantized_linear {scheme}": _quantized(scheme)
        for scheme in ("w8a8", "w8a16", "w4a16", "fp8", "bf16")
    },
    "topk_similarity": Problem(
        "topk_similarity",
        _search,
        lambda x, b: vk.topk_similarity(x["queries"], x["database"], 7, backend=b),
        ("queries", "database"),
    ),
    "zero_shot": Problem(
        "zero_shot",
        _search,
        lambda x, b: vk.zero_shot(x["queries"], x["database"][:50], 10.0, k=5, backend=b),
        ("queries", "database"),
    ),
}


def compare(problem: Problem, ours: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Fails where a result or gradient is further off than roundings explain; indices must be equal."""
    assert len(ours) == len(expected)
    for place, (mine, true) in enumerate(zip(ours, expected, strict=True)):
        assert mine.shape == true.shape, f"result {place}: {list(mine.shape)}, expected {list(true.shape)}"
        if not true.is_floating_point():
            assert torch.equal(mine.cpu(), true.cpu()), f"result {place}: other indices"
            continue
        error = (mine.double().cpu() - true.double().cpu()).abs().max().item() if true.numel() else 0.0
        allowed = TOLERANCE[dtype] * max(true.abs().max().item() if true.numel() else 0.0, 1e-3)
        assert error <= allowed, f"result {place}: off by {error:.3g}, allowed {allowed:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a call failed, or none was served."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", required=True, choices=("cpu", "cuda", "triton", "reference"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    options = parser.parse_args(arguments)
    counts = {"right": 0, "wrong": 0, "refused": 0}
    for name, problem in PROBLEMS.items():
        for dtype in (getattr(torch, d) for d in options.dtypes):
            inputs = problem.place(options.device, dtype)
            try:
                compare(problem, problem.run(inputs, options.backend), problem.expected(inputs), dtype)
                said = "right"
            except NotImplementedError as error:
                said = f"refused: {error}"
            except (AssertionError, RuntimeError) as error:
                said = f"wrong: {error}"
            counts[said.partition(":")[0]] += 1
            print(f"{name} {dtype}: {said}", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return int(counts["wrong"] > 0 or counts["right"] == 0)


if __name__ == "__main__":
    sys.exit(main())

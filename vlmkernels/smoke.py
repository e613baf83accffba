# SPDX-License-Identifier: Apache-2.0
"""Does this installation work? `python -m vlmkernels.smoke` answers within ten seconds and needs only the package.

Each family's kernels, forward and backward, are compared with the reference on a small problem, on the GPU too where
the CUDA module has kernels for one that is here. Then the model that ships names drawings that ship. One line per
check; exit code 1 where something is wrong. `--require cpu cuda` makes a missing extension module an error.
"""

from __future__ import annotations

import argparse
import functools
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlmkernels as vk
from vlmkernels import _native

# Relative to the largest result, of float32 sums of some hundred products. With int8 activations a value that lies
# between two codes may take the other one: one step of 127 in one of 96 products.
TOLERANCE = {"quantized_linear": 1e-3}
FLOAT_TOLERANCE = 1e-4
Function = Callable[..., Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every check and prints a line for each; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlmkernels.smoke", description=__doc__)
    parser.add_argument(
        "--require", nargs="+", choices=("cpu", "cuda"), default=[], help="modules that must be there"
    )
    args = parser.parse_args(argv)
    start = time.perf_counter()
    print(f"vlmkernels {vk.__version__}, Python {platform.python_version()}, torch {torch.__version__}")

    failures = 0
    for name, check in checks(args.require):
        began = time.perf_counter()
        try:
            said = check()
        except Exception as error:  # whatever goes wrong is the answer that this program is asked for
            said, failures = f"FAILED: {type(error).__name__}: {error}", failures + 1
        print(f"{name:<34} {said} ({time.perf_counter() - began:.2f} s)", flush=True)
    seconds = time.perf_counter() - start
    print(f"{failures} failed, in {seconds:.1f} s" if failures else f"all well, in {seconds:.1f} s")
    return int(failures > 0)


def checks(required: Sequence[str]) -> list[tuple[str, Callable[[], str]]]:
    """Names and functions that return what they saw, or raise."""
    listed: list[tuple[str, Callable[[], str]]] = [
        (f"module {name}", functools.partial(module, name, name in required)) for name in ("cpu", "cuda")
    ]
    available = vk.backends()
    for backend in ("cpu", "cuda"):
        ops = available[backend].ops if available[backend].available else ()
        listed += [
            (f"{op} on {backend}", functools.partial(compare, op, backend)) for op in PROBLEMS if op in ops
        ]
    listed.append(("the model names the drawings", name_drawings))
    return listed


def module(name: str, required: bool) -> str:
    """Whether an extension module loads.

    Raises:
        ImportError: it does not, and is required.
    """
    reason = _native.cpu_reason if name == "cpu" else _native.cuda_reason
    if reason is None:
        return "loads"
    if required:
        raise ImportError(reason)
    return f"is not there: {reason}"


def contrastive() -> tuple[Function, list[Tensor]]:
    """A batch of 65 pairs: the loss of all its logits."""
    u, v = F.normalize(torch.randn(2, 65, 48), dim=-1)
    return vk.clip_loss, [u, v, torch.tensor(10.0)]


def attention() -> tuple[Function, list[Tensor]]:
    """Two sequences of 50 tokens with three heads."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
        out = vk.attention(q, k, v, backend=backend)
        return out if isinstance(out, Tensor) else out[0]

    return attend, list(torch.randn(3, 2, 50, 3, 64))


def linear() -> tuple[Function, list[Tensor]]:
    """A layer with bias."""
    return vk.linear, [torch.randn(33, 96), torch.randn(40, 96), torch.randn(40)]


def quantized() -> tuple[Function, list[Tensor]]:
    """Int8 weights, activations quantized on the fly."""
    weight = vk.quantize_weight(torch.randn(40, 96), "w8a8")

    def layer(x: Tensor, *, backend: str) -> Tensor:
        return vk.quantized_linear(x, weight.to(x.device), activation="gelu", backend=backend)

    return layer, [torch.randn(33, 96)]


def topk() -> tuple[Function, list[Tensor]]:
    """The best five of 1,000 rows."""

    def search(queries: Tensor, database: Tensor, *, backend: str) -> Tensor:
        return vk.topk_similarity(queries, database, 5, metric="cosine", backend=backend)[0]

    return search, [torch.randn(17, 64), torch.randn(1000, 64)]


PROBLEMS: dict[str, Callable[[], tuple[Function, list[Tensor]]]] = {
    "clip_loss": contrastive,
    "attention": attention,
    "linear": linear,
    "quantized_linear": quantized,
    "topk_similarity": topk,
}


def compare(op: str, backend: str) -> str:
    """Result and gradients of a backend beside the reference's.

    Raises:
        ValueError: they differ by more than rounding.
    """
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    function, arguments = PROBLEMS[op]()
    torch.random.set_rng_state(generator)
    device = "cuda" if backend == "cuda" else "cpu"
    results = {}
    for name in (backend, "reference"):
        leaves = [x.to(device).clone().requires_grad_() for x in arguments]
        out = function(*leaves, backend=name)
        results[name] = [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]
    distances = [
        ((mine - theirs).abs().max() / theirs.abs().max()).item()
        for mine, theirs in zip(results[backend], results["reference"], strict=True)
    ]
    worst = torch.tensor(distances).max().item()  # NaN where one is
    if not worst <= TOLERANCE.get(op, FLOAT_TOLERANCE):
        raise ValueError(f"result or gradients differ from the reference by {worst:.1e}")
    return f"agrees with the reference to {worst:.1e}, forward and backward"


def name_drawings() -> str:
    """Classification of some twenty drawings among their names by the model that ships.

    Raises:
        ValueError: it finds fewer than three in four.
    """
    model: Any = vk.models.create("emoji-clip", pretrained=True)
    drawings = vk.data.emoji.load("noto")
    chosen = drawings.select(base_only=True)[::100]
    pictures = vk.data.transform_for(model)(drawings.images(chosen))
    names = vk.data.tokenizer_for(model)([drawings.emojis[index].name for index, _ in chosen])
    with torch.inference_mode():
        images, texts = model.encode_image(pictures, normalize=True), model.encode_text(names, normalize=True)
        probabilities, labels, _ = vk.zero_shot(images, texts, model.logit_scale.exp().item(), k=1)
    right = int((labels[:, 0].cpu() == torch.arange(len(chosen))).sum())
    if 4 * right < 3 * len(chosen):
        raise ValueError(f"{right} of {len(chosen)} are right")
    return f"{right} of {len(chosen)} are right, mean probability {probabilities.mean():.2f}"


if __name__ == "__main__":
    sys.exit(main())

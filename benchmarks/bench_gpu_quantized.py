# SPDX-License-Identifier: Apache-2.0
"""Linear layers on a GPU: int8 and e4m3, quantization of the activations included, beside torch's; bfloat16 as well.

    pytest -m gpu benchmarks/bench_gpu_quantized.py
    pytest -m gpu benchmarks/bench_gpu_quantized.py -k "w8a8 and 50432"
    pytest benchmarks/bench_gpu_quantized.py --dry                       # the same Python on small problems

Inputs and results are bfloat16. Results are compared with the float32 product of the original weight, or, where eight
bits are on both sides, with the product of the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import measures
import pytest
import torch
import torch.nn.functional as F
from gpu_measures import Arena, Call
from peers import gpu_linear as peer
from torch import Tensor

import vlmkernels as vk

pytestmark = pytest.mark.gpu

# Relative errors of whole matrices: eight bits on both sides, e4m3 on both, four bits on one, bfloat16.
TOLERANCE = {"w8a8": 0.02, "fp8": 0.06, "w4a16": 0.15, "bf16": 0.01}


@dataclass(frozen=True)
class Encoder:
    """Widths and tokens of a vision transformer."""

    name: str
    tokens: int
    width: int
    hidden: int

    def products(self) -> list[tuple[str, int, int]]:
        """(name, inputs, outputs) of a block's linear layers."""
        return [
            ("qkv", self.width, 3 * self.width),
            ("out", self.width, self.width),
            ("fc1", self.width, self.hidden),
            ("fc2", self.hidden, self.width),
        ]


ENCODERS = (
    Encoder("ViT-B/16", 197, 768, 3072),
    Encoder("ViT-L/14", 257, 1024, 4096),
    Encoder("so400m", 729, 1152, 4304),
)
IMAGES = (1, 16, 256)
LARGE = ((50432, 768, 3072), (65792, 1024, 4096))
each_large = pytest.mark.parametrize("shape", LARGE, ids=lambda shape: "x".join(map(str, shape)))


class Layer:
    """A linear layer and its input, in the dtype of the rows."""

    def __init__(self, arena: Arena, rows: int, inputs: int, outputs: int) -> None:
        if arena.dry:
            rows, inputs, outputs = min(rows, 40), 64, 48
        self.shape = [rows, inputs, outputs]
        self.x = arena.randn(rows, inputs).to(arena.half)
        self.weight = (arena.randn(outputs, inputs, seed=1) / inputs**0.5).to(arena.half)
        self.bias = arena.randn(outputs, seed=2).to(arena.half)

    @property
    def operations(self) -> float:
        rows, inputs, outputs = self.shape
        return 2.0 * rows * inputs * outputs

    def quantized(self, scheme: str, backend: str, activation: str | None, **options: int) -> Call:
        qweight = vk.quantize_weight(self.weight, scheme, **options)

        def call() -> Tensor:
            with torch.no_grad():
                return vk.quantized_linear(self.x, qweight, self.bias, activation=activation, backend=backend)

        return call

    def exact(self, gelu: bool) -> Tensor:
        """Some rows of the result in float32; `rows_of` picks the same."""
        y = F.linear(self.rows_of(self.x).float(), self.weight.float(), self.bias.float())
        return F.gelu(y) if gelu else y

    def rows_of(self, y: Tensor) -> Tensor:
        """The first and last rows of a matrix."""
        return torch.cat([y[:512], y[-512:]])

    def error(self, gelu: bool) -> object:
        exact = self.exact(gelu)
        return lambda y: measures.difference(self.rows_of(y), exact)


def graphless(function: object, *arguments: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*arguments)

    return call


@each_large
def test_w8a8_linear_and_gelu(arena: Arena, shape: tuple[int, int, int]) -> None:
    layer = Layer(arena, *shape)
    codes, scale = peer.int8_codes(layer.weight)
    rows, _ = peer.int8_codes(layer.x)
    compiled, int8 = arena.compiled(peer.linear_gelu), arena.compiled(peer.int8_linear_gelu)
    operands = (layer.x, layer.weight, layer.bias)
    outcome = arena.contest(
        f"w8a8 linear + GELU {shape}",
        op="quantized_linear",
        ours=lambda backend: layer.quantized("w8a8", backend, "gelu"),
        peers={
            "bfloat16 linear + GELU, compiled": lambda: graphless(compiled, *operands),
            "bfloat16 linear + GELU": lambda: graphless(peer.linear_gelu, *operands),
            "_int_mm with both ends, compiled": lambda: graphless(int8, layer.x, codes, scale, layer.bias),
        },
        compiles=("bfloat16 linear + GELU, compiled", "_int_mm with both ends, compiled"),
        beside={"_int_mm alone, no scales": lambda: graphless(torch._int_mm, rows, codes.t())},
        check=layer.error(gelu=True),
        tolerance=TOLERANCE["w8a8"],
        shape=layer.shape,
        scheme="w8a8",
        operations=layer.operations,
        kind="int8",
    )
    assert arena.prepare or outcome.times


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda e: e.name)
def test_w8a8_is_never_slower(arena: Arena, encoder: Encoder, images: int) -> None:
    """Every linear layer of a block beside bfloat16; fc1 with its GELU."""
    for name, inputs, outputs in encoder.products():
        gelu = name == "fc1"
        layer = Layer(arena, images * encoder.tokens, inputs, outputs)
        operands = (layer.x, layer.weight, layer.bias)
        function = peer.linear_gelu if gelu else F.linear
        arena.contest(
            f"w8a8 {encoder.name} {name}, {images} images",
            op="quantized_linear",
            ours=lambda backend, layer=layer, gelu=gelu: layer.quantized(
                "w8a8", backend, "gelu" if gelu else None
            ),
            peers={
                "torch bfloat16": lambda function=function, operands=operands: graphless(function, *operands)
            },
            check=layer.error(gelu),
            tolerance=TOLERANCE["w8a8"],
            shape=layer.shape,
            scheme="w8a8",
            operations=layer.operations,
            kind="int8",
            seconds=0.1,
        )


def test_fp8_rowwise(arena: Arena) -> None:
    """8192^3: both sides quantize the activations; the product alone, of codes that are there already, beside it."""
    layer = Layer(arena, 8192, 8192, 8192)
    layer.bias.zero_()
    codes, scale = peer.e4m3_rows(layer.weight)
    rows, row_scale = peer.e4m3_rows(layer.x)
    compiled = arena.compiled(peer.e4m3_linear)
    arena.contest(
        "fp8 linear 8192 x 8192 x 8192",
        op="quantized_linear",
        ours=lambda backend: layer.quantized("fp8", backend, None),
        peers={
            "_scaled_mm rowwise, quantization compiled": lambda: graphless(compiled, layer.x, codes, scale)
        },
        compiles=("_scaled_mm rowwise, quantization compiled",),
        beside={
            "_scaled_mm rowwise alone": lambda: graphless(
                lambda: peer.e4m3_product(rows, row_scale, codes, scale, layer.x.dtype)
            ),
            "torch bfloat16": lambda: graphless(F.linear, layer.x, layer.weight),
        },
        check=layer.error(gelu=False),
        tolerance=TOLERANCE["fp8"],
        shape=layer.shape,
        scheme="fp8",
        operations=layer.operations,
        kind="fp8",
    )


@pytest.mark.parametrize("rows", [1, 16])
def test_w4a16_few_rows(arena: Arena, rows: int) -> None:
    """Bound by the bytes of the weight; the bfloat16 layer reads four times as many."""
    layer = Layer(arena, rows, 4096, 4096)
    arena.contest(
        f"w4a16 linear ({rows}, 4096, 4096), groups of 32",
        op="quantized_linear",
        ours=lambda backend: layer.quantized("w4a16", backend, None, group_size=32),
        peers={"torch bfloat16": lambda: graphless(F.linear, layer.x, layer.weight, layer.bias)},
        check=layer.error(gelu=False),
        tolerance=TOLERANCE["w4a16"],
        shape=layer.shape,
        scheme="w4a16",
        moved=layer.shape[1] * layer.shape[2] * (0.5 + 5 / 32),
        seconds=0.2,
    )


@each_large
def test_bfloat16_linear(arena: Arena, shape: tuple[int, int, int]) -> None:
    """`vk.linear` with its GELU inside; the library's product and a kernel for GELU is what it must beat."""
    layer = Layer(arena, *shape)
    operands = (layer.x, layer.weight, layer.bias)
    compiled = arena.compiled(peer.linear_gelu)
    arena.contest(
        f"vk.linear + GELU {shape}",
        op="linear",
        ours=lambda backend: graphless(lambda: vk.linear(*operands, activation="gelu", backend=backend)),
        peers={
            "bfloat16 linear + GELU": lambda: graphless(peer.linear_gelu, *operands),
            "bfloat16 linear + GELU, compiled": lambda: graphless(compiled, *operands),
        },
        library={"bfloat16 linear + GELU": "reference"},
        compiles=("bfloat16 linear + GELU, compiled",),
        check=layer.error(gelu=True),
        tolerance=TOLERANCE["bf16"],
        shape=layer.shape,
        operations=layer.operations,
    )


def test_cuda_graph(arena: Arena) -> None:
    """A quantized layer captured in a graph gives the bits of an eager one."""
    for backend in arena.backends("quantized_linear"):
        layer = Layer(arena, 1576, 768, 3072)
        call = layer.quantized("w8a8", backend, "gelu")
        arena.graph_row(
            f"w8a8 linear + GELU in a CUDA graph {backend}",
            lambda call=call: [call()],
            [layer.x],
            op="quantized_linear",
            backend=backend,
            shape=layer.shape,
        )

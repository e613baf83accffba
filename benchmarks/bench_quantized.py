# SPDX-License-Identifier: Apache-2.0
"""Linear layers with bias and GELU beside torch and ONNX Runtime in the same run.

    pytest benchmarks/bench_quantized.py --benchmark-columns=median,iqr,rounds
    pytest benchmarks/bench_quantized.py -k "w8a8 and 1576" --save-results

Calls alternate, peer first. The int8 peer is the fastest of torch's dynamic engines and ONNX Runtime at that shape,
chosen before the pairs are timed, and its better time counts, in turn or by itself; ONNX Runtime needs the packages
onnx and onnxruntime. Activations and results are float32 unless the row says bfloat16; the time of ours includes the
quantization of the activations.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import measures
import pytest
import torch
import torch.nn.functional as F
from peers import quantized as peers
from torch import Tensor, nn

import vlmkernels as vk
from vlmkernels import _native

SHAPES = [(77, 512, 2048), (50, 768, 3072), (1576, 768, 3072), (1576, 3072, 768), (4112, 1024, 4096)]
LINEAR_SHAPES = [(1576, 768, 3072), (1576, 3072, 768), (4112, 1024, 4096)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
# Relative errors of whole matrices: eight bits on both sides, or bfloat16's rounding.
TOLERANCE = {"w8a8": 0.02, "bf16": 0.01, "w4a16": 0.15}
LINEAR_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def rounds_of(shape: tuple[int, int, int]) -> int:
    return 101 if shape[0] < 200 else 9 if shape[0] < 2000 else 7


def layer_and_input(shape: tuple[int, int, int]) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    m, k, n = shape
    return nn.Linear(k, n).eval().requires_grad_(False), torch.randn(m, k)


def operations(shape: tuple[int, int, int]) -> float:
    m, k, n = shape
    return 2.0 * m * k * n


def ours_of(layer: nn.Linear, x: Tensor, scheme: str) -> Callable[[], Tensor]:
    quantized = vk.nn.QuantizedLinear.from_float(layer.to(x.dtype), scheme, activation="gelu", backend="cpu")

    def call() -> Tensor:
        with torch.inference_mode():
            return quantized(x)

    exact = F.gelu(F.linear(x.float(), layer.weight.float(), layer.bias.float()))
    error = measures.difference(call(), exact)
    assert error <= TOLERANCE[scheme], f"{scheme}: relative error {error:.2e}"
    return call


@each_shape
def test_w8a8_beside_float32(pairs, row, share_of_peak, shape) -> None:
    layer, x = layer_and_input(shape)
    ours, peer = ours_of(layer, x, "w8a8"), peers.float_gelu(layer, x)
    assert measures.difference(ours(), peer()) <= TOLERANCE["w8a8"]
    times = pairs(ours, peer, rounds_of(shape))
    rates = share_of_peak("int8", operations(shape), times["ms"])
    row(
        f"w8a8 linear + GELU {shape} beside float32",
        shape=list(shape),
        dtype="w8a8",
        peer="torch float32",
        **times,
        **rates,
        peer_gflops=operations(shape) / times["peer_ms"] / 1e6,
    )


@each_shape
def test_w8a8_beside_dynamic_int8(pairs, row, share_of_peak, threads: int, shape) -> None:
    layer, x = layer_and_input(shape)
    candidates = {
        f"torch dynamic int8, {engine}": peers.torch_dynamic(layer, x, engine)
        for engine in peers.TORCH_ENGINES
    }
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        candidates["ONNX Runtime dynamic int8"] = peers.onnx_runtime_dynamic(layer, x, threads)
    best = min(
        candidates,
        key=lambda name: measures.median_seconds(candidates[name], 41 if shape[0] < 200 else 5, warmup=2),
    )
    ours = ours_of(layer, x, "w8a8")
    # The peer rounds its activations to eight bits by one scale for all rows.
    assert measures.difference(ours(), torch.as_tensor(candidates[best]())) <= 2 * TOLERANCE["w8a8"]
    times = pairs(ours, candidates[best], rounds_of(shape))
    # In turn with torch's pool, whose threads still spin, ONNX Runtime's lose a core: the peer's best time counts, be
    # it by itself or in turn.
    alone = 1e3 * measures.median_seconds(candidates[best], rounds_of(shape), warmup=2)
    times["peer_ms"] = min(times["peer_ms"], alone)
    times["ratio"] = times["peer_ms"] / times["ms"]
    rates = share_of_peak("int8", operations(shape), times["ms"])
    row(
        f"w8a8 linear + GELU {shape} beside dynamic int8",
        shape=list(shape),
        dtype="w8a8",
        peer=best,
        **times,
        **rates,
        peer_gflops=operations(shape) / times["peer_ms"] / 1e6,
    )


@each_shape
def test_bf16_beside_bfloat16(pairs, row, share_of_peak, shape) -> None:
    layer, x = layer_and_input(shape)
    x = x.bfloat16()
    peer = peers.float_gelu(layer, x)
    ours = ours_of(layer, x, "bf16")
    assert measures.difference(ours(), peer()) <= TOLERANCE["bf16"]
    times = pairs(ours, peer, rounds_of(shape))
    rates = share_of_peak("bfloat16", operations(shape), times["ms"])
    row(
        f"bf16 prepacked linear + GELU {shape}",
        shape=list(shape),
        dtype="bfloat16",
        peer="torch bfloat16",
        **times,
        **rates,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_w4a16_of_one_row(pairs, row, threads: int, group_size: int, dtype: str) -> None:
    """Eight layers, one after the other, as a decoder's step has them: 64 MiB of nibbles, none found in a cache."""
    layer, x = layer_and_input((1, 4096, 4096))
    layer, x = layer.to(getattr(torch, dtype)), x.to(getattr(torch, dtype))
    layers = [copy.deepcopy(layer) for _ in range(8)]
    weights = [vk.quantize_weight(layer.weight, "w4a16", group_size=group_size) for _ in layers]

    def ours() -> list[Tensor]:
        return [vk.quantized_linear(x, weight, layer.bias, backend="cpu") for weight in weights]

    def peer() -> list[Tensor]:
        return [F.linear(x, layer.weight, layer.bias) for layer in layers]

    exact = F.linear(x.double(), weights[0].dequantize(torch.float64), layer.bias.double())
    rounding = 1e-5 if dtype == "float32" else 2.0**-8
    assert (ours()[0] - exact).abs().max() <= rounding * exact.abs().max()
    assert measures.difference(ours()[0], peer()[0]) <= TOLERANCE["w4a16"]
    times = pairs(ours, peer, 25)
    bandwidth = max(_native.cpu.peak("read", 0.3, threads) for _ in range(3))
    rate = sum(weight.nbytes for weight in weights) / times["ms"] / 1e6
    row(
        f"eight w4a16 linears (1, 4096, 4096) {dtype}, groups of {group_size}",
        shape=[1, 4096, 4096],
        dtype="w4a16",
        peer=f"torch {dtype}",
        **times,
        gigabytes_per_second=rate,
        read_gigabytes_per_second=bandwidth,
        share_of_bandwidth=rate / bandwidth,
    )


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_float_linear(pairs, row, share_of_peak, shape, dtype: str, gradient: bool) -> None:
    if gradient and dtype == "bfloat16":
        pytest.skip("torch's backward is the default there")
    layer, x = layer_and_input(shape)
    inputs = [t.to(getattr(torch, dtype)).requires_grad_(gradient) for t in (x, layer.weight, layer.bias)]
    grad = torch.randn(shape[0], shape[2]).to(inputs[0].dtype)

    def step(function: Callable[..., Tensor]) -> Callable[[], Any]:
        if not gradient:
            return lambda: [function(*inputs)]
        return lambda: torch.autograd.grad(function(*inputs), inputs, grad)

    ours, peer = step(lambda *t: vk.linear(*t, backend="cpu")), step(F.linear)
    for mine, theirs in zip(ours(), peer(), strict=True):
        assert measures.difference(mine, theirs) <= LINEAR_TOLERANCE[dtype]
    times = pairs(ours, peer, rounds_of(shape))
    work = operations(shape) * (3 if gradient else 1)
    row(
        f"vk.linear {shape} {dtype} {'forward + backward' if gradient else 'forward'}",
        shape=list(shape),
        dtype=dtype,
        peer="torch",
        **times,
        **share_of_peak(dtype, work, times["ms"]),
    )

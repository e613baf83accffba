# SPDX-License-Identifier: Apache-2.0
"""Linear layers that users have on a CPU today: torch float32, bfloat16 and dynamic int8, ONNX Runtime dynamic int8.

The ONNX graph is the one that onnxruntime's dynamic quantization writes for a linear layer: the input quantized as one
uint8 tensor, an integer product with int8 columns, scale, bias, GELU. Threads do not spin between calls, because they
would take a core from whoever runs next.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TORCH_ENGINES = ("x86", "onednn", "fbgemm")


def float_gelu(layer: nn.Linear, x: Tensor) -> Callable[[], Tensor]:
    """The layer and exact GELU in x's dtype."""
    layer = copy.deepcopy(layer).to(x.dtype).eval().requires_grad_(False)
    return lambda: F.gelu(layer(x))


def torch_dynamic(layer: nn.Linear, x: Tensor, engine: str) -> Callable[[], Tensor]:
    """torch's dynamically quantized linear layer, and GELU."""
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, torch.qint8)

    def call() -> Tensor:
        torch.backends.quantized.engine = engine
        return F.gelu(model(x))

    return call


def onnx_runtime_dynamic(layer: nn.Linear, x: Tensor, threads: int) -> Callable[[], Any]:
    """ONNX Runtime's dynamically quantized linear layer with its own GELU."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    outputs, inputs = weight.shape
    scale = (np.abs(weight).max(1) / 127).astype(np.float32)
    codes = np.clip(np.round(weight / scale[:, None]), -127, 127).astype(np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "x_scale", "x_zero"]),
        helper.make_node("MatMulInteger", ["codes", "weight", "x_zero", "weight_zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x_scale", "weight_scale"], ["scale"]),
        helper.make_node("Mul", ["floats", "scale"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
        helper.make_node("Gelu", ["y"], ["z"], domain="com.microsoft"),
    ]
    constants = {
        "weight": np.ascontiguousarray(codes.T),
        "weight_zero": np.zeros(outputs, np.int8),
        "weight_scale": scale,
        "bias": bias,
    }
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", inputs])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["M", outputs])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 8
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    array = x.numpy()
    return lambda: session.run(None, {"x": array})[0]

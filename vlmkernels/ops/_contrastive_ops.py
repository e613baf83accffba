# SPDX-License-Identifier: Apache-2.0
"""The registered ops of the contrastive family, and how their arguments reach the kernels.

`softmax_contrastive` keeps log-sum-exps and forms the logits again in backward (8 N M D operations for CLIP; 6 where
the dot products are kept). `one_pass_contrastive` takes the gradients in forward, for an upstream gradient of 1,
because a logit's gradient is known as soon as the logit (sigmoid) or its row (rows-only softmax) is: 6 N M D.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops._library import no_autocast, register_op

REDUCTIONS = ("mean", "sum", "none")


class Arguments(NamedTuple):
    """What all ops of the family take, in the order of their schemas.

    Attributes:
        q: [..., N, D] float32, bfloat16 or float16; any strides.
        k: [..., M, D].
        scale: [] float32.
        bias: [] float32, added to every logit.
        key_bias: [M] float32, added to every logit of a key.
        positives: [..., N] int64; None: row i's positive is key i (or labels decide).
        row_labels: [..., N] int64, with col_labels [..., M]: equal labels are positives.
        key_mask: [..., M] bool, True = usable.
        ignore_index: rows with this positive count nowhere.
        columns: the loss is the mean of both directions.
        compute: dtype of the products.
    """

    q: Tensor
    k: Tensor
    scale: Tensor
    bias: Tensor | None = None
    key_bias: Tensor | None = None
    positives: Tensor | None = None
    row_labels: Tensor | None = None
    col_labels: Tensor | None = None
    key_mask: Tensor | None = None
    ignore_index: int | None = None
    columns: bool = False
    smoothing: float = 0.0
    reduction: str = "mean"
    compute: torch.dtype = torch.float32


_TENSORS = 9
_COUNT = len(Arguments._fields)
_SCHEMA = (
    "Tensor q, Tensor k, Tensor scale, Tensor? bias, Tensor? key_bias, Tensor? positives, Tensor? row_labels, "
    "Tensor? col_labels, Tensor? key_mask, int? ignore_index, bool columns, float smoothing, str reduction, "
    "ScalarType compute"
)


class _Launch:
    """One call of a kernel: the arguments as addresses, and the tensors behind them kept alive until it returns."""

    def __init__(self, call: Arguments) -> None:
        n, d = call.q.shape[-2:]
        batch, m = math.prod(call.q.shape[:-2]), call.k.shape[-2]
        q, k = call.q.reshape(batch, n, d), call.k.reshape(batch, m, d)
        self._alive: list[Tensor] = [q, k]
        self.arguments: dict[str, Any] = {
            "q": (q.data_ptr(), _native.dtype_tag(q.dtype), *q.stride()),
            "k": (k.data_ptr(), _native.dtype_tag(k.dtype), *k.stride()),
            "batch": batch,
            "n": n,
            "m": m,
            "d": d,
            "columns": call.columns,
            "bf16": call.compute == torch.bfloat16,
            "reduction": REDUCTIONS.index(call.reduction),
            "smoothing": call.smoothing,
            "ignores": call.ignore_index is not None,
            "ignore_index": call.ignore_index or 0,
        }
        for name in ("scale", "key_bias", "positives", "row_labels", "col_labels", "key_mask"):
            self.add(name, getattr(call, name))
        self.add("logit_bias", call.bias)

    def add(self, name: str, tensor: Tensor | None) -> None:
        """Passes a tensor by address, made contiguous where it is not; none and empty ones as 0."""
        if tensor is None or tensor.numel() == 0:
            return
        tensor = tensor.contiguous()
        self._alive.append(tensor)
        self.arguments[name] = tensor.data_ptr()

    def gradient(self, name: str, like: Tensor, wanted: bool) -> Tensor:
        """Room for the gradient of a feature matrix: float32 sums, and a rounded copy where the features are bf16."""
        if not wanted:
            return like.new_empty(0)
        sums = torch.empty(like.shape, dtype=torch.float32)
        self.add(name, sums)
        if like.dtype == torch.float32:
            return sums
        rounded = torch.empty(like.shape, dtype=like.dtype)
        self.add(f"{name}_bf16", rounded)
        return rounded

    def __call__(self, op: str, function: Any, *, one_pass: bool = False) -> None:
        call = _native.cpu.ContrastiveCall(**self.arguments)
        threads = _native.threads()
        workspace = torch.empty(call.workspace(one_pass, threads) + 64, dtype=torch.uint8)
        at = workspace.data_ptr()
        _native.call(op, function, call, at + -at % 64, threads)


def _triton_kernels() -> Any:
    from vlmkernels.ops.triton import contrastive

    return contrastive


def _cuda_kernels() -> Any:
    from vlmkernels.ops import _contrastive_cuda  # which builds on this file

    return _contrastive_cuda


def _second_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.op = inputs[-1]


def _second_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        f'vk.{ctx.op}: second derivatives exist on the reference path only; pass backend="reference"'
    )


def _softmax_fake(*args: Any) -> tuple[Tensor, ...]:
    call, (keep, *_) = Arguments(*args[:_COUNT]), args[_COUNT:]
    batch, n, m = call.q.shape[:-2], call.q.shape[-2], call.k.shape[-2]
    shapes = (
        (*batch, n) if call.reduction == "none" else (),  # loss
        (*batch, 2, n),  # row_lse: maximum, log of the shifted sum
        (*batch, 2, m) if call.columns else (0,),  # col_lse
        (*batch, n, m) if keep else (0,),  # dots
    )
    return tuple(call.q.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _softmax_impl(*args: Any) -> tuple[Tensor, ...]:
    call, (_, backend, op) = Arguments(*args[:_COUNT]), args[_COUNT:]
    if backend == "triton":
        with no_autocast(call.q.device.type):
            return _triton_kernels().softmax_forward(call, _softmax_fake(*args))
    if backend == "cuda":
        with no_autocast(call.q.device.type):
            return _cuda_kernels().softmax_forward(call, call.compute, _softmax_fake(*args), op)
    outputs = _softmax_fake(*args)
    launch = _Launch(call)
    for name, tensor in zip(("loss", "row_lse", "col_lse", "saved"), outputs, strict=True):
        launch.add(name, tensor)
    launch(op, _native.cpu.contrastive_forward)
    return outputs


def _softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
    ctx.options, ctx.backend, ctx.op = inputs[_TENSORS:_COUNT], inputs[-2], inputs[-1]
    ctx.set_materialize_grads(False)


def _softmax_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * (_COUNT + 3)
    if grad_loss is None:
        return nothing
    saved = ctx.saved_tensors  # once: under checkpointing they can be read no second time
    tensors, kept = saved[:_TENSORS], saved[_TENSORS:]
    needs = list(ctx.needs_input_grad[:5])
    grad_q, grad_k, grad_scale, grad_key_bias = softmax_contrastive_backward(
        grad_loss, *tensors, *ctx.options, *kept, needs, ctx.backend, ctx.op
    )
    grads = (
        grad_q if needs[0] else None,
        grad_k if needs[1] else None,
        grad_scale if needs[2] else None,
        torch.zeros_like(tensors[3])
        if needs[3]
        else None,  # a number added to all logits cancels in a softmax
        grad_key_bias if needs[4] else None,
    )
    return grads + nothing[len(grads) :]


def _softmax_backward_fake(grad_loss: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call, needs = Arguments(*args[:_COUNT]), args[-3]
    return (
        call.q.new_empty(call.q.shape if needs[0] else 0),
        call.k.new_empty(call.k.shape if needs[1] else 0),
        torch.empty_like(call.scale),
        call.scale.new_empty(call.key_bias.shape if call.key_bias is not None and needs[4] else 0),
    )


def _softmax_backward_impl(grad_loss: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call, (*kept, needs, backend, op) = Arguments(*args[:_COUNT]), args[_COUNT:]
    if backend == "triton":
        outputs = _softmax_backward_fake(grad_loss, *args)
        with no_autocast(call.q.device.type):
            return _triton_kernels().softmax_backward(grad_loss, call, kept, needs, outputs)
    if backend == "cuda":
        outputs = _softmax_backward_fake(grad_loss, *args)
        with no_autocast(call.q.device.type):
            return _cuda_kernels().softmax_backward(grad_loss, call, call.compute, kept, needs, outputs, op)
    launch = _Launch(call)
    for name, tensor in zip(("row_lse", "col_lse", "saved"), kept, strict=True):
        launch.add(name, tensor)
    launch.add("grad_loss", grad_loss)
    _, _, grad_scale, grad_key_bias = _softmax_backward_fake(grad_loss, *args)
    launch.add("grad_scale", grad_scale)
    launch.add("grad_key_bias", grad_key_bias)
    grad_q, grad_k = launch.gradient("grad_q", call.q, needs[0]), launch.gradient("grad_k", call.k, needs[1])
    launch(op, _native.cpu.contrastive_backward)
    return grad_q, grad_k, grad_scale, grad_key_bias


softmax_contrastive_backward = register_op(
    "softmax_contrastive_backward",
    f"(Tensor grad_loss, {_SCHEMA}, Tensor row_lse, Tensor col_lse, Tensor dots, bool[] needs, "
    "str backend, str op) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_scale, Tensor grad_key_bias)",
    fake=_softmax_backward_fake,
    impl=_softmax_backward_impl,
    setup_context=_second_setup,
    backward=_second_backward,
)
softmax_contrastive = register_op(
    "softmax_contrastive",
    f"({_SCHEMA}, bool keep, str backend, str op) -> (Tensor loss, Tensor row_lse, Tensor col_lse, Tensor dots)",
    fake=_softmax_fake,
    impl=_softmax_impl,
    setup_context=_softmax_setup,
    backward=_softmax_backward,
)


def _one_pass_fake(*args: Any) -> tuple[Tensor, ...]:
    call, needs = Arguments(*args[:_COUNT]), args[-3]
    return (
        torch.empty_like(call.scale),  # loss
        call.q.new_empty(call.q.shape if needs[0] else 0),
        call.k.new_empty(call.k.shape if needs[1] else 0),
        torch.empty_like(call.scale),  # gradient of scale
        torch.empty_like(call.scale),  # gradient of bias
        call.scale.new_empty(call.key_bias.shape if call.key_bias is not None and needs[4] else 0),
    )


def _one_pass_impl(*args: Any) -> tuple[Tensor, ...]:
    call, (sigmoid, needs, backend, op) = Arguments(*args[:_COUNT]), args[_COUNT:]
    if backend == "triton":
        with no_autocast(call.q.device.type):
            return _triton_kernels().one_pass(call, sigmoid, needs, _one_pass_fake(*args))
    if backend == "cuda":
        with no_autocast(call.q.device.type):
            return _cuda_kernels().one_pass(call, call.compute, sigmoid, needs, _one_pass_fake(*args), op)
    launch = _Launch(call)
    loss, _, _, grad_scale, grad_bias, grad_key_bias = _one_pass_fake(*args)
    launch.add("loss", loss)
    grad_q, grad_k = launch.gradient("grad_q", call.q, needs[0]), launch.gradient("grad_k", call.k, needs[1])
    if any(needs):
        launch.add("grad_scale", grad_scale)
        launch.add("grad_logit_bias", grad_bias)
        launch.add("grad_key_bias", grad_key_bias)
    launch.arguments["sigmoid"] = sigmoid
    launch(op, _native.cpu.contrastive_one_pass, one_pass=True)
    return loss, grad_q, grad_k, grad_scale, grad_bias, grad_key_bias


def _one_pass_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.op = inputs[-1]
    ctx.set_materialize_grads(False)


def _one_pass_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    nothing: tuple[None, ...] = (None,) * (_COUNT + 4)
    if grad_loss is None:
        return nothing
    needs, grads = ctx.needs_input_grad[:5], ctx.saved_tensors
    if _may_hand_over(grad_loss):
        # detached: they are outputs of an op that autograd watches, and the caller's to change
        grads = tuple(g.detach() for g in grads)
    else:
        grads = one_pass_contrastive_backward(grad_loss, *grads, ctx.op)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True)) + nothing[5:]


def _may_hand_over(grad_loss: Tensor) -> bool:
    """Whether the kept gradients are themselves the answer: `loss.backward()` brings a 1, and then no pass over them
    and no copy is needed. Not while tracing, not where a graph of the gradients is asked for, and not where the graph
    is retained: what is handed out may be written to, and the next backward needs the original."""
    return (
        type(grad_loss) is Tensor
        and grad_loss.device.type == "cpu"  # elsewhere asking for its value waits for the device
        and not torch.is_grad_enabled()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and grad_loss.item() == 1.0
    )


def _scaled_fake(grad_loss: Tensor, *grads: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(g) for g in grads[:-1])


def _scaled_impl(grad_loss: Tensor, *grads: Any) -> tuple[Tensor, ...]:
    return tuple(g * grad_loss.to(g.dtype) for g in grads[:-1])


one_pass_contrastive_backward = register_op(
    "one_pass_contrastive_backward",
    "(Tensor grad_loss, Tensor grad_q, Tensor grad_k, Tensor grad_scale, Tensor grad_bias, Tensor grad_key_bias, "
    "str op) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_scaled_fake,
    impl=_scaled_impl,
    setup_context=_second_setup,
    backward=_second_backward,
)
one_pass_contrastive = register_op(
    "one_pass_contrastive",
    f"({_SCHEMA}, bool sigmoid, bool[] needs, str backend, str op) -> (Tensor loss, Tensor grad_q, Tensor grad_k, "
    "Tensor grad_scale, Tensor grad_bias, Tensor grad_key_bias)",
    fake=_one_pass_fake,
    impl=_one_pass_impl,
    setup_context=_one_pass_setup,
    backward=_one_pass_backward,
)

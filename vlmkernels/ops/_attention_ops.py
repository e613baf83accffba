# SPDX-License-Identifier: Apache-2.0
"""The registered ops of attention, and how their arguments reach the kernels.

Forward keeps the result and the log-sum-exps; backward forms the scores again. `attention_qkvpacked` is an op of its
own because its gradient is one tensor, which the kernel writes where it belongs: nothing is concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops import _attention_cuda, _check, _triton, dispatch
from vlmkernels.ops._library import differentiate, like_inputs, register_op
from vlmkernels.ops.reference import attention as reference

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
TRITON_WIDEST_HEAD = 256


def _cpu_reasons(call: dispatch.Call) -> list[str]:
    if _native.cpu_reason is not None:
        return [_native.cpu_reason]
    reasons = []
    if call.device != "cpu":
        reasons.append(f"it serves cpu tensors, not {call.device}")
    if call.dtype not in KERNEL_DTYPES:
        reasons.append(f"it computes in float32 and bfloat16, not {call.dtype}")
    return reasons


def _triton_reasons(call: dispatch.Call) -> list[str]:
    reasons = _triton.reasons(call)
    if call.dtype == torch.float64:
        reasons.append("it sums in float32, which float64 operands do not want")
    if call.dtype == torch.bfloat16 and _triton.INTERPRETED:
        reasons.append("the interpreter truncates where bfloat16 rounds")
    widest = max(call.facts["head_dim"], call.facts["value_dim"])
    if widest > TRITON_WIDEST_HEAD:
        reasons.append(f"head dims above {TRITON_WIDEST_HEAD} do not fit the registers (got {widest})")
    return reasons


for _op in ("attention", "attention_varlen"):
    dispatch.register_backend(_op, "cpu", _cpu_reasons, priority=10)
    dispatch.register_backend(
        _op, "triton", _triton_reasons, priority=_triton.PRIORITY, not_default=_triton.not_default
    )


def _triton_kernels() -> ModuleType:
    from vlmkernels.ops.triton import attention

    return attention


View = tuple[int, int, int, int, int]


def _view(x: Tensor | None) -> View:
    """Address and strides of `[B, L, H, D]` or `[T, H, D]`; zeros for None."""
    if x is None:
        return _NOTHING
    *batch, row, head, col = x.stride()
    return x.data_ptr(), batch[0] if batch else 0, row, head, col


_NOTHING: View = (0, 0, 0, 0, 0)


def _native_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """The call as the kernels take it; the tensors must outlive it, and `lse` is contiguous."""
    packed = cu_seqlens is not None
    batch = cu_seqlens[0].shape[0] - 1 if cu_seqlens is not None else q.shape[0]
    Lq, H, D = q.shape[-3:]
    Lk, Hk, Dv = v.shape[-3:]
    call = _native.cpu.AttentionCall(
        (batch, H, Hk, Lq, Lk, D, Dv),
        q.dtype == torch.bfloat16,
        is_causal,
        scale,
        _view(q),
        _view(k),
        _view(v),
        _view(out),
        (lse.data_ptr(), 0 if packed else H * Lq, Lq),
    )
    if bias is not None:
        strides = [
            0 if size == 1 else step for size, step in zip(bias.shape[:2], bias.stride()[:2], strict=True)
        ]
        call.set_bias(bias.data_ptr(), bias.dtype == torch.bfloat16, *strides, *bias.stride()[2:])
    if key_mask is not None:
        call.set_key_mask(key_mask.data_ptr(), *key_mask.stride())
    if cu_seqlens is not None:
        ends_q, ends_k = cu_seqlens
        wide = torch.int64
        call.set_sequences(ends_q.data_ptr(), ends_q.dtype == wide, ends_k.data_ptr(), ends_k.dtype == wide)
    if seed is not None:
        keep_scale = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
        call.set_dropout(seed.data_ptr(), round(dropout_p * 2**32), keep_scale)
    return call


def _run(op: str, call: Any, *, backward: bool) -> None:
    threads = _native.threads()
    workspace = torch.empty(call.workspace(backward, threads) + 64, dtype=torch.uint8)
    at = workspace.data_ptr()
    function = _native.cpu.attention_backward if backward else _native.cpu.attention_forward
    _native.call(op, function, call, at + -at % 64, threads)


def _set_gradients(
    call: Any,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: Sequence[Tensor | None],
    grad_bias: Tensor | None = None,
) -> None:
    lse = _NOTHING
    if grad_lse is not None:
        strides = grad_lse.stride()
        batch, heads, row = strides if len(strides) == 3 else (0, *strides)
        lse = (grad_lse.data_ptr(), batch, row, heads, 0)
    bias = (0, 1, 1) if grad_bias is None else (grad_bias.data_ptr(), *grad_bias.shape[:2])
    call.set_gradients(_view(grad_out), lse, _view(grads[0]), _view(grads[1]), _view(grads[2]), bias)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "cpu":
        out, lse = _outputs(q, v)
        call = _native_call(
            q, k, v, out, lse, seed, is_causal, scale, dropout_p, bias=bias, key_mask=key_mask
        )
        _run("attention", call, backward=False)
        return out, lse
    if backend == "cuda":
        out, lse = _outputs(q, v)
        _attention_cuda.forward(q, k, v, out, lse, bias, key_mask, seed, is_causal, scale, dropout_p)
        return out, lse
    if backend == "triton":
        out, lse = _outputs(q, v)
        kernels = _triton_kernels()
        kernels.forward(
            kernels.AttentionCall(q, k, v, is_causal, scale, dropout_p, seed, bias, key_mask), out, lse
        )
        return out, lse
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p, "seed": seed}
    return reference.attention(q, k, v, bias=bias, key_mask=key_mask, **options)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    *batch, Lq, H, _ = q.shape
    return q.new_empty(*batch, Lq, H, v.shape[-1]), q.new_empty(*batch, H, Lq, dtype=sums)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    _check.attention("attention", q, k, v, bias=bias, key_mask=key_mask)
    return _outputs(q, v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.options = inputs[6:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    saved = ctx.saved_tensors  # once: under checkpointing they can be read no second time
    if grad_out is None:
        grad_out = torch.zeros_like(saved[6])
    grads = attention_backward(grad_out, grad_lse, *saved, *ctx.options, needs)
    grad_q, grad_k, grad_v, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return (
        grad_q,
        grad_k,
        grad_v,
        grad_bias,
        None,  # key_mask
        None,  # seed
        None,  # is_causal
        None,  # scale
        None,  # dropout_p
        None,  # backend
    )


def _backward_impl(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if backend != "reference":
        grads = like_inputs((q, k, v, bias), needs)
        wanted = [g if need else None for g, need in zip(grads[:3], needs, strict=False)]
        grad_bias = grads[3] if needs[3] and bias is not None else None
        options = (is_causal, scale, dropout_p, backend)
        _launch_backward(
            q, k, v, wanted, grad_bias, grad_out, grad_lse, bias, key_mask, seed, out, lse, *options
        )
        return grads

    def recompute(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return _forward(q, k, v, bias, key_mask, seed, is_causal, scale, dropout_p, backend)

    return differentiate(recompute, (q, k, v, bias), (grad_out, grad_lse), needs)


def _launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grads: Sequence[Tensor | None],
    grad_bias: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    backend: str,
) -> None:
    if backend == "triton":
        kernels = _triton_kernels()
        triton_call = kernels.AttentionCall(q, k, v, is_causal, scale, dropout_p, seed, bias, key_mask)
        kernels.backward(triton_call, out, lse, grad_out, grad_lse, grads, grad_bias)
        return
    if backend == "cuda":  # which refuses biases that want a gradient
        _attention_cuda.backward(
            grad_out, grad_lse, q, k, v, grads, out, lse, bias, key_mask, seed, is_causal, scale, dropout_p
        )
        return
    call = _native_call(q, k, v, out, lse, seed, is_causal, scale, dropout_p, bias=bias, key_mask=key_mask)
    _set_gradients(call, grad_out, grad_lse, grads, grad_bias)
    _run("attention", call, backward=True)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return like_inputs((q, k, v, bias), rest[-1])


attention_backward = register_op(
    "attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_mask, "
    "Tensor? seed, Tensor out, Tensor lse, bool is_causal, float scale, float dropout_p, str backend, "
    "bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    impl=_backward_impl,
)
attention = register_op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_mask, Tensor? seed, bool is_causal, "
    "float scale, float dropout_p, str backend) -> (Tensor out, Tensor lse)",
    fake=_forward_fake,
    impl=_forward,
    setup_context=_setup_context,
    backward=_backward,
)


def _packed_forward(
    qkv: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return _forward(q, k, v, bias, key_mask, seed, is_causal, scale, dropout_p, backend)


def _packed_fake(
    qkv: Tensor, bias: Tensor | None, key_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return _forward_fake(q, k, v, bias, key_mask)


def _packed_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]
    ctx.set_materialize_grads(False)


def _packed_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    saved = ctx.saved_tensors  # once: under checkpointing they can be read no second time
    if grad_out is None:
        grad_out = torch.zeros_like(saved[4])
    grads = attention_qkvpacked_backward(grad_out, grad_lse, *saved, *ctx.options, needs)
    grad_qkv, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return (
        grad_qkv,
        grad_bias,
        None,  # key_mask
        None,  # seed
        None,  # is_causal
        None,  # scale
        None,  # dropout_p
        None,  # backend
    )


def _packed_backward_impl(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    qkv: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if backend != "reference":
        grad_qkv, grad_bias = like_inputs((qkv, bias), needs)
        q, k, v = qkv.unbind(2)
        wanted = list(grad_qkv.unbind(2)) if needs[0] else [None] * 3
        bias_wanted = grad_bias if needs[1] and bias is not None else None
        options = (is_causal, scale, dropout_p, backend)
        _launch_backward(
            q, k, v, wanted, bias_wanted, grad_out, grad_lse, bias, key_mask, seed, out, lse, *options
        )
        return grad_qkv, grad_bias

    def recompute(qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return _packed_forward(qkv, bias, key_mask, seed, is_causal, scale, dropout_p, backend)

    return differentiate(recompute, (qkv, bias), (grad_out, grad_lse), needs)


def _packed_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return like_inputs((qkv, bias), rest[-1])


attention_qkvpacked_backward = register_op(
    "attention_qkvpacked_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor qkv, Tensor? bias, Tensor? key_mask, Tensor? seed, Tensor out, "
    "Tensor lse, bool is_causal, float scale, float dropout_p, str backend, bool[] needs) -> (Tensor, Tensor)",
    fake=_packed_backward_fake,
    impl=_packed_backward_impl,
)
attention_qkvpacked = register_op(
    "attention_qkvpacked",
    "(Tensor qkv, Tensor? bias, Tensor? key_mask, Tensor? seed, bool is_causal, float scale, float dropout_p, "
    "str backend) -> (Tensor out, Tensor lse)",
    fake=_packed_fake,
    impl=_packed_forward,
    setup_context=_packed_setup,
    backward=_packed_backward,
)


def _varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "cpu":
        out, lse = _outputs(q, v)
        ends = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
        call = _native_call(q, k, v, out, lse, seed, is_causal, scale, dropout_p, cu_seqlens=ends)
        _run("attention_varlen", call, backward=False)
        return out, lse
    if backend == "triton":
        out, lse = _outputs(q, v)
        kernels = _triton_kernels()
        ends = (cu_seqlens_q, cu_seqlens_k)
        kernels.forward(
            kernels.AttentionCall(q, k, v, is_causal, scale, dropout_p, seed, cu_seqlens=ends), out, lse
        )
        return out, lse
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p, "seed": seed}
    return reference.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)


def _varlen_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    _check.attention("attention_varlen", q, k, v, layout="[T, H, D]")
    _check.cu_seqlens("attention_varlen", q, k, cu_seqlens_q, cu_seqlens_k)
    return _outputs(q, v)


def _varlen_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    saved = ctx.saved_tensors  # once: under checkpointing they can be read no second time
    if grad_out is None:
        grad_out = torch.zeros_like(saved[6])
    grads = attention_varlen_backward(grad_out, grad_lse, *saved, *ctx.options, needs)
    grad_q, grad_k, grad_v = (g if need else None for g, need in zip(grads, needs, strict=True))
    return (
        grad_q,
        grad_k,
        grad_v,
        None,  # cu_seqlens_q
        None,  # cu_seqlens_k
        None,  # seed
        None,  # is_causal
        None,  # scale
        None,  # dropout_p
        None,  # backend
    )


def _varlen_backward_impl(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if backend != "reference":
        grads = like_inputs((q, k, v), needs)
        ends = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
        wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
        if backend == "triton":
            kernels = _triton_kernels()
            kernels.backward(
                kernels.AttentionCall(q, k, v, is_causal, scale, dropout_p, seed, cu_seqlens=ends),
                out, lse, grad_out, grad_lse, wanted,
            )  # fmt: skip
            return grads
        call = _native_call(q, k, v, out, lse, seed, is_causal, scale, dropout_p, cu_seqlens=ends)
        _set_gradients(call, grad_out, grad_lse, wanted)
        _run("attention_varlen", call, backward=True)
        return grads

    def recompute(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, seed, is_causal, scale, dropout_p, backend
        )

    return differentiate(recompute, (q, k, v), (grad_out, grad_lse), needs)


def _varlen_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return like_inputs((q, k, v), rest[-1])


attention_varlen_backward = register_op(
    "attention_varlen_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, Tensor? seed, Tensor out, Tensor lse, bool is_causal, float scale, "
    "float dropout_p, str backend, bool[] needs) -> (Tensor, Tensor, Tensor)",
    fake=_varlen_backward_fake,
    impl=_varlen_backward_impl,
)
attention_varlen = register_op(
    "attention_varlen",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seed, bool is_causal, "
    "float scale, float dropout_p, str backend) -> (Tensor out, Tensor lse)",
    fake=_varlen_fake,
    impl=_varlen_forward,
    setup_context=_setup_context,
    backward=_varlen_backward,
)

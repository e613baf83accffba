# SPDX-License-Identifier: Apache-2.0
"""Argument checks and their sentences, shared by public functions and fakes.

They read shapes, dtypes and devices; data only where `readable` says that this costs no synchronisation.

Every function takes the op's public name first ("attention"), then the argument's name, and raises a
TypeError or ValueError that says op, argument, expectation and value::

    _check.tensor("attention", "q", q)               # vk.attention: q must be a tensor, got list
    _check.ndim("attention", "q", q, 3, "[B, L, D]") # vk.attention: q must be [B, L, D], got [2, 64]
    _check.same_dtype("attention", q=q, k=k, v=v)    # vk.attention: q, k and v must have one dtype, got q ...
    _check.same_device("attention", q=q, k=k, v=v)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# General: used by every family.


def describe(x: Any) -> str:
    """Short text for a value in an error: the shape of a tensor, otherwise its repr."""
    return str(list(x.shape)) if isinstance(x, Tensor) else repr(x)


def shapes(**tensors: Tensor | None) -> str:
    """`q [2, 77, 16, 64], k [2, 77, 6, 64]`, for the end of a sentence about several tensors."""
    return ", ".join(f"{name} {describe(x)}" for name, x in tensors.items() if x is not None)


def tensor(op: str, name: str, x: Any) -> None:
    """`x` is a torch.Tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"vk.{op}: {name} must be a tensor, got {type(x).__name__}")


def floating(op: str, name: str, x: Any, dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """`x` is a tensor of one of the floating dtypes."""
    tensor(op, name, x)
    if x.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"vk.{op}: {name} must be floating ({allowed}), got {x.dtype}")


def integer(op: str, name: str, x: Any, dtypes: Sequence[torch.dtype] = (torch.int32, torch.int64)) -> None:
    """`x` is a tensor of one of the integer dtypes."""
    tensor(op, name, x)
    if x.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"vk.{op}: {name} must be {allowed}, got {x.dtype}")


def boolean(op: str, name: str, x: Any) -> None:
    """`x` is a bool tensor."""
    tensor(op, name, x)
    if x.dtype != torch.bool:
        raise TypeError(f"vk.{op}: {name} must be bool, got {x.dtype}")


def ndim(op: str, name: str, x: Tensor, dims: int, letters: str) -> None:
    """`x` has `dims` dimensions; `letters` shows them, for example "[B, L, H, D]"."""
    if x.ndim != dims:
        raise ValueError(f"vk.{op}: {name} must be {letters}, got {describe(x)}")


def shape(op: str, name: str, x: Tensor, expected: Sequence[int | None], letters: str) -> None:
    """`x` has the expected shape; None in `expected` stands for any size."""
    if x.ndim != len(expected) or any(
        e is not None and s != e for s, e in zip(x.shape, expected, strict=True)
    ):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"vk.{op}: {name} must be {letters} = [{wanted}], got {describe(x)}")


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """All given tensors have one dtype; None is skipped."""
    if len({x.dtype for x in tensors.values() if x is not None}) > 1:
        given = {name: x for name, x in tensors.items() if x is not None}
        got = ", ".join(f"{name} {x.dtype}" for name, x in given.items())
        raise TypeError(f"vk.{op}: {_join(list(given))} must have one dtype (outside autocast), got {got}")


def same_device(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are on one device; None is skipped."""
    if len({x.device for x in tensors.values() if x is not None}) > 1:
        given = {name: x for name, x in tensors.items() if x is not None}
        got = ", ".join(f"{name} {x.device}" for name, x in given.items())
        raise ValueError(f"vk.{op}: {_join(list(given))} must be on one device, got {got}")


def one_of(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"vk.{op}: {name} must be one of {tuple(allowed)}, got {value!r}")


def flag(op: str, name: str, value: Any) -> None:
    """`value` is a bool: an int or a tensor here is nearly always a misplaced argument."""
    if not isinstance(value, bool):
        raise TypeError(f"vk.{op}: {name} must be a bool, got {describe(value)}")


def probability(op: str, name: str, value: Any) -> None:
    """`value` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"vk.{op}: {name} must be a number, got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"vk.{op}: {name} must be in [0, 1], got {value}")


def number(op: str, name: str, value: Any) -> None:
    """`value` is an int or a float (a bool is neither)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"vk.{op}: {name} must be a number, got {type(value).__name__}")


def scalar(op: str, name: str, value: Any) -> None:
    """`value` is a number or a floating tensor of one element."""
    if isinstance(value, Tensor):
        floating(op, name, value)
        if value.numel() != 1:
            raise ValueError(f"vk.{op}: {name} must be a number or a 0-d tensor, got {describe(value)}")
    else:
        number(op, name, value)


def count(op: str, name: str, value: Any, minimum: int = 0) -> None:
    """`value` is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"vk.{op}: {name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"vk.{op}: {name} must be at least {minimum}, got {value}")


def readable(x: Tensor) -> bool:
    """Whether data may be looked at: a CPU tensor, neither traced nor inside a torch.func transform."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and not isinstance(x, torch._subclasses.FakeTensor)
        and torch._C._functorch.maybe_current_level() is None
    )


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# Linear layers, float and quantized.

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
GROUP_SIZES = (128, 64, 32)

#: Dtype of `weight_q` under each scheme of vk.quantize_weight.
SCHEME_DTYPES = {
    "w8a8": torch.int8,
    "w8a16": torch.int8,
    "w4a16": torch.uint8,
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
}


def linear_arguments(
    op: str,
    x: Any,
    features: tuple[int, int],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    weight: str = "weight",
) -> None:
    """What every linear op asks of its epilogue; `features` is (N, K) of the argument called `weight`."""
    outputs, inputs = features
    floating(op, "x", x)
    one_of(op, "activation", activation, ACTIVATIONS)
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(f"vk.{op}: x must be [..., K] with {weight}'s K = {inputs}, got {describe(x)}")
    if bias is not None:
        floating(op, "bias", bias)
        shape(op, "bias", bias, [outputs], "[N]")
        same_dtype(op, x=x, bias=bias)
    if residual is not None:
        floating(op, "residual", residual)
        shape(op, "residual", residual, [*x.shape[:-1], outputs], "[..., N]")
        # Under autocast half-precision activations meet a float32 residual stream; elsewhere the public
        # function has refused the mixture.
        if torch.promote_types(x.dtype, residual.dtype) != residual.dtype:
            raise TypeError(f"vk.{op}: residual must be as wide as x ({x.dtype}), got {residual.dtype}")


def quantization_group(op: str, scheme: str, group_size: Any, inputs: int | None = None) -> int | None:
    """The scheme is known, the group fits it and divides `inputs` where given; returns w4a16's group."""
    one_of(op, "scheme", scheme, tuple(SCHEME_DTYPES))
    if scheme != "w4a16":
        if group_size is not None:
            raise ValueError(f"vk.{op}: group_size belongs to 'w4a16', got {group_size!r} with {scheme!r}")
        return None
    if group_size is not None:
        one_of(op, "group_size", group_size, (None, *reversed(GROUP_SIZES)))
    if inputs is None:
        return group_size
    fitting = fitting_group(inputs, group_size)
    if fitting is None:
        wanted = "32, 64 or 128" if group_size is None else f"the group_size {group_size}"
        raise ValueError(f"vk.{op}: weight's K must be divisible by {wanted}, got K = {inputs}")
    return fitting


def fitting_group(inputs: int, group_size: int | None) -> int | None:
    """The group of a w4a16 weight: the one asked for, or the largest, if it divides `inputs`; else None."""
    candidates = GROUP_SIZES if group_size is None else (group_size,)
    return next((g for g in candidates if inputs % g == 0), None)


def quantized_weight(
    op: str, scheme: str, weight_q: Any, scale: Tensor | None, zero_point: Tensor | None
) -> tuple[int, int]:
    """The three canonical tensors make up a weight of the scheme; returns (N, K)."""
    one_of(op, "scheme", scheme, tuple(SCHEME_DTYPES))
    tensor(op, "weight_q", weight_q)
    letters = "[N, K / 2]" if scheme == "w4a16" else "[N, K]"
    if weight_q.dtype != SCHEME_DTYPES[scheme]:
        wanted = SCHEME_DTYPES[scheme]
        raise TypeError(f"vk.{op}: weight_q of {scheme!r} must be {wanted}, got {weight_q.dtype}")
    ndim(op, "weight_q", weight_q, 2, letters)
    outputs, inputs = weight_q.shape[0], weight_q.shape[1] * (2 if scheme == "w4a16" else 1)
    parts = (("scale", scale, scheme != "bf16"), ("zero_point", zero_point, scheme == "w4a16"))
    for name, x, needed in parts:
        if (x is not None) != needed:
            raise ValueError(f"vk.{op}: {scheme!r} takes {'a' if needed else 'no'} {name}, got {describe(x)}")
    if scale is not None and scale.dtype != torch.float32:
        raise TypeError(f"vk.{op}: scale must be float32, got {scale.dtype}")
    if scheme == "w4a16" and scale is not None and zero_point is not None:
        ndim(op, "scale", scale, 2, "[N, K / G]")
        groups = scale.shape[1]
        if scale.shape[0] != outputs or all(groups * g != inputs for g in GROUP_SIZES):
            raise ValueError(
                f"vk.{op}: scale must be [N, K / G] with G 32, 64 or 128, "
                f"got {describe(scale)} for N, K = {outputs}, {inputs}"
            )
        if zero_point.dtype != torch.uint8:
            raise TypeError(f"vk.{op}: zero_point must be uint8, got {zero_point.dtype}")
        shape(op, "zero_point", zero_point, scale.shape, "[N, K / G]")
    elif scale is not None:
        shape(op, "scale", scale, [outputs], "[N]")
    same_device(op, weight_q=weight_q, scale=scale, zero_point=zero_point)
    return outputs, inputs


def static_input_scale(op: str, scheme: str, input_scale: Tensor | None) -> None:
    """A static activation scale belongs to a scheme that quantizes activations, and is one number."""
    if input_scale is None:
        return
    if scheme not in ("w8a8", "fp8"):
        raise ValueError(
            f"vk.{op}: input_scale belongs to 'w8a8' and 'fp8', which quantize activations, not to {scheme!r}"
        )
    floating(op, "input_scale", input_scale)
    ndim(op, "input_scale", input_scale, 0, "a number or a 0-d tensor")


# Top-k similarity.

METRICS = ("dot", "cosine", "l2")


def topk_similarity(queries: Any, database: Any, k: Any, metric: Any, mask: Any) -> None:
    """Arguments of vk.topk_similarity."""
    op = "topk_similarity"
    floating(op, "queries", queries)
    floating(op, "database", database)
    ndim(op, "queries", queries, 2, "[N, D]")
    ndim(op, "database", database, 2, "[M, D]")
    if queries.shape[1] != database.shape[1]:
        raise ValueError(
            f"vk.{op}: queries and database must have one width, got {shapes(queries=queries, database=database)}"
        )
    same_dtype(op, queries=queries, database=database)
    same_device(op, queries=queries, database=database, mask=mask if isinstance(mask, Tensor) else None)
    one_of(op, "metric", metric, METRICS)
    best_of(op, k, database.shape[0], "database rows")
    if mask is not None:
        allowed_rows(op, "mask", mask, queries.shape[0], database.shape[0])


def best_of(op: str, k: Any, available: int, things: str) -> None:
    """`k` is an int from 1 to the number of `things` there are."""
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"vk.{op}: k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"vk.{op}: k must be at least 1, got {k}")
    if k > available:
        raise ValueError(f"vk.{op}: k must be at most the number of {things}, {available}, got {k}")


def allowed_rows(op: str, name: str, mask: Any, queries: int, rows: int) -> None:
    """`mask` is bool, [M] or [N, M]."""
    boolean(op, name, mask)
    if tuple(mask.shape) not in ((rows,), (queries, rows)):
        raise ValueError(
            f"vk.{op}: {name} must be [M] = [{rows}] or [N, M] = [{queries}, {rows}], got {describe(mask)}"
        )


def zero_shot(image_features: Any, class_features: Any, logit_scale: Any, k: Any) -> None:
    """Arguments of vk.zero_shot."""
    op = "zero_shot"
    floating(op, "image_features", image_features)
    floating(op, "class_features", class_features)
    ndim(op, "image_features", image_features, 2, "[N, D]")
    if class_features.ndim not in (2, 3):
        raise ValueError(
            f"vk.{op}: class_features must be [C, D] or [C, P, D], got {describe(class_features)}"
        )
    if class_features.shape[-1] != image_features.shape[1]:
        given = shapes(image_features=image_features, class_features=class_features)
        raise ValueError(f"vk.{op}: image_features and class_features must have one width, got {given}")
    if class_features.ndim == 3 and class_features.shape[1] == 0:
        raise ValueError(
            f"vk.{op}: class_features must hold at least one prompt per class, got {describe(class_features)}"
        )
    same_dtype(op, image_features=image_features, class_features=class_features)
    same_device(op, image_features=image_features, class_features=class_features)
    if isinstance(logit_scale, Tensor):
        floating(op, "logit_scale", logit_scale)
        ndim(op, "logit_scale", logit_scale, 0, "a float or a 0-d tensor")
    else:
        number(op, "logit_scale", logit_scale)
        if not 0.0 < logit_scale < float("inf"):
            raise ValueError(f"vk.{op}: logit_scale must be positive and finite, got {logit_scale}")
    best_of(op, k, class_features.shape[0], "classes")


# Attention.


def attention(
    op: str, q: Any, k: Any, v: Any, *, bias: Any = None, key_mask: Any = None, layout: str = "[B, L, H, D]"
) -> None:
    """Tensors of attention in either layout: `[B, L, H, D]`, or `[T, H, D]` for packed sequences."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        floating(op, name, x)
        ndim(op, name, x, layout.count(",") + 1, layout)
    same_dtype(op, q=q, k=k, v=v)
    same_device(op, q=q, k=k, v=v, bias=bias, key_mask=key_mask)
    packed = len(q.shape) == 3
    if not packed and not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"vk.{op}: q, k and v must have one batch size ({shapes(q=q, k=k, v=v)})")
    if k.shape[-3] != v.shape[-3]:
        raise ValueError(f"vk.{op}: k and v must have one length ({shapes(k=k, v=v)})")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"vk.{op}: k and v must have the same number of heads ({shapes(k=k, v=v)})")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0:
        raise ValueError(
            f"vk.{op}: k has {k.shape[-2]} heads, which does not divide q's {q.shape[-2]} "
            f"({shapes(q=q, k=k)})"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"vk.{op}: q and k must have one head dim ({shapes(q=q, k=k)})")
    if q.shape[-1] == 0:
        raise ValueError(f"vk.{op}: the head dim must be at least 1 ({shapes(q=q, k=k)})")
    if bias is not None:
        _attention_bias(op, bias, q, k)
    if key_mask is not None:
        boolean(op, "key_mask", key_mask)
        shape(op, "key_mask", key_mask, (q.shape[0], k.shape[1]), "[B, Lk]")


def _attention_bias(op: str, bias: Any, q: Tensor, k: Tensor) -> None:
    tensor(op, "bias", bias)
    if bias.dtype == torch.bool:
        raise TypeError(
            f"vk.{op}: bias must be floating, got torch.bool; mask whole keys with key_mask, "
            "single scores with -inf"
        )
    sums = torch.promote_types(q.dtype, torch.float32)
    if bias.dtype not in (q.dtype, sums):
        allowed = f"{q.dtype}" if q.dtype == sums else f"{q.dtype} (as q) or {sums}"
        raise TypeError(f"vk.{op}: bias must be {allowed}, got {bias.dtype}")
    ndim(op, "bias", bias, 4, "[B|1, H|1, Lq, Lk]")
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if bias.shape[2:] != full[2:] or bias.shape[0] not in (1, full[0]) or bias.shape[1] not in (1, full[1]):
        raise ValueError(f"vk.{op}: bias must be [B|1, H|1, Lq, Lk] of {list(full)}, got {describe(bias)}")


def cu_seqlens(op: str, q: Tensor, k: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any) -> None:
    """Boundaries of packed sequences: dtype, shape and device; `boundaries` checks the values."""
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        integer(op, name, x)
        if x.ndim != 1 or x.shape[0] == 0:
            raise ValueError(f"vk.{op}: {name} must be [B + 1], got {describe(x)}")
    same_device(op, q=q, k=k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"vk.{op}: cu_seqlens_q and cu_seqlens_k must count the same sequences "
            f"({shapes(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)})"
        )


def boundaries(op: str, name: str, x: Tensor, tokens: int) -> list[int]:
    """The values of readable cu_seqlens, which must rise from 0 to the number of packed tokens."""
    values = x.tolist()
    if values[0] != 0 or values[-1] != tokens:
        raise ValueError(
            f"vk.{op}: {name} must go from 0 to {tokens} (the tokens), got {values[0]} to {values[-1]}"
        )
    for b, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            raise ValueError(f"vk.{op}: {name} must not decrease, got {start} then {end} at sequence {b}")
    return values

# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses whose logits are never written: the five public functions. Their ops: `_contrastive_ops.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops import _check, _contrastive_cuda, _triton, dispatch, measured
from vlmkernels.ops._contrastive_group import GroupLoss, group_sigmoid, group_softmax
from vlmkernels.ops._contrastive_ops import REDUCTIONS, Arguments, one_pass_contrastive, softmax_contrastive
from vlmkernels.ops._library import autocast_dtype, wants_gradients
from vlmkernels.ops.reference import contrastive as reference

#: Dot products up to this size are kept from forward to backward instead of being formed twice.
KEEP_BYTES = 64 * 2**20

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def clip_loss(
    image_features: Tensor,  # [..., N, D]
    text_features: Tensor,  # [..., N, D]
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    group: Any = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """`(CE(Z, arange) + CE(Z.T, arange)) / 2`, `Z = logit_scale * U @ V.T + logit_bias` (Radford 2021, figure 3).

    Args:
        image_features: U, [..., N, D], floating, normalised by the caller; leading dimensions are independent problems
            whose losses are averaged.
        text_features: V, [..., N, D].
        logit_scale: number or 0-d tensor, already exponentiated.
        logit_bias: number or 0-d tensor; it cancels in the softmax, so its gradient is zero.
        label_smoothing: s in [0, 1); targets are (1 - s) * one-hot + s / N.
        group: a `torch.distributed` process group whose ranks pass their shards, [N, D] each, of any number of rows;
            see below. None: this process alone.
        compute_dtype: dtype of the products (sums are float32); default, autocast's or the features' own.
        backend: None, "reference", "cpu" or "triton"; see `vk.backends()`.

    Returns:
        Scalar, float32 (float64 for float64). NaN for N = 0. Deterministic on every backend.

    With a group every rank returns the loss of the concatenated batch, and each logit is computed once in the whole
    group. Backward differentiates the sum of the ranks' losses by the features and their mean by logit_scale and
    logit_bias: after averaging over ranks, as DDP does, every parameter's gradient is that of the one loss. All ranks
    call forward and backward in the same order; a rank may have no rows. A rank that dies makes the others' call raise
    within the group's timeout. Such a call is not compiled: `torch.compile` leaves the graph for it.

    Raises:
        TypeError: not tensors, not floating, or of different dtypes outside autocast; group is no process group.
        ValueError: shapes differ between the sides or, in D, between ranks; label_smoothing is out of range.
        NotImplementedError: the named backend cannot serve the call; or second derivatives, outside the reference.

    Example:
        >>> features = torch.nn.functional.normalize(torch.eye(4), dim=-1)
        >>> vk.clip_loss(features, features, 10.0) < 1e-3
        tensor(True)
    """
    op = "clip_loss"
    compute = _check_features(
        op, "image_features", image_features, "text_features", text_features, compute_dtype
    )
    _check_same_rows(op, image_features, text_features)
    _check.scalar(op, "logit_scale", logit_scale)
    if logit_bias is not None:
        _check.scalar(op, "logit_bias", logit_bias)
    _check.probability(op, "label_smoothing", label_smoothing)
    if group is not None:
        settings = _over_group(op, group, image_features, text_features, compute, backend, label_smoothing)
        bias = None if logit_bias is None else _as_scalar(logit_bias, image_features)
        return group_softmax(
            settings, image_features, text_features, _as_scalar(logit_scale, image_features), bias
        )
    chosen = _choose(op, image_features, text_features, compute, backend)
    if chosen == "reference":
        return reference.clip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias=logit_bias,
            label_smoothing=label_smoothing,
            compute_dtype=compute,
        )
    return _softmax_loss(
        op,
        chosen,
        image_features,
        text_features,
        logit_scale,
        compute,
        bias=None if logit_bias is None else _as_scalar(logit_bias, image_features),
        columns=True,
        smoothing=label_smoothing,
    )


def siglip_loss(
    image_features: Tensor,  # [..., N, D]
    text_features: Tensor,  # [..., N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: Any = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """`-(1 / N) sum_ij log sigmoid(y_ij * z_ij)`, y = 1 on the diagonal, -1 elsewhere (Zhai et al. 2023, equation 2).

    Gradients are taken in forward, while each logit is at hand: 6 N^2 D operations in all, no N x N memory. Backward
    multiplies them by the incoming gradient.

    Args:
        image_features: [..., N, D], floating, normalised by the caller; leading dimensions are independent problems
            whose losses are averaged.
        text_features: [..., N, D].
        logit_scale: number or 0-d tensor, already exponentiated.
        logit_bias: number or 0-d tensor.
        group: a `torch.distributed` process group whose ranks pass their shards, [N, D] each, as in
            `clip_loss`; labels are compared over the whole group.
        compute_dtype: dtype of the products (sums are float32); default, autocast's or the features' own.
        backend: None, "reference", "cpu" or "triton"; see `vk.backends()`.

    Returns:
        Scalar, float32 (float64 for float64): all N * N pairs, divided by N. NaN for N = 0. Deterministic.

    Raises:
        TypeError, ValueError, NotImplementedError: as `clip_loss`.

    Example:
        >>> features = torch.nn.functional.normalize(torch.eye(4), dim=-1)
        >>> round(vk.siglip_loss(features, features, 10.0, -10.0).item(), 4)
        0.6933
    """
    op = "siglip_loss"
    compute = _check_features(
        op, "image_features", image_features, "text_features", text_features, compute_dtype
    )
    _check_same_rows(op, image_features, text_features)
    _check.scalar(op, "logit_scale", logit_scale)
    _check.scalar(op, "logit_bias", logit_bias)
    if group is not None:
        settings = _over_group(op, group, image_features, text_features, compute, backend)
        scale, bias = (_as_scalar(x, image_features) for x in (logit_scale, logit_bias))
        return group_sigmoid(settings, image_features, text_features, scale, bias)
    chosen = _choose(op, image_features, text_features, compute, backend)
    if chosen == "reference":
        return reference.siglip_loss(
            image_features, text_features, logit_scale, logit_bias, compute_dtype=compute
        )
    return _one_pass_loss(
        op,
        chosen,
        image_features,
        text_features,
        logit_scale,
        compute,
        bias=_as_scalar(logit_bias, image_features),
        sigmoid=True,
    )


def multi_positive_loss(
    image_features: Tensor,  # [..., N, D]
    text_features: Tensor,  # [..., M, D]
    logit_scale: Tensor | float,
    image_labels: Tensor,  # [..., N]
    text_labels: Tensor,  # [..., M]
    *,
    group: Any = None,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """`(mean_i CE(Z_i, Y_i / |Y_i|) + mean_j CE(Z.T_j, Y.T_j / |Y.T_j|)) / 2`, `Y_ij = [label_i = label_j]`.

    The objective of UniCL (Yang et al. 2022, equation 3).

    Args:
        image_features: [..., N, D], floating, normalised by the caller; leading dimensions are independent problems
            whose losses are averaged.
        text_features: [..., M, D].
        logit_scale: number or 0-d tensor, already exponentiated.
        image_labels: [..., N], int64; any values.
        text_labels: [..., M], int64.
        group: a `torch.distributed` process group whose ranks pass their shards, [N, D] each, as in
            `clip_loss`; labels are compared over the whole group.
        compute_dtype: dtype of the products (sums are float32); default, autocast's or the features' own.
        backend: None, "reference", "cpu" or "triton"; see `vk.backends()`.

    Returns:
        Scalar, float32 (float64 for float64). Rows (columns) without a positive leave their direction's mean; NaN where
        none is left. Deterministic.

    Raises:
        TypeError, ValueError, NotImplementedError: as `clip_loss`; labels that are not int64 of the features' rows.

    Example:
        >>> images, texts = torch.eye(3), torch.eye(3)[[0, 0, 1]]
        >>> labels = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])
        >>> round(vk.multi_positive_loss(images, texts, 1.0, *labels).item(), 4)
        0.7858
    """
    op = "multi_positive_loss"
    compute = _check_features(
        op, "image_features", image_features, "text_features", text_features, compute_dtype
    )
    _check.scalar(op, "logit_scale", logit_scale)
    _check_index(op, "image_labels", image_labels, image_features)
    _check_index(op, "text_labels", text_labels, text_features)
    if group is not None:
        settings = _over_group(op, group, image_features, text_features, compute, backend)
        scale = _as_scalar(logit_scale, image_features)
        return group_softmax(settings, image_features, text_features, scale, None, image_labels, text_labels)
    chosen = _choose(op, image_features, text_features, compute, backend)
    if chosen == "reference":
        return reference.multi_positive_loss(
            image_features, text_features, logit_scale, image_labels, text_labels, compute_dtype=compute
        )
    return _softmax_loss(
        op,
        chosen,
        image_features,
        text_features,
        logit_scale,
        compute,
        columns=True,
        row_labels=image_labels,
        col_labels=text_labels,
    )


def info_nce(
    queries: Tensor,  # [..., N, D]
    keys: Tensor,  # [..., M, D]
    logit_scale: Tensor | float,
    *,
    positives: Tensor | None = None,  # [..., N]
    key_mask: Tensor | None = None,  # [..., M]
    reduction: str = "mean",
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """`CE(Z, positives)` with `Z = logit_scale * Q @ K.T`, one direction (van den Oord et al. 2018, equation 4).

    Args:
        queries: [..., N, D], floating, normalised by the caller; leading dimensions are independent problems.
        keys: [..., M, D]; M may exceed N (memory banks, hard negatives).
        logit_scale: number or 0-d tensor, the inverse of the temperature.
        positives: [..., N], int64, each row's key; default `arange(N)`.
        key_mask: [..., M], bool, True = usable; a positive must be.
        reduction: "mean", "sum" or "none".
        compute_dtype: dtype of the products (sums are float32); default, autocast's or the features' own.
        backend: None, "reference", "cpu" or "triton"; see `vk.backends()`.

    Returns:
        Scalar, or [..., N] with "none"; float32 (float64 for float64). Deterministic.

    Raises:
        TypeError, ValueError, NotImplementedError: as `clip_loss`; positives that are no usable key.

    Example:
        >>> queries, bank = torch.eye(2, 4), torch.eye(4)
        >>> round(vk.info_nce(queries, bank, 1.0).item(), 4)
        0.7437
    """
    op = "info_nce"
    compute = _check_features(op, "queries", queries, "keys", keys, compute_dtype)
    _check.scalar(op, "logit_scale", logit_scale)
    _check.one_of(op, "reduction", reduction, REDUCTIONS)
    if positives is not None:
        _check_index(op, "positives", positives, queries)
    elif keys.shape[-2] < queries.shape[-2]:
        raise ValueError(
            f"vk.{op}: without positives, row i's positive is key i, so keys must have at least as many rows as "
            f"queries, got {_check.shapes(queries=queries, keys=keys)}"
        )
    if key_mask is not None:
        _check.boolean(op, "key_mask", key_mask)
        _check.same_device(op, keys=keys, key_mask=key_mask)
        _check.shape(op, "key_mask", key_mask, keys.shape[:-1], "[..., M]")
    chosen = _choose(op, queries, keys, compute, backend)
    if chosen != "cpu":
        if positives is not None:
            _check_values(op, "positives", positives, keys.shape[-2])
        _check_usable(op, positives, key_mask, queries)
    if chosen == "reference":
        return reference.info_nce(
            queries,
            keys,
            logit_scale,
            positives=positives,
            key_mask=key_mask,
            reduction=reduction,
            compute_dtype=compute,
        )
    return _softmax_loss(
        op,
        chosen,
        queries,
        keys,
        logit_scale,
        compute,
        positives=positives,
        key_mask=key_mask,
        reduction=reduction,
    )


def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [K, D]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [K]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: Tensor | float = 1.0,
    reduction: str = "mean",
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """`CE(logit_scale * hidden @ weight.T + bias, targets)`, logits never written.

    For captioning heads and 100,000-class classifiers. With "mean" or "sum", gradients are taken in forward, chunk of
    rows by chunk: 6 N K D operations in all.

    Args:
        hidden: [..., D], floating.
        weight: [K, D], one row per class.
        targets: [...], int64 classes.
        bias: [K], float32 or hidden's dtype.
        ignore_index: targets of this value count nowhere.
        label_smoothing: s in [0, 1); targets are (1 - s) * one-hot + s / K.
        logit_scale: number or 0-d tensor.
        reduction: "mean" (over the targets that count), "sum" or "none" (0 for ignored ones).
        compute_dtype: dtype of the products (sums are float32); default, autocast's or hidden's own.
        backend: None, "reference", "cpu" or "triton"; see `vk.backends()`.

    Returns:
        Scalar, or [...] with "none"; float32 (float64 for float64). All ignored gives NaN, as torch. Deterministic.

    Raises:
        TypeError, ValueError, NotImplementedError: as `clip_loss`; targets outside [0, K).

    Example:
        >>> hidden, weight = torch.eye(2, 3), torch.eye(5, 3)
        >>> round(vk.linear_cross_entropy(hidden, weight, torch.tensor([0, -100])).item(), 4)
        0.9048
    """
    op = "linear_cross_entropy"
    compute = _check_operands(op, "hidden", hidden, "weight", weight, compute_dtype)
    _check.ndim(op, "weight", weight, 2, "[K, D]")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"vk.{op}: hidden must end in weight's D = {weight.shape[1]}, got "
            f"{_check.shapes(hidden=hidden, weight=weight)}"
        )
    _check_index(op, "targets", targets, hidden)
    if not isinstance(ignore_index, int):
        raise TypeError(f"vk.{op}: ignore_index must be an int, got {ignore_index!r}")
    if bias is not None:
        _check.floating(op, "bias", bias)
        _check.shape(op, "bias", bias, (weight.shape[0],), "[K]")
        _check.same_device(op, hidden=hidden, bias=bias)
    _check.scalar(op, "logit_scale", logit_scale)
    _check.probability(op, "label_smoothing", label_smoothing)
    _check.one_of(op, "reduction", reduction, REDUCTIONS)
    chosen = _choose(op, hidden, weight, compute, backend)
    if chosen != "cpu":
        _check_values(op, "targets", targets, weight.shape[0], ignore_index)
    if chosen == "reference":
        return reference.linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            logit_scale=logit_scale,
            reduction=reduction,
            compute_dtype=compute,
        )
    rows = hidden.reshape(targets.numel(), hidden.shape[-1])
    options: dict[str, Any] = {
        "key_bias": None if bias is None else bias.to(torch.float32),
        "positives": targets.reshape(-1),
        "ignore_index": ignore_index,
        "smoothing": label_smoothing,
        "reduction": reduction,
    }
    if reduction == "none":
        return _softmax_loss(op, chosen, rows, weight, logit_scale, compute, **options).reshape(targets.shape)
    return _one_pass_loss(op, chosen, rows, weight, logit_scale, compute, **options)


# Checks and choices shared by the five functions.


def _check_operands(
    op: str, a: str, left: Tensor, b: str, right: Tensor, compute: torch.dtype | None
) -> torch.dtype:
    _check.floating(op, a, left)
    _check.floating(op, b, right)
    _check.same_device(op, **{a: left, b: right})
    if compute is not None:
        if compute not in _check.FLOATING:
            raise TypeError(f"vk.{op}: compute_dtype must be a floating dtype, got {compute!r}")
        return compute
    autocast = autocast_dtype(left.device.type)
    if autocast is not None and torch.float64 not in (left.dtype, right.dtype):
        return autocast
    _check.same_dtype(op, **{a: left, b: right})
    return left.dtype


def _check_features(
    op: str, a: str, left: Tensor, b: str, right: Tensor, compute: torch.dtype | None
) -> torch.dtype:
    dtype = _check_operands(op, a, left, b, right, compute)
    if (
        left.ndim < 2
        or left.ndim != right.ndim
        or left.shape[:-2] != right.shape[:-2]
        or left.shape[-1] != right.shape[-1]
    ):
        raise ValueError(
            f"vk.{op}: {a} and {b} must be [..., N, D] and [..., M, D] with the same leading dimensions and D, got "
            f"{_check.shapes(**{a: left, b: right})}"
        )
    return dtype


def _check_same_rows(op: str, image_features: Tensor, text_features: Tensor) -> None:
    if image_features.shape[-2] != text_features.shape[-2]:
        raise ValueError(
            f"vk.{op}: image_features and text_features must have as many rows, got "
            f"{_check.shapes(image_features=image_features, text_features=text_features)}"
        )


def _check_index(op: str, name: str, index: Tensor, rows: Tensor) -> None:
    _check.integer(op, name, index, (torch.int64,))
    _check.shape(op, name, index, rows.shape[:-1], "one entry per row")
    _check.same_device(op, **{"features": rows, name: index})


def _check_values(op: str, name: str, index: Tensor, count: int, ignore_index: int | None = None) -> None:
    """What the kernels check for themselves: indices in range, where they can be read without waiting for a device."""
    if not _readable(index):
        return
    bad = (index < 0) | (index >= count)
    if ignore_index is not None:
        bad &= index != ignore_index
    if bad.any():
        raise ValueError(f"vk.{op}: {name} must be in [0, {count}), got {index[bad][0].item()}")


def _check_usable(op: str, positives: Tensor | None, key_mask: Tensor | None, queries: Tensor) -> None:
    if key_mask is None or not _readable(key_mask):
        return
    if positives is None:
        usable = key_mask[..., : queries.shape[-2]]
    elif not _readable(positives):
        return
    else:
        usable = key_mask.gather(-1, positives)
    if not usable.all():
        raise ValueError(f"vk.{op}: positives must be usable keys, but key_mask leaves some out")


def _readable(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and not dispatch._inside_transform()
    )


def _over_group(
    op: str,
    group: Any,
    left: Tensor,
    right: Tensor,
    compute: torch.dtype,
    backend: str | None,
    smoothing: float = 0.0,
) -> GroupLoss:
    """The loss's settings over a process group, its backend chosen."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"vk.{op}: group must be a torch.distributed process group, got {type(group).__name__}"
        )
    if left.ndim != 2:
        raise ValueError(
            f"vk.{op}: with a group, features must be [N, D], got {_check.shapes(left=left, right=right)}"
        )
    facts = {"dtypes": (left.dtype, right.dtype), "width": left.shape[-1], "group": True}
    name = dispatch.choose(op, dispatch.Call(left.device.type, compute, facts), backend)
    return GroupLoss(op, group, compute, name, smoothing)


def _choose(op: str, left: Tensor, right: Tensor, compute: torch.dtype, backend: str | None) -> str:
    logits = left.numel() // max(left.shape[-1], 1) * right.shape[-2]
    facts = {"dtypes": (left.dtype, right.dtype), "width": left.shape[-1], "logits": logits}
    return dispatch.choose(op, dispatch.Call(left.device.type, compute, facts, 4 * logits), backend)


def _cpu_reasons(call: dispatch.Call) -> list[str]:
    reasons = []
    if _native.cpu_reason is not None:
        reasons.append(_native.cpu_reason)
    if call.device != "cpu":
        reasons.append(f"it serves cpu tensors, not {call.device}")
    if call.dtype not in _KERNEL_DTYPES:
        reasons.append(f"products are float32 or bfloat16, not {call.dtype}")
    if any(dtype not in _KERNEL_DTYPES for dtype in call.facts["dtypes"]):
        reasons.append(
            f"features must be float32 or bfloat16, not {' and '.join(map(str, call.facts['dtypes']))}"
        )
    return reasons


def _triton_reasons(call: dispatch.Call) -> list[str]:
    reasons = _triton.reasons(call)
    dtypes = (call.dtype, *call.facts["dtypes"])
    if any(dtype not in _TRITON_DTYPES for dtype in dtypes):
        shown = " and ".join(map(str, dict.fromkeys(dtypes)))
        reasons.append(f"features and products are float32, bfloat16 or float16, not {shown}")
    return reasons


for _op in ("clip_loss", "siglip_loss", "multi_positive_loss", "info_nce", "linear_cross_entropy"):
    dispatch.register_backend(_op, "cpu", _cpu_reasons, priority=10)
    if _op != "multi_positive_loss":  # positives of those kernels are indices, not labels
        dispatch.register_backend(
            _op,
            "cuda",
            _contrastive_cuda.reasons,
            priority=_triton.PRIORITY,
            not_default=measured.unless_fastest(_op, "cuda"),
        )
    dispatch.register_backend(
        _op, "triton", _triton_reasons, priority=_triton.PRIORITY, not_default=_triton.not_default
    )


def _as_scalar(x: Tensor | float, features: Tensor) -> Tensor:
    # float32 whatever it was: a learned scale is a float32 parameter, and a number has no gradient to lose. Only
    # beside float64 features, which the kernels do not take, float64.
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    if isinstance(x, Tensor):
        return x.reshape(()).to(dtype=dtype, device=features.device)
    return torch.full((), float(x), dtype=dtype, device=features.device)


def _softmax_loss(
    op: str,
    backend: str,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor | float,
    compute: torch.dtype,
    **options: Any,
) -> Tensor:
    call = Arguments(q, k, _as_scalar(logit_scale, q), compute=compute, **options)
    logits = math.prod(q.shape[:-1]) * k.shape[-2]
    keep = (
        backend != "cuda"
        and 4 * logits <= KEEP_BYTES
        and any(wants_gradients(q, k, call.scale, call.key_bias))
    )
    return softmax_contrastive(*call, keep, backend, op)[0]


def _one_pass_loss(
    op: str,
    backend: str,
    q: Tensor,
    k: Tensor,
    logit_scale: Tensor | float,
    compute: torch.dtype,
    *,
    sigmoid: bool = False,
    **options: Any,
) -> Tensor:
    call = Arguments(q, k, _as_scalar(logit_scale, q), compute=compute, **options)
    needs = wants_gradients(q, k, call.scale, call.bias, call.key_bias)
    return one_pass_contrastive(*call, sigmoid, needs, backend, op)[0]

# SPDX-License-Identifier: Apache-2.0
"""Exact top-k similarity and zero-shot classification: signatures, docstrings, schemas, gradients.

The scores' arithmetic and the search live in `reference/`; the index that keeps a database in `flat_index.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmkernels import _native

from . import _check, _topk_cpu, _topk_cpu_backward, _topk_cuda, _topk_triton, dispatch
from ._library import differentiate, follow_autocast, like_inputs, register_op, wants_gradients
from .reference import topk as reference

# Logits that the reference keeps for its gradient are worth a warning from here on.
_WARN_BYTES = 16 * 2**20
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def topk_similarity(
    queries: Tensor,  # [N, D]
    database: Tensor,  # [M, D]
    k: int,
    *,
    metric: str = "dot",
    mask: Tensor | None = None,  # [M] or [N, M]
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k database rows most similar to every query, exactly, without the N x M similarities.

    ```
    scores[n, j] = s(queries[n], database[indices[n, j]]), the k largest s(queries[n], .) in descending order
    s(q, x) = sum_d q_d x_d                              "dot"
              sum_d q_d x_d / (|q| |x|)                  "cosine", each norm at least 1e-12
              -sum_d (q_d - x_d)^2                       "l2"
    ```

    The score that is returned and ranked by is computed in float64, its terms added in a fixed order, and rounded to
    float32; equal scores come in ascending index, NaN comes last. So indices depend neither on the batch, nor on the
    thread count, nor on the backend. Rows that an error bound rules out are never scored exactly; at most a few MiB
    of approximate scores exist at once.

    Args:
        queries: [N, D], floating.
        database: [M, D], same dtype and device. Under autocast both are cast to its dtype, as a matmul's operands are.
        k: 1 to M.
        metric: "dot", "cosine" or "l2" (negated squared distance, so that larger is better everywhere).
        mask: bool, True = allowed, [M] for all queries or [N, M].
        backend: None, "reference", "cpu", "cuda" or "triton"; see `vk.backends()`.

    Returns:
        `(scores, indices)`: [N, k] float32 (float64 for float64 inputs), descending, and [N, k] int64. Where the mask
        leaves fewer than k rows, the rest is index -1 with score -inf.

    Raises:
        TypeError: dtypes that are not floating or differ, a mask that is not bool.
        ValueError: shapes that do not fit, k < 1 or k > M, an unknown metric.
        NotImplementedError: the named backend cannot serve the call.

    Scores have gradients to queries and database (indices are taken as constant, entries of index -1 have none); second
    derivatives and `torch.vmap` work on the reference path.

    Example:
        >>> database = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> scores, indices = vk.topk_similarity(torch.tensor([[0.0, 2.0]]), database, k=2, metric="cosine")
        >>> indices.tolist()
        [[2, 1]]
    """
    _check.tensor("topk_similarity", "queries", queries)
    _check.tensor("topk_similarity", "database", database)
    queries, database = follow_autocast(queries, database)  # type: ignore[assignment]
    _check.topk_similarity(queries, database, k, metric, mask)
    (n, width), m = queries.shape, database.shape[0]
    facts = {
        "n": n,
        "m": m,
        "width": width,
        "k": k,
        "metric": metric,
        "mask_dims": 0 if mask is None else mask.ndim,
    }
    call = dispatch.Call(queries.device.type, queries.dtype, facts)
    chosen = dispatch.choose("topk_similarity", call, backend)
    if chosen == "reference":
        return reference.topk_similarity(queries, database, k, metric, mask)
    return topk_similarity_op(queries, database, k, metric, mask, chosen)


def zero_shot(
    image_features: Tensor,  # [N, D]
    class_features: Tensor,  # [C, D] or [C, P, D]
    logit_scale: Tensor | float = 1.0,
    *,
    k: int = 5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Zero-shot classification: the k most probable classes of every image and the log-sum-exp over all classes.

    ```
    c_j    = normalise(mean_p normalise(class_features[j, p]))     or normalise(class_features[j])
    l[n,j] = logit_scale * <normalise(image_features[n]), c_j>
    lse[n] = log sum_j exp(l[n, j])
    probabilities[n, i] = exp(l[n, indices[n, i]] - lse[n])
    ```

    This is CLIP's classifier with an ensemble of prompts (Radford et al. 2021, section 3.1.4). Classes rank as in
    `vk.topk_similarity` with metric "cosine": equal cosines in ascending index, NaN last, independent of batch,
    threads and backend. `-log probabilities` of one class, or `lse - l`, is its cross-entropy.

    Args:
        image_features: [N, D], floating, normalised here.
        class_features: [C, D], or [C, P, D] with P >= 1 prompts per class, averaged here; same dtype and device. Under
            autocast both are cast to its dtype.
        logit_scale: positive float or 0-d tensor, already exponentiated.
        k: 1 to C.
        backend: None, "reference", "cpu", "cuda" or "triton"; see `vk.backends()`.

    Returns:
        `(probabilities, indices, lse)`: [N, k] descending, [N, k] int64, and [N]; the floating ones float32 (float64
        for float64 inputs).

    Raises:
        TypeError: dtypes that are not floating or differ, a logit_scale that is no number.
        ValueError: shapes that do not fit, k < 1 or k > C, a logit_scale number that is not positive and finite.
        NotImplementedError: the named backend cannot serve the call.

    Probabilities and lse have gradients to image_features, class_features and logit_scale (indices are taken as
    constant); second derivatives and `torch.vmap` work on the reference path, which alone keeps [N, C] logits, in
    float64, for its gradient.

    Example:
        >>> images, classes = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> probabilities, indices, lse = vk.zero_shot(images, classes, 100.0, k=1)
        >>> indices.item(), round(lse.item())
        (1, 100)
    """
    _check.tensor("zero_shot", "image_features", image_features)
    _check.tensor("zero_shot", "class_features", class_features)
    image_features, class_features = follow_autocast(image_features, class_features)  # type: ignore[assignment]
    _check.zero_shot(image_features, class_features, logit_scale, k)
    if not isinstance(logit_scale, Tensor):
        dtype = reference.score_dtype(image_features)
        logit_scale = torch.full((), logit_scale, dtype=dtype, device=image_features.device)
    n, c, width = image_features.shape[0], class_features.shape[0], image_features.shape[1]
    prompts = class_features.shape[1] if class_features.ndim == 3 else 0
    scale_kind = (logit_scale.device, logit_scale.dtype)
    facts = {"n": n, "c": c, "width": width, "k": k, "prompts": prompts, "logit_scale": scale_kind}
    keeps = any(wants_gradients(image_features, class_features, logit_scale))
    product = 8 * n * c if keeps else 0
    call = dispatch.Call(
        image_features.device.type, image_features.dtype, facts, product if product > _WARN_BYTES else 0
    )
    chosen = dispatch.choose("zero_shot", call, backend)
    if chosen == "reference":
        probabilities, lse, indices = reference.zero_shot(image_features, class_features, logit_scale, k)
    else:
        probabilities, lse, indices = zero_shot_op(image_features, class_features, logit_scale, k, chosen)
    return probabilities, indices, lse


def _cpu_reasons(call: dispatch.Call) -> list[str]:
    reasons = []
    if _native.cpu_reason is not None:
        reasons.append(_native.cpu_reason)
    if call.device != "cpu":
        reasons.append(f"it serves cpu tensors, not {call.device}")
    if call.dtype not in _KERNEL_DTYPES:
        reasons.append(f"features must be float32 or bfloat16, not {call.dtype}")
    scale = call.facts.get("logit_scale")
    if scale is not None and scale != (torch.device("cpu"), torch.float32):
        reasons.append(f"logit_scale must be float32 on the cpu, got {scale[1]} on {scale[0]}")
    return reasons


for _op in ("topk_similarity", "zero_shot"):
    dispatch.register_backend(_op, "cpu", _cpu_reasons, priority=10)


# vlmkernels::topk_similarity


def _topk_fake(
    queries: Tensor, database: Tensor, k: int, metric: str, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    _check.topk_similarity(queries, database, k, metric, mask)
    n, dtype = queries.shape[0], reference.score_dtype(queries)
    return queries.new_empty((n, k), dtype=dtype), queries.new_empty((n, k), dtype=torch.int64)


def _topk_impl(
    queries: Tensor, database: Tensor, k: int, metric: str, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    shared = mask if mask is not None and mask.ndim == 1 else None
    each = mask if mask is not None and mask.ndim == 2 else None
    rows = [_topk_cpu.Rows(database, database.shape[0])]
    if backend == "cpu":
        return _topk_cpu.search("topk_similarity", queries, rows, k, metric, allowed=shared, mask=each)[:2]
    if backend == "cuda":
        return _topk_cuda.search(queries, rows, k, metric, allowed=shared, mask=each)[:2]
    if backend == "triton":
        return _topk_triton.search(queries, rows, k, metric, allowed=shared, mask=each)[:2]
    return reference.topk_similarity(queries.detach(), database.detach(), k, metric, mask)


def _topk_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, database, _, ctx.metric, _, ctx.backend = inputs
    ctx.save_for_backward(queries, database, output[1])


def _topk_backward(ctx: Any, grad_scores: Tensor, grad_indices: Tensor | None) -> tuple[Tensor | None, ...]:
    queries, database, indices = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grad_queries, grad_database = topk_similarity_backward_op(
        grad_scores, queries, database, indices, ctx.metric, ctx.backend, list(needs)
    )
    return (
        grad_queries if needs[0] else None,
        grad_database if needs[1] else None,
        None,  # k
        None,  # metric
        None,  # mask
        None,  # backend
    )


def _topk_backward_fake(
    grad_scores: Tensor,
    queries: Tensor,
    database: Tensor,
    indices: Tensor,
    metric: str,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return like_inputs((queries, database), needs)


def _topk_backward_impl(
    grad_scores: Tensor,
    queries: Tensor,
    database: Tensor,
    indices: Tensor,
    metric: str,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if backend in ("cpu", "triton"):
        kernels = _topk_cpu_backward if backend == "cpu" else _topk_triton
        return kernels.topk_similarity_gradients(
            grad_scores, queries, database, indices, metric, (needs[0], needs[1])
        )

    def scores(q: Tensor, x: Tensor) -> Tensor:
        return reference.gather_scores(q, x, indices, metric)

    return differentiate(scores, (queries, database), grad_scores, needs)


topk_similarity_backward_op = register_op(
    "topk_similarity_backward",
    "(Tensor grad_scores, Tensor queries, Tensor database, Tensor indices, str metric, str backend, bool[] needs)"
    " -> (Tensor, Tensor)",
    fake=_topk_backward_fake,
    impl=_topk_backward_impl,
)
topk_similarity_op = register_op(
    "topk_similarity",
    "(Tensor queries, Tensor database, SymInt k, str metric, Tensor? mask, str backend) -> (Tensor, Tensor)",
    fake=_topk_fake,
    impl=_topk_impl,
    setup_context=_topk_setup,
    backward=_topk_backward,
)


# vlmkernels::zero_shot, which returns (probabilities, lse, indices): the differentiable ones first.


def _zero_shot_fake(
    image_features: Tensor, class_features: Tensor, logit_scale: Tensor, k: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    _check.zero_shot(image_features, class_features, logit_scale, k)
    dtype, n = reference.score_dtype(image_features), image_features.shape[0]
    return (
        image_features.new_empty((n, k), dtype=dtype),
        image_features.new_empty((n,), dtype=dtype),
        image_features.new_empty((n, k), dtype=torch.int64),
    )


def _zero_shot_impl(
    image_features: Tensor, class_features: Tensor, logit_scale: Tensor, k: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "cpu":
        return _topk_cpu.zero_shot(image_features, class_features, logit_scale, k)
    if backend == "triton":
        return _topk_triton.zero_shot(image_features, class_features, logit_scale, k)
    return reference.zero_shot(image_features, class_features, logit_scale, k)


def _zero_shot_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    image_features, class_features, logit_scale, _, ctx.backend = inputs
    probabilities, lse, indices = output
    ctx.save_for_backward(image_features, class_features, logit_scale, indices, probabilities, lse)


def _zero_shot_backward(
    ctx: Any, grad_probabilities: Tensor, grad_lse: Tensor, grad_indices: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = zero_shot_backward_op(grad_probabilities, grad_lse, *ctx.saved_tensors, ctx.backend, list(needs))
    return (
        *(grad if need else None for grad, need in zip(grads, needs, strict=True)),
        None,  # k
        None,  # backend
    )


def _zero_shot_backward_fake(
    grad_probabilities: Tensor,
    grad_lse: Tensor,
    image_features: Tensor,
    class_features: Tensor,
    logit_scale: Tensor,
    indices: Tensor,
    probabilities: Tensor,
    lse: Tensor,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return like_inputs((image_features, class_features, logit_scale), needs)


def _zero_shot_backward_impl(
    grad_probabilities: Tensor,
    grad_lse: Tensor,
    image_features: Tensor,
    class_features: Tensor,
    logit_scale: Tensor,
    indices: Tensor,
    probabilities: Tensor,
    lse: Tensor,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if backend in ("cpu", "triton"):
        kernels = _topk_cpu_backward if backend == "cpu" else _topk_triton
        return kernels.zero_shot_gradients(
            grad_probabilities,
            grad_lse,
            image_features,
            class_features,
            logit_scale,
            indices,
            probabilities,
            lse,
            (needs[0], needs[1], needs[2]),
        )

    def outputs(images: Tensor, classes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return reference.class_probabilities(images, classes, scale, indices)

    return differentiate(
        outputs, (image_features, class_features, logit_scale), (grad_probabilities, grad_lse), needs
    )


zero_shot_backward_op = register_op(
    "zero_shot_backward",
    "(Tensor grad_probabilities, Tensor grad_lse, Tensor image_features, Tensor class_features, Tensor logit_scale,"
    " Tensor indices, Tensor probabilities, Tensor lse, str backend, bool[] needs) -> (Tensor, Tensor, Tensor)",
    fake=_zero_shot_backward_fake,
    impl=_zero_shot_backward_impl,
)
zero_shot_op = register_op(
    "zero_shot",
    "(Tensor image_features, Tensor class_features, Tensor logit_scale, SymInt k, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_zero_shot_fake,
    impl=_zero_shot_impl,
    setup_context=_zero_shot_setup,
    backward=_zero_shot_backward,
)

# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: (op, device, dtype, shape, flags) -> name. The only place that decides.

A family registers each backend with one function that lists why it cannot serve a call, and asks `choose`::

    def _cpu_reasons(call: Call) -> list[str]:
        reasons = []
        if call.device != "cpu":
            reasons.append(f"it serves cpu tensors, not {call.device}")
        if call.facts["head_dim"] > 256:
            reasons.append(f"head dims above 256 are not built (got {call.facts['head_dim']})")
        return reasons

    register_backend("attention", "cpu", _cpu_reasons, priority=10)

    name = choose("attention", Call(q.device.type, q.dtype, {"head_dim": q.shape[-1]}), backend)
    if name == "reference":
        return reference.attention(...)
    return torch.ops.vlmkernels.attention.default(..., name)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

logger = logging.getLogger(__name__)

#: What a user may name. A backend registered under another name is an internal choice: `choose` may return
#: it, nobody can ask for it.
PUBLIC_BACKENDS = ("reference", "cpu", "cuda", "triton")

#: A product of this size is worth a warning where the reference writes it: below, it costs less than the warning.
COSTLY_BYTES = 2**20


@dataclass
class Call:
    """What decides a choice, and nothing else.

    Attributes:
        device: `tensor.device.type`.
        dtype: dtype of the matmul operands, after autocast and `compute_dtype`.
        facts: shape facts and flags by name, for example `{"head_dim": 64, "is_causal": True}`.
        product_bytes: bytes of the matrix product that the reference would write for this call, 0 where it
            writes none of that order; decides whether falling back to the reference is worth a warning.
    """

    device: str
    dtype: torch.dtype
    facts: Mapping[str, Any] = field(default_factory=dict)
    product_bytes: int = 0


Reasons = Callable[[Call], list[str]]


@dataclass
class _Backend:
    name: str
    reasons: Reasons
    not_default: Reasons | None
    priority: int


_backends: dict[str, list[_Backend]] = {}
_warned: set[str] = set()


def register_backend(
    op: str, name: str, reasons: Reasons, *, priority: int = 0, not_default: Reasons | None = None
) -> None:
    """Add a backend to an op. "reference" needs no registration: it serves every call, after all others.

    Args:
        op: public name without `vk.`, for example "attention".
        name: "cpu", "cuda", "triton", or the name of an internal choice such as "torch".
        reasons: why this backend cannot serve a call, one clause each; an empty list means it can.
        priority: the highest comes first; equal ones in order of registration.
        not_default: further reasons that hold only while the user names no backend (the call can be served,
            but another backend is known to be faster).

    Raises:
        ValueError: the op already has a backend of this name, or the name is "reference".
    """
    known = _backends.setdefault(op, [])
    if name == "reference" or any(b.name == name for b in known):
        raise ValueError(f"register_backend: {op} already has a backend {name!r}")
    known.append(_Backend(name, reasons, not_default, priority))
    known.sort(key=lambda b: -b.priority)


def registered_backends(op: str) -> list[str]:
    """Names of an op's backends in the order in which they are tried, "reference" last."""
    return [b.name for b in _backends.get(op, ())] + ["reference"]


def reasons_against(op: str, name: str, call: Call) -> list[str]:
    """Why the named backend cannot serve a call; an empty list means it can."""
    if name == "reference":
        return []
    for backend in _backends.get(op, ()):
        if backend.name == name:
            return _transform_reasons() + backend.reasons(call)
    return [f"there is no {name} kernel for this op"]


def choose(op: str, call: Call, backend: str | None) -> str:
    """Name of the backend that serves a call.

    Args:
        op: public name without `vk.`.
        call: what decides.
        backend: None for the first able backend in order of priority, or a name.

    Raises:
        ValueError: the name is none of `PUBLIC_BACKENDS`.
        NotImplementedError: the named backend cannot serve the call; the message says why.
    """
    if backend is not None:
        if backend not in PUBLIC_BACKENDS:
            raise ValueError(f"vk.{op}: backend must be None or one of {PUBLIC_BACKENDS}, got {backend!r}")
        against = reasons_against(op, backend, call)
        if against:
            raise NotImplementedError(
                f"vk.{op}: backend {backend!r} cannot serve this call: {'; '.join(against)}"
            )
        return backend

    refused = []
    for candidate in _backends.get(op, ()):
        against = _transform_reasons() + candidate.reasons(call)
        if not against and candidate.not_default is not None:
            against = candidate.not_default(call)
        if not against:
            return candidate.name
        refused.append((candidate.name, against))
    # Dynamo cannot trace logging, and a compiled program would say it once per recompilation.
    if not torch.compiler.is_compiling():
        _log_fallback(op, call, refused)
    return "reference"


def _transform_reasons() -> list[str]:
    # registered ops have no rule for these; the reference goes through them like any torch code
    if not _inside_transform():
        return []
    return ["a torch.func transform (vmap, grad, jvp) is active, and only the reference supports it"]


def _inside_transform() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


# What torch.compiler.assume_constant_result sets: Dynamo asks once while tracing and keeps the answer, which
# is safe since it guards on the transforms itself. The decorator would import all of torch._dynamo here, a
# second at least.
_inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _log_fallback(op: str, call: Call, refused: list[tuple[str, list[str]]]) -> None:
    costly = call.product_bytes >= COSTLY_BYTES and op not in _warned
    if not costly and not logger.isEnabledFor(logging.DEBUG):
        return
    why = (
        "; ".join(f"{name}: {', '.join(against)}" for name, against in refused)
        or "no other backend is registered"
    )
    if costly:
        _warned.add(op)
        logger.warning(
            "vk.%s runs on the reference, which writes the whole product (%.1f MiB here) to memory (%s)",
            op,
            call.product_bytes / 2**20,
            why,
        )
    else:
        logger.debug("vk.%s runs on the reference (%s)", op, why)

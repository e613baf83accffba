# SPDX-License-Identifier: Apache-2.0
"""Whether Triton kernels can run here, and why not: asked by `dispatch` and by `vk.backends()`. Imports no triton.

A family registers its kernels with the reasons below before its own, and imports them where it launches them::

    def _triton_reasons(call: Call) -> list[str]:
        reasons = _triton.reasons(call)
        if call.facts["head_dim"] > 256:
            reasons.append(...)
        return reasons

    dispatch.register_backend("attention", "triton", _triton_reasons, priority=_triton.PRIORITY,
                              not_default=_triton.not_default)

    def _impl(...):
        if backend == "triton":
            from vlmkernels.ops.triton import attention as kernels
            return kernels.attention_fwd(...)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch

from vlmkernels.ops.dispatch import Call

#: Below a measured CUDA kernel, above the reference. The CPU kernels serve other tensors.
PRIORITY = 5

#: The oldest architecture that the kernels are compiled and tuned for.
OLDEST = (8, 0)

#: Triton decides when a kernel is defined, so the variable counts as it was when the process imported us.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: The oldest triton that compiles the kernels; torch 2.9 brings it.
OLDEST_TRITON = (3, 5)


def _why_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (torch's CUDA builds bring it; elsewhere: pip install triton)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None  # somebody's build under another name
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {version} does not compile the kernels, {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or newer does"
    return None


#: Why there is no triton to use, None where there is.
missing: str | None = _why_missing()


def reasons(call: Call) -> list[str]:
    """Why no Triton kernel can serve a call, whatever the op: triton, the device, its age."""
    if missing is not None:
        return [missing]
    if call.device == "cpu":
        return [] if INTERPRETED else ["it serves cuda tensors, and cpu ones only under TRITON_INTERPRET=1"]
    if call.device != "cuda":
        return [f"it serves cuda tensors, not {call.device}"]
    if INTERPRETED:
        return ["TRITON_INTERPRET=1 runs kernels on the CPU"]
    return _device_reasons()


def not_default(call: Call) -> list[str]:
    """Why nobody gets a Triton kernel without naming it: the interpreter is for tests, and very slow."""
    return ["interpreted kernels are for tests"] if call.device == "cpu" else []


def device_reason(index: int) -> str | None:
    """Why kernels cannot run on a CUDA device, None where they can."""
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return f"kernels are for sm_{OLDEST[0]}{OLDEST[1]} and newer, not sm_{capability[0]}{capability[1]}"
    return None


def _device_reasons() -> list[str]:
    reason = device_reason(torch.cuda.current_device())
    return [] if reason is None else [reason]


# As in `dispatch`: Dynamo asks once and keeps the answer, which holds for the life of a process.
_device_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]

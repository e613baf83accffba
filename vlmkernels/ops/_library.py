# SPDX-License-Identifier: Apache-2.0
"""The one helper that registers an op with torch.library: schema, fake, implementation, gradient.

Not here: choosing a backend (`dispatch.py`) and checking arguments (`_check.py`).

How an op family uses it (all arguments positional in the schema, so that `inputs` below holds every one)::

    def _fake(x, weight, scale, backend):
        check_scaled(x, weight)                       # the public function's check
        return x.new_empty(x.shape[:-1])

    def _impl(x, weight, scale, backend):             # `backend` is what dispatch.choose returned
        return reference.scaled(x, weight, scale)     # or a kernel, by name

    def _setup(ctx, inputs, output):
        x, weight, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(x, weight)

    def _backward(ctx, grad_out):
        x, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:2])
        grad_x, grad_weight = scaled_backward(grad_out, x, weight, ctx.scale, ctx.backend, needs)
        return (grad_x if ctx.needs_input_grad[0] else None,
                grad_weight if ctx.needs_input_grad[1] else None,
                None,   # scale
                None)   # backend

    def _backward_impl(grad_out, x, weight, scale, backend, needs):
        return differentiate(lambda x, w: reference.scaled(x, w, scale), (x, weight), grad_out, needs)

    def _backward_fake(grad_out, x, weight, scale, backend, needs):
        return like_inputs((x, weight), needs)

    scaled_backward = register_op(
        "scaled_backward",
        "(Tensor grad_out, Tensor x, Tensor weight, float scale, str backend, bool[] needs)"
        " -> (Tensor, Tensor)",
        fake=_backward_fake, impl=_backward_impl)
    scaled = register_op(
        "scaled", "(Tensor x, Tensor weight, float scale, str backend) -> Tensor",
        fake=_fake, impl=_impl, setup_context=_setup, backward=_backward)

An op registered without `backward` has a gradient formula that raises NotImplementedError and names the op:
this is what a backward op wants, whose gradient would be a second derivative.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "vlmkernels"

# Kept alive for the life of the process: torch.library forgets the registrations of a dead Library.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_REGISTERED: dict[str, torch._ops.OpOverload] = {}


# Asked once, because Dynamo cannot trace the question in torch 2.6.
_AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(device)
)


def register_op(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    impl: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Register `vlmkernels::<name>` and return its overload, which is what the family file calls.

    Args:
        name: the op's name; a backward op is called `<op>_backward`.
        schema: arguments and returns, for example `"(Tensor x, float scale, str backend) -> Tensor"`.
        fake: same arguments as the op; returns tensors of the right shape, dtype and strides, reads no data.
        impl: same arguments; serves every device, runs below autograd, returns tensors that alias no input.
        setup_context: `(ctx, inputs, output)`, saves what `backward` needs.
        backward: `(ctx, *grad_outputs)`, returns one gradient or None per argument of the schema.
        vmap: a rule as `torch.library.register_vmap` wants it, for an op that the reference itself is built
            on; the default refuses.

    Raises:
        ValueError: an op of this name exists, only one of `setup_context` and `backward` is given, or the
            schema has what the gradient cannot see: defaults, keyword-only arguments, lists of tensors.
    """
    if name in _REGISTERED:
        raise ValueError(f"register_op: {NAMESPACE}::{name} is already registered")
    if (setup_context is None) != (backward is None):
        raise ValueError(
            f"register_op: {NAMESPACE}::{name} needs setup_context and backward together, or neither"
        )
    if any(part in schema for part in ("=", "*", "Tensor[", "Tensor?[")):
        raise ValueError(
            f"register_op: {NAMESPACE}::{name} may have no defaults, keyword-only arguments or lists of "
            f"tensors, got {schema}"
        )
    qualified = f"{NAMESPACE}::{name}"
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_vmap(qualified, vmap or _refuse_vmap(name), lib=_LIBRARY)
    overload = getattr(torch.ops.vlmkernels, name).default
    _LIBRARY.impl(name, _autograd(overload, setup_context, backward or _refuse_gradient(name)), "Autograd")
    _REGISTERED[name] = overload
    return overload


def registered_ops() -> dict[str, torch._ops.OpOverload]:
    """Every op registered so far, by name without the namespace."""
    return dict(_REGISTERED)


def differentiate(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    grad_outputs: Tensor | Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of `function(*tensors)` by recomputing it: what a backward op does where no kernel exists.

    Works inside an op's implementation, where autograd itself is switched off.

    Args:
        function: takes all of `tensors`, returns a tensor or a tuple of tensors, floating ones only.
        tensors: the op's tensor arguments; None for an optional one that was not given.
        grad_outputs: one gradient per output of `function`; None means zero.
        needs: for each of `tensors`, whether its gradient is wanted.

    Returns:
        As many tensors as `tensors`, contiguous and owning their memory. Where none is wanted (or the
        argument is None) the entry is an empty tensor of shape [0], because a schema cannot return None;
        `like_inputs` is the fake.
    """
    wanted = {i: x for i, (x, need) in enumerate(zip(tensors, needs, strict=True)) if need and x is not None}
    grads = list(like_inputs(tensors, [False] * len(tensors)))
    if not wanted:
        return tuple(grads)

    with _autograd_inside_op(), torch.enable_grad():
        leaves = {i: x.detach().requires_grad_() for i, x in wanted.items()}
        result = function(*[leaves.get(i, x) for i, x in enumerate(tensors)])
        outputs = result if isinstance(result, tuple) else (result,)
        given = (grad_outputs,) if isinstance(grad_outputs, Tensor) else tuple(grad_outputs)
        pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if g is not None and o.requires_grad]
        if not pairs:
            return tuple(torch.zeros_like(x) for x in like_inputs(tensors, needs))
        results = torch.autograd.grad(
            [o for o, _ in pairs],
            list(leaves.values()),
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    storages = {x.untyped_storage().data_ptr() for x in (*tensors, *given) if x is not None}
    for i, grad in zip(wanted, results, strict=True):
        grad = grad.contiguous()
        # outputs may alias neither inputs nor each other, and an addition hands the incoming gradient on twice
        grads[i] = grad.clone() if grad.untyped_storage().data_ptr() in storages else grad
        storages.add(grads[i].untyped_storage().data_ptr())
    return tuple(grads)


def like_inputs(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What `differentiate` returns, uninitialised: contiguous gradients, shape [0] where none is wanted."""
    template = next(x for x in tensors if x is not None)
    return tuple(
        x.new_empty(x.shape) if need and x is not None else (template if x is None else x).new_empty(0)
        for x, need in zip(tensors, needs, strict=True)
    )


def wants_gradients(*tensors: Tensor | None) -> list[bool]:
    """Whether a call on these records a gradient, for each."""
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in tensors]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast wants matmul operands in on this kind of device, None where autocast is off."""
    if device_type not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def follow_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast matmul operands as autocast would: floating tensors except float64; the rest stays.

    The first tensor's device decides. Outside autocast the tensors come back as they are::

        q, k, v = follow_autocast(q, k, v)
    """
    device_type = next(x.device.type for x in tensors if x is not None)
    dtype = autocast_dtype(device_type)
    if dtype is None:
        return tensors
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast is off, or it would cast the float32 arithmetic of a reference again."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _autograd(
    overload: torch._ops.OpOverload, setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The op's kernel for the autograd key: as `torch.library.register_autograd`, less the bookkeeping.

    That one refills default arguments and goes through two wrappers: 40 us per call that records a gradient
    where this one takes 15, which a loss of a hundred rows notices. The schema rules of `register_op` are
    what makes it safe.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return output

    function = type(
        f"{overload.name()}_autograd",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def kernel(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and _any_requires_grad(*arguments):
            return function.apply(*arguments)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    return kernel


def _some_tensor_requires_grad(*arguments: Any) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


# torch 2.6 does not have it; it saves a microsecond per call.
_any_requires_grad = getattr(torch._C, "_any_requires_grad", _some_tensor_requires_grad)


def _autograd_inside_op() -> contextlib.AbstractContextManager[Any]:
    """Let autograd see tensors again inside an op's implementation, which torch.library calls below autograd.

    Taking the autograd keys out of the thread's excluded set is what is left: `torch.enable_grad` alone
    records nothing there, and `torch.func.vjp` fails under a TorchDispatchMode (its wrappers reach kernels
    unopened).
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _refuse_gradient(name: str) -> Callable[..., None]:
    public = name.removesuffix("_backward")
    what = "second derivatives" if public != name else "derivatives"

    def refuse(ctx: Any, *grad_outputs: Tensor) -> None:
        raise NotImplementedError(
            f"{NAMESPACE}::{name}: {what} exist on the reference path only; "
            f'pass backend="reference" to vk.{public}'
        )

    return refuse


def _refuse_vmap(name: str) -> Callable[..., None]:
    public = name.removesuffix("_backward")

    def refuse(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{NAMESPACE}::{name}: torch.vmap works on the reference path only; "
            f'pass backend="reference" to vk.{public}'
        )

    return refuse

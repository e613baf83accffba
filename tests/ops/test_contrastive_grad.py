# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses under autograd, torch.compile, autocast and vmap; the registered ops; refused arguments."""

from __future__ import annotations

import re

import pytest
import torch
from contrastive_problems import BACKENDS, OPERANDS, OPS, SQUARE, make
from torch.utils._python_dispatch import TorchDispatchMode

from vlmkernels import _native
from vlmkernels.ops import _library, _triton
from vlmkernels.ops import contrastive as ops

needs_cpu = pytest.mark.skipif(
    _native.cpu_reason is not None, reason=f"vlmkernels._cpu: {_native.cpu_reason}"
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_op = pytest.mark.parametrize("op", OPS)


def some(op, **keywords):
    """A small problem that is not square where the op allows it."""
    return make(op, 9, None if op in SQUARE else 13, 8, **keywords)


def leaves(problem):
    return problem.but(**{name: x.detach().clone().requires_grad_() for name, x in problem.tensors.items()})


# Autograd.


SMOOTHED = [("clip_loss", 0.1), ("linear_cross_entropy", 0.1)]


@pytest.mark.parametrize(("op", "smoothing"), [*((op, 0.0) for op in OPS), *SMOOTHED])
def test_reference_gradients_are_those_of_finite_differences(op, smoothing):
    problem = make(op, 3, None if op in SQUARE else 4, 2, scale=2.0, lead=(2,)).to(torch.float64)
    if smoothing:
        problem = problem.but(label_smoothing=smoothing)
    names = list(problem.tensors)

    def loss(*tensors):
        return problem.but(**dict(zip(names, tensors, strict=True))).loss(ops, backend="reference")

    inputs = [x.requires_grad_() for x in problem.tensors.values()]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@needs_cpu
@each_op
@pytest.mark.parametrize("upstream", [1.0, 2.0])
def test_second_derivatives_are_refused_by_the_kernels(op, upstream):
    problem = leaves(some(op))
    inputs = list(problem.tensors.values())
    loss = problem.loss(ops, backend="cpu")
    grads = torch.autograd.grad(loss, inputs, torch.tensor(upstream), create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"vk\.{op}: second derivatives"):
        torch.autograd.grad(sum(g.sum() for g in grads), inputs)


@each_backend
@each_op
def test_backward_twice_gives_the_same_gradients(op, backend):
    problem = leaves(some(op))
    loss = problem.loss(ops, backend=backend)
    inputs = list(problem.tensors.values())
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_backend
@each_op
def test_backward_twice_with_other_upstream_gradients(op, backend):
    problem = leaves(some(op))
    loss = problem.loss(ops, backend=backend)
    inputs = list(problem.tensors.values())
    first = torch.autograd.grad(loss, inputs, torch.tensor(2.0), retain_graph=True)
    second = torch.autograd.grad(loss, inputs, torch.tensor(-4.0))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(-2 * a, b)


@each_backend
@each_op
def test_gradients_are_the_callers_own(op, backend):
    problem = leaves(some(op))
    loss = problem.loss(ops, backend=backend)
    expected = some(op).results(ops, backend=backend)
    for _ in range(3):  # clipping gradients in place must not reach what the next backward returns
        grads = torch.autograd.grad(loss, list(problem.tensors.values()), retain_graph=True)
        for name, grad in zip(problem.tensors, grads, strict=True):
            assert torch.equal(grad, expected[f"gradient of {name}"]), name
            assert not grad.requires_grad
            grad.mul_(7.0)


@each_backend
@each_op
def test_backward_three_times_accumulates(op, backend):
    problem = leaves(some(op))
    loss = problem.loss(ops, backend=backend)
    for i in range(3):
        loss.backward(retain_graph=i < 2)
    expected = some(op).results(ops, backend=backend)
    for name, x in problem.tensors.items():
        torch.testing.assert_close(x.grad, 3 * expected[f"gradient of {name}"])
        assert not x.grad.requires_grad


@each_backend
@each_op
def test_gradients_accumulate(op, backend):
    one, other = leaves(some(op)), some(op, seed=2)
    shared = dict.fromkeys(one.tensors)
    for name, x in one.tensors.items():
        shared[name] = x
    other = other.but(**shared)
    one.loss(ops, backend=backend).backward()
    after_one = {name: x.grad.clone() for name, x in shared.items()}
    other.loss(ops, backend=backend).backward()
    expected = other.results(ops, backend=backend)
    for name, x in shared.items():
        torch.testing.assert_close(x.grad, after_one[name] + expected[f"gradient of {name}"])


@each_backend
@each_op
def test_each_gradient_alone_equals_all_together(op, backend):
    problem = some(op)
    together = problem.results(ops, backend=backend)
    for name, x in problem.tensors.items():
        leaf = x.clone().requires_grad_()
        (alone,) = torch.autograd.grad(problem.but(**{name: leaf}).loss(ops, backend=backend), leaf)
        torch.testing.assert_close(alone, together[f"gradient of {name}"], rtol=1e-6, atol=1e-7)


@each_backend
@each_op
def test_no_gradient_is_recorded_without_need(op, backend):
    problem = some(op)
    assert not problem.loss(ops, backend=backend).requires_grad
    with torch.no_grad():
        assert not leaves(problem).loss(ops, backend=backend).requires_grad


@each_backend
@each_op
def test_loss_is_the_same_with_and_without_gradients(op, backend):
    problem = some(op)
    assert torch.equal(
        problem.loss(ops, backend=backend), leaves(problem).loss(ops, backend=backend).detach()
    )


@needs_cpu
@pytest.mark.parametrize("op", ["clip_loss", "multi_positive_loss", "info_nce"])
def test_inputs_changed_after_forward_are_refused(op):
    # the other two take their gradients with the loss and read nothing again
    problem = leaves(some(op))
    first = OPERANDS[op][0]
    features = problem.tensors[first] * 1.0
    loss = problem.but(**{first: features}).loss(ops, backend="cpu")
    with torch.no_grad():
        features.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# torch.func, autocast, torch.compile.


@each_op
def test_vmap_goes_through_the_reference(op):
    problem = make(op, 5, d=4, lead=(3,))
    features = {name: x for name, x in problem.tensors.items() if x.ndim == 3}
    per_row = {name: x for name, x in problem.options.items() if isinstance(x, torch.Tensor)}
    names = [*features, *per_row]

    def loss(*values):
        return problem.but(**dict(zip(names, values, strict=True))).loss(ops)

    batched = torch.vmap(loss)(*features.values(), *per_row.values())
    each = [loss(*(x[i] for x in (*features.values(), *per_row.values()))) for i in range(3)]
    torch.testing.assert_close(batched, torch.stack(each), rtol=1e-5, atol=1e-6)


def results_under_autocast(problem, **keywords):
    """Forward under autocast and backward outside of it, as torch's documentation wants it."""
    problem = leaves(problem)
    with torch.autocast("cpu", torch.bfloat16):
        loss = problem.loss(ops, **keywords)
    grads = torch.autograd.grad(loss, list(problem.tensors.values()), materialize_grads=True)
    return {
        "loss": loss.detach(),
        **{f"gradient of {name}": g for name, g in zip(problem.tensors, grads, strict=True)},
    }


@each_backend
@each_op
def test_autocast_rounds_the_operands(op, backend):
    expected = some(op).results(ops, backend=backend, compute_dtype=torch.bfloat16)
    for name, result in results_under_autocast(some(op), backend=backend).items():
        assert result.dtype == torch.float32, name
        assert torch.equal(result, expected[name]), name


@each_backend
@each_op
def test_compute_dtype_wins_over_autocast(op, backend):
    expected = some(op).results(ops, backend=backend)
    for name, result in results_under_autocast(
        some(op), backend=backend, compute_dtype=torch.float32
    ).items():
        assert torch.equal(result, expected[name]), name


@each_op
def test_float64_does_not_follow_autocast(op):
    expected = some(op).to(torch.float64).results(ops)
    for name, result in results_under_autocast(some(op).to(torch.float64)).items():
        assert torch.equal(result, expected[name]), name


@each_backend
@each_op
def test_compiles_into_one_graph_for_every_batch_size(op, backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(tensors, options):
        loss = getattr(ops, op)(**tensors, **options, backend=backend)
        return 2.0 * loss

    fixed = dict(make(op, 2, 40, 8).tensors.items()) if op == "linear_cross_entropy" else {}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (9, 17, 40):
            problem = leaves(make(op, n, n if op in SQUARE else 40, 8))
            if op == "linear_cross_entropy":
                problem = leaves(problem.but(**{name: fixed[name] for name in ("weight", "bias")}))
            inputs = list(problem.tensors.values())
            compiled = step(problem.tensors, problem.options)
            grads = torch.autograd.grad(compiled, inputs)
            loss = 2.0 * problem.loss(ops, backend=backend)
            torch.testing.assert_close(compiled, loss)
            for grad, expected in zip(grads, torch.autograd.grad(loss, inputs), strict=True):
                torch.testing.assert_close(grad, expected)
    torch._dynamo.reset()


# The registered ops.


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every op of ours."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == _library.NAMESPACE:
            kept = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]
            self.calls.setdefault(func, []).append(kept)
        return func(*args, **(kwargs or {}))


def contrastive_ops():
    return {op for name, op in _library.registered_ops().items() if "contrastive" in name}


def recorded_calls(problems, backend):
    with Recorder() as recorder:
        for problem in problems:
            # not 1, which hands out gradients that were taken with the loss
            (2.0 * leaves(problem).loss(ops, backend=backend)).sum().backward()
    return recorder.calls


@needs_cpu
def test_opcheck_passes_on_every_registered_op():
    problems = [some(op, seed=seed) for op in OPS for seed in (0, 1)]
    problems += [some("info_nce").but(reduction=r) for r in ("sum", "none")]
    problems += [some("linear_cross_entropy").but(reduction=r) for r in ("sum", "none")]
    problems += [some("clip_loss").but(logit_bias=None), some("linear_cross_entropy").but(bias=None)]
    calls = recorded_calls(problems, "cpu")
    assert set(calls) == contrastive_ops()
    for op, arguments in calls.items():
        for args in arguments:
            differentiable = [
                x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for x in args
            ]
            if op._schema.name.endswith("_backward"):
                # its own gradient is refused by design, which the checks of autograd would count as a failure
                with torch.no_grad():
                    torch.library.opcheck(op, tuple(args), test_utils=("test_schema", "test_faketensor"))
            else:
                torch.library.opcheck(op, tuple(differentiable))


# Refusals.


@each_op
@pytest.mark.parametrize("backend", ["cuda"] if _triton.INTERPRETED else ["cuda", "triton"])
def test_named_backend_that_cannot_serve_says_why(op, backend):
    with pytest.raises(NotImplementedError, match=f"vk.{op}: backend '{backend}' cannot serve this call: ."):
        some(op).loss(ops, backend=backend)


@each_op
def test_cpu_backend_refuses_float64(op):
    with pytest.raises(NotImplementedError, match=f"vk.{op}: .*float64"):
        some(op).to(torch.float64).loss(ops, backend="cpu")


@each_op
def test_unknown_backend(op):
    with pytest.raises(ValueError, match=f"vk.{op}: backend must be .* got 'tpu'"):
        some(op).loss(ops, backend="tpu")


def refused(error, op, argument, **arguments):
    """Fails unless the call with these arguments raises `error` with a sentence about op and argument."""
    with pytest.raises(error, match=rf"^vk\.{op}: .*{re.escape(argument)}"):
        some(op).but(**arguments).loss(ops)


@each_op
@pytest.mark.parametrize("side", [0, 1])
def test_refused_features(op, side):
    name = OPERANDS[op][side]
    x = some(op).tensors[name]
    refused(TypeError, op, name, **{name: x.tolist()})
    refused(TypeError, op, name, **{name: x.long()})
    refused(TypeError, op, name, **{name: x.bfloat16()})
    refused(ValueError, op, name, **{name: torch.randn(9, 7) if side == 0 else torch.randn(len(x), 7)})
    refused(ValueError, op, name, **{name: x.to("meta")})
    if name != "hidden":
        refused(ValueError, op, name, **{name: x[0]})


@pytest.mark.parametrize("op", SQUARE)
def test_refused_unequal_counts(op):
    refused(ValueError, op, "text_features", text_features=torch.randn(8, 8))


@pytest.mark.parametrize("op", ["clip_loss", "siglip_loss", "info_nce"])
def test_refused_unequal_leading_dimensions(op):
    first, second = OPERANDS[op]
    refused(ValueError, op, second, **{first: torch.randn(2, 9, 8), second: torch.randn(3, 9, 8)})


@each_op
def test_refused_scale(op):
    refused(ValueError, op, "logit_scale", logit_scale=torch.ones(2))
    refused(TypeError, op, "logit_scale", logit_scale="10")
    refused(TypeError, op, "logit_scale", logit_scale=torch.tensor(3))


@each_op
def test_refused_compute_dtype(op):
    with pytest.raises(TypeError, match=rf"vk\.{op}: compute_dtype"):
        some(op).loss(ops, compute_dtype=torch.int32)


@pytest.mark.parametrize("op", ["clip_loss", "linear_cross_entropy"])
def test_refused_smoothing(op):
    refused(ValueError, op, "label_smoothing", label_smoothing=-0.1)
    refused(ValueError, op, "label_smoothing", label_smoothing=1.5)
    refused(TypeError, op, "label_smoothing", label_smoothing="0.1")


@pytest.mark.parametrize("op", ["info_nce", "linear_cross_entropy"])
def test_refused_reduction(op):
    refused(ValueError, op, "reduction", reduction="average")


def test_refused_labels():
    op = "multi_positive_loss"
    refused(TypeError, op, "image_labels", image_labels=torch.rand(9))
    refused(ValueError, op, "image_labels", image_labels=torch.arange(8))
    refused(TypeError, op, "text_labels", text_labels=torch.rand(13))
    refused(ValueError, op, "text_labels", text_labels=torch.arange(9))


def test_refused_positives_and_masks():
    op = "info_nce"
    refused(TypeError, op, "positives", positives=torch.rand(9))
    refused(ValueError, op, "positives", positives=torch.arange(8))
    refused(ValueError, op, "positives", positives=torch.arange(9) + 5)
    refused(ValueError, op, "positives", positives=torch.arange(9) - 1)
    refused(TypeError, op, "key_mask", key_mask=torch.ones(13))
    refused(ValueError, op, "key_mask", key_mask=torch.ones(9, dtype=torch.bool))
    refused(ValueError, op, "positives", positives=None, keys=torch.randn(5, 8), key_mask=None)


def test_refused_targets_and_bias():
    op = "linear_cross_entropy"
    refused(TypeError, op, "targets", targets=torch.rand(9))
    refused(ValueError, op, "targets", targets=torch.arange(8))
    refused(ValueError, op, "targets", targets=torch.full((9,), 13))
    refused(ValueError, op, "targets", targets=torch.full((9,), -1))
    refused(ValueError, op, "bias", bias=torch.randn(9))
    refused(ValueError, op, "weight", weight=torch.randn(2, 13, 8))
    refused(TypeError, op, "ignore_index", ignore_index=0.5)


def test_refused_siglip_bias():
    refused(ValueError, "siglip_loss", "logit_bias", logit_bias=torch.zeros(2))

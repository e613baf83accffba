# SPDX-License-Identifier: Apache-2.0
"""Gradient caching: a contrastive batch of any size in the memory of a micro-batch, with the gradients of the whole."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmkernels.ops._library import no_autocast

__all__ = ["CachedContrastive", "unsynchronized"]

Context = contextlib.AbstractContextManager[Any]


class CachedContrastive:
    """Loss and gradients of a batch whose activations would not fit, micro-batch by micro-batch.

    Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache, 2021). A
    contrastive loss sees the towers only through their features, which are small:

    1. the features of every micro-batch, without activations;
    2. the loss of all features, and its gradient by each of them;
    3. every micro-batch again, now with activations, and that gradient back through it.

    So each tower runs forward twice, and gradients are those of the whole batch: up to the order of sums, not an
    approximation. What is random in the second run repeats the first: the states of torch's generators (CPU, and the
    GPU of the inputs), Python's and NumPy's are put back for each micro-batch, and go on afterwards as if it had run
    once. Autocast holds in both runs as it does around the call. Layers that mix the rows of a batch (batch norm in
    training) see micro-batches, twice.

    Under DDP and FSDP only the last micro-batch of a model synchronises its gradients.

    Args:
        model: the towers: a sequence of modules, one for each input, each giving the features of its input; or one
            module that takes all inputs. It returns a tensor, a tuple of tensors or a dict of tensors: features
            ``[n, ...]`` for its n rows, or 0-d tensors that do not depend on the rows, such as the logit scale.
        loss: called with what the model returns for the whole batch, by name where that is a dict; returns a scalar.
            `vk.nn`'s losses and lambdas around the ops fit, with ``group=`` too.
        micro_batch: the largest number of rows that run at once.
        context: makes the context in which the model runs and the loss does not, such as
            ``lambda: torch.autocast("cpu", torch.bfloat16)``.

    Raises:
        TypeError, ValueError: arguments of another kind, micro_batch below 1.

    Example:
        >>> towers = torch.nn.Linear(12, 4), torch.nn.Linear(7, 4)
        >>> def loss(images, texts):
        ...     images, texts = (torch.nn.functional.normalize(x, dim=-1) for x in (images, texts))
        ...     return vk.clip_loss(images, texts, 10.0)
        >>> step = CachedContrastive(towers, loss, micro_batch=256)
        >>> value = step(torch.randn(1000, 12), torch.randn(1000, 7))  # in place of loss(...).backward()
        >>> towers[0].weight.grad.shape
        torch.Size([4, 12])

        A model that returns the arguments of its loss, and four batches to an optimiser step:

        >>> model = vk.models.create("emoji-clip").train()
        >>> step = CachedContrastive(model, vk.nn.ClipLoss(), micro_batch=2)
        >>> for part in range(4):
        ...     images, ids = torch.rand(4, 3, 48, 48), torch.randint(1, 99, (4, 8))
        ...     value = step(images, ids, weight=1 / 4, synchronize=part == 3)
    """

    def __init__(
        self,
        model: Callable[..., Any] | Sequence[Callable[..., Any]],
        loss: Callable[..., Tensor],
        *,
        micro_batch: int,
        context: Callable[[], Context] = contextlib.nullcontext,
    ) -> None:
        self._towers = None if callable(model) else tuple(model)
        self._models: tuple[Callable[..., Any], ...] = (model,) if callable(model) else tuple(model)
        if not self._models or not all(callable(x) for x in self._models + (loss, context)):  # noqa: RUF005 (mypy)
            raise TypeError("CachedContrastive: model, loss and context must be callable")
        if not isinstance(micro_batch, int) or micro_batch < 1:
            raise ValueError(
                f"CachedContrastive: micro_batch must be an int of at least 1, got {micro_batch!r}"
            )
        self._loss, self._micro_batch, self._context = loss, micro_batch, context

    def __call__(
        self,
        *inputs: Any,
        weight: float = 1.0,
        synchronize: bool = True,
        parts: int | None = None,
        **loss_options: Any,
    ) -> Tensor:
        """Computes the loss and adds its gradients to those of the parameters, as ``(weight * loss).backward()``.

        Args:
            *inputs: one for each tower, or those of the one model: tensors, or tuples or dicts of tensors, whose
                first dimension is cut into micro-batches. Inputs of one model may have unequal numbers of rows (two
                views of each caption's picture): each is cut into as many parts.
            weight: on the gradients: 1 / n where n batches accumulate, or a gradient scaler's factor.
            synchronize: whether DDP or FSDP exchange gradients now; False for all but the last of accumulated batches.
            parts: number of micro-batches, in place of as many as the rows need. Ranks with unequal numbers of rows
                need the same number where the model itself communicates (batch norm over ranks).
            **loss_options: passed to the loss as they are, such as labels of the whole batch.

        Returns:
            The loss, detached and without the weight. Where gradients are disabled, only that is computed.

        Raises:
            ValueError: inputs without rows, or of another number than the towers.
        """
        if self._towers is not None and len(inputs) != len(self._towers):
            raise ValueError(
                f"CachedContrastive: {len(self._towers)} towers need as many inputs, got {len(inputs)}"
            )
        each = [(x,) for x in inputs] if self._towers is not None else [inputs]
        runs = [
            _Run(model, given, self._micro_batch, parts)
            for model, given in zip(self._models, each, strict=True)
        ]
        if not torch.is_grad_enabled():
            with torch.no_grad():
                found = [run.features(self._context) for run in runs]
                return self._value(found, loss_options)
        if all(run.parts == 1 for run in runs):
            return self._at_once(runs, weight, synchronize, loss_options)

        with torch.no_grad():
            found = [run.features(self._context) for run in runs]
        # Casts of the weights that autocast made just now know nothing of the weights' gradients.
        torch.clear_autocast_cache()
        leaves = [output.map(_leaf) for output in found]
        value = self._value(leaves, loss_options)
        with no_autocast(value.device.type):
            (value * weight).backward()
        state = _RandomState.now(value.device)
        last = {id(run.model): i for i, run in enumerate(runs)}  # towers may share a model
        for i, (run, output) in enumerate(zip(runs, leaves, strict=True)):
            run.backward(output.map(_gradient), self._context, synchronize and last[id(run.model)] == i)
        state.restore()
        return value.detach()

    def _at_once(
        self, runs: list[_Run], weight: float, synchronize: bool, loss_options: dict[str, Any]
    ) -> Tensor:
        with contextlib.ExitStack() as stack:
            if not synchronize:
                for model in {id(run.model): run.model for run in runs}.values():
                    stack.enter_context(unsynchronized(model))
            found = [run.part(0, self._context) for run in runs]
            value = self._value(found, loss_options)
            with no_autocast(value.device.type):
                (value * weight).backward()
        return value.detach()

    def _value(self, outputs: list[_Output], options: dict[str, Any]) -> Tensor:
        positional = [x for output in outputs for x in output.positional()]
        named = {name: x for output in outputs for name, x in output.named().items()}
        return self._loss(*positional, **named, **options)


@dataclass(frozen=True)
class _Output:
    """What a model returned, in the kind in which it did: a tensor, a tuple or a dict."""

    keys: tuple[str, ...] | None
    values: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, value: Any) -> _Output:
        if isinstance(value, dict):
            return cls(tuple(value), tuple(value.values()))
        return cls(None, tuple(value) if isinstance(value, (tuple, list)) else (value,))

    def map(self, function: Callable[[Tensor], Tensor | None]) -> _Output:
        return _Output(self.keys, tuple(None if x is None else function(x) for x in self.values))

    def positional(self) -> tuple[Tensor | None, ...]:
        return self.values if self.keys is None else ()

    def named(self) -> dict[str, Tensor | None]:
        return {} if self.keys is None else dict(zip(self.keys, self.values, strict=True))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def _gradient(x: Tensor) -> Tensor | None:
    return x.grad


class _Run:
    """One model's way through the micro-batches of its inputs, first without and then with activations."""

    def __init__(
        self, model: Callable[..., Any], inputs: tuple[Any, ...], micro_batch: int, parts: int | None
    ) -> None:
        self.model, self.inputs = model, inputs
        counts = [_count_rows(x) for x in inputs]
        if not counts or not max(counts):
            raise ValueError("CachedContrastive: inputs must have rows, got none")
        self.parts = -(-max(counts) // micro_batch) if parts is None else parts
        if self.parts < 1:
            raise ValueError(f"CachedContrastive: parts must be at least 1, got {parts}")
        self._counts = counts
        self._states: list[_RandomState] = []
        self._sizes: list[tuple[int | None, ...]] = []  # by part and value: rows, None for 0-d ones

    def part(self, number: int, context: Callable[[], Context]) -> _Output:
        """What the model gives for one micro-batch."""
        cuts = [(n * number // self.parts, n * (number + 1) // self.parts) for n in self._counts]
        arguments = [_rows(x, *cut) for x, cut in zip(self.inputs, cuts, strict=True)]
        with context():
            return _Output.of(self.model(*arguments))

    def features(self, context: Callable[[], Context]) -> _Output:
        """What the model gives for all rows; remembers the random states on the way."""
        device = _device(self.inputs)
        outputs = []
        for number in range(self.parts):
            self._states.append(_RandomState.now(device))
            outputs.append(self.part(number, context))
            self._sizes.append(
                tuple(None if x is None or x.ndim == 0 else len(x) for x in outputs[-1].values)
            )
        values = []
        for pieces in zip(*(output.values for output in outputs), strict=True):
            shared = pieces[0] is None or pieces[0].ndim == 0
            values.append(pieces[-1] if shared else torch.cat(pieces))
        return _Output(outputs[0].keys, tuple(values))

    def backward(self, gradients: _Output, context: Callable[[], Context], synchronize: bool) -> None:
        """Runs every micro-batch again and sends its part of the gradients back through it."""
        starts = [0] * len(gradients.values)
        for number in range(self.parts):
            last = number == self.parts - 1
            with contextlib.nullcontext() if synchronize and last else unsynchronized(self.model):
                self._states[number].restore()
                roots, grads = [], []
                for i, x in enumerate(self.part(number, context).values):
                    size, grad = self._sizes[number][i], gradients.values[i]
                    start, starts[i] = starts[i], starts[i] + (size or 0)
                    if x is None or grad is None or not x.requires_grad or (size is None and not last):
                        continue
                    roots.append(x)
                    grads.append(grad if size is None else grad[start : start + size])
                if roots:
                    with no_autocast(roots[0].device.type):
                        torch.autograd.backward(roots, grads)


def unsynchronized(model: Any) -> Context:
    """A context in which DDP and FSDP let gradients accumulate where they are."""
    if hasattr(model, "no_sync"):  # DDP, and FSDP's first generation
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):  # its second
        return _without_gradient_sync(model)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _without_gradient_sync(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@dataclass(frozen=True)
class _RandomState:
    """Where the generators stand that towers and augmentation draw from."""

    device: torch.device
    torch_cpu: Tensor
    torch_device: Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        on_device = None if device.type != "cuda" else torch.cuda.get_rng_state(device)
        numpy = sys.modules.get("numpy")  # not imported: nobody drew from it
        of_numpy = None if numpy is None else numpy.random.get_state()
        return cls(device, torch.get_rng_state(), on_device, random.getstate(), of_numpy)

    def restore(self) -> None:
        torch.set_rng_state(self.torch_cpu)
        if self.torch_device is not None:
            torch.cuda.set_rng_state(self.torch_device, self.device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    items = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _count_rows(x: Any) -> int:
    counts = {len(tensor) if tensor.ndim else None for tensor in _tensors(x)}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            "CachedContrastive: an input must be tensors of equal numbers of rows, got "
            f"{[list(tensor.shape) for tensor in _tensors(x)]}"
        )
    return int(counts.pop())  # type: ignore[arg-type]


def _rows(x: Any, start: int, stop: int) -> Any:
    if isinstance(x, Tensor):
        return x[start:stop]
    if isinstance(x, dict):
        return {name: _rows(value, start, stop) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(_rows(value, start, stop) for value in x)
    return x


def _device(inputs: tuple[Any, ...]) -> torch.device:
    return next(x.device for x in _tensors(inputs))

# SPDX-License-Identifier: Apache-2.0
"""Our operations inside torch's machinery: compile, export, autocast, torch.func, checkpointing, DDP, FSDP, torchao."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from group_programs import run_group
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch_ranks import pairs, tiny_clip, train_clip

import vlmkernels as vk

D = 32


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(randn(*shape, seed=seed), dim=-1)


WEIGHT, QUANTIZED = 0.1 * randn(48, D, seed=7), vk.quantize_weight(0.1 * randn(48, D, seed=7), "w8a8")
DATABASE, CLASSES = unit(40, D, seed=8), unit(11, D, seed=9)


@dataclass(frozen=True)
class Op:
    """An operation as people call it: `run(*make(rows))` is a tensor or a tuple of them.

    Attributes:
        run: the call.
        make: its inputs, floating ones first, whose leading dimension is the batch.
        reference: the same on the reference, which torch.func can transform; None where there is no gradient.
    """

    run: Callable[..., Any]
    make: Callable[[int], tuple[Tensor, ...]]
    reference: Callable[..., Any] | None = None


def two(rows: int) -> tuple[Tensor, ...]:
    return unit(rows, D), unit(rows, D, seed=1)


def qkv(rows: int) -> tuple[Tensor, ...]:
    return tuple(randn(rows, 9, 2, 16, seed=i) for i in range(3))


OPS = {
    "clip_loss": Op(
        lambda u, v: vk.clip_loss(u, v, 7.0), two, lambda u, v: vk.clip_loss(u, v, 7.0, backend="reference")
    ),
    "siglip_loss": Op(
        lambda u, v: vk.siglip_loss(u, v, 7.0, -3.0),
        two,
        lambda u, v: vk.siglip_loss(u, v, 7.0, -3.0, backend="reference"),
    ),
    "multi_positive_loss": Op(
        lambda u, v: vk.multi_positive_loss(
            u, v, 7.0, torch.arange(u.shape[0]) % 3, torch.arange(v.shape[0]) % 3
        ),
        two,
        lambda u, v: vk.multi_positive_loss(
            u, v, 7.0, torch.arange(u.shape[0]) % 3, torch.arange(v.shape[0]) % 3, backend="reference"
        ),
    ),
    "info_nce": Op(
        lambda q, k: vk.info_nce(q, k, 7.0), two, lambda q, k: vk.info_nce(q, k, 7.0, backend="reference")
    ),
    "linear_cross_entropy": Op(
        lambda h, t: vk.linear_cross_entropy(h, WEIGHT, t),
        lambda rows: (randn(rows, D), torch.arange(rows) % 48),
        lambda h, t: vk.linear_cross_entropy(h, WEIGHT, t, backend="reference"),
    ),
    "attention": Op(
        lambda q, k, v: vk.attention(q, k, v, is_causal=True),
        qkv,
        lambda q, k, v: vk.attention(q, k, v, is_causal=True, backend="reference"),
    ),
    "linear": Op(
        lambda x: vk.linear(x, WEIGHT, activation="gelu"),
        lambda rows: (randn(rows, D),),
        lambda x: vk.linear(x, WEIGHT, activation="gelu", backend="reference"),
    ),
    "quantized_linear": Op(
        lambda x: vk.quantized_linear(x, QUANTIZED),
        lambda rows: (randn(rows, D),),
        lambda x: vk.quantized_linear(x, QUANTIZED, backend="reference"),
    ),
    "topk_similarity": Op(lambda q: vk.topk_similarity(q, DATABASE, 3), lambda rows: (unit(rows, D),)),
    "zero_shot": Op(lambda x: vk.zero_shot(x, CLASSES, 10.0, k=3), lambda rows: (unit(rows, D),)),
}
# Quantized products have straight-through gradients, the same on all backends but no derivative of what is computed.
DIFFERENTIABLE = [name for name, op in OPS.items() if op.reference is not None]

op_names = pytest.mark.parametrize("name", OPS)


def first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def value_and_gradients(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    value = first(run(*leaves))
    value.float().square().sum().backward()
    return [value.detach(), *(x.grad for x in leaves if x.grad is not None)]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    """Two programs for one formula in float32: their sums are rounded in another order."""
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


class Wrapped(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)


@op_names
def test_compiles_into_one_graph_for_every_batch_size(name: str) -> None:
    op, counter = OPS[name], CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(op.run, backend=counter, fullgraph=True, dynamic=True)
    compiled_frames = []
    for rows in (6, 9, 17):
        assert_same(value_and_gradients(compiled, op.make(rows)), value_and_gradients(op.run, op.make(rows)))
        compiled_frames.append(counter.frame_count)
    assert len(set(compiled_frames)) == 1, "another batch size compiled again"


@op_names
def test_exports_with_a_dynamic_batch(name: str) -> None:
    op = OPS[name]
    batch = torch.export.Dim("batch", min=2, max=512)
    inputs = op.make(6)
    program = torch.export.export(
        Wrapped(op.run), inputs, dynamic_shapes={"inputs": tuple({0: batch} for _ in inputs)}
    )
    for rows in (6, 13):
        found, wanted = program.module()(*op.make(rows)), op.run(*op.make(rows))
        assert_same([first(found)], [first(wanted)])


@op_names
def test_autocast_multiplies_in_bfloat16_and_keeps_gradients_in_their_dtype(name: str) -> None:
    op = OPS[name]
    inputs = op.make(12)
    plain = value_and_gradients(op.run, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        value = first(op.run(*leaves))
    value.float().square().sum().backward()
    grads = [x.grad for x in leaves if x.grad is not None]
    assert all(grad.dtype == torch.float32 for grad in grads)
    # operands are rounded to 2^-9, and a temperature of 10 multiplies that in the logits
    for x, y in zip([value.detach().float(), *grads], plain, strict=True):
        assert (x - y).norm() <= 0.06 * y.norm() + 1e-3, name


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func_differentiates_through_the_reference(name: str) -> None:
    op = OPS[name]
    assert op.reference is not None
    inputs = op.make(5)
    floating = tuple(i for i, x in enumerate(inputs) if x.is_floating_point())

    def scalar(*arguments: Tensor) -> Tensor:
        return first(op.run(*arguments)).square().sum()

    # without a backend named: inside a transform the dispatcher takes the reference by itself
    found = torch.func.grad(scalar, argnums=floating)(*inputs)
    assert_same(list(found), value_and_gradients(op.reference, inputs)[1:])


def test_functional_call_of_a_model_gives_its_gradients() -> None:
    model, (images, ids) = tiny_clip(), pairs()
    loss = vk.nn.ClipLoss()(**model(images, ids))
    names = [name for name, _ in model.named_parameters()]
    wanted = torch.autograd.grad(loss, list(model.parameters()))

    def objective(parameters: dict[str, Tensor]) -> Tensor:
        return vk.nn.ClipLoss()(**torch.func.functional_call(model, parameters, (images, ids)))

    found = torch.func.grad(objective)({n: p.detach() for n, p in model.named_parameters()})
    assert_same([found[n] for n in names], list(wanted), tolerance=1e-4)


@op_names
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    op = OPS[name]

    def again(*inputs: Tensor) -> Any:
        return checkpoint(op.run, *inputs, use_reentrant=reentrant)

    for x, y in zip(
        value_and_gradients(again, op.make(7)), value_and_gradients(op.run, op.make(7)), strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_attention_drops_the_same_weights(reentrant: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vk.attention(q, k, v, dropout_p=0.4)

    def again(*inputs: Tensor) -> Tensor:
        return checkpoint(attend, *inputs, use_reentrant=reentrant)

    results = []
    for run in (attend, again):
        torch.manual_seed(3)
        results.append(value_and_gradients(run, qkv(4)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


inductor = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # its own modules still use it


@pytest.mark.slow
@inductor
@op_names
def test_inductor_compiles_into_one_graph_for_every_batch_size(name: str) -> None:
    op = OPS[name]
    torch._dynamo.reset()
    compiled = torch.compile(op.run, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 9, 17):
            assert_same(
                value_and_gradients(compiled, op.make(rows)), value_and_gradients(op.run, op.make(rows))
            )


@pytest.mark.slow
@inductor
@pytest.mark.timeout(300)
def test_inductor_compiles_a_training_step_of_a_model() -> None:
    torch._dynamo.reset()
    losses = []
    for compiles in (False, True):
        model = tiny_clip()
        forward = torch.compile(model, fullgraph=True, dynamic=True) if compiles else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for rows in (8, 6, 7):
            loss = vk.nn.ClipLoss()(**forward(*pairs(rows)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(losses[3:], losses[:3], rtol=1e-5)


@pytest.mark.slow
def test_a_model_under_ddp_and_fsdp_trains_as_in_one_process() -> None:
    alone = train_clip(0, 1, ("none",))["none"]
    for rank in run_group(2, train_clip, ("ddp", "fsdp")):
        for wrapper, found in rank.items():
            for name, wanted in alone.items():
                # three steps of rounding in another order
                np.testing.assert_allclose(
                    found[name], wanted, rtol=1e-4, atol=1e-5, err_msg=f"{wrapper} {name}"
                )


def test_quantizing_beside_torchao() -> None:
    """Each leaves alone what the other has quantized, and both run in one model."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x = randn(5, 64)
    before = model(x)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "0")
    theirs = type(model[0].weight)
    vk.quantize_(model, "w8a8", filter_fn=lambda module, name: name == "2")
    assert isinstance(model[2], vk.nn.QuantizedLinear)
    assert type(model[0].weight) is theirs
    assert (model(x) - before).norm() < 0.05 * before.norm()

# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of the contrastive losses: accuracy, chunks, layouts, bits, edges. Run by `test_triton.py`."""

from __future__ import annotations

import math

import pytest
import torch
from contrastive_problems import OPERANDS, OPS, SQUARE, Problem, check_accuracy, draws, make, row_gradient
from oracle import assert_as_accurate, ulp
from triton_device import DEVICE, DTYPES

from vlmkernels.ops import contrastive as ops
from vlmkernels.ops.reference import contrastive as reference
from vlmkernels.ops.reference import contrastive_blocks
from vlmkernels.ops.triton import _tables, contrastive
from vlmkernels.ops.triton import contrastive_blocks as blocks

each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# One tile of the interpreter is 32 x 32, its parts 8 columns wide, its steps 16 deep.
SHAPES = [(1, 1, 1), (7, 7, 5), (33, 33, 17), (50, 50, 16)]
OBLONG = [(3, 70, 8), (40, 31, 5)]


def ours(problem: Problem, **options) -> dict[str, torch.Tensor]:
    results = problem.on(DEVICE).results(ops, backend="triton", **options)
    return {name: x.cpu() for name, x in results.items()}


def shapes(op: str) -> list[tuple[int, int, int]]:
    if op in SQUARE:
        return SHAPES
    return SHAPES + [shape for shape in OBLONG if op != "info_nce" or shape[0] <= shape[1]]


@each_dtype
@pytest.mark.parametrize(("op", "shape"), [(op, shape) for op in OPS for shape in shapes(op)])
def test_as_accurate_as_eager(op, shape, dtype):
    count = 3 if dtype == torch.float32 else 1
    check_accuracy(draws(op, *shape)[:count], compute_dtype=dtype, backend="triton", device=DEVICE)


@each_op
def test_bfloat16_loss_is_the_loss_of_rounded_operands(op):
    problem = make(op, 40, d=24)
    rounded = problem.but(**{name: problem.tensors[name].bfloat16().float() for name in OPERANDS[op]})
    loss = problem.on(DEVICE).loss(ops, backend="triton", compute_dtype=torch.bfloat16).cpu()
    assert_as_accurate(
        loss,
        rounded.loss(reference),
        rounded.to(torch.float64).loss(reference),
        at_least=ulp(1.0, torch.float32),
    )


@pytest.fixture
def small_chunks(monkeypatch):
    """Workspaces so small that a problem of a hundred rows has several chunks of rows, of columns, of problems."""
    monkeypatch.setattr(contrastive, "CHUNK_BYTES", 40 * 48 * 4)
    monkeypatch.setattr(contrastive, "CHUNK_COLUMNS", 48)
    monkeypatch.setattr(contrastive, "STATISTICS_COLUMNS", 48)
    monkeypatch.setattr(ops, "KEEP_BYTES", 0)


@each_op
@each_dtype
def test_chunks_do_not_change_the_result(op, dtype, small_chunks):
    problem = make(op, 90, None if op in SQUARE else 100, 9, seed=1)
    check_accuracy([problem], compute_dtype=dtype, backend="triton", device=DEVICE)


@pytest.mark.parametrize("op", [op for op in OPS if op != "linear_cross_entropy"])
def test_chunks_of_problems(op, small_chunks):
    problem = make(op, 9, None if op in SQUARE else 12, 8, lead=(2, 21))
    check_accuracy([problem], backend="triton", device=DEVICE, compute_dtype=torch.float16)


@each_dtype
def test_classes_few_enough_to_keep_their_logits(dtype, monkeypatch):
    problem = make("linear_cross_entropy", 90, 20, 7)
    monkeypatch.setattr(contrastive, "READ_ROWS", 32)
    monkeypatch.setattr(contrastive, "CHUNK_BYTES", 20 * 40 * 8)  # three ranges of rows
    check_accuracy([problem], compute_dtype=dtype, backend="triton", device=DEVICE)


@each_op
def test_dots_are_kept_from_forward_to_backward(op, monkeypatch):
    problem = make(op, 40, None if op in SQUARE else 50, 8)
    for keep in (0, 2**26):
        monkeypatch.setattr(ops, "KEEP_BYTES", keep)
        check_accuracy([problem], compute_dtype=torch.float16, backend="triton", device=DEVICE)


@pytest.mark.parametrize("op", ["info_nce", "linear_cross_entropy"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(op, reduction):
    problem = make(op, 35, 50, 8).but(reduction=reduction)
    upstream = row_gradient(problem) if reduction == "none" else 0.37
    check_accuracy([problem], upstream=upstream, compute_dtype=torch.float16, backend="triton", device=DEVICE)


@each_dtype
@pytest.mark.parametrize("upstream", [-2.0, 0.0, 1e-6])
def test_incoming_gradients_of_any_sign_and_size(dtype, upstream):
    problem = make("clip_loss", 40, d=8)
    check_accuracy([problem], upstream=upstream, compute_dtype=dtype, backend="triton", device=DEVICE)


@each_op
@each_dtype
def test_large_logits(op, dtype):
    problem = make(op, 40, d=24)
    scaled = {name: 5 * problem.tensors[name] for name in OPERANDS[op]}
    problem = problem.but(**scaled, logit_scale=torch.tensor(100.0))
    if dtype == torch.float32:
        check_accuracy([problem], backend="triton", device=DEVICE)
        return
    # half precision against the loss of the rounded operands: what rounding does to logits of 2,500 is not ours
    rounded = problem.but(**{name: problem.tensors[name].to(dtype).float() for name in OPERANDS[op]})
    loss = ours(problem, compute_dtype=dtype)["loss"]
    exact = rounded.to(torch.float64).loss(reference)
    assert_as_accurate(loss, rounded.loss(reference), exact)


def test_rows_and_columns_of_very_different_size_use_two_exponentials():
    problem = make("clip_loss", 40, d=8)
    features = problem.tensors["image_features"] * torch.logspace(-3, 1.5, 40).unsqueeze(1)
    check_accuracy([problem.but(image_features=features)], backend="triton", device=DEVICE)
    check_accuracy(
        [problem.but(image_features=features.half().float())],
        backend="triton",
        device=DEVICE,
        compute_dtype=torch.float16,
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@each_op
def test_half_features_have_half_gradients(op, dtype):
    problem = make(op, 40, d=8)
    half = problem.but(**{name: problem.tensors[name].to(dtype) for name in OPERANDS[op]})
    results = ours(half)
    assert results["loss"].dtype == torch.float32
    assert all(results[f"gradient of {name}"].dtype == dtype for name in OPERANDS[op])
    check_accuracy([half], backend="triton", device=DEVICE)


def transposed(x):
    return x.T.contiguous().T


def every_other_column(x):
    return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]


def part_of_a_larger_one(x):
    return torch.nn.functional.pad(x, (3, 5, 1, 1), value=torch.nan)[1:-1, 3:-5]


@each_op
@pytest.mark.parametrize("layouts", [(transposed, every_other_column), (part_of_a_larger_one, transposed)])
def test_layout_does_not_change_a_bit(op, layouts):
    problem = make(op, 40, d=9)
    for dtype in (torch.float32, torch.float16) if op == "siglip_loss" else (torch.float16,):
        operands = {name: problem.tensors[name].to(dtype) for name in OPERANDS[op]}
        strided = {name: layout(x) for (name, x), layout in zip(operands.items(), layouts, strict=True)}
        expected, results = ours(problem.but(**operands)), ours(problem.but(**strided))
        assert all(torch.equal(results[key], expected[key]) for key in expected)


@each_op
def test_repeats_its_bits(op):
    problem = make(op, 70, d=9)
    first, second = (ours(problem, compute_dtype=torch.float16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_op
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from inside the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_features_spread_as_in_eager(op, value, side):
    problem = make(op, 40, d=8)
    name = OPERANDS[op][side]
    features = problem.tensors[name].clone()
    features[13, 5] = value
    problem = problem.but(**{name: features})
    if op == "info_nce":
        problem = problem.but(key_mask=None)
    expected, results = problem.results(reference), ours(problem)
    if op == "clip_loss":
        del results["gradient of logit_bias"]  # zero whatever the features are: the bias cancels
    for key, result in results.items():
        assert torch.equal(result.isnan(), expected[key].isnan()), key


@pytest.mark.parametrize("op", ["info_nce", "linear_cross_entropy"])
@pytest.mark.skipif(DEVICE == "cpu", reason="values of cpu tensors are checked")
def test_a_bad_index_gives_nan(op):
    problem = make(op, 12, 20, 8)
    name = "positives" if op == "info_nce" else "targets"
    bad = problem.options[name].clone()
    bad[3] = 2**40 + 1
    assert problem.but(**{name: bad}).on(DEVICE).loss(ops, backend="triton").isnan()


@pytest.mark.parametrize("op", ["info_nce", "linear_cross_entropy"])
@pytest.mark.skipif(DEVICE == "cuda", reason="values of device tensors are not read")
def test_a_bad_index_on_the_cpu_is_an_error(op):
    problem = make(op, 12, 20, 8)
    name = "positives" if op == "info_nce" else "targets"
    bad = problem.options[name].clone()
    bad[3] = 20
    with pytest.raises(ValueError, match=rf"vk.{op}: {name} must be in \[0, 20\), got 20"):
        problem.but(**{name: bad}).loss(ops, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["contrastive_statistics", "contrastive_gradients", "contrastive_sigmoid"])
@pytest.mark.parametrize("read", [False, True])
def test_every_tile_of_the_tables(kernel, read, monkeypatch):
    name = f"{kernel}_read" if read else kernel
    dtype = torch.float32 if read else torch.float16
    monkeypatch.setattr(ops, "KEEP_BYTES", 0)
    tiles = {repr(row.tile): row.tile for row in _tables.TABLES[name] if row.arch}
    for op in ("siglip_loss",) if kernel == "contrastive_sigmoid" else ("clip_loss", "linear_cross_entropy"):
        problem = make(op, 131, d=24)
        expected = ours(problem, compute_dtype=dtype)
        for tile in tiles.values():
            monkeypatch.setitem(_tables.TABLES, name, (_tables.Row(tile, arch=0), _tables.Row(tile)))
            for key, result in ours(problem, compute_dtype=dtype).items():
                # another order of adding up some hundred numbers, and in half precision another rounding of some tiles
                eps = torch.finfo(dtype).eps
                scale = expected[key].abs().max().item()
                torch.testing.assert_close(result, expected[key], rtol=0, atol=max(8 * eps * scale, 1e-6))


# Blocks of a problem that is spread over a process group.


def block_cases():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(37, 10, generator=generator), torch.randn(45, 10, generator=generator)
    labels = torch.randint(0, 9, (82,), generator=generator)
    shares = torch.rand(82, generator=generator)
    by_label = {
        "row_labels": labels[:37],
        "col_labels": labels[37:],
        "row_share": shares[:37],
        "col_share": shares[37:],
    }
    diagonal = {"positives": torch.arange(37) - 5, "logit_bias": torch.tensor(-1.0), "smoothing": 0.1}
    for options in (by_label, diagonal):
        yield q, k, contrastive_blocks.Block(**options, row_classes=100, col_classes=90)


def on_device(x):
    if isinstance(x, contrastive_blocks.Block):
        return contrastive_blocks.Block(**{name: on_device(value) for name, value in vars(x).items()})
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("case", [0, 1])
def test_blocks_equal_the_references(case):
    q, k, block = list(block_cases())[case]
    scale = torch.tensor(2.0)
    arguments = [on_device(x) for x in (q, k, scale, block)]
    used = 4 if block.smoothing else 3
    for mine, expected in zip(
        blocks.block_statistics(*arguments),
        contrastive_blocks.block_statistics(q, k, scale, block),
        strict=True,
    ):
        mine, expected = mine[:used], expected[:used]
        torch.testing.assert_close(mine.cpu(), expected, rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(2)
    lse = [torch.rand(2, n, generator=generator) + torch.tensor([[9.0], [1.0]]) for n in (37, 45)]
    weights = [torch.randn(n, generator=generator) for n in (37, 45)]
    sums = [torch.ones(37, 10), torch.ones(37, 10, device=DEVICE)]
    expected = contrastive_blocks.block_gradients(q, k, scale, block, *lse, *weights, sums[0], True)
    mine = blocks.block_gradients(*arguments, *map(on_device, (*lse, *weights)), sums[1], True)
    for a, b in zip((*mine, sums[1]), (*expected, sums[0]), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


def test_sigmoid_block_equals_the_references():
    q, k, _ = next(block_cases())
    block = contrastive_blocks.Block(positives=torch.arange(37) - 5, logit_bias=torch.tensor(-1.0))
    scale, sums = torch.tensor(2.0), [torch.ones(37, 10), torch.ones(37, 10, device=DEVICE)]
    expected = contrastive_blocks.block_sigmoid(q, k, scale, block, 0.1, sums[0], True)
    mine = blocks.block_sigmoid(*(on_device(x) for x in (q, k, scale, block)), 0.1, sums[1], True)
    for a, b in zip((*mine, sums[1]), (*expected, sums[0]), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)

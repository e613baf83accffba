# SPDX-License-Identifier: Apache-2.0
"""What holds for the CPU kernels of the contrastive losses alone: bits, threads, memory, bounds, instruction sets."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from contrastive_problems import OPERANDS, OPS, SQUARE, assert_accurate, make
from kernel_checks import (
    ALLOCATIONS_AND_VIEWS,
    Inside,
    assert_undisturbed_by_threads,
    isa_levels,
    needs_cpu_kernels,
    run,
    saved_at,
)

from vlmkernels.ops import _contrastive_ops
from vlmkernels.ops import contrastive as ops

pytestmark = needs_cpu_kernels
each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def medium(op, **keywords):
    """Large enough to be cut into parts for several threads."""
    return make(op, 300, None if op in SQUARE else 500, 64, **keywords)


# Determinism and threads.


@each_op
@each_dtype
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_threads_give_the_same_bits(op, dtype, threads):
    torch.set_num_threads(threads)
    problem = medium(op)
    first = problem.results(ops, backend="cpu", compute_dtype=dtype)
    second = problem.results(ops, backend="cpu", compute_dtype=dtype)
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@each_op
@each_dtype
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads_is_as_accurate_as_eager(op, dtype, threads):
    torch.set_num_threads(threads)
    problem = medium(op)
    assert_accurate(
        [problem], [problem.results(ops, backend="cpu", compute_dtype=dtype)], compute_dtype=dtype
    )


@each_op
def test_python_threads_do_not_disturb_each_other(op):
    problems = [medium(op, seed=seed) for seed in range(4)]
    assert_undisturbed_by_threads([partial(problem.results, ops, backend="cpu") for problem in problems])


@each_op
def test_default_backend_is_cpu(op):
    problem = medium(op)
    assert torch.equal(problem.loss(ops), problem.loss(ops, backend="cpu"))


# What a call issues and what it keeps.


IMPLEMENTATIONS = {
    _contrastive_ops.softmax_contrastive: _contrastive_ops._softmax_impl,
    _contrastive_ops.softmax_contrastive_backward: _contrastive_ops._softmax_backward_impl,
    _contrastive_ops.one_pass_contrastive: _contrastive_ops._one_pass_impl,
}


@each_op
@each_dtype
def test_a_call_issues_only_allocations_and_views(op, dtype):
    problem = medium(op)
    problem = problem.but(**{name: x.clone().requires_grad_() for name, x in problem.tensors.items()})
    with Inside(IMPLEMENTATIONS) as mode:
        loss = problem.loss(ops, backend="cpu", compute_dtype=dtype)
        torch.autograd.grad(loss, list(problem.tensors.values()))
    assert mode.ours
    assert set(mode.inside) <= ALLOCATIONS_AND_VIEWS


@each_op
def test_saved_for_backward_stays_within_64_mib(op):
    n, d = 5000, 4  # 5,000 x 5,000 logits are 95 MiB
    problem = make(op, n, d=d)
    problem = problem.but(**{name: x.clone().requires_grad_() for name, x in problem.tensors.items()})
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        problem.loss(ops, backend="cpu")
    assert 0 < sum(saved.values()) <= 64 * 2**20


PEAK_MEMORY = """
    import resource, sys, torch
    from contrastive_problems import make
    from vlmkernels.ops import contrastive as ops

    def resident():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    n, d, dtype = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3])
    for op in sys.argv[4:]:
        make(op, 64, d=d).results(ops, backend="cpu", compute_dtype=dtype)  # pools, lazily loaded code
        problem = make(op, n // 2, 2 * n, d) if op == "linear_cross_entropy" else make(op, n, d=d)
        problem = problem.but(**{name: x.requires_grad_() for name, x in problem.tensors.items()})
        ballast = []  # fills memory up to the peak so far, so that whatever the call takes raises it
        while resident() < peak():
            ballast.append(bytearray(b"x" * (1 << 20)))
        before = peak()
        problem.loss(ops, backend="cpu", compute_dtype=dtype).backward()
        gradients = sum(x.grad.untyped_storage().nbytes() for x in problem.tensors.values())
        print(op, (peak() - before - gradients) / 2**20)
"""


def assert_memory_within_64_mib(ops_to_run, n, d, dtype):
    lines = run(PEAK_MEMORY, n, d, str(dtype).removeprefix("torch."), *ops_to_run).splitlines()
    extra = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert list(extra) == list(ops_to_run)
    # the allocator may hold on to a few MiB besides; the N x N logits would be 256 MiB at N = 8192
    assert max(extra.values()) <= 64 + 4, f"MiB beside the gradients: {extra}"


def test_extra_memory_is_the_gradients_and_64_mib():
    assert_memory_within_64_mib(OPS, 8192, 32, torch.float32)


@pytest.mark.slow
@each_op
@each_dtype
@pytest.mark.parametrize(("n", "d"), [(8192, 512), (32768, 512)])
def test_extra_memory_of_large_batches(op, dtype, n, d):
    assert_memory_within_64_mib([op], n, d, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("op", SQUARE)
def test_a_batch_of_131072(op):
    assert_memory_within_64_mib([op], 131072, 64, torch.bfloat16)


# Bounds.


GUARDED = """
    import torch
    from contrastive_problems import OPS, SQUARE, make
    from kernel_checks import GuardedAllocations, guarded
    from test_contrastive_cpu import IMPLEMENTATIONS
    from vlmkernels.ops import contrastive as ops

    for op in OPS:
        for n, m, d in ((1, 1, 1), (7, 7, 3), (33, 33, 47), (50, 50, 49), (129, 129, 17), (9, 245, 7), (245, 9, 65)):
            if op in SQUARE and n != m or op == "info_nce" and n > m:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for features in (torch.float32, torch.bfloat16):
                    problem = make(op, n, m, d)
                    tensors = {k: v.to(features) if v.ndim > 1 else v for k, v in problem.tensors.items()}
                    expected = problem.but(**tensors).results(ops, backend="cpu", compute_dtype=dtype)
                    guarded_tensors = {k: guarded(v) for k, v in tensors.items()}
                    guarded_options = {k: guarded(v) for k, v in problem.options.items()}
                    with GuardedAllocations(IMPLEMENTATIONS) as mode:
                        problem = problem.but(**guarded_tensors, **guarded_options)
                        results = problem.results(ops, backend="cpu", compute_dtype=dtype)
                    assert mode.count >= 2, "no output was guarded"
                    for name, result in results.items():
                        assert torch.equal(result.nan_to_num(), expected[name].nan_to_num()), (op, n, m, d, name)
                    results = None
    print("in bounds")
"""


def test_nothing_is_read_or_written_behind_a_buffer():
    assert "in bounds" in run(GUARDED)


# Instruction sets.


EVERY_PROBLEM = """
    import sys, torch
    from contrastive_problems import OPS, make
    from vlmkernels import _native
    from vlmkernels.ops import contrastive as ops

    results = {}
    for op in OPS:
        for n, d in ((7, 5), (50, 64), (131, 33), (250, 49)):
            for dtype in (torch.float32, torch.bfloat16):
                draws = [make(op, n, d=d, seed=s).results(ops, backend="cpu", compute_dtype=dtype) for s in range(3)]
                results[op, n, d, dtype] = draws
    torch.save({"isa": _native.cpu.isa(), "results": results}, sys.argv[1])
"""


@pytest.mark.parametrize("isa", isa_levels())
def test_every_instruction_set_is_as_accurate_as_eager(isa, tmp_path):
    saved = saved_at(isa, EVERY_PROBLEM, tmp_path)
    assert len(saved["results"]) == len(OPS) * 4 * 2
    for (op, n, d, dtype), draws in saved["results"].items():
        problems = [make(op, n, d=d, seed=seed) for seed in range(3)]
        assert_accurate(problems, draws, compute_dtype=dtype)


@each_op
def test_operands_are_left_as_they_are(op):
    problem = make(op, 20, d=8)
    before = {name: problem.tensors[name].clone() for name in OPERANDS[op]}
    problem.results(ops, backend="cpu")
    assert all(torch.equal(problem.tensors[name], before[name]) for name in OPERANDS[op])

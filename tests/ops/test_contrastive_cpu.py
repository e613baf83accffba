# SPDX-License-Identifier: Apache-2.0
"""What holds for the CPU kernels of the contrastive losses alone: bits, threads, memory, bounds, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from contrastive_problems import OPERANDS, OPS, SQUARE, assert_accurate, make
from torch.utils._python_dispatch import TorchDispatchMode

from vlmkernels import _native
from vlmkernels.ops import _contrastive_ops, _library
from vlmkernels.ops import contrastive as ops

pytestmark = pytest.mark.skipif(
    _native.cpu_reason is not None, reason=f"vlmkernels._cpu: {_native.cpu_reason}"
)
each_op = pytest.mark.parametrize("op", OPS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def medium(op, **keywords):
    """Large enough to be cut into parts for several threads."""
    return make(op, 300, None if op in SQUARE else 500, 64, **keywords)


def run(script, *arguments, **environment):
    """Output of a Python program in a process of its own, which sees this folder and the package under test."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


# Determinism and threads.


@each_op
@each_dtype
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_threads_give_the_same_bits(op, dtype, threads, set_threads):
    set_threads(threads)
    problem = medium(op)
    first = problem.results(ops, backend="cpu", compute_dtype=dtype)
    second = problem.results(ops, backend="cpu", compute_dtype=dtype)
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@each_op
@each_dtype
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads_is_as_accurate_as_eager(op, dtype, threads, set_threads):
    set_threads(threads)
    problem = medium(op)
    assert_accurate(
        [problem], [problem.results(ops, backend="cpu", compute_dtype=dtype)], compute_dtype=dtype
    )


@each_op
def test_python_threads_do_not_disturb_each_other(op):
    problems = [medium(op, seed=seed) for seed in range(4)]
    expected = [problem.results(ops, backend="cpu") for problem in problems]
    results = [[] for _ in problems]

    def work(index):
        for _ in range(3):
            results[index].append(problems[index].results(ops, backend="cpu"))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, repeated in enumerate(results):
        assert len(repeated) == 3
        for once in repeated:
            assert all(torch.equal(result, expected[index][name]) for name, result in once.items())


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


class Inside(TorchDispatchMode):
    """Notes every op that runs, those inside the implementations of our own ops included."""

    def __init__(self):
        super().__init__()
        self.ours, self.inside = [], []
        self._depth = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != _library.NAMESPACE:
            result = func(*args, **kwargs)
            if self._depth:
                name = func._schema.name.removeprefix("aten::")
                copies = name == "reshape" and result.data_ptr() != args[0].data_ptr()
                self.inside.append("reshape with a copy" if copies else name)
            return result
        self.ours.append(func)
        self._depth += 1
        try:
            with self:
                # straight to the implementation: calling the op again would only bring us back here
                return IMPLEMENTATIONS[func](*args)
        finally:
            self._depth -= 1


ALLOCATIONS_AND_VIEWS = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "view", "as_strided",
    "expand", "select", "slice", "unsqueeze", "squeeze", "transpose", "t", "permute", "reshape", "_unsafe_view",
    "unbind",
}  # fmt: skip


@each_op
@each_dtype
def test_a_call_issues_only_allocations_and_views(op, dtype):
    problem = medium(op)
    problem = problem.but(**{name: x.clone().requires_grad_() for name, x in problem.tensors.items()})
    with Inside() as mode:
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
    import ctypes, mmap, sys, torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from contrastive_problems import OPS, SQUARE, make
    from test_contrastive_cpu import IMPLEMENTATIONS
    from vlmkernels.ops import contrastive as ops

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    regions = []

    def guarded_bytes(count):
        '''Writable memory whose last byte lies just before a page that must not be touched.'''
        pages = -(-count // mmap.PAGESIZE) + 1
        region = mmap.mmap(-1, pages * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(region))
        if libc.mprotect(start + (pages - 1) * mmap.PAGESIZE, mmap.PAGESIZE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        regions.append(region)
        offset = (pages - 1) * mmap.PAGESIZE - count
        return (ctypes.c_char * count).from_address(start + offset)

    def guarded_empty(shape, dtype):
        count = torch.empty(shape, dtype=dtype, device="meta").numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(guarded_bytes(count * dtype.itemsize), dtype=dtype).view(shape)

    def guarded(x):
        return guarded_empty(x.shape, x.dtype).copy_(x) if isinstance(x, torch.Tensor) else x

    class GuardedAllocations(TorchDispatchMode):
        '''Outputs and workspaces end at such a page too.'''
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func.namespace == "vlmkernels":
                with self:
                    return IMPLEMENTATIONS[func](*args)
            result = func(*args, **kwargs)
            if func._schema.name in ("aten::empty", "aten::new_empty", "aten::empty_like"):
                if result.is_contiguous() and result.numel():
                    self.count += 1
                    return guarded_empty(result.shape, result.dtype)
            return result

    if sys.argv[1] == "break":
        x = guarded(torch.zeros(100))
        ctypes.memset(x.data_ptr() + 400, 0, 1)
        print("survived")

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
                    with GuardedAllocations() as mode:
                        problem = problem.but(**guarded_tensors, **guarded_options)
                        results = problem.results(ops, backend="cpu", compute_dtype=dtype)
                    assert mode.count >= 2, "no output was guarded"
                    for name, result in results.items():
                        assert torch.equal(result.nan_to_num(), expected[name].nan_to_num()), (op, n, m, d, name)
                    results = None
    print("in bounds")
"""


def test_nothing_is_read_or_written_behind_a_buffer():
    assert "in bounds" in run(GUARDED, "check")


def test_the_guard_pages_are_really_there():
    with pytest.raises(AssertionError, match="exit code -"):
        run(GUARDED, "break")


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


def isa_levels():
    return _native.cpu.isa_levels() if _native.cpu_reason is None else []


@pytest.mark.parametrize("isa", isa_levels())
def test_every_instruction_set_is_as_accurate_as_eager(isa, tmp_path):
    run(EVERY_PROBLEM, tmp_path / "results.pt", VLMKERNELS_CPU_ISA=isa)
    saved = torch.load(tmp_path / "results.pt")
    assert saved["isa"] == isa
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

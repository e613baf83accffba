# SPDX-License-Identifier: Apache-2.0
"""What holds on a GPU for every op and both kinds of kernels: dtypes and gradients, bits, compilation, CUDA graphs,
streams, devices. The table of calls itself is tried on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import gpu_calls
import pytest
import torch
from gpu_calls import PROBLEMS
from torch import Tensor

from vlmkernels import _native

each_problem = pytest.mark.parametrize("name", PROBLEMS)
each_dtype = pytest.mark.parametrize(
    "dtype", gpu_calls.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
each_backend = pytest.mark.parametrize("backend", ["triton", "cuda"])
HALF = torch.float16


def served(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The call's results; where the backend refuses it, the test is skipped with its sentence."""
    try:
        return call()
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(_native.cpu_reason is not None, reason=str(_native.cpu_reason))
@each_problem
def test_the_table_of_calls_on_the_cpu(name: str) -> None:
    problem = PROBLEMS[name]
    inputs = problem.place("cpu", torch.float32)
    ours = served(lambda: problem.run(inputs, "cpu"))
    gpu_calls.compare(problem, ours, problem.expected(inputs), torch.float32)


def test_the_program_says_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--backend", "reference", "--device", "cpu", "--dtypes", "float16"]
    assert gpu_calls.main(arguments) == 0
    assert f"{len(PROBLEMS)} right, 0 wrong, 0 refused" in capsys.readouterr().out


@pytest.mark.gpu
@each_dtype
@each_backend
@each_problem
def test_results_and_gradients(name: str, backend: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name]
    inputs = problem.place("cuda", dtype)
    ours = served(lambda: problem.run(inputs, backend))
    gpu_calls.compare(problem, ours, problem.expected(inputs), dtype)


@pytest.mark.gpu
@each_problem
def test_the_default_backend(name: str) -> None:
    problem = PROBLEMS[name]
    inputs = problem.place("cuda", torch.bfloat16)
    gpu_calls.compare(problem, problem.run(inputs, None), problem.expected(inputs), torch.bfloat16)


@pytest.mark.gpu
@each_backend
@each_problem
def test_bits_repeat(name: str, backend: str) -> None:
    problem = PROBLEMS[name]
    inputs = problem.place("cuda", HALF, size=5)
    first = served(lambda: problem.run(inputs, backend))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, problem.run(inputs, backend), strict=True))


@pytest.mark.gpu
@each_backend
@each_problem
def test_compiled_without_graph_breaks(name: str, backend: str) -> None:
    problem = PROBLEMS[name]
    inputs = problem.place("cuda", HALF)
    eager = served(lambda: list(problem.call(inputs, backend)))
    if name.startswith("quantized"):
        pytest.skip("the call quantizes its weight, which is no part of a compiled program")
    compiled = torch.compile(lambda x: problem.call(x, backend), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(inputs), eager, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@each_backend
@each_problem
def test_a_cuda_graph_replays_forward_and_backward(name: str, backend: str) -> None:
    problem = PROBLEMS[name]
    if name == "topk_similarity":
        pytest.skip("a search reads back how many candidates it has, which a graph cannot")
    inputs, others = (problem.place("cuda", HALF, size=size) for size in (1, 1))
    served(lambda: problem.run(inputs, backend))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            problem.run(inputs, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run(inputs, backend)
    with torch.no_grad():
        for key in problem.leaves:
            if inputs[key].ndim:
                others[key].copy_(inputs[key].flip(0))
                inputs[key].copy_(others[key])
    graph.replay()
    eager = problem.run(others, backend)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


@pytest.mark.gpu
@each_backend
@each_problem
def test_kernels_run_on_the_current_stream(name: str, backend: str) -> None:
    """The inputs are written on a stream that sleeps first: whoever does not wait on that stream reads zeros."""
    problem = PROBLEMS[name]
    inputs, late = problem.place("cuda", HALF), problem.place("cuda", HALF)
    expected = served(lambda: problem.run(inputs, backend))
    floating = [key for key, x in late.items() if x.is_floating_point() and x.ndim]
    with torch.no_grad():
        for key in floating:
            late[key].zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # some hundredths of a second
        with torch.no_grad():
            for key in floating:
                late[key].copy_(inputs[key])
        ours = problem.run(late, backend)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device at most")
@each_backend
@each_problem
def test_tensors_on_a_device_that_is_not_the_current_one(name: str, backend: str) -> None:
    problem = PROBLEMS[name]
    first, second = (problem.place(f"cuda:{index}", HALF) for index in (0, 1))
    expected = served(lambda: problem.run(first, backend))
    assert torch.cuda.current_device() == 0
    ours = problem.run(second, backend)
    assert all(x.device.index == 1 for x in ours)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, expected, strict=True))


@pytest.mark.gpu
def test_inductor_takes_attention_and_a_loss() -> None:
    for name in ("attention", "clip_loss"):
        problem = PROBLEMS[name]
        inputs = problem.place("cuda", HALF)
        compiled = torch.compile(lambda x, problem=problem: problem.call(x, None), fullgraph=True)
        with torch.no_grad():
            (mine,), (theirs,) = compiled(inputs), problem.call(inputs, None)
        assert torch.equal(mine, theirs)

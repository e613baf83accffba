# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: threads, interleaved pairs, probed peaks, the quick subset, and the files of results.

README.md in this folder says how rows are reproduced and recorded::

    pytest benchmarks/bench_contrastive.py --benchmark-columns=median,iqr,rounds
    pytest benchmarks/bench_contrastive.py --save-results        # benchmarks/results/<machine>/contrastive.json

`--threads` (default 2) is given to torch, whose pool our kernels use too. `--machine` names the folder of results; by
default the processor's brand and the number of cores. A row that is run again replaces the one of the same name.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_measures
import measures
import pytest
import result_files
import torch

from vlmkernels import _native
from vlmkernels._files import write_text_atomically
from vlmkernels._version import __version__

HERE = Path(__file__).parent
ROWS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()
#: Suites of this name hold rows of a GPU, whose results are those of the card.
GPU_SUITE = "bench_gpu_"
PROBE_SECONDS = 0.3

#: A minute or two of rows, at least one of every family: what `-m quick` and `vlmkernels bench --quick` run.
QUICK = (
    "bench_attention.py::test_attention[ViT-B/32 (32,12,50,64)-forward-float32]",
    "bench_attention.py::test_attention[ViT-B/32 (32,12,50,64)-forward+backward-bfloat16]",
    "bench_attention.py::test_attention[text (64,8,77,64) causal-forward+backward-float32]",
    "bench_attention.py::test_masked_keys_cost_nothing[ViT-B/16 (16,12,197,64)-float32]",
    "bench_contrastive.py::test_forward_and_backward[clip_loss 2048 x 512 float32]",
    "bench_contrastive.py::test_forward_and_backward[clip_loss 2048 x 512 bfloat16]",
    "bench_engine.py::test_engine_rate[float32-512-50]",
    "bench_engine.py::test_engine_rate[bfloat16-512-50]",
    "bench_engine.py::test_engine_rate[int8-512-50]",
    "bench_overhead.py::test_forward_overhead",
    "bench_overhead.py::test_forward_and_backward_call",
    "bench_quantized.py::test_w8a8_beside_float32[77x512x2048]",
    "bench_quantized.py::test_bf16_beside_bfloat16[50x768x3072]",
    "bench_quantized.py::test_float_linear[1576x768x3072-float32-forward]",
    "bench_topk.py::test_few_classes[float32]",
    "bench_topk.py::test_few_classes[bfloat16]",
    "bench_topk.py::test_zero_shot",
    "bench_topk.py::test_product_and_topk[int8]",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vlmkernels")
    group.addoption("--threads", type=int, default=2, help="threads of torch and of our kernels (default 2)")
    group.addoption("--machine", default=None, help="name of the folder in --results")
    group.addoption("--results", default=str(HERE / "results"), help="where results are kept, by machine")
    group.addoption("--save-results", action="store_true", help="write <results>/<machine>/<family>.json")
    group.addoption("--rows", default=None, metavar="FILE", help="write the rows of this run to one file")
    group.addoption(
        "--append", default=None, metavar="FILE", help="append each row to a file, as soon as it is there"
    )
    group.addoption(
        "--dry", action="store_true", help="GPU rows: small problems on the CPU, timed by a fake clock"
    )
    group.addoption(
        "--prepare", action="store_true", help="GPU rows: compile what they need, and measure nothing"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}
    config.addinivalue_line("markers", "quick: a row that the continuous integration compares as well")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    why_no_gpu = None
    if not config.getoption("--dry"):
        if not torch.cuda.is_available():
            why_no_gpu = "there is no CUDA device"
        elif "gpu" not in config.option.markexpr:  # the processor's rows are of another machine class
            why_no_gpu = "rows of a GPU run with -m gpu"
    for item in items:
        if short_node(item) in QUICK:
            item.add_marker(pytest.mark.quick)
        if item.get_closest_marker("gpu") is not None:
            # those of torch's compiler and of other releases say nothing about our kernels
            item.add_marker(pytest.mark.filterwarnings("default"))
            if why_no_gpu is not None:
                item.add_marker(pytest.mark.skip(reason=why_no_gpu))


def short_node(item: pytest.Item) -> str:
    """`bench_<family>.py::test[case]`: what pytest takes in this folder, wherever the root of the run is."""
    return f"{item.path.name}::{item.nodeid.partition('::')[2]}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    families = config.stash[ROWS]
    name = config.getoption("--machine") or machine_name()
    if config.getoption("--rows"):
        content = {"name": name, "machine": machine(config), "families": families}
        write_text_atomically(config.getoption("--rows"), json.dumps(content))
    if config.getoption("--save-results"):
        for family, rows in families.items():
            folder = Path(config.getoption("--results")) / name
            result_files.save_rows(folder / f"{family}.json", machine(config), rows)


def machine_name() -> str:
    """Folder name for this machine: processor and number of cores."""
    return re.sub(r"[^a-z0-9]+", "-", f"{brand()} {os.cpu_count()} cores".lower()).strip("-")


def brand() -> str:
    return (
        _native.cpu.cpu_brand().strip()
        if _native.cpu_reason is None
        else platform.processor() or platform.machine()
    )


def machine(config: pytest.Config) -> dict[str, Any]:
    return {
        "processor": brand(),
        "cores": os.cpu_count(),
        "isa": _native.cpu.isa() if _native.cpu_reason is None else None,
        "threads": config.getoption("--threads"),
    }


def versions() -> dict[str, str]:
    return {
        "vlmkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> int:
    """Threads of this run, already given to torch."""
    count = request.config.getoption("--threads")
    torch.set_num_threads(count)
    return count


@pytest.fixture(autouse=True)
def extension(request: pytest.FixtureRequest) -> None:
    """Every row of the processor measures the compiled kernels; without them there is nothing to compare."""
    if _native.cpu_reason is not None and request.node.get_closest_marker("gpu") is None:
        pytest.fail(f"vlmkernels._cpu is not available: {_native.cpu_reason}")


@pytest.fixture
def row(benchmark, request: pytest.FixtureRequest, threads: int) -> Callable[..., None]:
    """`row(name, shape=..., **figures)` notes figures beside the timing and for the results file."""
    family = Path(request.node.fspath).stem.removeprefix("bench_")

    def note(name: str, **figures: Any) -> None:
        figures = _short(figures)
        benchmark.extra_info.update(figures)
        entry = {"name": name, **figures, "threads": threads, **versions(), "node": short_node(request.node)}
        request.config.stash[ROWS].setdefault(family, []).append(entry)

    return note


@pytest.fixture(scope="session")
def gpu(request: pytest.FixtureRequest) -> gpu_measures.Arena:
    """What GPU rows run on; one for the whole run, since its probes and its clock are shared."""
    option = request.config.getoption
    return gpu_measures.Arena(dry=option("--dry"), prepare=option("--prepare"))


@pytest.fixture
def arena(gpu: gpu_measures.Arena, request: pytest.FixtureRequest) -> Iterator[gpu_measures.Arena]:
    """`gpu`, its rows noted for this test's family; what failed in a row fails the test at its end."""
    family = Path(request.node.fspath).stem.removeprefix(GPU_SUITE)

    def note(name: str, **figures: Any) -> None:
        entry = {"name": name, **_short(figures), **versions(), "node": short_node(request.node)}
        request.config.stash[ROWS].setdefault(family, []).append(entry)
        if request.config.getoption("--append"):
            result_files.append_row(Path(request.config.getoption("--append")), family, entry)

    gpu.note, gpu.failures = note, []
    yield gpu
    gpu.tidy()
    if gpu.failures:
        pytest.fail("\n".join(gpu.failures), pytrace=False)


@pytest.fixture
def pairs(benchmark) -> Callable[..., dict[str, float]]:
    """`pairs(ours, peer, rounds)` times the two in turn, peer first, after one untimed call of each.

    Returns what `measures.versus` makes of them, in milliseconds.
    """

    def measure(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int) -> dict[str, float]:
        milliseconds: dict[str, list[float]] = {"ours": [], "peer": []}

        def timed_peer() -> None:
            milliseconds["peer"].append(1e3 * measures.seconds(peer))

        def timed_ours() -> None:
            milliseconds["ours"].append(1e3 * measures.seconds(ours))

        benchmark.pedantic(timed_ours, setup=timed_peer, rounds=rounds, warmup_rounds=1)
        return measures.versus(milliseconds["ours"][-rounds:], milliseconds["peer"][-rounds:], "ms")

    return measure


@pytest.fixture
def memory() -> Callable[..., dict[str, float]]:
    """`memory(ours, peer)`: what a call of each adds to the resident memory, in MiB; empty where that is unknown."""

    def measure(ours: Callable[[], Any], peer: Callable[[], Any]) -> dict[str, float]:
        found = {
            "extra_mib": measures.extra_mebibytes(ours),
            "peer_extra_mib": measures.extra_mebibytes(peer),
        }
        return {key: value for key, value in found.items() if value is not None}

    return measure


@pytest.fixture(scope="session")
def peak(threads: int) -> Callable[[str], float]:
    """`peak(kind)`: probes the peak and returns the best of this run, in GFLOP/s.

    A neighbour's load can only lower a probe, so the best one is the nearest to the truth.
    """
    best: dict[str, float] = {}

    def probe(kind: str) -> float:
        best[kind] = max(best.get(kind, 0.0), _native.cpu.peak(kind, PROBE_SECONDS, threads))
        return best[kind]

    return probe


@pytest.fixture
def share_of_peak(peak: Callable[[str], float]) -> Callable[[str, float, float], dict[str, float]]:
    """`share_of_peak(kind, operations, ms)`: rate of the timed call beside the peak that is probed now."""

    def figures(kind: str, operations: float, ms: float) -> dict[str, float]:
        limit = peak(kind)
        rate = operations / ms / 1e6
        return {"gflops": rate, "peak_gflops": limit, "share_of_peak": rate / limit}

    return figures


def _short(value: Any) -> Any:
    """Floats to four digits, those in dictionaries as well."""
    if isinstance(value, dict):
        return {key: _short(x) for key, x in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value

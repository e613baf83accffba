# SPDX-License-Identifier: Apache-2.0
"""One thread pool in the process, torch's: counted, forked, entered from several threads, and left alone."""

from __future__ import annotations

import pytest
from programs import result_of, run_program

from vlmkernels import _native

pytestmark = pytest.mark.skipif(
    _native.cpu_reason is not None, reason=f"no CPU kernels: {_native.cpu_reason}"
)

THREADS = 3  # not the number of processors of a usual machine, so that a default cannot pass for it

PRELUDE = f"""
import json, os, threading
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's own threads, which torch's import would start
import torch
torch.set_num_threads({THREADS})
from vlmkernels import _native

def os_threads():
    return len(os.listdir("/proc/self/task"))

def ours(threads=None):
    return _native.cpu.peak("float32", 0.002, _native.threads() if threads is None else threads)

def torchs():
    return torch.ones(1 << 20).mul_(2).sum().item()
"""


def test_the_pool_is_the_one_that_torch_loaded() -> None:
    path, mapped = result_of(
        PRELUDE
        + """
torchs(); ours()
with open("/proc/self/maps") as maps:
    mapped = sorted({line.split()[-1] for line in maps if "omp" in os.path.basename(line.split()[-1])})
print(json.dumps([_native.cpu.openmp_path(), mapped]))
""",
    )
    assert mapped == [path]


def test_alternating_with_torch_starts_no_further_thread() -> None:
    torch_alone, both = result_of(
        PRELUDE
        + """
torchs()
alone = os_threads()
counts = set()
for _ in range(20):
    torchs(); counts.add(os_threads())
    ours(); counts.add(os_threads())
    ours(2); counts.add(os_threads())
print(json.dumps([alone, sorted(counts)]))
""",
    )
    assert both == [torch_alone]


def test_our_pool_serves_torch_when_ours_comes_first() -> None:
    before, ours, both = result_of(
        PRELUDE
        + """
before = os_threads(); ours(); after = os_threads(); torchs()
print(json.dumps([before, after, os_threads()]))
""",
    )
    assert ours == before + THREADS - 1
    assert both == ours


def test_one_thread_starts_no_pool() -> None:
    before, after = result_of(
        PRELUDE
        + """
torch.set_num_threads(1)
before = os_threads(); ours(); ours(1)
print(json.dumps([before, os_threads()]))
""",
    )
    assert after == before


def test_set_num_threads_holds_for_the_kernels() -> None:
    before, after = result_of(
        PRELUDE
        + """
torch.set_num_threads(5)
before = os_threads(); ours()
print(json.dumps([before, os_threads()]))
""",
    )
    assert after == before + 4


def test_a_child_forked_after_use_runs_serially() -> None:
    """Its copy of the pool has no threads behind it: entering it would wait for ever."""
    parent_lost, child_lost, child_threads, rate = result_of(
        PRELUDE
        + """
ours(); torchs()
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    rate = ours(3)
    os.write(writer, json.dumps([_native.cpu.forked_from_threads(), os_threads(), rate]).encode())
    os._exit(0)
os.waitpid(child, 0)
print(json.dumps([_native.cpu.forked_from_threads(), *json.loads(os.read(reader, 4096))]))
""",
        PYTHONWARNINGS="ignore::DeprecationWarning",
        timeout=60,
    )
    assert not parent_lost
    assert child_lost
    assert child_threads == 1
    assert rate > 0


def test_a_child_forked_before_use_has_its_own_pool() -> None:
    lost, threads = result_of(
        # torch.set_num_threads starts threads of its own (XNNPACK's pool)
        PRELUDE.replace(f"torch.set_num_threads({THREADS})", "")
        + """
assert os_threads() == 1, "something started threads at import"
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    ours(3)
    os.write(writer, json.dumps([_native.cpu.forked_from_threads(), os_threads()]).encode())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(reader, 4096).decode())
""",
        timeout=60,
    )
    assert not lost
    assert threads == THREADS


def test_a_data_loader_worker_does_not_hang() -> None:
    rates = result_of(
        PRELUDE
        + """
from torch.utils.data import DataLoader, Dataset

class Rates(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return ours(3)

ours(); torchs()
loader = DataLoader(Rates(), batch_size=1, num_workers=2, multiprocessing_context="fork")
print(json.dumps([float(batch) for batch in loader]))
""",
        PYTHONWARNINGS="ignore",
        timeout=90,
    )
    assert len(rates) == 4
    assert min(rates) > 0


def test_several_python_threads_at_once() -> None:
    done = result_of(
        PRELUDE
        + """
done = []
def work():
    for _ in range(20):
        ours(); torchs()
    done.append(True)
workers = [threading.Thread(target=work) for _ in range(4)]
for worker in workers: worker.start()
for worker in workers: worker.join()
print(json.dumps(len(done)))
""",
    )
    assert done == 4


def test_the_gil_is_released_while_a_kernel_runs() -> None:
    ticks = result_of(
        PRELUDE
        + """
import time
ticks, running = 0, True
def count():
    global ticks
    while running:
        ticks += 1
        time.sleep(0.001)
counter = threading.Thread(target=count)
counter.start()
before = ticks
_native.cpu.peak("float32", 0.3, 1)
counted = ticks - before
running = False
counter.join()
print(json.dumps(counted))
"""
    )
    assert ticks > 5


def test_without_an_openmp_runtime_the_kernels_are_serial() -> None:
    result = run_program(
        """
from vlmkernels import _cpu
assert _cpu.use_openmp("/nonexistent/libgomp.so.1") is False
""",
    )
    assert result.returncode == 0

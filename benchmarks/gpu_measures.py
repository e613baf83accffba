# SPDX-License-Identifier: Apache-2.0
"""How GPU rows are measured: a clock of events, the card's limits, and a contest of several programs for one result.

A row names its programs as functions that prepare a call, and how a result is checked::

    arena.contest(
        "attention ViT-B/16 (256,12,197,64) bfloat16 forward",
        op="attention",
        ours=lambda backend: lambda: vk.attention(q, k, v, backend=backend),
        peers={"SDPA flash": lambda: flash_call},
        check=lambda out: measures.difference(out, expected()),   # relative error
        tolerance=1e-2,
        operations=4.0 * B * H * L * L * D,
    )

Every backend of ours gets a row of its own, beside the fastest peer; what fails (out of memory included) is a row that
says so, and the others are measured nevertheless. With --dry the same Python runs on small problems on the CPU, timed
by a clock that means nothing: a misprint must not cost time on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import measures
import torch
from torch import Tensor

from vlmkernels.ops import _triton, dispatch, measured

Call = Callable[[], Any]
Setup = Callable[[], Call]

#: Rates of dense products in TFLOP/s (or TOP/s) and of memory in TB/s, from the makers' data sheets, by words in the
#: name of the device.
PAPER = {
    "H200": {"bfloat16": 989.0, "int8": 1979.0, "fp8": 1979.0, "memory": 4.8},
    "H100 80GB HBM3": {"bfloat16": 989.0, "int8": 1979.0, "fp8": 1979.0, "memory": 3.35},
    "A100-SXM4-80GB": {"bfloat16": 312.0, "int8": 624.0, "memory": 2.04},
}

MOST_ROUNDS, FEWEST_ROUNDS = 30, 5
FLUSHED_BYTES = 256 * 2**20  # several times the second-level cache of any card
#: The device sleeps so long before a call, times what the host takes to issue it: no gap between kernels is timed.
HEAD_START, LONGEST_SLEEP = 1.5, 3e-3
CYCLES_PER_SECOND = 2e9
PROBE_SIDE, PROBE_ROUNDS = 8192, 5
PROBE_BYTES = 2 * 2**30


LOST = "the device is lost"


class DeviceLostError(RuntimeError):
    """The process cannot use the device any more, as after an access outside memory: only a new process can."""


# Clocks.


class EventClock:
    """Times calls on the current CUDA stream by events: cold cache, and the host ahead of the device."""

    def __init__(self) -> None:
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")

    def milliseconds(self, call: Call, issue_seconds: float = 0.0) -> float:
        """Of one call, by the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        if issue_seconds:
            torch.cuda._sleep(int(min(HEAD_START * issue_seconds, LONGEST_SLEEP) * CYCLES_PER_SECOND))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def issue_seconds(self, call: Call) -> float:
        """What the host takes to issue a call, the device being idle."""
        torch.cuda.synchronize()
        seconds = measures.seconds(call)
        torch.cuda.synchronize()
        return seconds


class DryClock:
    """The same on the CPU, for --dry."""

    def milliseconds(self, call: Call, issue_seconds: float = 0.0) -> float:
        return 1e3 * measures.seconds(call)

    def issue_seconds(self, call: Call) -> float:
        call()
        return 0.0


# What the card can do.


class Limits:
    """Rates probed in this run, the best so far; a probe takes some hundredths of a second."""

    def __init__(self, clock: EventClock | DryClock, device: torch.device, dry: bool) -> None:
        self._clock, self._device, self._dry = clock, device, dry
        self._best: dict[str, float] = {}
        self._probes: dict[str, tuple[Call, float]] = {}

    def rate(self, kind: str) -> float:
        """TFLOP/s or TOP/s of a product of 8192^3 by the library ("bfloat16", "int8", "fp8"), or TB/s ("memory")."""
        if kind not in self._probes:
            self._probes[kind] = self._memory_probe() if kind == "memory" else self._product_probe(kind)
        call, work = self._probes[kind]
        times = [self._clock.milliseconds(call) for _ in range(PROBE_ROUNDS)]
        self._best[kind] = max(self._best.get(kind, 0.0), work / statistics.median(times) / 1e9)
        return self._best[kind]

    def _product_probe(self, kind: str) -> tuple[Call, float]:
        side = 32 if self._dry else PROBE_SIDE
        a, b = torch.randn(2, side, side, device=self._device).unbind(0)
        if kind == "int8":
            call = functools.partial(
                torch._int_mm, *(x.mul(40).clamp(-127, 127).to(torch.int8) for x in (a, b.t()))
            )
        elif kind == "fp8":
            one = torch.ones((), device=self._device)
            operands = (x.to(torch.float8_e4m3fn) for x in (a, b.t()))
            options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
            call = functools.partial(torch._scaled_mm, *operands, scale_a=one, scale_b=one, **options)
        else:
            call = functools.partial(torch.mm, *(x.to(getattr(torch, kind)) for x in (a, b.t())))
        call()
        return call, 2.0 * side**3

    def _memory_probe(self) -> tuple[Call, float]:
        count = 2**12 if self._dry else PROBE_BYTES // 2
        source, target = (torch.ones(count, dtype=torch.int8, device=self._device) for _ in range(2))
        return lambda: target.copy_(source), 2.0 * count  # read and written


def paper(kind: str, device_name: str) -> float | None:
    """The data sheet's rate of this card; None where none is on record."""
    return next((rates.get(kind) for name, rates in PAPER.items() if name in device_name), None)


# Contests.


@dataclass
class Outcome:
    """What a contest saw, by program: times in ms, errors of results, and sentences about what failed."""

    times: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def fastest(self, names: Mapping[str, Any]) -> str | None:
        """Of these programs, the one of the smallest median."""
        able = [name for name in names if self.times.get(name)]
        return min(able, key=lambda name: statistics.median(self.times[name]), default=None)


class Arena:
    """Where rows run: a GPU, or under --dry the CPU.

    Attributes:
        device: of every tensor of a row.
        dry: small problems, times that mean nothing.
        half: the dtype of the rows, bfloat16; float16 where Triton's kernels are interpreted, which serve no other.
        prepare: compile what the rows need, and measure nothing.
    """

    def __init__(self, *, dry: bool, prepare: bool = False) -> None:
        self.dry, self.prepare = dry, prepare
        #: Of the row that runs: where its figures go, and what failed in it.
        self.note: Callable[..., None] = lambda name, **figures: None
        self.failures: list[str] = []
        self._fastest: dict[str, str] = {}
        self.device = torch.device("cpu" if dry else "cuda")
        self.half = torch.float16 if dry else torch.bfloat16
        self.clock: EventClock | DryClock = DryClock() if dry else EventClock()
        self.limits = Limits(self.clock, self.device, dry)
        self.card = "dry run" if dry else torch.cuda.get_device_name()
        major, minor = (0, 0) if dry else torch.cuda.get_device_capability()
        self.arch = f"sm_{major}{minor}"

    def size(self, full: int, small: int) -> int:
        """A size of the problem, the small one under --dry."""
        return small if self.dry else full

    def generator(self, seed: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        """Standard normal, float32, the same for the same seed."""
        return torch.randn(shape, generator=self.generator(seed), device=self.device)

    def backends(self, op: str) -> list[str]:
        """Kernels of ours that the op has for this device; the reference where there are none, and in a dry run."""
        known = [name for name in ("triton", "cuda") if name in dispatch.registered_backends(op)]
        return [*known, "reference"] if self.dry or not known else known

    def fastest_so_far(self, op: str) -> str | None:
        """The backend of ours that won the last contest of an op in this process."""
        return self._fastest.get(op)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`torch.compile` for fixed shapes; in a dry run without its compiler."""
        return torch.compile(function, dynamic=False, backend="eager" if self.dry else "inductor")

    def versions(self) -> dict[str, Any]:
        """Of what runs on the device, and its name."""
        return {
            "card": self.card,
            "arch": self.arch,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": _triton_version(),
        }

    def contest(
        self,
        name: str,
        *,
        op: str,
        ours: Callable[[str], Call],
        peers: Mapping[str, Setup],
        check: Callable[[Any], float],
        tolerance: float,
        shape: list[int],
        step: str = "forward",
        only: str | None = None,
        beside: Mapping[str, Setup] | None = None,
        library: Mapping[str, str] | None = None,
        compiles: tuple[str, ...] = (),
        operations: float = 0.0,
        kind: str = "bfloat16",
        moved: float = 0.0,
        seconds: float = 0.5,
        figures: Callable[[str], dict[str, Any]] | None = None,
        **more: Any,
    ) -> Outcome:
        """Checks and times every backend of ours and every peer in turn, and notes a row for each of ours.

        Args:
            name: of the row; the backend is added to it.
            op: public name without `vk.`.
            ours: `ours(backend)` prepares a call.
            peers: what prepares the peers' calls, by name.
            check: relative error of what a call returns.
            tolerance: ours may not err more; a peer may, and its error is noted.
            shape: as the row states it.
            step: "forward", "backward" or "forward+backward".
            only: one backend of ours instead of all.
            beside: further programs that are timed and noted, and are no peers: they do another thing.
            library: peers that `dispatch` could choose in our place, with the names that it has for them.
            compiles: peers that a compiler prepares, which --prepare runs as well.
            operations: useful ones; `kind` names the limit they are held against.
            moved: bytes that must be read and written.
            seconds: of timing, about.
            figures: what else is to be said of a backend of ours.
            more: further entries of the rows.

        What fails is noted in `failures`, which the fixture turns into the failure of the test.

        Raises:
            DeviceLostError: this process cannot use the device any more; the rows are noted before.
        """
        outcome = Outcome()
        classes: dict[str, str | None] = {}
        calls: dict[str, Call] = {}
        own = self.backends(op) if only is None else [only]
        others = {**peers, **(beside or {})}
        if self.prepare:
            others = {name: setup for name, setup in others.items() if name in compiles}
        for backend in own:
            with _watched(op, backend) as seen:
                self._try(outcome, backend, lambda backend=backend: ours(backend), check, tolerance, calls)
            classes[backend] = measured.shape_class(op, seen[-1]) if seen else None
        for peer, setup in others.items():
            self._try(outcome, peer, setup, check if peer in peers else None, None, calls)
        if not self.prepare:
            self._time(outcome, calls, seconds)
            winner = outcome.fastest(dict.fromkeys(own))
            if winner is not None:
                self._fastest[op] = winner
            common = {"op": op, "shape": shape, "dtype": "bfloat16", "step": step, **more}
            common["library"] = dict(library or {})
            self._note_rows(
                name, outcome, own, peers, list(others), classes, common, figures, operations, kind, moved
            )
        calls.clear()
        self.tidy()
        self.failures += _failed(outcome, own, name)
        if only is None and all(backend in outcome.refusals for backend in own):
            self.failures.append(f"{name}: no backend serves it: {outcome.refusals}")
        return outcome

    def _try(
        self,
        outcome: Outcome,
        name: str,
        setup: Setup,
        check: Callable[[Any], float] | None,
        tolerance: float | None,
        calls: dict[str, Call],
    ) -> None:
        """The first call: compiles what must be compiled, and shows whether the result is right."""
        with self._recorded(outcome, name):
            call = setup()
            result = call()
            if check is not None and not self.prepare:
                outcome.errors[name] = error = float(check(result))
                if tolerance is not None and not error <= tolerance:
                    raise AssertionError(f"relative error {error:.2e}, allowed {tolerance:.0e}")
            calls[name] = call

    def _time(self, outcome: Outcome, calls: dict[str, Call], seconds: float) -> None:
        issue, total = {}, 0.0
        for name, call in calls.items():
            with self._recorded(outcome, name):
                issue[name] = self.clock.issue_seconds(call)
                total += self.clock.milliseconds(call, issue[name]) / 1e3
        rounds = 2 if self.dry else int(min(MOST_ROUNDS, max(FEWEST_ROUNDS, seconds / max(total, 1e-6))))
        for _ in range(rounds):
            for name, call in calls.items():
                if name not in outcome.failures and name not in outcome.refusals:
                    with self._recorded(outcome, name):
                        outcome.times.setdefault(name, []).append(self.clock.milliseconds(call, issue[name]))

    @contextlib.contextmanager
    def or_a_failed_row(self, name: str, **entry: Any) -> Iterator[None]:
        """What goes wrong inside is a row that says so, and the rows after it are measured nevertheless."""
        outcome = Outcome()
        with self._recorded(outcome, name):
            yield
        for key, group in (("failed", outcome.failures), ("refused", outcome.refusals)):
            if name in group:
                self.note(name, **entry, **self.versions(), **{key: group[name]})
        self.failures += _failed(outcome, [name], name)

    @contextlib.contextmanager
    def _recorded(self, outcome: Outcome, name: str) -> Iterator[None]:
        """What goes wrong inside becomes a sentence of the outcome."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch's compiler and backends, which say why they refuse
                yield
        except NotImplementedError as error:
            outcome.refusals[name] = _sentence(error)
        except torch.OutOfMemoryError:
            outcome.failures[name] = "out of memory"
        except Exception as error:
            outcome.failures[name] = f"{type(error).__name__}: {_sentence(error)}"
        else:
            return
        outcome.times.pop(name, None)
        self.tidy()
        if not self.alive():
            outcome.failures[name] = f"{LOST}: {outcome.failures.get(name, '')}"

    def _note_rows(
        self,
        name: str,
        outcome: Outcome,
        own: list[str],
        peers: Mapping[str, Setup],
        others: list[str],
        classes: dict[str, str | None],
        common: dict[str, Any],
        figures: Callable[[str], dict[str, Any]] | None,
        operations: float,
        kind: str,
        moved: float,
    ) -> None:
        best = outcome.fastest(peers)
        common |= self.versions()
        common["others_ms"] = {p: statistics.median(outcome.times[p]) for p in others if p in outcome.times}
        common["others_errors"] = {p: outcome.errors[p] for p in others if p in outcome.errors}
        common["others_missing"] = {
            p: s for group in (outcome.failures, outcome.refusals) for p, s in group.items() if p in others
        }
        limits = {kind: self._probed(kind)} if operations else {}
        if moved:
            limits["memory"] = self._probed("memory")
        for backend in own:
            entry = {"backend": backend, "class": classes[backend], **common}
            sentence = outcome.failures.get(backend)
            if sentence is not None or backend in outcome.refusals:
                key = "refused" if sentence is None else "failed"
                self.note(f"{name} {backend}", **entry, **{key: sentence or outcome.refusals[backend]})
                continue
            times = outcome.times[backend]
            entry["error"] = outcome.errors[backend]
            if best is not None:
                entry["peer"] = best
                entry |= measures.versus(times, outcome.times[best][: len(times)], "ms")
            else:
                entry |= {
                    "ms": statistics.median(times),
                    "spread": measures.spread(times),
                    "rounds": len(times),
                }
            entry |= self._shares(entry["ms"], operations, kind, moved, limits)
            if figures is not None:
                try:
                    entry |= figures(backend)
                except Exception as error:  # a time that was measured is not lost for it
                    entry["figures_missing"] = _sentence(error)
            self.note(f"{name} {backend}", **entry)

    def _probed(self, kind: str) -> float | None:
        try:
            return self.limits.rate(kind)
        except Exception as error:
            warnings.warn(f"the probe of {kind} failed: {_sentence(error)}", stacklevel=2)
            return None

    def _shares(
        self, ms: float, operations: float, kind: str, moved: float, limits: dict[str, float | None]
    ) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        if operations:
            rate, on_paper = operations / ms / 1e9, paper(kind, self.card)
            figures |= {"tflops": rate, "limit": kind}
            if limits[kind]:
                figures |= {"peak_tflops": limits[kind], "share_of_peak": rate / limits[kind]}
            if on_paper:
                figures["share_of_paper"] = rate / on_paper
        if moved:
            figures["gigabytes_per_second"] = rate = moved / ms / 1e6
            if limits["memory"]:
                figures["probed_gigabytes_per_second"] = 1e3 * limits["memory"]
                figures["share_of_bandwidth"] = rate / limits["memory"] / 1e3
        return figures

    # Memory, launches, graphs.

    def tidy(self) -> None:
        """Gives memory that nobody holds back to the device."""
        if not self.dry:
            gc.collect()
            with contextlib.suppress(RuntimeError):  # a lost device is found elsewhere
                torch.cuda.empty_cache()

    def alive(self) -> bool:
        """Whether this process can still use the device."""
        if self.dry:
            return True
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def extra_bytes(self, call: Callable[[], list[Tensor]]) -> int:
        """Peak memory of a call beside what was there before and what it returns. In a dry run 0."""
        if self.dry:
            call()
            return 0
        self.tidy()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in kept)

    def graph(self, call: Call) -> tuple[Call, Any]:
        """`call` captured into a CUDA graph: what replays it, and the tensors that a replay fills."""
        if self.dry:
            return call, call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # whatever compiles or allocates once
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        return graph.replay, result

    def graph_row(
        self, name: str, call: Callable[[], list[Tensor]], inputs: list[Tensor], **entry: Any
    ) -> None:
        """A row of a call in a CUDA graph beside the eager one; replays after a change of the inputs must give the
        eager call's bits."""
        with self.or_a_failed_row(name, **entry):
            replay, captured = self.graph(call)
            for _ in range(2):
                with torch.no_grad():
                    for x in inputs:
                        x.copy_(x.roll(1, 0))
                replayed = replay()
                results = replayed if self.dry else captured
                for mine, eager in zip(results, call(), strict=True):
                    assert torch.equal(mine, eager), "a replay gives other bits than an eager call"
            if self.prepare:
                return
            graph_ms, eager_ms = ([self.clock.milliseconds(c) for _ in range(9)] for c in (replay, call))
            times = measures.versus(graph_ms, eager_ms, "ms")
            self.note(name, **entry, dtype="bfloat16", peer="the same, eager", **times, **self.versions())

    def launches(self, call: Call) -> int | None:
        """Kernels that a call starts, by torch's profiler; None where it cannot tell."""
        if self.dry:
            return None
        from torch.profiler import ProfilerActivity, profile

        call()
        torch.cuda.synchronize()
        try:
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
                call()
                torch.cuda.synchronize()
        except RuntimeError:
            return None
        on_device = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [e for e in on_device if not re.match(r"(?i)mem(cpy|set)", e.name)]
        return len(kernels) or None

    def microseconds_per_call(self, call: Call, calls: int = 200, rounds: int = 9) -> list[float]:
        """What the host takes to issue a call, in rounds of many."""
        calls = 3 if self.dry else calls
        found = []
        for _ in range(rounds + 1):
            if not self.dry:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            found.append(1e6 * (time.perf_counter() - start) / calls)
        return found[1:]


@contextlib.contextmanager
def _watched(op: str, backend: str) -> Iterator[list[dispatch.Call]]:
    """What `dispatch` asks this backend about, while the block runs."""
    seen: list[dispatch.Call] = []
    (entry,) = [b for b in dispatch._backends[op] if b.name == backend] or [None]
    if entry is None:  # the reference is asked nothing
        yield seen
        return
    reasons = entry.reasons

    def noting(call: dispatch.Call) -> list[str]:
        seen.append(call)
        return reasons(call)

    entry.reasons = noting
    try:
        yield seen
    finally:
        entry.reasons = reasons


def _failed(outcome: Outcome, own: list[str], row: str) -> list[str]:
    """What makes a row fail: a backend of ours that erred. One that refuses says so in its row."""
    lost = [s for s in outcome.failures.values() if s.startswith(LOST)]
    if lost:
        raise DeviceLostError(f"{row}: {lost[0]}")
    return [f"{row}, {name}: {outcome.failures[name]}" for name in own if name in outcome.failures]


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _triton_version() -> str | None:
    if _triton.missing is not None:
        return None
    import triton

    return triton.__version__

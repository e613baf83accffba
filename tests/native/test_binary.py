# SPDX-License-Identifier: Apache-2.0
"""Properties of the built modules: what they export, what they need, which instructions are where."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmkernels import _native

pytestmark = pytest.mark.skipif(
    shutil.which("objdump") is None, reason="needs binutils (nm, objdump, readelf)"
)

SOURCES = Path(__file__).parents[2] / "csrc"

#: What a level's functions may contain, as classes of instructions found below.
LEVEL_MAY_USE = {
    "portable": set(),
    "x86_64_v2": {"sse4"},
    "avx2": {"sse4", "vex", "fma"},
    "avx512": {"sse4", "vex", "fma", "evex"},
    "avx512_bf16": {"sse4", "vex", "fma", "evex", "dot"},
}
#: What each level must contain, or the flags are missing and the test above would pass on portable code.
LEVEL_MUST_USE = {"avx2": "fma", "avx512": "evex", "avx512_bf16": "dot"}

_DOT = re.compile(r"v(dpbf16ps|cvtneps2bf16|cvtne2ps2bf16|pdpbusds?|pdpwssds?)")
_FMA = re.compile(r"vfn?m(add|sub)")
# Mnemonics newer than SSE2 that need no VEX prefix: SSE3, SSSE3, SSE4.1, SSE4.2 and POPCNT.
_SSE4 = re.compile(
    r"h(add|sub)p[sd]|addsubp|lddqu|mov(sh|sl|d)dup|pshufb|palignr|pabs[bwd]|pmulhrsw|pmaddubsw|ph(add|sub)|psign"
    r"|pblend|blendv?p|pmov[sz]x|pmulld|pmuldq|pmin(sb|uw|sd|ud)|pmax(sb|uw|sd|ud)|phminpos|round[sp][sd]|insertps"
    r"|extractps|pinsr[bdq]|pextr[bdq]|ptest|pcmpeqq|packusdw|movntdqa|dpp[sd]|mpsadbw|pcmp[ei]str|pcmpgtq|crc32|popcnt"
)
# verr and verw are old instructions of the operating system.
_VEX = re.compile(r"v(?!err|erw)[a-z]")
_EVEX_OPERAND = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")


def modules() -> list[Path]:
    reasons = {"cpu": _native.cpu_reason, "cuda": _native.cuda_reason}
    return [Path(getattr(_native, name).__file__) for name, reason in reasons.items() if reason is None]


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instruction_classes(line: str) -> Iterator[str]:
    mnemonic, _, operands = line.partition(" ")
    if _VEX.match(mnemonic):
        yield "vex"
        if _FMA.match(mnemonic):
            yield "fma"
        if _DOT.match(mnemonic):
            yield "dot"
    elif _SSE4.match(mnemonic):
        yield "sse4"
    if _EVEX_OPERAND.search(operands):
        yield "evex"


@pytest.fixture(scope="module")
def functions() -> dict[str, set[str]]:
    """Classes of instructions in each function of the CPU module, by demangled name."""
    if _native.cpu_reason is not None:
        pytest.skip(_native.cpu_reason)
    text = output_of("objdump", "-dC", "--no-show-raw-insn", str(_native.cpu.__file__))
    found: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in text.splitlines():
        start = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if start:
            current = found.setdefault(start[1], set())
        elif line.startswith(" "):
            current.update(instruction_classes(line.partition(":\t")[2]))
    return found


def level_of(function: str) -> str | None:
    """Instruction-set namespace that a function belongs to, also as a template argument; None for all others."""
    match = re.search(r"vk::cpu::(portable|x86_64_v2|avx2|avx512_bf16|avx512)::", function)
    return match[1] if match else None


def test_the_modules_were_built() -> None:
    assert _native.cpu_reason is None, _native.cpu_reason
    assert modules()


@pytest.mark.parametrize("module", modules(), ids=lambda path: path.name.split(".")[0])
def test_only_the_entry_point_is_exported(module: Path) -> None:
    lines = output_of("nm", "-D", "--defined-only", str(module)).splitlines()
    names = [line.split()[-1] for line in lines]
    assert names == [f"PyInit_{module.name.split('.')[0]}"]


@pytest.mark.parametrize("module", modules(), ids=lambda path: path.name.split(".")[0])
def test_only_the_c_library_is_needed(module: Path) -> None:
    text = output_of("readelf", "-d", str(module))
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", text)
    assert needed, "readelf found no needed library at all"
    libc = re.compile(r"(libc|libm|libdl|libpthread|librt|ld-linux[-\w]*)\.so\.\d+$")
    assert [name for name in needed if not libc.match(name)] == []
    assert "RPATH" not in text
    assert "RUNPATH" not in text


def test_instructions_of_a_level_stay_in_its_functions(functions: dict[str, set[str]]) -> None:
    wrong = {
        name: sorted(used - LEVEL_MAY_USE.get(level_of(name) or "portable", set()))
        for name, used in functions.items()
    }
    assert {name: used for name, used in wrong.items() if used} == {}


def test_each_level_uses_its_instructions(functions: dict[str, set[str]]) -> None:
    levels = {level_of(name) for name in functions} - {None}
    if "avx2" not in levels:
        assert levels == {"portable"}  # another processor family
        return
    assert levels == set(LEVEL_MAY_USE)
    for level, needed in LEVEL_MUST_USE.items():
        used = set().union(*(used for name, used in functions.items() if level_of(name) == level))
        assert needed in used, f"{level} has no {needed} instruction"


def test_no_level_runs_code_at_load_time() -> None:
    """A constructor in an ISA file would run before the processor was asked what it can do."""
    symbols = output_of("nm", "-C", str(_native.cpu.__file__))
    constructors = [
        line.split(maxsplit=2)[2]
        for line in symbols.splitlines()
        if "_GLOBAL__sub_I" in line and len(line.split()) > 2
    ]
    levels = ("portable", "x86_64_v2", "avx2", "avx512")
    assert [name for name in constructors if any(level in name for level in levels)] == []


def test_level_files_include_nothing_that_brings_shared_code() -> None:
    """Functions of the standard library that are compiled in an ISA file may be the copy kept for the whole module."""
    allowed = {"cstddef", "cstdint", "cstring", "type_traits", "utility", "immintrin.h", "arm_neon.h"}
    seen: set[Path] = set()
    todo = [SOURCES / "cpu" / "isa" / "level.h"]
    wrong = []
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for kind, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE):
            if kind == "<":
                wrong += [f"{path.name} includes <{name}>"] if name not in allowed else []
            else:
                candidates = [base / name for base in (SOURCES, SOURCES / "cpu") if (base / name).is_file()]
                assert candidates, f"{path.name} includes {name}, which is nowhere"
                todo.append(candidates[0])
    assert wrong == []
    assert len(seen) > 3

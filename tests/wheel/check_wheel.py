# SPDX-License-Identifier: Apache-2.0
"""What a wheel must be before anyone installs it: small enough, complete, nothing too much; and its manylinux tag.

    python tests/wheel/check_wheel.py dist/vlmkernels-*.whl --require cpu cuda

Prints the size, the largest files and, where auditwheel is installed, the oldest C library that the modules run on.
Exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

LIMIT_BYTES = 60 * 10**6
#: Files without which an installed package is incomplete.
NEEDED = (
    "vlmkernels/__init__.py",
    "vlmkernels/py.typed",
    "vlmkernels/_cpu.pyi",
    "vlmkernels/smoke.py",
    "vlmkernels/data/bundled/emoji/metadata.json",
    "vlmkernels/data/bundled/emoji/ATTRIBUTION.md",
    "vlmkernels/models/weights/emoji-clip/model.safetensors",
)
#: What belongs to the source tree alone.
UNWANTED = re.compile(r"(^|/)(tests|benchmarks|csrc|build|__pycache__)/|\.(cpp|cu|h|o|a|pyc)$")


def problems(wheel: Path, required: list[str], limit: int = LIMIT_BYTES) -> list[str]:
    """What is wrong with a wheel, a sentence each."""
    found = []
    size = wheel.stat().st_size
    if size >= limit:
        found.append(f"it has {size / 1e6:.1f} MB; {limit / 1e6:.0f} MB is the limit")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    found += [f"{name} is missing" for name in NEEDED if name not in names]
    for module in required:
        if not any(re.fullmatch(rf"vlmkernels/_{module}\.[\w-]+\.so", name) for name in names):
            found.append(f"the module _{module} is missing")
    found += [f"{name} does not belong into a wheel" for name in names if UNWANTED.search(name)]
    found += [
        f"{name} is a library of its own"
        for name in names
        if re.search(r"\.so(\.\d+)*$", name) and not re.fullmatch(r"vlmkernels/_c(pu|uda)\.[\w-]+\.so", name)
    ]
    return found


def manylinux_tag(wheel: Path) -> str | None:
    """The tag that auditwheel gives, None where it is not installed."""
    if importlib.util.find_spec("auditwheel") is None:
        return None
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    match = re.search(r'platform tag:\s+"(\S+)"', done.stdout)
    return match[1] if match else None


def largest(wheel: Path, count: int = 6) -> list[str]:
    """The files that take most of the archive, with their packed sizes."""
    with zipfile.ZipFile(wheel) as archive:
        files = sorted(archive.infolist(), key=lambda file: -file.compress_size)[:count]
    return [f"{file.compress_size / 1e6:6.2f} MB  {file.filename}" for file in files]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument(
        "--require", nargs="+", choices=("cpu", "cuda"), default=["cpu"], help="modules (default cpu)"
    )
    args = parser.parse_args(argv)
    failed = False
    for wheel in args.wheels:
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        print("\n".join(largest(wheel)))
        tag = manylinux_tag(wheel)
        print(f"runs where {tag} does" if tag else "tag unknown: auditwheel is not installed")
        for problem in problems(wheel, args.require):
            failed = True
            print(f"{wheel.name}: {problem}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""One wheel, every torch: installs the same file beside several torch releases and runs the op tests on each.

    python tests/wheel/every_torch.py dist/vlmkernels-*.whl --torch 2.6.0 2.8.0 2.13.0 --report tests/wheel/report.json

Each release gets an environment of its own that is deleted afterwards; a CUDA build of torch takes several GB of disk
while its turn lasts, and no GPU. Not part of CI: it downloads every release. Exit code 1 where a test failed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Groups of processes are torch.distributed's matter, and FSDP2 on a CPU is younger than the oldest torch.
LEFT_OUT = ("tests/ops/test_contrastive_group.py",)
DESCRIBE = (
    "import json, torch, vlmkernels; "
    "print(json.dumps([torch.__version__, torch.version.cuda, vlmkernels.__version__, vlmkernels.__file__]))"
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="the file to install, built for the Python that runs this")
    parser.add_argument(
        "--torch", nargs="+", required=True, metavar="VERSION", help="releases to install beside it"
    )
    parser.add_argument(
        "--report", type=Path, help="where to write the results as JSON; releases in it are replaced"
    )
    parser.add_argument(
        "--tests", nargs="+", default=["tests/ops"], metavar="PATH", help="default: tests/ops"
    )
    parser.add_argument("--threads", type=int, default=2, help="OMP_NUM_THREADS of the tests (default 2)")
    args = parser.parse_args(argv)
    wheel = args.wheel.resolve()
    if not wheel.is_file():
        parser.error(f"there is no wheel {wheel}")

    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    kept = json.loads(args.report.read_text()) if args.report and args.report.is_file() else {}
    rows = {row["torch"]: row for row in kept.get("releases", [])} if kept.get("sha256") == digest else {}
    for version in args.torch:
        print(f"== torch {version}", flush=True)
        with tempfile.TemporaryDirectory(prefix="every-torch-") as folder:
            row = try_release(Path(folder), wheel, version, args.tests, args.threads)
        print(json.dumps(row), flush=True)
        rows[row["torch"]] = row
        if args.report:
            write_report(args.report, wheel, digest, args.tests, list(rows.values()))
    return int(any(row["failed"] or not row["passed"] for row in rows.values()))


def try_release(folder: Path, wheel: Path, version: str, tests: list[str], threads: int) -> dict[str, Any]:
    """Installs torch and the wheel in `folder` and runs smoke test and op tests there.

    Raises:
        RuntimeError: the environment is not the one asked for: another torch, or the package from the source tree.
    """
    python = folder / "bin" / "python"
    # Nothing of the source tree may be imported but the tests.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VLMKERNELS_"))}
    environment |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads), "VIRTUAL_ENV": str(folder)}

    def run(*command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done

    venv.create(folder, with_pip=True)
    install = (python, "-m", "pip", "install", "--quiet", "--no-cache-dir")
    run(*install, f"torch=={version}")
    run(*install, f"{wheel}[test]")
    found, cuda, package, file = json.loads(run(python, "-W", "ignore", "-c", DESCRIBE).stdout)
    if found.split("+")[0] != version or not Path(file).is_relative_to(folder):
        raise RuntimeError(
            f"asked for torch {version}, but found {found}, and vlmkernels {package} in {file}"
        )

    start = time.perf_counter()
    run(python, "-m", "vlmkernels.smoke")
    smoke_seconds = time.perf_counter() - start
    start = time.perf_counter()
    results = folder / "results.xml"
    selection = [*tests, *(f"--ignore={path}" for path in LEFT_OUT)]
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}")
    done = run(*pytest, *selection, check=False)
    if not results.is_file():
        raise RuntimeError(f"pytest wrote no results:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {
        "torch": found,
        "cuda": cuda,
        "vlmkernels": package,
        **counts(results),
        "test_seconds": round(time.perf_counter() - start),
        "smoke_seconds": round(smoke_seconds, 1),
        "date": datetime.date.today().isoformat(),
    }


def counts(results: Path) -> dict[str, Any]:
    """Numbers of passed, failed and skipped tests of a JUnit file, and the names of those that failed."""
    cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": names[:20],
    }


def write_report(path: Path, wheel: Path, digest: str, tests: list[str], rows: list[dict[str, Any]]) -> None:
    """Writes the report, releases in ascending order."""
    rows = sorted(rows, key=lambda row: [int(n) for n in re.findall(r"\d+", row["torch"].split("+")[0])])
    content = {
        "wheel": wheel.name,
        "sha256": digest,
        "bytes": wheel.stat().st_size,
        "python": platform.python_version(),
        "system": platform.platform(),
        "tests": tests,
        "left out": LEFT_OUT,
        "releases": rows,
    }
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())

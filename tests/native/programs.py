# SPDX-License-Identifier: Apache-2.0
"""Runs a program in a fresh interpreter: what a process-wide choice (instruction set, thread pool, fork) needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any


def run_program(
    source: str, *arguments: Any, timeout: float = 120.0, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python source, with `arguments` in its sys.argv; `environment` is added to this process's own.

    Raises:
        AssertionError: it ended with another exit status than 0, and `check`.
    """
    command = [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)]
    # The interpreter puts the working directory into sys.path: started here, it cannot take the source tree for the
    # installed package.
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        cwd=os.path.dirname(os.path.abspath(__file__)),
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def result_of(source: str, **environment: Any) -> Any:
    """Runs Python source and returns the value that it printed as JSON on its last line."""
    return json.loads(run_program(source, **environment).stdout.splitlines()[-1])

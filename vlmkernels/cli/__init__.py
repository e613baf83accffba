# SPDX-License-Identifier: Apache-2.0
"""The `vlmkernels` command, one file per subcommand. Names only."""

from vlmkernels.cli.main import main

__all__ = ["main"]

# SPDX-License-Identifier: Apache-2.0
"""Lets ``python -m vlmkernels`` be the `vlmkernels` command."""

import sys

from vlmkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())

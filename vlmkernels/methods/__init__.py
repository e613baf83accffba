# SPDX-License-Identifier: Apache-2.0
"""The published systems, a package per family. Names only."""

from vlmkernels.methods import zeroshot

__all__ = ["zeroshot"]

# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for other libraries, which are imported only by the functions that need them. Names only."""

from vlmkernels.integrations import faiss, open_clip, timm, torch, transformers
from vlmkernels.integrations._convert import ConversionReport, convert

__all__ = ["ConversionReport", "convert", "faiss", "open_clip", "timm", "torch", "transformers"]

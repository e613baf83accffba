# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for other libraries, which are imported only by the functions that need them. Names only."""

from vlmkernels.integrations import faiss, open_clip, torch, transformers

__all__ = ["faiss", "open_clip", "torch", "transformers"]

# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch definitions of the ops, one file per family; every backend is tested against them."""

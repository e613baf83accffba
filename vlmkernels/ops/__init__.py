# SPDX-License-Identifier: Apache-2.0
"""The ops, one file per family; their public names are those of `vlmkernels` itself."""

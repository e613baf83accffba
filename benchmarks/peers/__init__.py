# SPDX-License-Identifier: Apache-2.0
"""What our ops are timed against: the same work as users write it without us."""

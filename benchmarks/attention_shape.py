# SPDX-License-Identifier: Apache-2.0
"""Shapes of encoders' attention, by which the processor's rows and a GPU's are named and counted."""

from __future__ import annotations

from dataclasses import dataclass

#: Operations for each of B H L^2 D; the backward pass forms the scores again.
OPERATIONS = {"forward": 4.0, "backward": 10.0, "forward+backward": 14.0}


@dataclass(frozen=True)
class AttentionShape:
    """One shape of an encoder."""

    encoder: str
    B: int
    H: int
    L: int
    D: int
    is_causal: bool = False

    @property
    def name(self) -> str:
        return f"{self.encoder} ({self.B},{self.H},{self.L},{self.D}){' causal' * self.is_causal}"

    def operations(self, step: str) -> float:
        """Useful ones of a step: half where causal."""
        half = 0.5 if self.is_causal else 1.0
        return half * OPERATIONS[step] * self.B * self.H * self.L**2 * self.D

# SPDX-License-Identifier: Apache-2.0
"""Random numbers for the members of a batch, each a function of a key and of the member's number alone.

A generator hands out numbers in turn, so what a picture gets depends on who was there before it. Here draw ``j`` of
member ``i`` is a hash of ``(key, i, j)``: a process that holds a part of a batch draws for its part what one process
would have drawn for it within the whole.
"""

from __future__ import annotations

import hashlib
import math

import torch

# The constants of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), as the
# signed numbers that torch has.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_BITS = 24  # of a float32 between 0 and 1


def key_for(seed: int, *purpose: int) -> int:
    """Returns a number from 0 to 2^63 - 1 that depends on a seed and on what it is for."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(seed: int, *purpose: int) -> torch.Generator:
    """Makes a generator whose state depends on the seed and on what it is for, and on nothing that happened before."""
    return torch.Generator().manual_seed(key_for(seed, *purpose))


class Draws:
    """Random numbers for N members. Every call draws new ones.

    Args:
        key: what all draws depend on, such as `key_for(seed, step)`.
        members: int64 [N], the members' numbers: their places in the whole batch, not in this part of it.

    Example:
        >>> whole, part = Draws(7, torch.arange(100)), Draws(7, torch.arange(40, 60))
        >>> torch.equal(whole.uniform(3)[40:60], part.uniform(3))
        True
    """

    def __init__(self, key: int, members: torch.Tensor) -> None:
        if members.dtype != torch.int64 or members.ndim != 1:
            raise ValueError(f"Draws: members must be int64 [N], got {members.dtype} {list(members.shape)}")
        self._keys = _mix(_mix(members * _STEP + _wrap(key)) + _wrap(key))
        self._drawn = 0

    @classmethod
    def from_generator(cls, generator: torch.Generator, count: int) -> Draws:
        """Takes the key from a generator, for members 0 to ``count - 1``."""
        key = int(torch.randint(2**63 - 1, (), generator=generator))
        return cls(key, torch.arange(count))

    def __len__(self) -> int:
        return len(self._keys)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Draws from 0 (included) to 1 (excluded): float32 [N, *shape]."""
        return (self._bits(shape) * 2.0**-_BITS).float()

    def normal(self, *shape: int) -> torch.Tensor:
        """Draws from the normal distribution: float32 [N, *shape]."""
        middle = (self._bits(shape).double() + 0.5) * 2.0**-_BITS
        return (math.sqrt(2) * torch.erfinv(2 * middle - 1)).float()

    def between(self, limit: float, *shape: int) -> torch.Tensor:
        """Draws from ``-limit`` to ``limit``: float32 [N, *shape]."""
        return limit * (2 * self.uniform(*shape) - 1)

    def integers(self, count: int, *shape: int) -> torch.Tensor:
        """Draws from 0 to ``count - 1``, at most 2^24 of them: int64 [N, *shape]."""
        return self._bits(shape) * count >> _BITS

    def chance(self, share: float) -> torch.Tensor:
        """Says yes with a probability: bool [N]."""
        return self.uniform() < share

    def _bits(self, shape: tuple[int, ...]) -> torch.Tensor:
        """int64 [N, *shape] of `_BITS` random bits."""
        count = math.prod(shape)
        counters = torch.arange(self._drawn + 1, self._drawn + count + 1) * _STEP
        self._drawn += count
        mixed = _mix(self._keys.unsqueeze(1) + counters)
        return _shift(mixed, 64 - _BITS).view(len(self._keys), *shape)


def _wrap(value: int) -> int:
    """The signed 64-bit number with the low bits of a Python one."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    # torch shifts the sign in
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, a bijection in which every bit of the input changes half of the output's."""
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)

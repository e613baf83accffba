# SPDX-License-Identifier: Apache-2.0
"""Draws depend on key and member alone, look random, and have the ranges they promise."""

from __future__ import annotations

import pytest
import torch

from vlmkernels.data.draws import Draws, generator_for, key_for


def test_a_part_draws_what_the_whole_draws_for_it() -> None:
    def drawn(draws: Draws) -> list[torch.Tensor]:
        return [
            draws.uniform(),
            draws.normal(2, 3),
            draws.between(3.0),
            draws.integers(12),
            draws.chance(0.3),
        ]

    whole = drawn(Draws(key_for(0, 1), torch.arange(50)))
    part = drawn(Draws(key_for(0, 1), torch.arange(17, 30)))
    assert all(torch.equal(a[17:30], b) for a, b in zip(whole, part, strict=True))


def test_key_member_and_turn_make_other_numbers() -> None:
    members = torch.arange(40)
    draws = [Draws(key, members) for key in (0, 1, 2**63 - 1)]
    numbers = torch.cat([d.uniform(50).flatten() for d in (*draws, draws[0])])
    # 8,000 numbers of 24 bits: 1.9 equal pairs are to be expected
    assert numbers.unique().numel() >= 8000 - 10


def test_uniform_and_normal_have_their_moments() -> None:
    draws = Draws(5, torch.arange(200))
    x, z = draws.uniform(1000).double(), draws.normal(1000).double()
    # five standard errors of 200,000 draws
    assert abs(x.mean() - 0.5) < 5 * (1 / 12 / 2e5) ** 0.5
    assert abs(z.mean()) < 5 * (1 / 2e5) ** 0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / 2e5) ** 0.5
    assert x.min() >= 0 and x.max() < 1
    assert z.isfinite().all()
    for a, b in ((x[:-1], x[1:]), (x[:, :-1], x[:, 1:])):  # neighbouring members, neighbouring turns
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 * (1 / 2e5) ** 0.5


def test_integers_and_chances_have_their_shares() -> None:
    draws = Draws(6, torch.arange(60_000))
    counts = draws.integers(6).bincount()
    assert counts.numel() == 6
    assert (counts - 10_000).abs().max() < 5 * (60_000 * 5 / 36) ** 0.5
    assert abs(draws.chance(0.2).sum() - 12_000) < 5 * (60_000 * 0.16) ** 0.5
    assert not draws.chance(0.0).any() and draws.chance(1.0).all()


def test_a_generator_gives_the_key() -> None:
    one, two = (Draws.from_generator(torch.Generator().manual_seed(3), 5) for _ in range(2))
    assert len(one) == 5
    assert torch.equal(one.uniform(4), two.uniform(4))


def test_members_are_checked() -> None:
    with pytest.raises(ValueError, match=r"members must be int64 \[N\], got torch.float32"):
        Draws(0, torch.zeros(3))


def test_generators_differ_by_seed_and_purpose_and_repeat() -> None:
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0)]
    draws = [tuple(torch.rand(4, generator=generator_for(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [tuple(torch.rand(4, generator=generator_for(*key)).tolist()) for key in keys]

# SPDX-License-Identifier: Apache-2.0
"""Tables of names that bring a state dict to another layout and back; tensors are moved, never computed with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rule", "from_ours", "to_ours"]

_PLACEHOLDERS = {
    "#": r"(\d+)",
    "@": "(weight|bias)",
    "*": "(weight|bias|running_mean|running_var|num_batches_tracked)",
}


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        theirs: Name in the other layout; several, where ours packs them row by row. "#" stands for a number, "@" for
            weight or bias, "*" for anything a batch norm holds; each must occur in `ours` too, in the same order.
        ours: Our name.
        how: "" as it is; "transpose"; "row": theirs has a leading axis of 1; "token": theirs is `[1, 1, D]`.
        shares: Rows of each of several names, in proportion.
    """

    theirs: str | tuple[str, ...]
    ours: str
    how: str = ""
    shares: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"([#@*])", name)
    return re.compile("".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in parts))


def _filled(name: str, values: Sequence[str]) -> str:
    found = iter(values)
    return "".join(next(found) if part in _PLACEHOLDERS else part for part in re.split(r"([#@*])", name))


def to_ours(state: dict[str, Tensor], rules: Sequence[Rule]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames to our layout.

    Returns:
        Our state dict, and their names that no rule knows or whose companions are missing.
    """
    patterns = [(rule, part, _pattern(name)) for rule in rules for part, name in enumerate(rule.names)]
    parts: dict[str, tuple[Rule, dict[int, str]]] = {}
    unknown = []
    for name in state:
        for rule, part, pattern in patterns:
            match = pattern.fullmatch(name)
            if match:
                parts.setdefault(_filled(rule.ours, match.groups()), (rule, {}))[1][part] = name
                break
        else:
            unknown.append(name)
    ours = {}
    for target, (rule, found) in parts.items():
        if len(found) < len(rule.names):
            unknown += found.values()
            continue
        values = [state[found[part]] for part in range(len(found))]
        value = values[0] if len(values) == 1 else torch.cat(values)
        if rule.how == "transpose":
            value = value.t().contiguous()
        elif rule.how == "row":
            value = value.squeeze(0)
        elif rule.how == "token":
            value = value.flatten()
        ours[target] = value
    return ours, unknown


def from_ours(state: dict[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Renames from our layout.

    Raises:
        ValueError: If a name has no place in the other layout.
    """
    patterns = [(rule, _pattern(rule.ours)) for rule in rules]
    theirs: dict[str, Tensor] = {}
    homeless = []
    for name, value in state.items():
        rule, match = next(((r, m) for r, p in patterns if (m := p.fullmatch(name))), (None, None))
        if rule is None or match is None:
            homeless.append(name)
            continue
        if rule.how == "transpose":
            value = value.t().contiguous()
        elif rule.how == "row":
            value = value.unsqueeze(0)
        elif rule.how == "token":
            value = value.view(1, 1, -1)
        shares = rule.shares or (1,) * len(rule.names)
        sizes = [len(value) * share // sum(shares) for share in shares] if len(shares) > 1 else []
        values = value.split(sizes) if sizes else (value,)
        for target, piece in zip(rule.names, values, strict=True):
            # Clones: safetensors refuses tensors that share storage.
            theirs[_filled(target, match.groups())] = piece.clone()
    if homeless:
        raise ValueError(f"the other layout has no place for {homeless[:5]}")
    return theirs

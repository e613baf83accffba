# SPDX-License-Identifier: Apache-2.0
"""The registry of systems: the papers implemented here, each with its kind, entry point and what it was seen to do.

Imports nothing of ours, so that every part of the package may register here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "Claim",
    "System",
    "claims_file",
    "get_system",
    "list_systems",
    "recorded_claims",
    "register_system",
]

_Entry = TypeVar("_Entry", bound=Callable[..., Any])


@dataclass(frozen=True)
class System:
    """One registered system.

    Attributes:
        name: Short name, as in the table ("CLIP").
        paper: Title of the paper.
        kind: What it is ("model", "pretraining objective", "adaptation method", ...).
        entry: The class or function that implements it.
    """

    name: str
    paper: str
    kind: str
    entry: Callable[..., Any]

    @property
    def entry_point(self) -> str:
        """Where it lives, as "module:name"."""
        return f"{self.entry.__module__}:{self.entry.__qualname__}"


_SYSTEMS: dict[str, System] = {}


def register_system(name: str, paper: str, kind: str) -> Callable[[_Entry], _Entry]:
    """Returns a decorator that enters a class or function in the table of systems and returns it unchanged.

    Args:
        name: Short name, unique among systems (letter case does not distinguish).
        paper: Title of the paper.
        kind: What it is.

    Raises:
        ValueError: If an argument is empty, or another class or function already has this name.
    """
    for label, value in (("name", name), ("paper", paper), ("kind", kind)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"register_system: {label} must be a non-empty string, got {value!r}")

    def decorate(entry: _Entry) -> _Entry:
        system = System(name, paper, kind, entry)
        known = _SYSTEMS.get(name.lower())
        # The same definition registers again when its module is reloaded.
        if known is not None and known.entry_point != system.entry_point:
            raise ValueError(f"register_system: {name!r} is already registered by {known.entry_point}")
        _SYSTEMS[name.lower()] = system
        return entry

    return decorate


def list_systems(kind: str | None = None) -> list[System]:
    """Returns the registered systems by name; those whose kind contains `kind` where it is given.

    Only modules that have been imported have registered: `import vlmkernels.models` brings the models.
    """
    systems = sorted(_SYSTEMS.values(), key=lambda system: system.name.lower())
    return systems if kind is None else [system for system in systems if kind.lower() in system.kind.lower()]


def get_system(name: str) -> System:
    """Returns a system by name, letter case ignored.

    Raises:
        ValueError: If no such system is registered.
    """
    if name.lower() not in _SYSTEMS:
        raise ValueError(f"get_system: expected one of {[s.name for s in list_systems()]}, got {name!r}")
    return _SYSTEMS[name.lower()]


@dataclass(frozen=True)
class Claim:
    """What a system is said to do, and what it did on real data when its test was last recorded.

    Attributes:
        system: Name of the system.
        claim: What is tested, in a sentence.
        expected: What the paper, or the specification made from it, lets one expect.
        seen: What came out, with figures and their units.
        holds: Whether that is what was expected.
        seeds: The seeds that it ran with.
        seconds: How long the test took on the machine that recorded it.
        test: The test that makes it again, as "tests/...py::name".
    """

    system: str
    claim: str
    expected: str
    seen: str
    holds: bool
    seeds: tuple[int, ...]
    seconds: float
    test: str


_RESULTS = Path(__file__).parent / "results"


def claims_file(system: str) -> Path:
    """Returns the file of a system's recorded claims (it need not exist): a JSON list with a `Claim`'s fields."""
    return _RESULTS / (re.sub(r"[^a-z0-9]+", "-", system.lower()).strip("-") + ".json")


def recorded_claims(system: str) -> list[Claim]:
    """Returns the recorded claims of a system, in the order of their tests; none where nothing was recorded."""
    path = claims_file(system)
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Claim(**row | {"seeds": tuple(row["seeds"])}) for row in rows]

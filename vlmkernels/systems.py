# SPDX-License-Identifier: Apache-2.0
"""The registry of systems: the papers implemented here, each with its kind and entry point.

Imports nothing of ours, so that every part of the package may register here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["System", "get_system", "list_systems", "register_system"]

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

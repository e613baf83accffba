# SPDX-License-Identifier: Apache-2.0
"""What the configuration of every model can do: to plain values and back, and copies with fields replaced."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, TypeVar

__all__ = ["ModelConfig"]

_Config = TypeVar("_Config", bound="ModelConfig")


class ModelConfig:
    """Base of configurations, which are frozen dataclasses with defaults and may hold others of their kind."""

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain dicts, fit for JSON and for `from_dict`."""
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[_Config], values: dict[str, Any]) -> _Config:
        """Builds a configuration from nested dicts; fields that are missing take their defaults.

        Raises:
            ValueError: If a field is unknown.
        """
        return cls().override(**values)

    def override(self: _Config, **values: Any) -> _Config:
        """Returns a copy with fields replaced; a dict for a nested configuration replaces single fields of it.

        Raises:
            ValueError: If a field is unknown.
        """
        return _override(self, values)


def _override(config: Any, values: dict[str, Any]) -> Any:
    known = {f.name for f in fields(config)}
    for name in values:
        if name not in known:
            raise ValueError(f"{type(config).__name__}: expected fields among {sorted(known)}, got {name!r}")
    changes = dict(values)
    for name, value in values.items():
        nested = getattr(config, name)
        if isinstance(value, dict) and is_dataclass(nested):
            changes[name] = _override(nested, value)
    return replace(config, **changes)

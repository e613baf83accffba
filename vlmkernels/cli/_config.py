# SPDX-License-Identifier: Apache-2.0
"""Options files: JSON or TOML with the names of the long options, checked as the command line checks them."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any


def read_config(path: str, command: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Reads options from a file.

    Args:
        path: a ``.json`` or ``.toml`` file. Its keys are long options without the dashes; "-" and "_" are the same.
            They may lie in a table named after the command, so that one file can hold several commands' options.
        command: the subcommand.
        parser: its parser.

    Returns:
        Values by option, converted as on the command line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or has an unknown option or a value of the wrong kind.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--config: there is no file {path}")
    content = _parse(file)
    if isinstance(content.get(command), dict):
        content = content[command]
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    values = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in actions:
            raise ValueError(f"--config: {path} has {key!r}, which is no option of vlmkernels {command}")
        values[name] = _convert(path, key, value, actions[name])
    return values


def _parse(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    try:
        if file.suffix == ".json":
            content = json.loads(text)
        elif file.suffix == ".toml":
            if sys.version_info < (3, 11):
                raise ValueError("TOML needs Python 3.11; write the options as JSON")
            content = importlib.import_module("tomllib").loads(text)
        else:
            raise ValueError("expected a .json or .toml file")
    except ValueError as error:
        raise ValueError(f"--config: {file}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config: {file}: expected names and values, got a {type(content).__name__}")
    return content


def _convert(path: str, key: str, value: Any, action: argparse.Action) -> Any:
    if isinstance(action.default, bool) or action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"--config: {path}: {key} must be true or false, got {value!r}")
        return value
    if isinstance(value, bool):
        raise ValueError(f"--config: {path}: {key} must not be true or false")
    if action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction):
        return value if isinstance(value, list) else [value]
    convert = action.type if callable(action.type) else str
    text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    try:
        converted = convert(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"--config: {path}: {key}: {error}") from error
    if action.choices is not None and converted not in action.choices:
        raise ValueError(
            f"--config: {path}: {key} must be one of {', '.join(map(str, action.choices))}, got {value!r}"
        )
    return converted

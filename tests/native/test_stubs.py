# SPDX-License-Identifier: Apache-2.0
"""The `.pyi` files say what the native modules have: every name, argument, default and return type."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import vlmkernels
from vlmkernels import _native

AVAILABLE = [name for name in ("cpu", "cuda") if getattr(_native, f"{name}_reason") is None]

#: pybind11 writes what it accepts; a stub says what the function means.
ACCEPTED_AS = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "collections.abc.Sequence": "list",
}


def stub_of(name: str) -> dict[str, ast.stmt]:
    tree = ast.parse((Path(vlmkernels.__file__).parent / f"_{name}.pyi").read_text())
    return {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def signature_text(node: ast.FunctionDef) -> str:
    """Arguments and return type in one spelling."""
    text = f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else 'None'}"
    text = re.sub(r"\bvlmkernels\._c\w+\.", "", text)
    for pybind, plain in ACCEPTED_AS.items():
        text = text.replace(pybind, plain)
    return re.sub(r"^\(self[^,)]*(, )?", "(", text)


def native_signature(function: Any) -> str:
    line = function.__doc__.splitlines()[0]
    parsed = ast.parse(f"def {line}: ...").body[0]
    assert isinstance(parsed, ast.FunctionDef)
    return signature_text(parsed)


def public_names(owner: Any) -> set[str]:
    return {name for name in vars(owner) if not name.startswith("_")}


@pytest.mark.parametrize("module", AVAILABLE)
def test_names_are_those_of_the_module(module: str) -> None:
    assert set(stub_of(module)) == public_names(getattr(_native, module))


@pytest.mark.parametrize("module", AVAILABLE)
def test_signatures_are_those_of_the_module(module: str) -> None:
    native = getattr(_native, module)
    for name, node in stub_of(module).items():
        if isinstance(node, ast.FunctionDef):
            assert signature_text(node) == native_signature(getattr(native, name)), name


@pytest.mark.parametrize("module", AVAILABLE)
def test_classes_are_those_of_the_module(module: str) -> None:
    for name, node in stub_of(module).items():
        if not isinstance(node, ast.ClassDef):
            continue
        native = getattr(getattr(_native, module), name)
        bases = [ast.unparse(base) for base in node.bases]
        assert bases == [] or bases == [native.__base__.__name__], name
        members = {member.name: member for member in node.body if isinstance(member, ast.FunctionDef)}
        assert set(members) - {"__init__"} == public_names(native), name
        for member_name, member in members.items():
            if not any(ast.unparse(decorator) == "property" for decorator in member.decorator_list):
                assert signature_text(member) == native_signature(getattr(native, member_name)), (
                    f"{name}.{member_name}"
                )

# SPDX-License-Identifier: Apache-2.0
"""The direction of imports, what `__init__.py` files hold, and what is imported at the top of a module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmkernels

PACKAGE = Path(vlmkernels.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

#: layer: the other layers it may import. A layer is a file or folder directly in the package.
ALLOWED = {
    "__main__": {"cli"},
    "_version": set(),
    "_files": set(),
    "systems": set(),
    "_native": {"_version"},
    "ops": {"_files", "_native", "systems"},
    "nn": {"ops", "systems"},
    "models": {"_files", "ops", "nn", "systems"},
    "data": {"_files", "ops", "nn", "models", "systems"},
    "train": {"_files", "ops", "nn", "models", "data", "systems", "_version"},
    "methods": {"_files", "ops", "nn", "models", "data", "train", "systems"},
    "integrations": {"ops", "nn"},
    "diagnostics": {"_native", "_version", "ops"},
    "smoke": {"_native"},
    "cli": {
        "_files",
        "_native",
        "_version",
        "ops",
        "nn",
        "models",
        "data",
        "train",
        "methods",
        "systems",
        "diagnostics",
    },
    "__init__": {
        "_version",
        "data",
        "diagnostics",
        "integrations",
        "methods",
        "models",
        "nn",
        "ops",
        "systems",
        "train",
    },
}

#: Files whose third-party import at the top is the point: kernels written in another package's language are imported
#: only by the function that launches them.
TOP_IMPORT_EXEMPT = ("ops/triton/",)


def layer_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def dotted_name(path: Path) -> list[str]:
    """Package that relative imports in a file start from."""
    return ["vlmkernels", *path.relative_to(PACKAGE).parts[:-1]]


def imported_modules(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module imported anywhere in a file, names from `from x import y` appended."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = dotted_name(path)[: len(dotted_name(path)) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def top_level_imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif is_type_checking(node) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        else:
            for name in ("body", "orelse", "finalbody"):
                yield from top_level_imports(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from top_level_imports(handler.body)


def test_package_has_files() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    layer = layer_of(path)
    assert layer in ALLOWED, f"{layer} is no known layer: add it to ALLOWED and to the design"
    wrong = []
    for line, module in imported_modules(path, ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] != "vlmkernels" or len(parts) < 2:
            continue
        target = parts[1]
        is_layer = target in ALLOWED or (PACKAGE / target).exists() or (PACKAGE / f"{target}.py").exists()
        native_by_native = layer == "_native" and target in ("_cpu", "_cuda")
        if native_by_native or target == layer or (not is_layer and target not in ("_cpu", "_cuda")):
            continue
        if target not in ALLOWED[layer]:
            wrong.append(f"line {line}: {layer} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_torch_and_the_standard_library_at_the_top(path: Path) -> None:
    if str(path.relative_to(PACKAGE)).startswith(TOP_IMPORT_EXEMPT):
        return
    allowed = {*sys.stdlib_module_names, "torch", "vlmkernels"}
    wrong = []
    for node in top_level_imports(ast.parse(path.read_text()).body):
        if isinstance(node, ast.ImportFrom):
            roots = [] if node.level else [(node.module or "").split(".")[0]]
        else:
            roots = [alias.name.split(".")[0] for alias in node.names]
        wrong += [f"line {node.lineno}: {root}" for root in roots if root not in allowed]
    assert not wrong, "imported at the top, belongs into the function that needs it:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.name == "__init__.py"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_init_files_only_re_export(path: Path) -> None:
    def allowed(node: ast.stmt) -> bool:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return True
        if isinstance(node, ast.Expr):  # the docstring, or a string that documents a name
            return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if isinstance(node, ast.Assign):
            return [ast.unparse(target) for target in node.targets] == ["__all__"]
        return False

    wrong = [
        f"line {node.lineno}: {ast.unparse(node)[:60]}"
        for node in ast.parse(path.read_text()).body
        if not allowed(node)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_say_what_lives_in_them(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text)), "the file has no docstring"

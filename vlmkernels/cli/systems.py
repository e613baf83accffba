# SPDX-License-Identifier: Apache-2.0
"""List the systems (models, objectives, methods) that the package implements, with their papers."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil

from vlmkernels.cli._models import print_json
from vlmkernels.systems import list_systems

# Systems enter the table when the module that implements them is imported.
_REGISTERING = ("vlmkernels.models", "vlmkernels.methods")

HELP = "list what is implemented, with its papers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--kind", help="only kinds that contain this word")


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    for module in _REGISTERING:
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    found = [s for s in list_systems() if not args.kind or args.kind.lower() in s.kind.lower()]
    if args.json:
        print_json(
            [{"name": s.name, "paper": s.paper, "kind": s.kind, "entry": s.entry_point} for s in found]
        )
        return 0
    if not found:
        print(f"no system of kind {args.kind!r}" if args.kind else "no systems")
        return 0
    names = max(len(s.name) for s in found)
    kinds = min(44, max(len(s.kind) for s in found))
    room = max(40, shutil.get_terminal_size((120, 24)).columns - names - kinds - 4)
    for s in found:
        paper = s.paper if len(s.paper) <= room else s.paper[: room - 1] + "…"
        kind = s.kind if len(s.kind) <= kinds else s.kind[: kinds - 1] + "…"
        print(f"{s.name:<{names}}  {kind:<{kinds}}  {paper}")
    print(f"{len(found)} systems")
    return 0

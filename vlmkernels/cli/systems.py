# SPDX-License-Identifier: Apache-2.0
"""List the systems (models, objectives, methods) that the package implements, with their papers."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import shutil
import textwrap
from typing import Any

from vlmkernels.cli._models import print_json
from vlmkernels.systems import System, list_systems, recorded_claims

# Systems enter the table when the module that implements them is imported.
_REGISTERING = ("vlmkernels.models", "vlmkernels.methods")

HELP = "list what is implemented, with its papers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--kind", help="only kinds that contain this word")
    parser.add_argument(
        "--results", action="store_true", help="what each was expected to do on real data, and what was seen"
    )


def register_all() -> None:
    """Imports every module in which systems register."""
    for module in _REGISTERING:
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    register_all()
    found = [s for s in list_systems() if not args.kind or args.kind.lower() in s.kind.lower()]
    if args.json:
        rows: list[dict[str, Any]] = [
            {"name": s.name, "paper": s.paper, "kind": s.kind, "entry": s.entry_point} for s in found
        ]
        if args.results:
            rows = [
                row | {"results": [dataclasses.asdict(claim) for claim in recorded_claims(s.name)]}
                for row, s in zip(rows, found, strict=True)
            ]
        print_json(rows)
        return 0
    if not found:
        print(f"no system of kind {args.kind!r}" if args.kind else "no systems")
        return 0
    if args.results:
        return _print_results(found)
    names = max(len(s.name) for s in found)
    kinds = min(44, max(len(s.kind) for s in found))
    room = max(40, shutil.get_terminal_size((120, 24)).columns - names - kinds - 4)
    for s in found:
        paper = s.paper if len(s.paper) <= room else s.paper[: room - 1] + "…"
        kind = s.kind if len(s.kind) <= kinds else s.kind[: kinds - 1] + "…"
        print(f"{s.name:<{names}}  {kind:<{kinds}}  {paper}")
    print(f"{len(found)} systems")
    return 0


def _print_results(systems: list[System]) -> int:
    """Prints the recorded claims of each system, wrapped to the terminal."""
    width = shutil.get_terminal_size((110, 24)).columns
    claims = [claim for s in systems for claim in recorded_claims(s.name)]
    for s in systems:
        print(f"{s.name}: {s.paper}")
        found = recorded_claims(s.name)
        if not found:
            print("  no result recorded")
        for claim in found:
            seeds = ", ".join(map(str, claim.seeds))
            lines = (
                f"  {'+' if claim.holds else '-'} {claim.claim} (seeds {seeds}; {claim.seconds:.0f} s)",
                f"      expected: {claim.expected}",
                f"      seen:     {claim.seen}",
            )
            for line in lines:
                print(textwrap.fill(line, width, subsequent_indent=" " * 16))
        print()
    holding = sum(claim.holds for claim in claims)
    print(f"{len(systems)} systems; {holding} of {len(claims)} recorded claims came out as expected")
    return 0

# SPDX-License-Identifier: Apache-2.0
"""Show versions, processor, threads, CUDA, which backends are available and why the others are not, and the "
"models."""

from __future__ import annotations

import argparse

from vlmkernels import diagnostics
from vlmkernels.cli._models import print_json
from vlmkernels.models import list_models, pretrained_dir

HELP = "show what is available on this machine, and why the rest is not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are no options of its own."""
    del parser


def run(args: argparse.Namespace) -> int:
    """Prints everything."""
    shipped = [name for name in list_models() if (pretrained_dir(name) / "model.safetensors").is_file()]
    content = diagnostics.info() | {"models": {"known": list_models(), "with weights": shipped}}
    if args.json:
        print_json(content)
    else:
        print(diagnostics.format_info(content))
    return 0

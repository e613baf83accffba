# SPDX-License-Identifier: Apache-2.0
"""Index the pictures of a folder, so that `vlmkernels search` finds them by what they show."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from vlmkernels._files import write_text_atomically
from vlmkernels.cli._models import add_model_argument, load_encoder, picture_features, print_json, warn
from vlmkernels.data.sources import list_pictures
from vlmkernels.ops.flat_index import FlatIndex

HELP = "make a folder of pictures searchable"

DEFAULT_INDEX = "vlmkernels-index"
VECTORS, CONTENT = "vectors.index", "index.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("folder", help="folder with pictures, searched recursively")
    parser.add_argument("--output", default=DEFAULT_INDEX, help="folder of the index")
    parser.add_argument(
        "--storage", default="float32", choices=("float32", "bfloat16", "int8"), help="how vectors are stored"
    )
    add_model_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Encodes every picture and writes the index."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"index: there is no folder {folder}")
    files = list_pictures(folder)
    if not files:
        raise ValueError(f"index: there is no picture in {folder}")
    began = time.perf_counter()
    encoder = load_encoder(args.model)
    features, kept, problems = picture_features(encoder, files)
    if not kept:
        raise ValueError(f"index: no picture in {folder} can be read, for instance {problems[0]}")
    index = FlatIndex(features.shape[1], metric="cosine", storage=args.storage)
    index.add(features)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    # A model given by path is found again from any folder; a name stays a name.
    model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    content = {"model": model, "files": [str(file.resolve()) for file in kept]}
    index.save(output / VECTORS)
    write_text_atomically(output / CONTENT, json.dumps(content, indent=1) + "\n")
    seconds = time.perf_counter() - began
    warn(problems)
    if args.json:
        print_json({"index": str(output), "pictures": len(kept), "skipped": problems, "seconds": seconds})
    else:
        print(f'{len(kept):,} pictures in {seconds:.1f} s; {output}; now: vlmkernels search "a red heart"')
    return 0

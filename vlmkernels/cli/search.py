# SPDX-License-Identifier: Apache-2.0
"""Search pictures by a description: those of an index made by `vlmkernels index`, or else the bundled emoji.

An index in shards may be searched by several processes, each with its own: `torchrun --nproc-per-node N -m vlmkernels
search ...`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vlmkernels.cli._models import DEFAULT_MODEL, load_encoder, print_json, templates_for, text_features
from vlmkernels.cli.index import CONTENT, DEFAULT_INDEX, SHARDS, VECTORS
from vlmkernels.data import emoji
from vlmkernels.ops.flat_index import FlatIndex
from vlmkernels.ops.sharded_index import ShardedIndex
from vlmkernels.train.distributed import Processes, join

HELP = "find pictures by a description"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("text", nargs="+", help="what to look for")
    parser.add_argument(
        "--index",
        help=f"folder of the index (default: {DEFAULT_INDEX} where that exists, else the bundled emoji)",
    )
    parser.add_argument("--top", type=int, default=5, help="how many pictures to show")
    parser.add_argument(
        "--style", default=emoji.HELD_OUT_STYLE, choices=emoji.STYLES, help="emoji: drawing style"
    )
    parser.add_argument(
        "--template", action="append", metavar="TEXT", help="prompt with {} for the description"
    )
    parser.add_argument(
        "--model", metavar="NAME|PATH", help="model (default: the one the index was made with, or emoji-clip)"
    )


def run(args: argparse.Namespace) -> int:
    """Searches and prints the best pictures."""
    if args.top < 1:
        raise ValueError(f"--top must be at least 1, got {args.top}")
    with join() as processes:
        return _run(args, processes)


def _run(args: argparse.Namespace, processes: Processes) -> int:
    text = " ".join(args.text)
    place = args.index or (DEFAULT_INDEX if (Path(DEFAULT_INDEX) / CONTENT).is_file() else None)
    index: FlatIndex | ShardedIndex
    if place is None:
        encoder = load_encoder(args.model or DEFAULT_MODEL)
        data = emoji.load(args.style)
        pairs = data.select(base_only=True)
        index = FlatIndex(encoder.model.config.embed_dim, metric="cosine")
        index.add(encoder.images(data.images(pairs, size=encoder.model.config.vision.image_size)))
        names = [f"{data.emojis[i].char}  {data.emojis[i].name}" for i, _ in pairs]
    else:
        content = _read_content(Path(place))
        encoder = load_encoder(args.model or content["model"])
        if content["sharded"]:
            index = ShardedIndex.load(Path(place) / SHARDS, group=processes.group)
        else:
            index = FlatIndex.load(Path(place) / VECTORS)
        names = content["files"]
        if index.dim != encoder.model.config.embed_dim or len(index) != len(names):
            raise ValueError(f"search: {place} was not made with this model, or is damaged; make it again")
    query = text_features(encoder, [text], templates_for(encoder, args.template))
    scores, ids = index.search(query, min(args.top, len(index)))
    if not processes.is_first:
        return 0
    found = [
        {"picture": names[i], "similarity": round(float(s), 4)}
        for s, i in zip(scores[0].tolist(), ids[0].tolist(), strict=True)
    ]
    if args.json:
        print_json({"text": text, "index": place or f"bundled emoji ({args.style})", "results": found})
    else:
        for result in found:
            print(f"{result['similarity']:.3f}  {result['picture']}")
    return 0


def _read_content(place: Path) -> dict[str, Any]:
    if not (place / CONTENT).is_file():
        raise FileNotFoundError(
            f"search: there is no index in {place}; make one with: vlmkernels index FOLDER"
        )
    try:
        content = json.loads((place / CONTENT).read_text(encoding="utf-8"))
        return {
            "model": str(content["model"]),
            "files": list(content["files"]),
            "sharded": bool(content.get("sharded", False)),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"search: {place / CONTENT} is damaged; make the index again") from error

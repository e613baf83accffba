# SPDX-License-Identifier: Apache-2.0
"""Index the pictures of a folder, so that `vlmkernels search` finds them by what they show.

Several processes: `torchrun --nproc-per-node N -m vlmkernels index ...`; each encodes its shards of the pictures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from vlmkernels._files import write_text_atomically
from vlmkernels.cli._models import add_model_argument, load_encoder, picture_features, print_json, warn
from vlmkernels.data.sources import list_pictures
from vlmkernels.ops.flat_index import FlatIndex
from vlmkernels.ops.sharded_index import ShardedIndex
from vlmkernels.train.distributed import Processes, join

HELP = "make a folder of pictures searchable"

DEFAULT_INDEX = "vlmkernels-index"
VECTORS, SHARDS, CONTENT = "vectors.index", "vectors", "index.json"  # one file, or a folder of shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("folder", help="folder with pictures, searched recursively")
    parser.add_argument("--output", default=DEFAULT_INDEX, help="folder of the index")
    parser.add_argument(
        "--storage", default="float32", choices=("float32", "bfloat16", "int8"), help="how vectors are stored"
    )
    parser.add_argument(
        "--shards", type=int, help="files that the vectors are spread over (default: one for each process)"
    )
    add_model_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Encodes every picture and writes the index."""
    if args.shards is not None and args.shards < 1:
        raise ValueError(f"--shards must be at least 1, got {args.shards}")
    folder = Path(args.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"index: there is no folder {folder}")
    files = list_pictures(folder)
    if not files:
        raise ValueError(f"index: there is no picture in {folder}")
    with join() as processes:
        return _run(args, files, processes)


def _run(args: argparse.Namespace, files: list[Path], processes: Processes) -> int:
    began = time.perf_counter()
    encoder = load_encoder(args.model)
    rank, size = processes.rank, processes.world_size
    shards = args.shards or size
    shares = [
        picture_features(encoder, files[len(files) * i // shards : len(files) * (i + 1) // shards])
        for i in range(rank * shards // size, (rank + 1) * shards // size)
    ]
    # Ids are positions in the list of all files, which only everybody's counts give.
    found = processes.from_all(
        [([str(file.resolve()) for file in kept], problems) for _, kept, problems in shares]
    )
    every = [share for of_rank in found for share in of_rank]
    names, problems = (
        [name for kept, _ in every for name in kept],
        [text for _, texts in every for text in texts],
    )
    if not names:
        raise ValueError(f"index: no picture in {args.folder} can be read, for instance {problems[0]}")
    first = sum(len(kept) for of_rank in found[:rank] for kept, _ in of_rank)
    indexes = []
    for features, kept, _ in shares:
        index = FlatIndex(encoder.model.config.embed_dim, metric="cosine", storage=args.storage)
        index.add(features, range(first, first + len(kept)))
        first += len(kept)
        indexes.append(index)

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if shards == 1 and size == 1:
        indexes[0].save(output / VECTORS)
    else:
        empty = FlatIndex(encoder.model.config.embed_dim, metric="cosine", storage=args.storage)
        # A process without a shard of its own takes part with an empty one.
        ShardedIndex(indexes or [empty], group=processes.group).save(output / SHARDS)
    if not processes.is_first:
        return 0
    # A model given by path is found again from any folder; a name stays a name.
    model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    content = {"model": model, "sharded": shards > 1 or size > 1, "files": names}
    write_text_atomically(output / CONTENT, json.dumps(content, indent=1) + "\n")
    seconds = time.perf_counter() - began
    warn(problems)
    if args.json:
        result = {"index": str(output), "pictures": len(names), "shards": shards, "skipped": problems}
        print_json(result | {"seconds": seconds})
    else:
        print(f'{len(names):,} pictures in {seconds:.1f} s; {output}; now: vlmkernels search "a red heart"')
    return 0

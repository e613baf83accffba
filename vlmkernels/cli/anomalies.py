# SPDX-License-Identifier: Apache-2.0
"""Find what is odd among pictures of one kind, without examples: vlmkernels anomalies folder/ (MuSc)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from vlmkernels._files import write_atomically
from vlmkernels.cli._models import add_model_argument, load_encoder, print_json, warn
from vlmkernels.data.sources import decode_picture, list_pictures
from vlmkernels.methods.zeroshot import MuSc
from vlmkernels.train.corpora import over_white

HELP = "find odd pictures, and where they are odd, in a folder of pictures of one kind"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "folder", help="folder with at least three pictures of one kind, searched recursively"
    )
    parser.add_argument("--output", default="anomalies", help="folder for the heat maps")
    parser.add_argument("--size", type=int, help="side that pictures are resized to (default: the model's)")
    parser.add_argument("--parts", type=int, default=1, help="groups scored apart, to save time and memory")
    parser.add_argument("--no-maps", action="store_true", help="print the scores and write no heat maps")
    add_model_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Scores every picture, prints the oddest first, and writes a heat map for each."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"anomalies: there is no folder {folder}")
    if args.size is not None and args.size < 16:
        raise ValueError(f"--size must be at least 16, got {args.size}")
    detector = MuSc(load_encoder(args.model), size=args.size, parts=args.parts)
    pictures, files, problems = [], [], []
    for file in list_pictures(folder):
        try:
            pictures.append(decode_picture(file, detector.size))
            files.append(file)
        except (ValueError, OSError) as error:
            problems.append(f"{file}: {error}")
    if len(files) < 3:
        raise ValueError(
            f"anomalies: expected at least three readable pictures in {folder}, found {len(files)}"
        )
    shown = over_white(torch.stack(pictures))
    found = detector.predict(shown)
    order = found.scores.argsort(descending=True).tolist()
    maps = {} if args.no_maps else write_maps(Path(args.output), files, folder, shown, found.maps)
    warn(problems)
    rows = [
        {"picture": str(files[i]), "score": round(float(found.scores[i]), 6), "map": maps.get(i)}
        for i in order
    ]
    if args.json:
        print_json({"model": args.model, "results": rows, "skipped": problems})
    else:
        for row in rows:
            print(f"{row['score']:.3f}  {row['picture']}")
        if maps:
            print(f"{len(maps):,} heat maps in {args.output}")
    return 2 if problems else 0


def write_maps(
    output: Path, files: list[Path], folder: Path, pictures: Tensor, maps: Tensor
) -> dict[int, str]:
    """Writes each picture beside itself under its heat map, all on one scale, and returns their paths."""
    from PIL import Image

    output.mkdir(parents=True, exist_ok=True)
    low, high = float(maps.min()), float(maps.max())
    written = {}
    for i, file in enumerate(files):
        pair = torch.cat([pictures[i], heat(pictures[i], (maps[i] - low) / max(high - low, 1e-12))], 2)
        name = "_".join(file.relative_to(folder).with_suffix("").parts) + f"-{i}.png"
        image = Image.fromarray(pair.permute(1, 2, 0).contiguous().numpy())
        write_atomically(output / name, lambda path, image=image: image.save(path, "PNG"))  # type: ignore[misc]
        written[i] = str(output / name)
    return written


def heat(picture: Tensor, value: Tensor) -> Tensor:
    """Lays a heat map over the grey of a picture: blue for 0, through yellow, to red for 1.

    Args:
        picture: uint8 [3, H, W].
        value: [H, W] from 0 to 1.

    Returns:
        uint8 [3, H, W].
    """
    stops = torch.tensor(
        [[40.0, 60.0, 160.0], [90.0, 190.0, 170.0], [250.0, 220.0, 70.0], [215.0, 30.0, 40.0]]
    )
    place = value.clamp(0, 1) * (len(stops) - 1)
    lower = place.floor().long().clamp(max=len(stops) - 2)
    colour = torch.lerp(stops[lower], stops[lower + 1], (place - lower)[..., None]).permute(2, 0, 1)
    grey = picture.float().mean(0, keepdim=True).expand_as(picture)
    return torch.lerp(grey, colour, 0.55).round().clamp(0, 255).to(torch.uint8)

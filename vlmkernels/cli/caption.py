# SPDX-License-Identifier: Apache-2.0
"""Write captions of pictures: vlmkernels caption cat.png --model RUN, after vlmkernels train --model coca-emoji."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vlmkernels.cli._models import load_encoder, print_json, read_pictures, warn
from vlmkernels.data.transforms import transform_for
from vlmkernels.models.generation import METHODS

HELP = "write a caption for each picture with a captioning model"

_AT_ONCE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="picture files")
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME|PATH",
        help="a run folder or checkpoint of a captioning model, such as CoCa",
    )
    parser.add_argument("--method", default="greedy", choices=METHODS, help="how words are chosen")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="how every caption begins")
    parser.add_argument("--max-length", type=int, help="most tokens (default: 30 or the model's context)")
    parser.add_argument("--beams", type=int, default=6, help="beam: texts kept at once")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, help="beam: scores per length to this power"
    )
    parser.add_argument("--top-p", type=float, default=0.9, help="top_p: probability to draw from")
    parser.add_argument("--top-k", type=int, default=10, help="top_k: tokens to draw from")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="top_p, top_k: evens out probabilities"
    )
    parser.add_argument("--seed", type=int, default=0, help="top_p, top_k: seed of the draws")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Writes a line per picture."""
    encoder = load_encoder(args.model)
    model, tokenizer = encoder.model, encoder.tokenizer
    if not hasattr(model, "generate") or tokenizer is None:
        raise ValueError(f"--model: {args.model} is a {type(model).__name__}, which writes no captions")
    pictures, files, problems = read_pictures(
        [Path(p) for p in args.pictures], model.config.vision.image_size
    )
    if not files:
        raise ValueError(f"caption: no readable picture; {'; '.join(problems)}")
    options = {
        name: getattr(args, name)
        for name in ("method", "beams", "length_penalty", "top_p", "top_k", "temperature")
    }
    if args.max_length is not None:
        options["max_length"] = args.max_length
    prompt = torch.tensor([tokenizer.start_id, *tokenizer.encode(args.prompt)])
    generator = torch.Generator().manual_seed(args.seed)
    transform = transform_for(model)
    captions: list[str] = []
    for part in pictures.split(_AT_ONCE):
        ids = model.generate(
            transform(part),
            prompt.expand(len(part), -1),
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            generator=generator,
            **options,
        )
        captions += tokenizer.decode(ids.tolist())
    warn(problems)
    if args.json:
        results = [{"picture": str(f), "caption": c} for f, c in zip(files, captions, strict=True)]
        print_json({"model": args.model, "results": results, "skipped": problems})
    else:
        for file, caption in zip(files, captions, strict=True):
            print(f"{file}: {caption}")
    return 2 if problems else 0

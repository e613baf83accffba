# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model: retrieval and zero-shot classification on the bundled emoji, or retrieval on pairs of "
"your own."""

from __future__ import annotations

import argparse

from vlmkernels.cli._models import add_model_argument, load_encoder, print_json
from vlmkernels.data import emoji
from vlmkernels.data.sources import PictureStore, open_source
from vlmkernels.train.corpora import over_white
from vlmkernels.train.evaluation import (
    RECALLS,
    EmojiEvaluation,
    PairsEvaluation,
    evaluate_emoji,
    evaluate_pairs,
)

HELP = "measure retrieval and zero-shot classification, next to chance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_model_argument(parser)
    parser.add_argument("--data", default="emoji", help="emoji, or a folder, table or shards of your own")
    parser.add_argument(
        "--style", default=emoji.HELD_OUT_STYLE, choices=emoji.STYLES, help="emoji: style to test on"
    )
    parser.add_argument("--path-column", help="column of a table with the picture (default: found by name)")
    parser.add_argument(
        "--caption-column", help="column of a table with the caption (default: found by name)"
    )
    parser.add_argument("--limit", type=int, default=5000, help="most pairs of your own, the first ones")


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints a table."""
    encoder = load_encoder(args.model)
    result: EmojiEvaluation | PairsEvaluation
    if args.data == "emoji":
        result = evaluate_emoji(encoder, style=args.style)
    else:
        if args.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {args.limit}")
        source = open_source(args.data, path_column=args.path_column, caption_column=args.caption_column)
        source.pairs = source.pairs[: args.limit]
        with PictureStore(source, encoder.model.config.vision.image_size) as store:
            pictures, rows = store.pictures(range(len(source)))
        result = evaluate_pairs(encoder, over_white(pictures), [source.captions[i] for i in rows])
    if args.json:
        print_json({"model": args.model, "data": args.data} | result.to_dict())
        return 0
    for name, r in (("image to text", result.image_to_text), ("text to image", result.text_to_image)):
        figures = "  ".join(
            f"R@{k} {100 * r.recall[k]:5.1f}% (chance {100 * r.chance[k]:.2f}%)" for k in RECALLS
        )
        print(f"{name:<28} {figures}")
    if isinstance(result, EmojiEvaluation):
        for name, c in (
            (f"top-1 of {len(result.names.classes):,} names", result.names),
            ("group, unseen concepts", result.groups),
            ("subgroup, unseen concepts", result.subgroups),
        ):
            print(f"{name:<28} {100 * c.accuracy:.1f}% (chance {100 * c.chance:.2f}%)")
    return 0

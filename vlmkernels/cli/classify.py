# SPDX-License-Identifier: Apache-2.0
"""Classify pictures by your own labels, without training: vlmkernels classify cat.png --labels "cat,dog,pizza"."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from vlmkernels.cli._models import (
    add_model_argument,
    load_encoder,
    picture_features,
    print_json,
    templates_for,
    warn,
)
from vlmkernels.data import emoji
from vlmkernels.ops.topk import zero_shot

HELP = "say which of your labels fits a picture best"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="picture files")
    parser.add_argument(
        "--labels", help="labels, separated by commas (default: the names of the bundled emoji)"
    )
    parser.add_argument("--labels-file", metavar="FILE", help="labels, one per line")
    parser.add_argument("--top", type=int, default=5, help="how many labels to show")
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help='prompt with {} for the label, such as "a photo of {}"',
    )
    add_model_argument(parser)


def _labels(args: argparse.Namespace) -> list[str]:
    if args.labels is not None and args.labels_file is not None:
        raise ValueError("classify: pass --labels or --labels-file, not both")
    if args.labels is not None:
        found = args.labels.split(",")
    elif args.labels_file is not None:
        found = Path(args.labels_file).read_text(encoding="utf-8").splitlines()
    else:
        return [emoji.spoken_name(e) for e in emoji.load().emojis if e.base == e.index]
    labels = list(dict.fromkeys(label.strip() for label in found if label.strip()))
    if not labels:
        raise ValueError("classify: there is no label")
    return labels


def run(args: argparse.Namespace) -> int:
    """Classifies and prints a line per picture."""
    if args.top < 1:
        raise ValueError(f"--top must be at least 1, got {args.top}")
    labels = _labels(args)
    encoder = load_encoder(args.model)
    features, files, problems = picture_features(encoder, [Path(p) for p in args.pictures])
    if not files:
        raise ValueError(f"classify: no readable picture; {'; '.join(problems)}")
    classes = encoder.prompts(labels, templates_for(encoder, args.template))
    with torch.no_grad():
        scale = float(encoder.model.logit_scale.exp())
    probabilities, indices, _ = zero_shot(features, classes, scale, k=min(args.top, len(labels)))
    results: list[dict[str, Any]] = [
        {
            "picture": str(file),
            "labels": [
                {"label": labels[i], "probability": round(p, 6)}
                for i, p in zip(indices[row].tolist(), probabilities[row].tolist(), strict=True)
            ],
        }
        for row, file in enumerate(files)
    ]
    warn(problems)
    if args.json:
        print_json({"model": args.model, "results": results, "skipped": problems})
    else:
        for result in results:
            shown = "  ".join(f"{x['label']} {100 * x['probability']:.1f}%" for x in result["labels"])
            print(f"{result['picture']}: {shown}")
    return 2 if problems else 0

# SPDX-License-Identifier: Apache-2.0
"""Classify pictures by your own labels, without training: vlmkernels classify cat.png --labels "cat,dog,pizza"."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlmkernels.cli._gallery import write_gallery
from vlmkernels.cli._models import add_model_argument, load_encoder, picture_features, print_json, warn
from vlmkernels.cli._zeroshot import METHODS, build_classifier, build_open_vocabulary, classify, name_freely
from vlmkernels.data import emoji

HELP = "say which of your labels fits a picture best"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="picture files")
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
    parser.add_argument("--method", choices=METHODS, default="clip", help="how labels become a classifier")
    parser.add_argument("--explain", action="store_true", help="show the reasons, where the method has some")
    parser.add_argument(
        "--descriptions", metavar="FILE", help="JSON of descriptions (default: the bundled emoji's keywords)"
    )
    parser.add_argument(
        "--context", action="append", metavar="FACTOR", help="what --method perception infers first"
    )
    parser.add_argument(
        "--open-vocabulary", action="store_true", help="no labels: words from the most similar captions"
    )
    parser.add_argument(
        "--captions", metavar="FILE", help="captions, one per line, for --open-vocabulary (default: bundled)"
    )
    parser.add_argument(
        "--gallery",
        metavar="HTML",
        help="write a page with every method's explanation, of these pictures or of bundled ones",
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


def _check(args: argparse.Namespace) -> None:
    if args.top < 1:
        raise ValueError(f"--top must be at least 1, got {args.top}")
    if not args.pictures and args.gallery is None:
        raise ValueError("classify: pass at least one picture")
    if args.open_vocabulary and (args.labels is not None or args.labels_file is not None):
        raise ValueError("classify: --open-vocabulary takes no labels")
    if args.captions is not None and not args.open_vocabulary:
        raise ValueError("classify: --captions belongs to --open-vocabulary")


def run(args: argparse.Namespace) -> int:
    """Classifies and prints a line per picture."""
    _check(args)
    labels = [] if args.open_vocabulary else _labels(args)
    encoder = load_encoder(args.model)
    if args.gallery is not None:
        page = write_gallery(Path(args.gallery), encoder, [Path(p) for p in args.pictures], labels)
        print_json({"gallery": str(page)}) if args.json else print(f"gallery: {page}")
        return 0
    features, files, problems = picture_features(encoder, [Path(p) for p in args.pictures])
    if not files:
        raise ValueError(f"classify: no readable picture; {'; '.join(problems)}")
    if args.open_vocabulary:
        system = build_open_vocabulary(encoder, args.captions)
        rows = name_freely(system, features, top=args.top, explain=args.explain)
    else:
        classifier = build_classifier(
            args.method,
            encoder,
            labels,
            features,
            templates=args.template,
            descriptions=args.descriptions,
            context=args.context,
        )
        rows = classify(classifier, labels, features, top=args.top, explain=args.explain)
    results: list[dict[str, Any]] = [
        {"picture": str(file), **row} for file, row in zip(files, rows, strict=True)
    ]
    warn(problems)
    if args.json:
        print_json({"model": args.model, "method": _name(args), "results": results, "skipped": problems})
    else:
        for result in results:
            print(f"{result['picture']}: " + "  ".join(_shown(x) for x in result["labels"]))
            for reason in result.get("reasons", []):
                print(f"    {reason['score']:.3f}  {reason['text']}")
    return 2 if problems else 0


def _name(args: argparse.Namespace) -> str:
    return "open-vocabulary" if args.open_vocabulary else args.method


def _shown(label: dict[str, Any]) -> str:
    if "probability" in label:
        return f"{label['label']} {100 * label['probability']:.1f}%"
    return f"{label['label']} {label['score']:.3f}"

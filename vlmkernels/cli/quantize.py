# SPDX-License-Identifier: Apache-2.0
"""Quantize a model's linear layers, say how far its features move, and save it; it reloads without the float one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlmkernels._files import write_text_atomically
from vlmkernels.cli._models import QUANTIZATION, add_model_argument, load_encoder, print_json
from vlmkernels.data import emoji
from vlmkernels.models import save_pretrained
from vlmkernels.nn.quantize import QuantizationReport, quantize_

if TYPE_CHECKING:
    from vlmkernels.train.evaluation import Encoder

HELP = "store a model's linear layers in 8 or 4 bits"

SCHEMES = ("w8a8", "w8a16", "w4a16", "bf16")
_COMPARED = 256  # pictures, and names, whose features are compared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add_model_argument(parser)
    parser.add_argument(
        "--scheme", default="w8a8", choices=SCHEMES, help="how weights and activations are stored"
    )
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), help="w4a16: weights that share a scale"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the quantized model goes")


def run(args: argparse.Namespace) -> int:
    """Quantizes, compares and saves."""
    output = Path(args.output)
    if (output / "model.safetensors").exists():
        raise ValueError(f"quantize: {output} holds a model already; choose another folder")
    encoder = load_encoder(args.model)
    before = _features(encoder)
    float_bytes = _bytes(encoder.model)
    quantize_(encoder.model, args.scheme, group_size=args.group_size)
    report: QuantizationReport = encoder.model.quantization_report
    if not report.converted:
        raise ValueError(f"quantize: no layer of {args.model} can be stored as {args.scheme}: {report}")
    agreement = [(a * b).sum(1) for a, b in zip(before, _features(encoder), strict=True)]
    save_pretrained(encoder.model, output, encoder.tokenizer)
    settings = {"scheme": args.scheme, "group_size": args.group_size}
    write_text_atomically(output / QUANTIZATION, json.dumps(settings) + "\n")
    size = _bytes(encoder.model)
    if args.json:
        print_json(
            {
                "folder": str(output),
                "scheme": args.scheme,
                "bytes_before": float_bytes,
                "bytes": size,
                "converted": report.converted,
                "left_alone": report.left_alone,
                "cosine_images": float(agreement[0].mean()),
                "cosine_texts": float(agreement[1].mean()),
            }
        )
        return 0
    print(
        f"{len(report.converted)} layers as {args.scheme}, {len(report.left_alone)} left alone; "
        f"{float_bytes / 2**20:.1f} MiB -> {size / 2**20:.1f} MiB; {output}"
    )
    for name, cosine in zip(("pictures", "names"), agreement, strict=True):
        mean, least = float(cosine.mean()), float(cosine.min())
        print(f"cosine to the float features of {len(cosine)} {name}: mean {mean:.5f}, least {least:.5f}")
    return 0


def _bytes(model: torch.nn.Module) -> int:
    return sum(value.nbytes for value in model.state_dict().values())


def _features(encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    data = emoji.load(emoji.HELD_OUT_STYLE)
    pairs = data.select(base_only=True)
    pairs = pairs[:: max(1, len(pairs) // _COMPARED)][:_COMPARED]
    pictures = data.images(pairs, size=encoder.model.config.vision.image_size)
    return encoder.images(pictures), encoder.texts([emoji.spoken_name(data.emojis[i]) for i, _ in pairs])

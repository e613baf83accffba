# SPDX-License-Identifier: Apache-2.0
"""What several subcommands need: models from a name or a path, features of pictures, JSON on stdout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlmkernels.data import emoji, tokenizer_for
from vlmkernels.data.sources import decode_picture
from vlmkernels.models import (
    create,
    list_models,
    load_checkpoint,
    load_state_dict_file,
    pretrained_dir,
)
from vlmkernels.models._registry import architecture
from vlmkernels.nn.quantize import quantize_
from vlmkernels.train.corpora import over_white
from vlmkernels.train.evaluation import Encoder, average_prompts

DEFAULT_MODEL = "emoji-clip"
QUANTIZATION = "quantization.json"  # beside the weights of a quantized model: how they were made
PHOTO_TEMPLATES = ("{}", "a photo of a {}", "a picture of {}")


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--model``."""
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|PATH",
        help="a model that ships with the package, or a run folder or checkpoint of yours",
    )


def load_encoder(name: str) -> Encoder:
    """Loads a model with its tokenizer.

    Args:
        name: a shipped model's name, or a path.

    Raises:
        FileNotFoundError: there is neither such a path nor such a model, or no weights ship for it.
        ValueError: the checkpoint is none, or comes without a tokenizer.
    """
    known = {n.lower() for n in list_models()}
    if (Path(name) / QUANTIZATION).is_file():
        return _load_quantized(Path(name))
    if Path(name).exists():
        model: Any = load_checkpoint(name)
    elif name.lower() not in known:
        raise FileNotFoundError(f"--model: {name} is neither a path nor the name of a model")
    elif not (pretrained_dir(name) / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"--model: no weights of {name} ship with this installation; pass a checkpoint's path"
        )
    else:
        model = create(name, pretrained=True)
    if not hasattr(model, "encode_text"):
        raise ValueError(f"--model: {name} is a {type(model).__name__}, which reads no text")
    # Weights may be stored in half precision; a CPU computes in float32.
    return Encoder(model.float(), tokenizer_for(model))


def _load_quantized(folder: Path) -> Encoder:
    """Builds the model with its layers quantized, and puts the stored codes where the random ones are."""
    settings = json.loads((folder / QUANTIZATION).read_text(encoding="utf-8"))
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = architecture(content.get("architecture", "CLIP"))
    model: Any = kind.model(kind.config.from_dict(content["config"])).eval()
    quantize_(model, settings["scheme"], group_size=settings["group_size"])
    weights, _ = load_state_dict_file(folder)
    model.load_state_dict(weights)
    model.tokenizer_state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return Encoder(model, tokenizer_for(model))


def templates_for(encoder: Encoder, chosen: Sequence[str] | None) -> Sequence[str]:
    """Returns the prompt templates: the user's, or those that fit what the model was trained on.

    Raises:
        ValueError: a template has no place for the label.
    """
    for template in chosen or ():
        if "{}" not in template:
            raise ValueError(f"--template: expected {{}} where the label goes, got {template!r}")
    is_emoji = encoder.model.config.name == DEFAULT_MODEL
    return tuple(chosen or (emoji.NAME_TEMPLATES if is_emoji else PHOTO_TEMPLATES))


def text_features(encoder: Encoder, texts: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Encodes texts in every template and averages: [N, E]."""
    return average_prompts(encoder.prompts(texts, templates))


def read_pictures(files: Sequence[Path], size: int) -> tuple[torch.Tensor, list[Path], list[str]]:
    """Reads picture files, those of any size.

    Returns:
        uint8 [N, 3, size, size], the N files that could be read, and a sentence for each that could not.
    """
    pictures, kept, problems = [], [], []
    for file in files:
        try:
            pictures.append(decode_picture(file, size))
            kept.append(file)
        except (ValueError, OSError) as error:
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            problems.append(f"{file}: {reason}")
    if not pictures:
        return torch.zeros(0, 3, size, size, dtype=torch.uint8), kept, problems
    return over_white(torch.stack(pictures)), kept, problems


def picture_features(encoder: Encoder, files: Sequence[Path]) -> tuple[torch.Tensor, list[Path], list[str]]:
    """Encodes picture files, those of any size.

    Returns:
        Features [N, E], the N files that could be read, and a sentence for each that could not.
    """
    size = encoder.model.config.vision.image_size
    features, kept, problems = [torch.zeros(0, encoder.model.config.embed_dim)], [], []
    for start in range(0, len(files), encoder.batch_size):
        pictures, read, unread = read_pictures(files[start : start + encoder.batch_size], size)
        kept += read
        problems += unread
        features.append(encoder.images(pictures))
    return torch.cat(features), kept, problems


def print_json(value: Any) -> None:
    """Prints one JSON object."""
    print(json.dumps(value, indent=2))


def warn(sentences: Sequence[str]) -> None:
    """Prints sentences on stderr."""
    for sentence in sentences:
        print(f"vlmkernels: skipped {sentence}", file=sys.stderr)

# SPDX-License-Identifier: Apache-2.0
"""Which backend a committed result from a GPU shows fastest, by architecture and class of shapes; asked by `dispatch`.

`measured.json` beside this file holds the winners, and `benchmarks/choose_defaults.py` writes it from the committed
rows: a CUDA C++ kernel, or a library kernel that torch carries, is the default only where it stands there. Elsewhere
Triton is. Nothing is timed at run time. A family registers its CUDA backend with what this file has against it::

    dispatch.register_backend("attention", "cuda", reasons, priority=5,
                              not_default=measured.unless_fastest("attention", "cuda"))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmkernels.ops.dispatch import Call

TABLE = Path(__file__).with_name("measured.json")

#: Upper ends of the ranges that share a winner; what is longer than all is a range of its own. 288 tokens are where the
#: kernels that keep a whole head end.
LENGTHS = (64, 128, 208, 288, 640, 1024, 4096)
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)
WIDTHS = (256, 512, 1024, 2048, 4096)
LOGITS = (2**20, 2**24, 2**28)
DATABASE = (1024, 16384, 2**18, 2**21)
NEIGHBOURS = (1, 16, 128, 1024)

Facts = Any

UNMEASURED = "no committed result from a GPU shows it right and faster yet"


def shape_class(op: str, call: Call) -> str | None:
    """Name of the class of shapes that a call belongs to; None where its options are in no benchmark.

    Example:
        >>> call = Call("cuda", torch.bfloat16, {"inputs": 768, "outputs": 3072, "rows": 50432, "scheme": "w8a8"})
        >>> shape_class("quantized_linear", call)
        'bfloat16 w8a8 rows>16384 inputs<=1024 outputs<=4096'
    """
    classify = _CLASSES.get(op)
    words = None if classify is None else classify(call.facts)
    return None if words is None else f"{str(call.dtype).removeprefix('torch.')} {words}"


def fastest(op: str, call: Call) -> str | None:
    """Backend that a committed result shows right and fastest for calls like this one; None where there is none."""
    if call.device != "cuda":
        return None
    known = _TABLE.get(op)
    if not known:
        return None
    name = shape_class(op, call)
    return None if name is None else known.get(_architecture(), {}).get(name)


def unless_fastest(op: str, backend: str) -> Callable[[Call], list[str]]:
    """`not_default` of a backend that must have been measured before anybody gets it without naming it."""

    def not_default(call: Call) -> list[str]:
        winner = fastest(op, call)
        if winner == backend:
            return []
        return [UNMEASURED] if winner is None else [f"committed results show {winner} faster for such shapes"]

    return not_default


# Classes.


def _up_to(what: str, value: int, ends: Sequence[int]) -> str:
    for end in ends:  # Dynamo traces this, and knows no bisect
        if value <= end:
            return f"{what}<={end}"
    return f"{what}>{ends[-1]}"


def _attention(facts: Facts) -> str | None:
    unlike = (
        facts["bias"],
        facts["dropout"],
        facts["return_lse"],
        facts["value_dim"] != facts["head_dim"],
        facts["key_heads"] != facts["heads"],
        facts["queries"] != facts["keys"],
    )
    if any(unlike):
        return None
    words = ["head", str(facts["head_dim"]), _up_to("keys", facts["keys"], LENGTHS)]
    words += ["causal"] if facts["is_causal"] else []
    words += ["key_mask"] if facts["key_mask"] else []
    words += ["gradient"] if facts["gradient"] else []
    return " ".join(words)


def _contrastive(facts: Facts) -> str | None:
    if "logits" not in facts:  # over a process group
        return None
    return f"{_up_to('width', facts['width'], WIDTHS)} {_up_to('logits', facts['logits'], LOGITS)}"


def _product(facts: Facts) -> str:
    sizes = (("rows", ROWS), ("inputs", WIDTHS), ("outputs", WIDTHS))
    return " ".join(_up_to(what, facts[what], ends) for what, ends in sizes)


def _linear(facts: Facts) -> str:
    words = [_product(facts), facts["activation"] or "plain"]
    return " ".join([*words, "gradient"] if facts["gradient"] else words)


def _quantized_linear(facts: Facts) -> str:
    return f"{facts['scheme']} {_product(facts)}"


def _topk_similarity(facts: Facts) -> str | None:
    if facts["mask_dims"]:
        return None
    words = [facts["metric"], _up_to("queries", facts["n"], ROWS), _up_to("database", facts["m"], DATABASE)]
    return " ".join([*words, _up_to("width", facts["width"], WIDTHS), _up_to("k", facts["k"], NEIGHBOURS)])


def _zero_shot(facts: Facts) -> str | None:
    if facts["prompts"]:
        return None
    words = [_up_to("images", facts["n"], ROWS), _up_to("classes", facts["c"], DATABASE)]
    return " ".join([*words, _up_to("width", facts["width"], WIDTHS), _up_to("k", facts["k"], NEIGHBOURS)])


_CLASSES: dict[str, Callable[[Facts], str | None]] = {
    "attention": _attention,
    "clip_loss": _contrastive,
    "siglip_loss": _contrastive,
    "info_nce": _contrastive,
    "linear_cross_entropy": _contrastive,
    "linear": _linear,
    "quantized_linear": _quantized_linear,
    "topk_similarity": _topk_similarity,
    "zero_shot": _zero_shot,
}


# The table, and where this process runs.


def read_table(path: Path = TABLE) -> dict[str, dict[str, dict[str, str]]]:
    """`{op: {"sm_90": {class: backend}}}` of a file of winners."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        op: {
            arch: {name: entry["fastest"] for name, entry in classes.items()}
            for arch, classes in archs.items()
        }
        for op, archs in content["fastest"].items()
    }


_TABLE = read_table()


def _architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


# As in `dispatch`: Dynamo asks once and keeps the answer, which holds for the life of a process.
_architecture._dynamo_marked_constant = True  # type: ignore[attr-defined]

# SPDX-License-Identifier: Apache-2.0
"""report.html: one file without scripts and without anything to download, light or dark as the reader's system is.

Curves, figures next to chance, retrieval examples with pictures, the confusion matrix, timings, and the command.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from vlmkernels._files import write_text_atomically
from vlmkernels.train._charts import bar_of_parts, heat_map, line_chart
from vlmkernels.train.evaluation import (
    RECALLS,
    Classification,
    EmojiEvaluation,
    Gallery,
    NeighbourEvaluation,
    PairsEvaluation,
    Retrieval,
)
from vlmkernels.train.run_folder import RunFolder

_STYLE_SHEET = Path(__file__).with_name("report.css")


def write_report(
    folder: RunFolder,
    evaluation: EmojiEvaluation | PairsEvaluation | NeighbourEvaluation | None,
    seconds: dict[str, float],
) -> Path:
    """Writes ``report.html`` from the files of a run and its evaluation.

    Args:
        folder: the run; its ``params.json`` and ``results.jsonl`` are read.
        evaluation: what was measured, or None.
        seconds: wall time by part.

    Returns:
        The path of the page.
    """
    params = json.loads(folder.params.read_text(encoding="utf-8"))
    rows = [row for row in folder.read_results() if "loss" in row]
    sections = [_header(folder, params, rows, seconds)]
    if isinstance(evaluation, NeighbourEvaluation):
        sections.append(_neighbours(evaluation))
    elif evaluation is not None:
        sections.append(_tiles(evaluation))
    sections.append(_curves(rows))
    if isinstance(evaluation, EmojiEvaluation | PairsEvaluation):
        sections.append(_figures(evaluation))
        sections.append(_image_to_text(evaluation.gallery))
        sections.append(_text_to_image(evaluation.gallery))
    if isinstance(evaluation, EmojiEvaluation):
        sections.append(_confusion(evaluation.groups))
    sections.append(_timings(seconds))
    sections.append(_settings(params))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(folder.path.name)} · vlmkernels train</title>"
        f"<style>{_STYLE_SHEET.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )
    write_text_atomically(folder.report, page)
    return folder.report


def picture_tag(picture: torch.Tensor, hint: str = "") -> str:
    """Returns an ``<img>`` with a picture (uint8 [3, H, W]) inside it."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(buffer, "WEBP", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img src="data:image/webp;base64,{data}" alt="{escape(hint)}" title="{escape(hint)}">'


def _section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{body}</section>"


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def _chance(share: float) -> str:
    return _percent(share, 1 if share >= 0.01 else 2)


def _header(
    folder: RunFolder, params: dict[str, Any], rows: Sequence[dict[str, Any]], seconds: dict[str, float]
) -> str:
    settings = params["settings"]
    minutes = sum(seconds.values()) / 60
    facts = [
        escape(settings["model"]),
        f"{params['parameters'] / 1e6:.1f} M parameters",
        escape(params["data"]),
        f"{rows[-1]['step']:,} steps" if rows else "no steps",
        f"{escape(params['precision'])}, {params['threads']} thread{'s' if params['threads'] != 1 else ''}",
        f"{minutes:.1f} minutes",
    ]
    items = "".join(f"<li>{fact}</li>" for fact in facts)
    title = f'<p class="kicker">vlmkernels train</p><h1>{escape(folder.path.name)}</h1>'
    return f'<header>{title}<ul class="facts">{items}</ul></header>'


def _tile(value: float, chance: float, title: str, detail: str) -> str:
    return (
        f'<div class="tile"><p>{escape(title)}</p><strong>{_percent(value)}</strong>'
        f'<div class="meter"><i style="width:{100 * value:.1f}%"></i></div>'
        f"<small>{escape(detail)} · chance {_chance(chance)}</small></div>"
    )


def _tiles(evaluation: EmojiEvaluation | PairsEvaluation) -> str:
    i2t, t2i = evaluation.image_to_text, evaluation.text_to_image
    tiles = [
        _tile(i2t.recall[1], i2t.chance[1], "Picture to caption, R@1", f"{i2t.queries:,} pictures"),
        _tile(t2i.recall[1], t2i.chance[1], "Caption to picture, R@1", f"{t2i.queries:,} captions"),
    ]
    if isinstance(evaluation, EmojiEvaluation):
        names, groups = evaluation.names, evaluation.groups
        tiles.append(
            _tile(names.accuracy, names.chance, "Top-1 over all names", f"{len(names.classes):,} names")
        )
        tiles.append(
            _tile(groups.accuracy, groups.chance, "Group of unseen concepts", f"{len(groups.classes)} groups")
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _neighbours(evaluation: NeighbourEvaluation) -> str:
    kinds = (
        ("same emoji", evaluation.names),
        ("subgroup", evaluation.subgroups),
        ("group", evaluation.groups),
    )
    tiles = "".join(
        _tile(r.recall[1], r.chance[1], f"Nearest neighbour: {name}", f"{r.queries:,} pictures")
        for name, r in kinds
    )
    return f'<div class="tiles">{tiles}</div>'


def _curves(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    steps = [row["step"] for row in rows]
    known = {"step", "epoch", "loss", "lr", "logit_scale", "pairs_per_second", "seconds"}
    own = [(name.replace("_", " ").capitalize(), name, False) for name in rows[0] if name not in known]
    charts = [
        line_chart(title, steps, [row[key] for row in rows], x_label="over steps", from_zero=zero)
        for title, key, zero in (
            ("Loss", "loss", False),
            *own,
            ("Learning rate", "lr", True),
            ("Logit scale", "logit_scale", False),
            ("Pairs per second", "pairs_per_second", True),
        )
        if key in rows[0]
    ]
    return _section("Training", f'<div class="charts">{"".join(charts)}</div>')


def _figures(evaluation: EmojiEvaluation | PairsEvaluation) -> str:
    rows = [
        _retrieval_row("Picture to caption", evaluation.image_to_text),
        _retrieval_row("Caption to picture", evaluation.text_to_image),
    ]
    head = "".join(f"<th>R@{k}</th>" for k in RECALLS)
    body = (
        f'<div class="scroll"><table><thead><tr><th>Retrieval</th>{head}<th>queries</th><th>candidates</th></tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    if not isinstance(evaluation, EmojiEvaluation):
        return _section(
            "Held-out pairs", body, "Pairs that were kept from training; in grey what chance would reach."
        )
    style = escape(evaluation.pictures[0][1])
    levels = [
        ("Names, held-out style", evaluation.names),
        ("Groups, unseen concepts", evaluation.groups),
        ("Subgroups, unseen concepts", evaluation.subgroups),
    ]
    body += (
        '<div class="scroll"><table><thead><tr><th>Zero-shot classification</th><th>top-1</th><th>top-5</th>'
        "<th>class mean</th><th>most frequent class</th><th>classes</th><th>pictures</th></tr></thead><tbody>"
        + "".join(_classification_row(name, c) for name, c in levels)
        + "</tbody></table></div>"
    )
    note = (
        f"Retrieval: concepts from training in a drawing style that training never saw ({style}). Unseen concepts: "
        "things whose whole family was kept from training, in all styles. In grey what chance would reach."
    )
    return _section("Zero-shot evaluation", body, note)


def _retrieval_row(name: str, r: Retrieval) -> str:
    cells = "".join(f"<td>{_percent(r.recall[k])} <span>{_chance(r.chance[k])}</span></td>" for k in RECALLS)
    return f"<tr><th>{name}</th>{cells}<td>{r.queries:,}</td><td>{r.database:,}</td></tr>"


def _classification_row(name: str, c: Classification) -> str:
    top5 = min(1.0, 5 * c.chance)
    return (
        f"<tr><th>{name}</th><td>{_percent(c.accuracy)} <span>{_chance(c.chance)}</span></td>"
        f"<td>{_percent(c.accuracy_top5)} <span>{_chance(top5)}</span></td><td>{_percent(c.balanced)}</td>"
        f"<td>{_percent(c.majority)}</td><td>{len(c.classes):,}</td><td>{len(c.labels):,}</td></tr>"
    )


def _image_to_text(gallery: Gallery) -> str:
    cards = []
    for picture, truth, found in gallery.image_to_text:
        names = "".join(f'<li class="{"right" if ok else "wrong"}">{escape(text)}</li>' for text, ok in found)
        missed = "" if any(ok for _, ok in found) else f'<p class="truth">is: {escape(truth)}</p>'
        cards.append(
            f'<div class="card">{picture_tag(picture, truth)}<div><ol>{names}</ol>{missed}</div></div>'
        )
    return _section(
        "From pictures to captions",
        f'<div class="cards">{"".join(cards)}</div>',
        "The five most similar captions of each picture. Examples are spread evenly over the test set, not chosen.",
    )


def _text_to_image(gallery: Gallery) -> str:
    rows = []
    for text, found in gallery.text_to_image:
        pictures = "".join(
            f'<span class="{"right" if ok else "wrong"}">{picture_tag(picture, caption)}</span>'
            for picture, caption, ok in found
        )
        rows.append(f'<div class="row"><p>{escape(text)}</p><div class="strip">{pictures}</div></div>')
    return _section(
        "From captions to pictures",
        f'<div class="rows">{"".join(rows)}</div>',
        "The eight most similar pictures of each caption, best first; the right one is framed.",
    )


def _confusion(groups: Classification) -> str:
    drawing = heat_map(groups.confusion.tolist(), groups.classes)
    note = (
        f"Unseen concepts, sorted into {len(groups.classes)} groups by their names alone: "
        f"{_percent(groups.accuracy)} right, chance {_chance(groups.chance)}. Rows are the true groups (with the "
        "number of pictures), columns what the model says."
    )
    return _section("Confusion by group", f'<div class="scroll">{drawing}</div>', note)


def _timings(seconds: dict[str, float]) -> str:
    return _section("Where the time went", bar_of_parts(list(seconds.items()), "s"))


def _settings(params: dict[str, Any]) -> str:
    command = params.get("command") or "vlmkernels.train.train(TrainConfig(...)), with the settings below"
    rows = [*params["settings"].items(), *((f"version of {k}", v) for k, v in params["versions"].items())]
    cells = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape(_plain(value))}</td></tr>"
        for name, value in rows
    )
    return _section(
        "To repeat it",
        f"<pre><code>{escape(command)}</code></pre>"
        f'<details><summary>All settings and versions</summary><table class="settings">{cells}</table></details>',
    )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

# SPDX-License-Identifier: Apache-2.0
"""The gallery of zero-shot methods: one self-contained page that shows each method's explanation on a few pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels._files import write_text_atomically
from vlmkernels.cli._models import picture_features
from vlmkernels.cli._zeroshot import build_classifier, build_open_vocabulary, is_emoji_model
from vlmkernels.cli.anomalies import heat
from vlmkernels.data import emoji
from vlmkernels.data.sources import decode_picture
from vlmkernels.methods.zeroshot import (
    COLOURS,
    FGVP,
    GDA,
    MARKS,
    BigramModel,
    Explanation,
    MuSc,
    SupportAdapter,
    Thing,
    cab_probe,
    cluster_vote,
    encoder_scores,
    make_pairs,
    make_singles,
    mask_boxes,
    pac_bayes_bound,
    prompt_kl,
    uniform_kl,
)
from vlmkernels.train.corpora import over_white
from vlmkernels.train.evaluation import Encoder
from vlmkernels.train.report import picture_tag

_BUNDLED = ("tiger", "hot beverage", "bicycle", "strawberry", "castle", "saxophone")
_METHODS = {
    "clip": ("CLIP", "prompts, averaged"),
    "zpe": ("ZPE", "what the strongest templates add to the logit"),
    "description": ("By description", "descriptors of the class by similarity"),
    "fudd": ("FuDD", "captions that tell the ten closest classes apart"),
    "perception": ("PerceptionCLIP", "the context that was inferred first"),
    "loki": ("Loki", "smallest expected squared distance under the class texts' metric"),
}
_MUSC_SIZE = 96
_STYLE = """
.method { display: grid; grid-template-columns: 130px 1fr; gap: 4px 14px; padding: 8px 0; }
.method + .method { border-top: 1px solid var(--line); }
.method b { font-size: 14px; } .method small { display: block; color: var(--soft); font-size: 12px; line-height: 1.3; }
.method .answer { font-weight: 600; font-size: 15px; }
.why { list-style: none; margin: 2px 0 0; padding: 0; font-size: 13px; color: var(--soft); }
.why li { display: grid; grid-template-columns: 46px 60px 1fr; gap: 8px; align-items: center; }
.why .meter { margin: 0; } .why output { font-variant-numeric: tabular-nums; text-align: right; }
.subject { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px;
  display: grid; grid-template-columns: 128px 1fr; gap: 20px; margin-bottom: 14px; }
.subject > img { width: 128px; height: 128px; border-radius: 8px; background: #fff; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; } .figures figure { margin: 0; text-align: center; }
.figures img { width: 128px; height: 128px; border-radius: 8px; display: block; image-rendering: auto; }
.figures figcaption { display: block; font-weight: 400; font-size: 13px; color: var(--soft); max-width: 128px; }
.figures .right img { outline: 3px solid var(--right); outline-offset: 1px; }
@media (max-width: 640px) { .subject, .method { grid-template-columns: 1fr; } }
"""


@torch.no_grad()
def write_gallery(path: Path, encoder: Encoder, files: Sequence[Path], labels: Sequence[str]) -> Path:
    """Writes the page.

    Args:
        path: where.
        encoder: the model.
        files: pictures to explain; none: a few bundled ones in the held-out style.
        labels: the classes.

    Returns:
        The path.

    Raises:
        ValueError: No picture can be read.
    """
    if files:
        pictures, features, names = _read(encoder, files)
    else:
        data = emoji.load()
        index = {e.name: e.index for e in data.emojis}
        pairs = [(index[n], emoji.HELD_OUT_STYLE) for n in _BUNDLED]
        pictures, names = data.images(pairs, size=128), list(_BUNDLED)
        features = encoder.images(data.images(pairs))
    sections = [_subjects(encoder, pictures, features, names, labels)]
    if not files and is_emoji_model(encoder):
        # these need labelled pictures, scenes or defects, which the bundled set provides for the model trained on it
        sections += [_support(encoder), _marks(encoder), _odd_ones(encoder), _clusters(encoder)]
        sections += [_association(encoder), _bounds(encoder)]
    style = Path(__file__).parents[1] / "train" / "report.css"
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Zero-shot gallery</title>'
        f"<style>{style.read_text(encoding='utf-8')}{_STYLE}</style></head><body><main>"
        '<header><p class="kicker">vlmkernels classify --gallery</p><h1>Zero-shot methods, explained</h1>'
        f'<ul class="facts"><li>{escape(encoder.model.config.name or "CLIP")}</li><li>{len(labels):,} classes</li>'
        f"<li>{len(names)} pictures</li></ul></header>{''.join(sections)}</main></body></html>\n"
    )
    write_text_atomically(path, page)
    return path


def _read(encoder: Encoder, files: Sequence[Path]) -> tuple[Tensor, Tensor, list[str]]:
    features, kept, problems = picture_features(encoder, files)
    if not kept:
        raise ValueError(f"classify: no readable picture; {'; '.join(problems)}")
    return over_white(torch.stack([decode_picture(f, 128) for f in kept])), features, [f.name for f in kept]


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}</section>'


def _answer(title: str, note: str, why: Explanation) -> str:
    highest = max((abs(r.score) for r in why.reasons), default=1.0) or 1.0
    reasons = "".join(
        f"<li><output>{r.score:.3f}</output>"
        f'<div class="meter"><i style="width:{max(0.0, 100 * r.score / highest):.0f}%"></i></div>'
        f"<span>{escape(r.text)}</span></li>"
        for r in why.reasons
    )
    return (
        f'<div class="method"><div><b>{escape(title)}</b><small>{escape(note)}</small></div>'
        f'<div><span class="answer">{escape(why.label)}</span> <small>{why.score:.3f}</small>'
        f'<ul class="why">{reasons}</ul></div></div>'
    )


def _subjects(
    encoder: Encoder, pictures: Tensor, features: Tensor, names: Sequence[str], labels: Sequence[str]
) -> str:
    answers: list[list[str]] = [[] for _ in names]
    for method, (title, note) in _METHODS.items() if labels else ():
        classifier = build_classifier(method, encoder, labels, features)
        if hasattr(classifier, "explain"):
            found = classifier.explain(features, 4)
        else:
            prediction = classifier.predict(features)
            found = [
                Explanation(classifier.classes[i], s)
                for i, s in zip(prediction.labels.tolist(), prediction.scores[:, 0].tolist(), strict=True)
            ]
        for row, why in zip(answers, found, strict=True):
            row.append(_answer(title, note, why))
    for row, why in zip(answers, build_open_vocabulary(encoder, None).explain(features, 4), strict=True):
        row.append(_answer("CaSED", "no list of classes: a word of the retrieved captions", why))
    cards = "".join(
        f'<div class="subject">{picture_tag(picture, name)}<div>{"".join(row)}</div></div>'
        for picture, name, row in zip(pictures, names, answers, strict=True)
    )
    return _section(
        "What each method says, and why",
        "Every method classifies the same picture; below its answer, its reasons with their scores.",
        cards,
    )


def _figure(picture: Tensor, caption: str, right: bool = False) -> str:
    kind = ' class="right"' if right else ""
    return f"<figure{kind}>{picture_tag(picture, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _support(encoder: Encoder) -> str:
    """Support adapter and GDA: concepts the model never saw, from their drawings in two other styles."""
    data = emoji.load()
    test = data.select(split="held_out_concepts", styles=emoji.HELD_OUT_STYLE, group="Animals & Nature")[:12]
    classes = [i for i, _ in test]
    support = [
        p for p in data.select(split="held_out_concepts", styles=("noto", "openmoji")) if p[0] in classes
    ]
    y = torch.tensor([classes.index(i) for i, _ in support])
    names = [emoji.spoken_name(data.emojis[i]) for i in classes]
    keys, texts = encoder.images(data.images(support)), encoder.texts(names)
    captions = encoder.texts(
        [f"{names[k]}: {', '.join(data.emojis[classes[k]].keywords[:3])}" for k in y.tolist()]
    )
    x = encoder.images(data.images(test))
    adapter = SupportAdapter(keys, y, texts, captions, classes=names, encoder=encoder, alpha=20.0, delta=0.4)
    fitted = GDA(encoder, names, text=texts, alpha=0.1).fit(keys, y)
    zero, voted, gaussian = ((x @ texts.T).argmax(1), adapter.predict(x).labels, fitted.predict(x).labels)
    truth = torch.arange(len(test))
    order = y.argsort(stable=True).tolist()  # the adapter keeps its support sorted by class
    rows = []
    for row, why in enumerate(adapter.explain(x, 2)):
        voters = [support[order[int(r.text.split()[-1])]] for r in why.reasons]
        shown = "".join(
            _figure(data.image(*p, size=64), f"{r.score:.2f}")
            for p, r in zip(voters, why.reasons, strict=True)
        )
        own = _figure(data.image(*test[row], size=64), f"{why.label}", int(voted[row]) == row)
        rows.append(f'<div class="row"><div class="figures">{own}{shown}</div></div>')
    share = [float((a == truth).float().mean()) for a in (zero, voted, gaussian)]
    note = (
        f"Twelve concepts that the model never saw. Right answers: {share[0]:.0%} zero-shot, {share[1]:.0%} with a "
        f"support set of other styles (CapS-Adapter), {share[2]:.0%} with Gaussians on it (GDA). Beside each picture "
        "the support pictures that voted most for its label."
    )
    return _section("Support sets: CapS-Adapter and GDA", note, f'<div class="rows">{"".join(rows)}</div>')


def _marks(encoder: Encoder) -> str:
    """FGVP: a scene of three emoji, a sentence, and the marked copies that were compared."""
    data = emoji.load()
    index = {e.name: e.index for e in data.emojis}
    scene, names = torch.full((3, 128, 128), 225, dtype=torch.uint8), ("hot beverage", "tangerine", "bicycle")
    masks = torch.zeros(3, 128, 128, dtype=torch.bool)
    for i, (name, (top, left)) in enumerate(zip(names, ((0, 0), (64, 30), (0, 64)), strict=True)):
        rgba = data.rgba([(index[name], emoji.HELD_OUT_STYLE)])[0]
        there = rgba[3] > 127
        part = scene[:, top : top + 64, left : left + 64]
        part.copy_(torch.where(there, rgba[:3], part))
        masks[:, top : top + 64, left : left + 64] &= ~there
        masks[i, top : top + 64, left : left + 64] = there
    rows = []
    for kind in ("blur_reverse_mask", "blur_reverse_box", "grey_reverse_mask", "contour", "box_line", "crop"):
        system = FGVP(encoder, kinds=[kind], size=96, blur_radius=25, prefix="an emoji of ")
        found = system.refer(scene, "tangerine", mask_boxes(masks), masks)
        copies = "".join(
            _figure(_square(p), f"{q:.0%}", i == found.index)
            for i, (p, q) in enumerate(zip(found.pictures, found.probabilities.tolist(), strict=True))
        )
        rows.append(
            f'<div class="row"><p>{MARKS[kind]}: {kind.replace("_", " ")}</p><div class="figures">{copies}</div></div>'
        )
    return _section(
        "FGVP: which one is the tangerine?",
        "One marked copy per candidate; the model's choice is framed, with the probability of each.",
        f'<div class="rows">{_figure(scene, "the picture")}{"".join(rows)}</div>',
    )


def _square(picture: Tensor, side: int = 96) -> Tensor:
    small = F.interpolate(picture[None].float(), (side, side), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)[0]


def _odd_ones(encoder: Encoder) -> str:
    """MuSc: jittered copies of one drawing, two of them with a blotch."""
    data, generator = emoji.load(), torch.Generator().manual_seed(0)
    index = {e.name: e.index for e in data.emojis}
    base = data.image(index["red apple"], emoji.HELD_OUT_STYLE).float()
    copies = torch.stack(
        [
            base.roll((i % 3 - 1, i % 2), (1, 2)) + 4 * torch.randn(base.shape, generator=generator)
            for i in range(8)
        ]
    ).clamp(0, 255)
    copies[3, :, 30:38, 36:44] = torch.tensor([60.0, 30.0, 90.0])[:, None, None]
    copies[6, :, 40:46, 20:30] = torch.tensor([240.0, 240.0, 200.0])[:, None, None]
    pictures = copies.round().to(torch.uint8)
    found = MuSc(encoder, size=_MUSC_SIZE, rs=(1, 3), ks=(1,)).predict(pictures)
    low, high = float(found.maps.min()), float(found.maps.max())
    shown = []
    for picture, value, score in zip(pictures, found.maps, found.scores.tolist(), strict=True):
        warm = heat(_square(picture, _MUSC_SIZE), (value - low) / (high - low))
        shown.append(_figure(torch.cat([_square(picture, _MUSC_SIZE), warm], 1), f"{score:.2f}", score > 0.5))
    body = "".join(shown).replace("<img ", '<img style="height:256px" ')
    return _section(
        "MuSc: which ones are odd, and where?",
        "Eight jittered copies of one drawing, two of them damaged; no example of damage was given. The map shows how "
        "badly the other pictures match each patch; scores run from 0 to 1.",
        f'<div class="figures">{body}</div>',
    )


def _clusters(encoder: Encoder) -> str:
    """S3A: unlabelled drawings, clustered and named from all names by vote."""
    data = emoji.load()
    index = {e.name: e.index for e in data.emojis}
    pairs = [(index[n], s) for n in ("hot beverage", "strawberry", "bicycle", "castle") for s in emoji.STYLES]
    bases = [e for e in data.emojis if e.base == e.index]
    words = encoder.texts([emoji.spoken_name(e) for e in bases])
    structure = cluster_vote(
        encoder.images(data.images(pairs)), words, 4, starts=5, generator=torch.Generator().manual_seed(0)
    )
    rows = []
    for cluster, word in enumerate(structure.words.tolist()):
        members = (structure.clusters == cluster).nonzero()[:, 0].tolist()
        shown = "".join(_figure(data.image(*pairs[i], size=64), pairs[i][1]) for i in members)
        share = float(structure.votes[cluster, word])
        title = f"{emoji.spoken_name(bases[word])} ({share:.0%} of the votes)"
        rows.append(f'<div class="row"><p>{escape(title)}</p><div class="figures">{shown}</div></div>')
    return _section(
        "S3A: names for unlabelled pictures",
        f"Twelve pictures without labels, four clusters, {len(bases):,} names: each cluster's pictures vote, and every "
        "cluster gets a name of its own.",
        f'<div class="rows">{"".join(rows)}</div>',
    )


def _association(encoder: Encoder) -> str:
    """CAB: fruit beside fruit."""
    data = emoji.load()
    index = {e.name: e.index for e in data.emojis}
    produce = {
        "lemon": "yellow",
        "eggplant": "purple",
        "carrot": "orange",
        "broccoli": "green",
        "tomato": "red",
    }

    def thing(name: str, colour: str) -> Thing:
        i = index[name]
        mask = data.alpha(i, emoji.HELD_OUT_STYLE)[0] > 127
        return Thing(name.split()[-1], colour, data.image(i, emoji.HELD_OUT_STYLE), mask)

    rows, shown = [], ""
    for title, names in (
        ("fruit and vegetables", produce),
        ("shapes of any colour", {f"{c} {s}": c for s in ("circle", "heart") for c in COLOURS}),
    ):
        things = [thing(n, c) for n, c in names.items()]
        trials = make_pairs(things, torch.Generator().manual_seed(0))
        r = cab_probe(encoder_scores(encoder), trials, list(COLOURS), singles=make_singles(things))
        rows.append(
            f"<tr><th>{title}</th><td>{r.acc_single:.0%}</td><td>{r.acc_true:.0%}</td><td>{r.acc_swap:.0%}</td>"
            f"<td>{r.gap:+.2f}</td></tr>"
        )
        for i in (0, 5):
            t = trials[i]
            shown += _figure(t.picture, f"color of the {t.asked}? said {r.answers[i]}, is {t.true}")
    return _section(
        "CAB: the colour of which one?",
        "Two things in a picture, and the question for the colour of one. A positive gap means that the other one's "
        "colour is named more often than its own.",
        '<div class="scroll"><table><thead><tr><th></th><th>alone</th><th>of two: right</th>'
        f"<th>of two: the other's</th><th>gap</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f'<div class="figures">{shown}</div>',
    )


def _bounds(encoder: Encoder) -> str:
    """PAC-Bayes: how far prompts can be wrong on new pictures."""
    data = emoji.load()
    subgroups = ("face-smiling", "animal-mammal", "food-fruit", "transport-ground", "plant-flower", "heart")
    own = [data.select(split="train", subgroup=s, base_only=True) for s in subgroups]
    labels = torch.arange(len(subgroups)).repeat_interleave(torch.tensor([len(p) for p in own]))
    x = encoder.images(data.images([p for pairs in own for p in pairs]))
    names = [emoji.spoken_name(e) for e in data.emojis if e.base == e.index]
    prior = BigramModel(t.format(n) for n in names for t in emoji.NAME_TEMPLATES)
    rows = []
    for template in ("{}", "an emoji of {}", "a picture of {}"):
        prompts = [template.format(emoji.spoken_group(s)) for s in subgroups]
        error = float(((x @ encoder.texts(prompts).T).argmax(1) != labels).float().mean())
        kls = prompt_kl(prompts, prior), uniform_kl(len(prompts), max(len(p.split()) for p in prompts))
        bounds = [pac_bayes_bound(error, kl, len(x), kind="kl_inverse", hypotheses=3) for kl in kls]
        rows.append(
            f"<tr><th>{escape(template)}</th><td>{error:.1%}</td><td>{kls[0]:.0f}</td><td>{bounds[0]:.1%}</td>"
            f"<td>{bounds[1]:.1%}</td></tr>"
        )
    return _section(
        "PAC-Bayes: what training error promises",
        f"Six subgroups, {len(x):,} pictures. With probability 99% the error on new pictures stays below the bound; "
        "the prior is a bigram model of names, or uniform over words.",
        '<div class="scroll"><table><thead><tr><th>prompt</th><th>training error</th><th>KL in nats</th>'
        f"<th>bound</th><th>with a uniform prior</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>",
    )

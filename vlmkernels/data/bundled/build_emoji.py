# SPDX-License-Identifier: Apache-2.0
"""Builds the bundled emoji set: one WebP atlas per drawing style, ``metadata.json`` and the licence texts.

Nothing in the package imports this file; it is run by hand when the set changes::

    pip install fonttools==4.68.0 uharfbuzz==0.57.0 resvg-py==0.5.0 pillow==13.0.0 numpy
    python vlmkernels/data/bundled/build_emoji.py --work-dir /tmp/emoji --out vlmkernels/data/bundled/emoji

It needs ``npm``, and ``apt-get`` with ``dpkg-deb`` on a Debian 12 machine. Every source is a published
package, pinned by version and by SHA-256. With the tools above two runs write identical bytes: no random
state, no dates, no dependence on file order. ``--limit 40`` builds a small set for trying changes out.

How a picture gets into its cell: draw it large, cut it to its visible box, shrink it once (Lanczos) by a
factor that is the same for the whole style, and centre it. The factors make the grinning face equally wide in
every style, so that relative sizes within a style survive and styles differ in drawing, not in zoom. Pictures
that would be larger than ``MAX_SIDE`` (OpenMoji fills its canvas unevenly) are shrunk to fit.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

CELL = 64
MAX_SIDE = 60
COLUMNS = 64  # 64 x 64 px = 4096 px wide; WebP allows 16383 px on a side
FACE_WIDTH = 56  # of the grinning face, in every style
RENDER = 288  # pixels an SVG canvas is drawn at: 8 x Twemoji's 36 units, 4 x OpenMoji's 72
QUALITY = 86
ALPHA_STEPS = 32  # of opacity; a mask does not need more, and all 256 would cost 3.7 MB
HELD_OUT_ONE_IN = 10

VS16, ZWJ = 0xFE0F, 0x200D
FEMALE, MALE = 0x2640, 0x2642
WOMAN, MAN, PERSON = 0x1F469, 0x1F468, 0x1F9D1
RIGHTWARDS = 0x27A1
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
TONE_CODES = range(0x1F3FB, 0x1F400)

GROUPS = {
    "smileys-emotion": "Smileys & Emotion",
    "people-body": "People & Body",
    "animals-nature": "Animals & Nature",
    "food-drink": "Food & Drink",
    "travel-places": "Travel & Places",
    "activities": "Activities",
    "objects": "Objects",
    "symbols": "Symbols",
    "flags": "Flags",
}  # "component" (skin-tone and hair swatches) is left out: those are parts of emoji

# One concept drawn with different genders, under code points that share nothing. The first names the family.
GENDERED = (
    ({"person": 0x1F9D1, "man": 0x1F468, "woman": 0x1F469}, None),
    ({"child": 0x1F9D2, "boy": 0x1F466, "girl": 0x1F467}, None),
    ({"person": 0x1F9D3, "man": 0x1F474, "woman": 0x1F475}, None),
    ({"person": 0x1FAC5, "man": 0x1F934, "woman": 0x1F478}, None),
    ({"person": 0x1FAC4, "man": 0x1FAC3, "woman": 0x1F930}, None),
    ({"man": 0x1F57A, "woman": 0x1F483}, None),
    ({"man": 0x1F385, "woman": 0x1F936}, "1F385"),
)
SANTA_LIKE = {
    "1F9D1-1F384": "1F385",
    "1F931": "1F9D1-1F37C",
}  # Mx Claus; breast-feeding beside the feeding persons
COUPLES = {"1F46B": ["man", "woman"], "1F46C": ["man"], "1F46D": ["woman"]}  # holding hands


@dataclass(frozen=True)
class Package:
    """A published package, pinned."""

    client: str  # "npm" or "apt"
    name: str
    version: str
    file: str
    sha256: str


PACKAGES = {
    "noto": Package(
        "apt",
        "fonts-noto-color-emoji",
        "2.042-0+deb12u1",
        "fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
        "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
    ),
    "openmoji": Package(
        "npm",
        "openmoji",
        "17.0.0",
        "openmoji-17.0.0.tgz",
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    ),
    "twemoji": Package(
        "npm",
        "@discordapp/twemoji",
        "16.0.1",
        "discordapp-twemoji-16.0.1.tgz",
        "2278fd609501e20dc646a546c1d7bbcab86a4c38010ded12b45e61f9687b9d0a",
    ),
    "names": Package(
        "npm",
        "emojibase-data",
        "17.0.0",
        "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    "licences": Package(
        "npm",
        "spdx-license-list",
        "6.12.0",
        "spdx-license-list-6.12.0.tgz",
        "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef",
    ),
}
STYLES = ("noto", "openmoji", "twemoji")


@dataclass
class Entry:
    """One emoji on its way into the metadata."""

    char: str
    name: str
    keywords: list[str]
    group: str
    subgroup: str
    skin_tone: str | None
    version: float
    base: int
    gender: str | None = None
    family: int = -1
    held_out: bool = False
    cells: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Code points without the emoji presentation selector, which the sources use inconsistently."""
        return code_key(ord(c) for c in self.char)


def code_key(codes: Iterable[int]) -> str:
    """Joins code points as upper-case hex, dropping U+FE0F."""
    return "-".join(f"{c:X}" for c in codes if c != VS16)


def fetch(package: Package, work: Path) -> Path:
    """Returns the package's archive, downloaded with the ordinary client unless it is there, and checked."""
    path = work / package.file
    if not path.exists():
        if package.client == "npm":
            command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        else:
            command = ["apt-get", "download", f"{package.name}={package.version}"]
        subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise SystemExit(f"{package.file}: SHA-256 is {found}, expected {package.sha256}")
    return path


def read_tar(path: Path, prefix: str) -> dict[str, bytes]:
    """Returns the files of an npm archive whose path inside the package starts with ``prefix``."""
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            content = archive.extractfile(member)  # None for what is no file
            if content is not None and name.startswith(prefix):
                files[name] = content.read()
    return files


# Names, groups, tones, genders, concept families


def tone_name(tone: int | list[int] | None) -> str | None:
    """Turns emojibase's tone numbers into "light" or, for two people of different tones, "light+dark"."""
    if tone is None:
        return None
    return "+".join(TONES[t - 1] for t in ([tone] if isinstance(tone, int) else tone))


def read_entries(archive: Path) -> list[Entry]:
    """Reads all fully-qualified emoji but components, in Unicode order, each base before its tones."""
    data = json.loads(read_tar(archive, "en/data.json")["en/data.json"])
    meta = json.loads(read_tar(archive, "meta/groups.json")["meta/groups.json"])
    entries: list[Entry] = []
    for item in sorted((d for d in data if "group" in d), key=lambda d: d["order"]):
        group = meta["groups"][str(item["group"])]
        if group not in GROUPS:
            continue
        base = len(entries)
        for form in [item, *sorted(item.get("skins", ()), key=lambda d: d["order"])]:
            entries.append(
                Entry(
                    char=form["emoji"],
                    name=form["label"],
                    keywords=[k for k in item.get("tags", ()) if k != item["label"]],
                    group=GROUPS[group],
                    subgroup=meta["subgroups"][str(item["subgroup"])],
                    skin_tone=tone_name(form.get("tone")),
                    version=form["version"],
                    base=base,
                )
            )
    return entries


def drawn_genders(codes: list[int]) -> list[str]:
    """Lists the genders that the code points themselves state, adults only, in order of appearance."""
    couple = COUPLES.get(code_key(codes))
    if couple:
        return couple
    table = {code: gender for forms, _ in GENDERED for gender, code in forms.items()}
    signs = {MALE: "man", FEMALE: "woman"}
    if ZWJ in codes[1:] and len(codes) > 1:
        named = [signs[c] for c in codes[1:] if c in signs]
        if named:
            return named[:1]
        found = [table[c] for c in codes if c in table]
        adults = [g for g in found if g in ("man", "woman", "person")]
        return adults or found
    return [table[c] for c in codes[:1] if c in table]


def family_key(codes: list[int], subgroup: str) -> str:
    """Names the concept that an emoji is a gender, direction or cast variant of; variants share the key."""
    codes = [c for c in codes if c not in TONE_CODES and c not in (VS16, ZWJ)]
    if subgroup == "family" and (
        code_key(codes) == "1F46A" or 0x1F9D2 in codes or {0x1F466, 0x1F467} & set(codes)
    ):
        return "1F46A"
    if code_key(codes) in COUPLES or (subgroup == "family" and 0x1F91D in codes):
        return "1F9D1-1F91D-1F9D1"
    if (subgroup == "family" and 0x1F48B in codes) or codes == [0x1F48F]:
        return "1F48F"
    if (subgroup == "family" and 0x2764 in codes) or codes == [0x1F491]:
        return "1F491"
    first = {
        code: family or code_key(list(forms.values())[:1])
        for forms, family in GENDERED
        for code in forms.values()
    }
    kept = [c for i, c in enumerate(codes) if i == 0 or c not in (MALE, FEMALE, RIGHTWARDS)]
    key = "-".join([first.get(kept[0], f"{kept[0]:X}"), *(f"{c:X}" for c in kept[1:])])
    return SANTA_LIKE.get(key, key)


def describe_people(entries: list[Entry]) -> None:
    """Fills in gender and family. An ungendered member of a family that has gendered ones is a "person"."""
    families: dict[str, list[int]] = defaultdict(list)
    for index, entry in enumerate(entries):
        codes = [ord(c) for c in entries[entry.base].char]
        families[family_key(codes, entry.subgroup)].append(index)
        found = drawn_genders([c for c in codes if c not in TONE_CODES])
        if entry.group == "People & Body" and found:
            entry.gender = "+".join(sorted(set(found)))
    for members in families.values():
        gendered = any(entries[i].gender for i in members)
        for i in members:
            entries[i].family = members[0]
            if gendered and entries[i].gender is None:
                entries[i].gender = "person"


def hold_out(entries: list[Entry]) -> None:
    """Marks about one concept family in ten of every subgroup, by a hash of the code points."""
    by_subgroup: dict[str, list[int]] = defaultdict(list)
    for family in sorted({e.family for e in entries}):
        by_subgroup[entries[family].subgroup].append(family)
    chosen: set[int] = set()
    for families in by_subgroup.values():
        count = (len(families) + HELD_OUT_ONE_IN // 2) // HELD_OUT_ONE_IN
        ranked = sorted(families, key=lambda i: hashlib.sha256(entries[i].key.encode()).hexdigest())
        chosen.update(ranked[:count])
    for entry in entries:
        entry.held_out = entry.family in chosen


# Pictures


class SvgStyle:
    """A style published as one SVG per emoji."""

    def __init__(self, files: dict[str, bytes], face_units: float, canvas_units: float) -> None:
        self.files = {}
        for name in sorted(files):
            if name.endswith(".svg"):
                codes = Path(name).stem.split("-")
                if all(all(ch in "0123456789abcdefABCDEF" for ch in c) for c in codes):
                    self.files[code_key(int(c, 16) for c in codes)] = files[name].decode()
        self.scale = FACE_WIDTH / (face_units * RENDER / canvas_units)

    def draw(self, entry: Entry) -> Picture | None:
        """Returns the emoji as a large RGBA picture, or None where the style lacks it."""
        import resvg_py
        from PIL import Image

        svg = self.files.get(entry.key)
        if svg is None:
            return None
        png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER, height=RENDER)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


class BitmapFontStyle:
    """A style published as a font with embedded 136 x 128 px bitmaps (CBDT), sequences as ligatures."""

    def __init__(self, font: bytes, face_pixels: float) -> None:
        import uharfbuzz
        from fontTools.ttLib import TTFont

        tables = TTFont(io.BytesIO(font))
        self.bitmaps = tables["CBDT"].strikeData[0]
        self.names = tables.getGlyphOrder()
        self.shaper = uharfbuzz.Font(uharfbuzz.Face(font))
        self.scale = FACE_WIDTH / face_pixels

    def draw(self, entry: Entry) -> Picture | None:
        """Returns the emoji's bitmap as RGBA, or None where the font has no single glyph for the sequence."""
        import uharfbuzz
        from PIL import Image

        buffer = uharfbuzz.Buffer()
        buffer.add_str(entry.char)
        buffer.guess_segment_properties()
        uharfbuzz.shape(self.shaper, buffer)
        glyphs = [self.names[info.codepoint] for info in buffer.glyph_infos]
        shown = [g for g in glyphs if g in self.bitmaps]
        if len(shown) != 1 or ".notdef" in glyphs or ("-" in entry.key and len(glyphs) != 1):
            return None
        return Image.open(io.BytesIO(self.bitmaps[shown[0]].imageData)).convert("RGBA")


def fit(picture: Picture, scale: float) -> Picture | None:
    """Cuts a picture to its visible box, scales it and centres it in a cell; None if nothing is visible."""
    from PIL import Image

    box = picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    last = ALPHA_STEPS - 1
    factor = min(scale, MAX_SIDE / max(picture.size))
    width, height = picture.size
    size = max(1, round(width * factor)), max(1, round(height * factor))
    small = picture.resize(size, Image.Resampling.LANCZOS)  # Pillow premultiplies RGBA here
    small.putalpha(small.getchannel("A").point(lambda a: round(round(a * last / 255) * 255 / last)))
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(small, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def bleed(cell: Picture) -> Picture:
    """Continues the picture's colours under its transparent pixels: each takes the mean of the nearest block.

    WebP stores colour at half resolution: otherwise what lies under the transparent pixels tints the edge.
    """
    import numpy as np
    from PIL import Image

    rgba = np.asarray(cell, dtype=np.float32)
    weight = rgba[..., 3:] / 255
    levels: list[Any] = [(rgba[..., :3] * weight, weight)]
    while len(levels[-1][1]) > 1:
        levels.append(tuple(x.reshape(len(x) // 2, 2, len(x) // 2, 2, -1).sum((1, 3)) for x in levels[-1]))
    colour = levels[-1][0] / levels[-1][1]
    for total, weight in reversed(levels[:-1]):
        colour = colour.repeat(2, 0).repeat(2, 1)
        colour = np.where(weight > 0, total / np.maximum(weight, 1e-6), colour)
    rgba = np.concatenate([colour.clip(0, 255).round(), rgba[..., 3:]], axis=-1)
    return Image.fromarray(rgba.astype(np.uint8), "RGBA")


def build_atlas(style: str, source: SvgStyle | BitmapFontStyle, entries: list[Entry], out: Path) -> None:
    """Draws every emoji that the style has, gives each a cell, and writes the atlas."""
    from PIL import Image

    cells: list[Picture] = []
    for entry in entries:
        picture = source.draw(entry)
        cell = fit(picture, source.scale) if picture is not None else None
        entry.cells[style] = -1 if cell is None else len(cells)
        if cell is not None:
            cells.append(bleed(cell))
    rows = -(-len(cells) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), (255, 255, 255, 0))
    for number, cell in enumerate(cells):
        atlas.paste(cell, (number % COLUMNS * CELL, number // COLUMNS * CELL))
    atlas.save(
        out / f"{style}.webp", quality=QUALITY, alpha_quality=100, method=6, exact=True, use_sharp_yuv=True
    )


# Files


def write_metadata(entries: list[Entry], out: Path) -> None:
    """Writes metadata.json: a header and one line per emoji, as an array in the order of ``columns``."""
    columns = ["char", "name", "keywords", "group", "subgroup", "skin_tone", "gender"]
    columns += ["base", "family", "held_out", "version", "cells"]
    header = {
        "cell": CELL,
        "columns_per_row": COLUMNS,
        "styles": list(STYLES),
        "sources": {role: f"{p.name} {p.version}" for role, p in PACKAGES.items()},
        "columns": columns,
    }
    lines = []
    for index, e in enumerate(entries):
        keywords = e.keywords if e.base == index else None  # a tone has its base's keywords
        row: list[Any] = [
            e.char,
            e.name,
            keywords,
            e.group,
            e.subgroup,
            e.skin_tone,
            e.gender,
            e.base,
            e.family,
        ]
        row += [int(e.held_out), e.version, [e.cells[s] for s in STYLES]]
        lines.append(json.dumps(row, ensure_ascii=True, separators=(",", ":")))
    text = json.dumps(header, indent=1)[:-2] + ',\n "emojis": [\n' + ",\n".join(lines) + "\n]}\n"
    (out / "metadata.json").write_text(text, encoding="ascii")


def spdx_text(archive: Path, identifier: str) -> str:
    """Returns a licence's full text from the SPDX list."""
    name = f"licenses/{identifier}.json"
    return json.loads(read_tar(archive, name)[name])["licenseText"].rstrip() + "\n"


def write_licences(archives: dict[str, Path], debian_copyright: str, out: Path) -> None:
    """Writes one licence file per source, and ATTRIBUTION.md: who made what, and what was changed."""
    openmoji = read_tar(archives["openmoji"], "LICENSE.txt")["LICENSE.txt"].decode()
    emojibase = read_tar(archives["names"], "LICENSE")["LICENSE"].decode()
    unicode_notice = spdx_text(archives["licences"], "Unicode-3.0")
    apache = spdx_text(archives["licences"], "Apache-2.0")
    texts = {
        "LICENSE-noto.txt": f"{debian_copyright.rstrip()}\n\n\nApache-2.0, in full:\n\n{apache}",
        "LICENSE-openmoji.txt": openmoji,
        "LICENSE-twemoji.txt": spdx_text(archives["licences"], "CC-BY-4.0"),
        "LICENSE-names.txt": f"emojibase-data:\n\n{emojibase.strip()}\n\n\nUnicode CLDR:\n\n{unicode_notice}",
        "ATTRIBUTION.md": ATTRIBUTION.format(**{role: p.version for role, p in PACKAGES.items()}),
    }
    for name, text in texts.items():
        lines = (line.rstrip() for line in text.replace("\r\n", "\n").strip().split("\n"))
        (out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


ATTRIBUTION = """\
# Whose work this is

The pictures and names in this folder were made by others and keep their own licences. The licence of the
program around them does not apply to them.

* `noto.webp`: Noto Color Emoji by Google and contributors, from Debian's `fonts-noto-color-emoji` {noto}.
  SIL Open Font License 1.1 (the font), Apache License 2.0 (the drawings): `LICENSE-noto.txt`.
* `openmoji.webp`: OpenMoji, the open-source emoji and icon project, <https://openmoji.org>; from npm
  `openmoji` {openmoji}. CC BY-SA 4.0: `LICENSE-openmoji.txt`.
* `twemoji.webp`: Twemoji by Twitter, Jason Sofonia, Justine De Caires and contributors; from npm
  `@discordapp/twemoji` {twemoji}. Graphics under CC BY 4.0: `LICENSE-twemoji.txt`.
* `metadata.json`: names, keywords, groups and order from Unicode CLDR, Unicode, Inc., as packaged by Miles
  Johnson in npm `emojibase-data` {names}. Unicode License v3 and MIT: `LICENSE-names.txt`.

What was changed: every picture was drawn large, cut to its visible box, scaled, centred in a cell of 64 x 64
pixels, and stored in one WebP file per style, with lossy colour and 32 steps of transparency. Skin tone,
gender, concept families and the held-out mark were added to the names. `build_emoji.py`, one folder up, does
all of it.

`openmoji.webp` is an adaptation of OpenMoji and is itself under CC BY-SA 4.0: whoever changes it and passes
it on does so under the same licence. `noto.webp` stays under the licences of its source. Whoever shows these
pictures names their makers, for instance with the list above.
"""


def print_table(entries: list[Entry], out: Path) -> None:
    """Prints what was built."""
    bases = [e for i, e in enumerate(entries) if e.base == i]
    print(f"{'group':20s}{'emoji':>8s}{'base':>8s}" + "".join(f"{s:>10s}" for s in STYLES))
    for group in (*GROUPS.values(), None):
        rows = [e for e in entries if group in (None, e.group)]
        count = sum(1 for e in bases if group in (None, e.group))
        drawn = "".join(f"{sum(e.cells[s] >= 0 for e in rows):10d}" for s in STYLES)
        print(f"{group or 'all':20s}{len(rows):8d}{count:8d}{drawn}")
    families = {e.family: e.held_out for e in entries}
    print(f"\nconcept families {len(families)}, held out {sum(families.values())}")
    print("gender", dict(Counter(e.gender for e in entries)))
    total = 0
    for path in sorted(out.iterdir()):
        total += path.stat().st_size
        print(f"{path.name:24s}{path.stat().st_size:12,d} bytes")
    print(f"{'total':24s}{total:12,d} bytes")


def build(work: Path, out: Path, limit: int | None = None) -> None:
    """Downloads what is missing into ``work`` and writes the data set into ``out``."""
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    archives = {role: fetch(package, work) for role, package in PACKAGES.items()}
    unpacked = work / "noto"
    subprocess.run(["dpkg-deb", "-x", archives["noto"], unpacked], check=True)
    font = (unpacked / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf").read_bytes()
    copyright_text = (unpacked / "usr/share/doc/fonts-noto-color-emoji/copyright").read_text(encoding="utf-8")

    entries = read_entries(archives["names"])
    describe_people(entries)
    sources: dict[str, SvgStyle | BitmapFontStyle] = {
        "noto": BitmapFontStyle(font, face_pixels=117),
        "openmoji": SvgStyle(read_tar(archives["openmoji"], "color/svg/"), face_units=48, canvas_units=72),
        "twemoji": SvgStyle(read_tar(archives["twemoji"], "dist/svg/"), face_units=36, canvas_units=36),
    }
    entries = entries[:limit]
    hold_out(entries)
    for style in STYLES:
        build_atlas(style, sources[style], entries, out)
    write_metadata(entries, out)
    write_licences(archives, copyright_text, out)
    print_table(entries, out)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Build the bundled emoji set from published packages.")
    parser.add_argument("--work-dir", type=Path, required=True, help="downloads are kept here and used again")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "emoji", help="default: %(default)s"
    )
    parser.add_argument("--limit", type=int, default=None, help="only the first LIMIT emoji, for trials")
    arguments = parser.parse_args()
    build(arguments.work_dir, arguments.out, arguments.limit)


if __name__ == "__main__":
    main()

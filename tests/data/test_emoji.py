# SPDX-License-Identifier: Apache-2.0
"""The bundled emoji set: contents, splits, pictures, captions, and its builder where it needs no network."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from vlmkernels.data import emoji

MEGABYTE = 1_000_000
FOLDER = Path(emoji.__file__).parent / "bundled" / "emoji"


@pytest.fixture(scope="module")
def emojis() -> emoji.EmojiSet:
    return emoji.load()


def by_name(emojis: emoji.EmojiSet, name: str) -> emoji.Emoji:
    return next(e for e in emojis.emojis if e.name == name)


# Contents


def test_counts_are_those_of_unicode_17(emojis):
    assert len(emojis) == 3944
    assert sum(e.base == e.index for e in emojis.emojis) == 1914
    assert len(emojis.groups) == 9
    assert "Component" not in emojis.groups


def test_every_style_draws_nearly_everything(emojis):
    drawn = {style: sum(style in e.styles for e in emojis.emojis) for style in emoji.STYLES}
    assert all(count >= 3700 for count in drawn.values()), drawn
    assert all(e.styles for e in emojis.emojis)


def test_names_and_characters_are_unique(emojis):
    assert len({e.name for e in emojis.emojis}) == len(emojis)
    assert len({e.char for e in emojis.emojis}) == len(emojis)


def test_spoken_names_of_bases_are_unique(emojis):
    names = [emoji.spoken_name(e) for e in emojis.emojis if e.base == e.index]
    assert len(set(names)) == len(names)


def test_index_is_position_and_base_has_no_skin_tone(emojis):
    for position, e in enumerate(emojis.emojis):
        base = emojis.emojis[e.base]
        assert e.index == position
        assert base.skin_tone is None
        assert (e.skin_tone is None) == (e.base == e.index)
        assert (e.keywords, e.group, e.subgroup) == (base.keywords, base.group, base.subgroup)


@pytest.mark.parametrize(
    ("name", "skin_tone", "gender"),
    [
        ("grinning face", None, None),
        ("waving hand: medium-dark skin tone", "medium-dark", None),
        ("man artist: light skin tone", "light", "man"),
        ("artist", None, "person"),
        ("woman running", None, "woman"),
        ("person running", None, "person"),
        ("princess", None, "woman"),
        ("handshake: light skin tone, dark skin tone", "light+dark", None),
        ("woman and man holding hands", None, "man+woman"),
        ("family: woman, girl", None, "woman"),
    ],
)
def test_skin_tone_and_gender_are_told_apart(emojis, name, skin_tone, gender):
    e = by_name(emojis, name)
    assert (e.skin_tone, e.gender) == (skin_tone, gender)


def test_tone_changes_only_the_tone_code_points(emojis):
    e = by_name(emojis, "waving hand: dark skin tone")
    assert e.code_points == (*emojis.emojis[e.base].code_points, 0x1F3FF)


# Splits


def test_split_sizes_are_fixed(emojis):
    sizes = {name: len(pairs) for name, pairs in emoji.splits().items()}
    assert sizes == {"train": 7017, "test_style": 3422, "held_out_concepts": 1075}
    assert len(emojis.select(split="test_style", base_only=True)) == 1712


def test_splits_share_no_picture(emojis):
    chosen = [set(emojis.select(split=name)) for name in emoji.SPLITS]
    assert not (chosen[0] & chosen[1] or chosen[0] & chosen[2] or chosen[1] & chosen[2])


def test_style_split_separates_styles_and_shares_concepts(emojis):
    train, test = emojis.select(split="train"), emojis.select(split="test_style")
    assert {style for _, style in train} == set(emoji.TRAIN_STYLES)
    assert {style for _, style in test} == {emoji.HELD_OUT_STYLE}
    assert {index for index, _ in test} <= {index for index, _ in train}


def test_families_are_not_torn_apart(emojis):
    families = defaultdict(set)
    for e in emojis.emojis:
        families[e.family].add(e.held_out)
        assert emojis.emojis[e.base].family == e.family
    assert all(len(marks) == 1 for marks in families.values())
    for names in (
        ("man running", "woman running: dark skin tone"),
        ("prince", "princess"),
        ("kiss", "kiss: man, man"),
    ):
        assert len({by_name(emojis, name).family for name in names}) == 1


def test_about_a_tenth_of_the_concepts_is_held_out_in_every_large_subgroup(emojis):
    families = defaultdict(dict)
    for e in emojis.emojis:
        families[emojis.emojis[e.family].subgroup][e.family] = e.held_out
    marks = [mark for members in families.values() for mark in members.values()]
    assert 0.09 <= sum(marks) / len(marks) <= 0.11
    assert all(sum(members.values()) >= 1 for members in families.values() if len(members) >= 5)


# Selection


def test_select_filters_combine(emojis):
    pairs = emojis.select(group="People & Body", skin_tone="light", gender="woman", styles="noto")
    assert pairs
    for index, style in pairs:
        e = emojis.emojis[index]
        assert (e.group, e.skin_tone, e.gender, style) == ("People & Body", "light", "woman", "noto")


def test_select_none_means_without(emojis):
    assert all(emojis.emojis[i].gender is None for i, _ in emojis.select(gender=None))
    assert emojis.select(skin_tone=None) == emojis.select(base_only=True)


def test_select_is_sorted_and_complete(emojis):
    pairs = emojis.select()
    assert pairs == sorted(pairs)
    assert len(pairs) == sum(len(e.styles) for e in emojis.emojis)


def test_loading_one_style_leaves_the_others_out():
    only = emoji.load("noto")
    assert {style for _, style in only.select()} == {"noto"}
    assert only.select(split="test_style") == []
    with pytest.raises(ValueError, match="'twemoji' is not loaded; loaded are 'noto'"):
        only.select(styles="twemoji")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group": "Animals"}, "unknown group 'Animals'; known are .*'Animals & Nature'"),
        ({"subgroup": "x"}, "unknown subgroup 'x'; known are .*'animal-mammal'"),
        ({"split": "test"}, "unknown split 'test'; known are 'train'"),
        ({"styles": "apple"}, "unknown style 'apple'; known are 'noto'"),
        ({"skin_tone": "pale"}, "unknown skin tone 'pale'; known are .*'light'"),
        ({"gender": "x"}, "unknown gender 'x'; known are .*'woman'"),
    ],
)
def test_select_refuses_unknown_names(emojis, arguments, message):
    with pytest.raises(ValueError, match=message):
        emojis.select(**arguments)


def test_load_refuses_unknown_style():
    with pytest.raises(ValueError, match="unknown style 'apple'"):
        emoji.load(("noto", "apple"))


# Pictures


def test_nothing_is_decoded_before_a_picture_is_asked_for():
    fresh = emoji.load()
    fresh.select(split="train")
    assert fresh._atlases == {}


def test_no_cell_is_empty_and_none_touches_its_border(emojis):
    for style in emoji.STYLES:
        alpha = emojis._atlas(style)[: len(emojis.select(styles=style)), 3]
        visible = (alpha > 127).float().mean(dim=(1, 2))
        assert visible.min() > 0.01
        assert not alpha[:, [0, -1], :].any() and not alpha[:, :, [0, -1]].any()


def test_styles_draw_faces_equally_large_and_centred(emojis):
    face = by_name(emojis, "grinning face")
    for style in emoji.STYLES:
        columns = (emojis.alpha(face.index, style)[0] > 127).any(dim=0).nonzero()
        assert abs(int(columns.max() - columns.min()) + 1 - 56) <= 1
        assert abs(int(columns.max() + columns.min()) - 63) <= 1


def test_image_and_alpha_have_the_stated_shapes(emojis):
    image, alpha = emojis.image(0, "noto"), emojis.alpha(0, "noto")
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
    assert alpha.shape == (1, 64, 64) and alpha.dtype == torch.uint8


def test_transparent_pixels_take_the_background_and_opaque_ones_do_not(emojis):
    index = by_name(emojis, "red apple").index
    alpha = emojis.alpha(index, "noto")[0]
    white, blue = emojis.image(index, "noto"), emojis.image(index, "noto", background=(0, 0, 255))
    assert (white[:, alpha == 0] == 255).all()
    assert (blue[:, alpha == 0] == torch.tensor([[0], [0], [255]], dtype=torch.uint8)).all()
    assert torch.equal(white[:, alpha == 255], blue[:, alpha == 255])


def test_a_red_apple_is_red_and_a_green_one_green(emojis):
    for style in emoji.STYLES:
        for name, strongest in (("red apple", 0), ("green apple", 1)):
            index = by_name(emojis, name).index
            colour = emojis.image(index, style)[:, emojis.alpha(index, style)[0] == 255].float().mean(dim=1)
            assert int(colour.argmax()) == strongest


def test_images_equal_single_images_in_any_order_of_styles(emojis):
    pairs = [(5, "twemoji"), (900, "noto"), (5, "openmoji"), (17, "twemoji")]
    batch = emojis.images(pairs)
    assert batch.shape == (4, 3, 64, 64)
    for picture, pair in zip(batch, pairs, strict=True):
        assert torch.equal(picture, emojis.image(*pair))


def test_images_resample_to_any_size(emojis):
    assert emojis.images([(0, "noto")] * 2, size=32).shape == (2, 3, 32, 32)
    assert emojis.image(0, "noto", size=224).shape == (3, 224, 224)
    assert torch.equal(emojis.image(0, "noto", size=64), emojis.image(0, "noto"))
    small = emojis.image(0, "noto", size=32).float()
    assert (small.mean() - emojis.image(0, "noto").float().mean()).abs() < 1


def test_images_take_one_background_per_picture(emojis):
    pictures = emojis.images([(0, "noto"), (0, "noto")], background=torch.tensor([[255, 0, 0], [0, 0, 0]]))
    assert pictures[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 0]]


def test_images_of_no_pairs_is_empty(emojis):
    assert emojis.images([]).shape == (0, 3, 64, 64)
    assert emojis.images([], size=32).shape == (0, 3, 32, 32)


def test_image_refuses_what_does_not_exist(emojis):
    missing = next(e for e in emojis.emojis if "noto" not in e.styles)
    with pytest.raises(ValueError, match="noto has no picture"):
        emojis.image(missing.index, "noto")
    with pytest.raises(ValueError, match="index -1 is outside 0 to 3943"):
        emojis.image(-1, "noto")
    with pytest.raises(ValueError, match="unknown style 'apple'"):
        emojis.image(0, "apple")
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        emojis.image(0, "noto", size=0)
    with pytest.raises(ValueError, match="background must have shape"):
        emojis.image(0, "noto", background=(1, 2))
    with pytest.raises(ValueError, match="background must lie between 0 and 255"):
        emojis.image(0, "noto", background=(0, 0, 256))


def test_pickle_carries_no_pictures(emojis):
    emojis.image(0, "noto")
    copy = pickle.loads(pickle.dumps(emojis))
    assert copy._atlases == {}
    assert copy.emojis == emojis.emojis


# Captions


@pytest.mark.parametrize(
    ("name", "spoken"),
    [
        ("red apple", "red apple"),
        ("flag: Japan", "flag of Japan"),
        ("keycap: 1", "keycap 1"),
        ("waving hand: light skin tone", "waving hand with light skin tone"),
        ("man: red hair", "man with red hair"),
        ("family: man, woman, boy", "family of a man, a woman and a boy"),
        ("person walking: facing right", "person walking facing right"),
    ],
)
def test_spoken_names_fit_into_sentences(emojis, name, spoken):
    assert emoji.spoken_name(by_name(emojis, name)) == spoken


def test_captions_hold_every_name_template_and_keyword(emojis):
    apple = by_name(emojis, "red apple")
    found = emoji.captions(apple)
    assert found == emoji.captions(apple)
    assert len(set(found)) == len(found)
    assert {t.format("red apple") for t in emoji.NAME_TEMPLATES} <= set(found)
    assert all(any(keyword in caption for caption in found) for keyword in apple.keywords)
    assert any("food fruit" in caption for caption in found)


def test_every_caption_is_plain_text(emojis):
    for e in emojis.emojis:
        for caption in emoji.captions(e):
            assert caption == caption.strip() and caption and "{" not in caption


def test_random_caption_follows_its_generator(emojis):
    apple = by_name(emojis, "red apple")
    first, second = (
        [emoji.random_caption(apple, generator) for _ in range(50)]
        for generator in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))
    )
    assert first == second
    assert len(set(first)) > 20


@pytest.mark.parametrize("template", emoji.NAME_TEMPLATES + emoji.GROUP_TEMPLATES)
def test_templates_have_one_place(template):
    assert template.count("{}") == 1


# Files


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("LICENSE-noto.txt", "SIL OPEN FONT LICENSE"),
        ("LICENSE-openmoji.txt", "Attribution-ShareAlike 4.0 International"),
        ("LICENSE-twemoji.txt", "Creative Commons Attribution 4.0 International"),
        ("LICENSE-names.txt", "UNICODE LICENSE V3"),
        ("ATTRIBUTION.md", "CC BY-SA 4.0"),
    ],
)
def test_licences_are_shipped(file, words):
    assert words in (FOLDER / file).read_text(encoding="utf-8")


def test_the_set_fits_in_a_wheel():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 15 * MEGABYTE


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build_emoji", FOLDER.parent / "build_emoji.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def as_entries(builder, emojis: emoji.EmojiSet) -> list:
    return [
        builder.Entry(e.char, e.name, list(e.keywords), e.group, e.subgroup, e.skin_tone, e.version, e.base)
        for e in emojis.emojis
    ]


def test_builder_derives_the_committed_people_and_split(builder, emojis):
    entries = as_entries(builder, emojis)
    builder.describe_people(entries)
    builder.hold_out(entries)
    assert [(e.gender, e.family, e.held_out) for e in entries] == [
        (e.gender, e.family, e.held_out) for e in emojis.emojis
    ]


def test_builder_writes_the_same_atlas_twice(builder, emojis, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")

    monkeypatch.setattr(builder, "COLUMNS", 8)

    class Rectangles:
        scale = 0.2

        def draw(self, entry):
            picture = image.new("RGBA", (300, 300))
            picture.paste((200, len(entry.char) * 40, 10, 255), (10, 60, 290, 240))
            return picture

    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        builder.build_atlas("noto", Rectangles(), as_entries(builder, emojis)[:20], tmp_path / name)
        written.append((tmp_path / name / "noto.webp").read_bytes())
    assert written[0] == written[1]


def test_builder_centres_and_caps_pictures(builder):
    image = pytest.importorskip("PIL.Image")
    picture = image.new("RGBA", (400, 400))
    picture.paste((255, 0, 0, 255), (0, 0, 400, 100))
    assert builder.fit(picture, scale=1.0).getchannel("A").getbbox() == (2, 24, 62, 39)
    assert builder.fit(image.new("RGBA", (400, 400)), scale=1.0) is None

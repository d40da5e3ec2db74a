"""Names, held-out compositions and drawing of dalle_fast.data.emoji."""

import itertools
import json
import sys
from collections import Counter

import numpy as np
import pytest
from helpers import FONT_PATH
from PIL import Image, ImageFont, features

from dalle_fast.data import emoji
from dalle_fast.data.emoji import Composition, choose_heldout, file_stems, split_name, write_emoji

needs_raqm = pytest.mark.skipif(not features.check("raqm"), reason="Pillow has no raqm here")
needs_font = pytest.mark.skipif(FONT_PATH is None, reason="Noto Color Emoji is not installed here")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("woman_firefighter_medium_skin_tone", ("firefighter", "woman", "medium")),
        ("man_in_lotus_position_medium-dark_skin_tone", ("in lotus position", "man", "medium-dark")),
        ("person_light_skin_tone_beard", ("beard", "person", "light")),
        ("deaf_man_dark_skin_tone", ("deaf", "man", "dark")),
        ("woman_firefighter", None),  # no tone
        ("firefighter_medium_skin_tone", None),  # no gender
        ("woman_dark_skin_tone", None),  # no role
        ("thumbs_up_light_skin_tone", None),
        ("kiss_woman_man_dark_skin_tone_light_skin_tone", None),  # two people
        ("woman_and_man_holding_hands_dark_skin_tone", None),
        ("snowman", None),
    ],
)
def test_names_split_into_role_gender_and_tone(name, expected):
    assert split_name(name) == (None if expected is None else Composition(*expected))


def test_captions_are_plain_words():
    assert emoji.caption_of(":man_artist_medium-light_skin_tone:") == "man artist medium-light skin tone"


def pairs(composition):
    return {(composition.role, composition.gender), (composition.role, composition.tone)} | {
        (composition.gender, composition.tone)
    }


def all_compositions(roles):
    return [Composition(*parts) for parts in itertools.product(roles, emoji.GENDERS, emoji.TONES)]


@pytest.mark.parametrize("seed", range(5))
def test_heldout_compositions_are_new_but_every_pair_of_parts_is_known(seed):
    compositions = all_compositions([f"role {i}" for i in range(40)])
    heldout = choose_heldout(compositions, seed)
    assert len(heldout) == round(emoji.HELDOUT_SHARE * len(compositions)) == 30
    training = set(compositions) - heldout
    known = set().union(*map(pairs, training))
    assert all(pairs(composition) <= known for composition in heldout)


def test_heldout_choice_depends_on_the_seed_and_not_on_the_order():
    compositions = all_compositions([f"role {i}" for i in range(40)])
    assert choose_heldout(compositions, 1) == choose_heldout(reversed(compositions), 1)
    assert choose_heldout(compositions, 1) != choose_heldout(compositions, 2)


def test_a_composition_whose_parts_occur_nowhere_else_is_never_held_out():
    lone = [Composition(f"role {i}", "woman", tone) for i in range(40) for tone in emoji.TONES]
    assert choose_heldout(lone, 0) == set()  # each (role, tone) pair occurs once


def test_file_stems_are_plain_and_distinct():
    stems = file_stems({"#": "keycap_#", "*": "keycap_*", "A": "Côte_d’Ivoire", "B": "ON!_arrow", "\u1234": "!"})
    assert list(stems.values()) == ["keycap-23", "keycap-2a", "cote-divoire", "on-arrow", "1234"]


def test_every_name_of_the_package_gets_its_own_stem():
    names = emoji.emoji_names()
    stems = file_stems(names)
    assert len(set(stems.values())) == len(names) > 3000
    compositions = Counter(filter(None, map(split_name, names.values())))
    assert len(compositions) > 900
    assert max(compositions.values()) == 1
    assert {composition.gender for composition in compositions} == set(emoji.GENDERS)
    assert {composition.tone for composition in compositions} == set(emoji.TONES)


NAMES = {
    "\U0001f600": "grinning_face",
    "\u2764\ufe0f": "red_heart",
    "\U0001f468\U0001f469": "two_glyphs_side_by_side",
    "\U0010fffd": "unassigned",
    **{
        f"{person}{tone}\u200d{tool}": f"{gender}_{role}_{name}_skin_tone"
        for person, gender in zip("\U0001f469\U0001f468\U0001f9d1", emoji.GENDERS, strict=True)
        for tone, name in zip("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff", emoji.TONES, strict=True)
        for tool, role in (("\U0001f692", "firefighter"), ("\U0001f3a8", "artist"))
    },
}


@needs_font
@needs_raqm
def test_write_emoji(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "emoji_names", lambda: NAMES)
    summary = write_emoji(tmp_path / "a", FONT_PATH, size=32, seed=1)
    assert (summary.train, summary.heldout, summary.left_out) == (30, 2, 2)
    for folder, count in (("train", 30), ("heldout", 2)):
        images = sorted((tmp_path / "a" / folder).glob("*.png"))
        assert len(images) == count
        for path in images:
            pixels = np.asarray(Image.open(path))
            assert pixels.shape == (32, 32, 3)
            # a corner of plain background and something in colour in the middle
            assert pixels[0, 0].tolist() == [255, 255, 255]
            assert np.ptp(pixels.astype(int), axis=2).max() > 30
            assert path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    listing = json.loads((tmp_path / "a" / "heldout.json").read_text(encoding="utf-8"))
    assert listing["seed"] == 1
    for entry in listing["heldout"]:
        caption = (tmp_path / "a" / "heldout" / f"{entry['key']}.txt").read_text(encoding="utf-8").strip()
        assert caption == entry["caption"]
        assert caption == f"{entry['gender']} {entry['role']} {entry['tone']} skin tone"
        assert not (tmp_path / "a" / "train" / f"{entry['key']}.png").exists()
    assert (tmp_path / "a" / "train" / "red-heart.txt").read_text(encoding="utf-8") == "red heart\n"


@needs_font
@needs_raqm
def test_write_emoji_repeats_itself_and_takes_a_background(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "emoji_names", lambda: NAMES)
    for name in ("a", "b"):
        write_emoji(tmp_path / name, FONT_PATH, size=16, background="#c0ffee")
    files = [sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")) for name in ("a", "b")]
    assert files[0] == files[1]
    for path in files[0]:
        if path.suffix:
            assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    assert Image.open(tmp_path / "a" / "train" / "red-heart.png").getpixel((0, 0)) == (0xC0, 0xFF, 0xEE)


def test_a_missing_font_names_the_package_to_install(tmp_path):
    with pytest.raises(ValueError, match=r"font must exist, got .*none.ttf \(on Debian: .* fonts-noto-color-emoji\)"):
        write_emoji(tmp_path / "out", tmp_path / "none.ttf")


@needs_raqm
def test_a_file_that_is_no_font_is_refused(tmp_path):
    path = tmp_path / "font.ttf"
    path.write_bytes(b"not a font")
    with pytest.raises(ValueError, match=r"font must be a font file usable at 109 pixels, got .*font.ttf"):
        write_emoji(tmp_path / "out", path)


@needs_raqm
def test_a_font_without_colour_is_refused(tmp_path):
    path = tmp_path / "plain.ttf"
    path.write_bytes(ImageFont.load_default(20).path.getvalue())
    with pytest.raises(ValueError, match=r"font must be a colour emoji font, got .*plain.ttf, which has no coloured"):
        write_emoji(tmp_path / "out", path)


def test_a_pillow_without_raqm_names_the_package_to_install(tmp_path, monkeypatch):
    path = tmp_path / "font.ttf"
    path.write_bytes(b"never opened")
    monkeypatch.setattr(features, "check", lambda feature: False)
    with pytest.raises(RuntimeError, match=r"Pillow must lay out text with raqm .*: apt install libfribidi0"):
        write_emoji(tmp_path / "out", path)


def test_a_missing_emoji_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(RuntimeError, match="the emoji package must be installed: pip install emoji"):
        write_emoji(tmp_path / "out", tmp_path / "font.ttf")


def test_other_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="size must be >= 8, got 4"):
        write_emoji(tmp_path / "out", "font.ttf", size=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"out must be a new or empty folder, got .*full"):
        write_emoji(tmp_path / "full", "font.ttf")

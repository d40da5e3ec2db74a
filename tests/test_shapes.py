"""The shapes data set: read back from pixels, compositions held out, captions that tell all, seeds, messages."""

import inspect
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dalle_fast.data import shapes
from dalle_fast.data.shapes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    FORMS,
    POSITIONS,
    RADII,
    Drawing,
    Shape,
    draw,
    held_out_compositions,
    random_drawing,
    read_drawing,
    score,
    write_shapes,
)
from dalle_fast.data.sources import open_source

NOTHING = frozenset()


def random_drawings(count, seed=0, held_out=NOTHING, *, show_held_out=False):
    rng = np.random.default_rng(seed)
    return [random_drawing(rng, held_out, show_held_out=show_held_out) for _ in range(count)]


def compositions_of(drawing):
    return {(shape.colour, shape.form, shape.position) for shape in drawing.shapes}


def make_drawing(*attributes, background="white"):
    return Drawing(tuple(Shape(*words) for words in attributes), background)


RED_CIRCLE = ("small", "red", "circle", "top left")
BLUE_CROSS = ("large", "blue", "cross", "bottom right")


@pytest.mark.parametrize("size", [16, 32, 48, 64])
def test_reading_gives_back_what_was_drawn(size):
    rng = np.random.default_rng(size)
    for drawing in random_drawings(300, seed=size):
        assert read_drawing(np.asarray(draw(drawing, size, rng))) == drawing


def test_reading_every_single_shape():
    rng = np.random.default_rng(0)
    for number, (size, colour, form) in enumerate((s, c, f) for s in RADII for c in COLOURS for f in FORMS):
        background = list(BACKGROUNDS)[number % len(BACKGROUNDS)]
        drawing = make_drawing((size, colour, form, list(POSITIONS)[number % 4]), background=background)
        assert read_drawing(np.asarray(draw(drawing, 32, rng))) == drawing


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_reading_an_empty_drawing(background):
    drawing = Drawing((), background)
    assert read_drawing(np.asarray(draw(drawing, 32, np.random.default_rng(0)))) == drawing


def test_reading_survives_noise():
    """A model's images are not as clean as the drawings."""
    rng = np.random.default_rng(0)
    for drawing in random_drawings(100):
        noisy = np.asarray(draw(drawing, 32, rng)) + rng.normal(0, 10, (32, 32, 3))
        assert read_drawing(noisy.clip(0, 255).astype(np.uint8)) == drawing


def test_the_reader_knows_pixels_alone():
    assert list(inspect.signature(read_drawing).parameters) == ["image"]
    rng = np.random.default_rng(0)
    image = np.asarray(draw(make_drawing(RED_CIRCLE), 32, rng))
    mirrored = read_drawing(np.ascontiguousarray(image[:, ::-1]))
    assert mirrored == make_drawing(("small", "red", "circle", "top right"))
    assert read_drawing(np.ascontiguousarray(image[..., ::-1])) == make_drawing(("small", "blue", *RED_CIRCLE[2:]))


def test_captions():
    drawing = make_drawing(RED_CIRCLE, BLUE_CROSS, background="grey")
    assert drawing.caption == (
        "a small red circle at the top left and a large blue cross at the bottom right on a grey background"
    )
    assert make_drawing(BLUE_CROSS).caption == "a large blue cross at the bottom right on a white background"


def test_captions_tell_everything():
    drawings = set(random_drawings(3000))
    assert len(drawings) > 2000
    assert len({drawing.caption for drawing in drawings}) == len(drawings)
    for drawing in drawings:
        assert Drawing.from_caption(drawing.caption) == drawing


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a small red circle at the top left",
        "a small red circle on a white background",
        "a small red circle at the top left on a red background",
        "a tiny red circle at the top left on a white background",
        "a small red circle at the top left and on a white background",
        "A small red circle at the top left on a white background",
        "an small red circle at the top left on a white background",
        "a small red circle at the top right and a small red circle at the top left on a white background",
        "a small red circle at the top left and a large red cross at the top left on a white background",
    ],
)
def test_captions_of_nothing(caption):
    with pytest.raises(ValueError, match=re.escape(f"caption must be one of a drawing of shapes, got {caption!r}")):
        Drawing.from_caption(caption)


@pytest.mark.parametrize("seed", range(5))
def test_held_out_compositions(seed):
    """At each position one colour a form; no two parts are held out together more than once."""
    held_out = held_out_compositions(seed)
    assert len(held_out) == len(FORMS) * len(POSITIONS)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert len({(parts[first], parts[second]) for parts in held_out}) == len(held_out)
    assert {form for _, form, _ in held_out} == set(FORMS)
    assert {position for _, _, position in held_out} == set(POSITIONS)
    assert {colour for colour, _, _ in held_out} <= set(COLOURS)


def test_held_out_compositions_follow_the_seed():
    assert held_out_compositions(3) == held_out_compositions(3)
    assert len({held_out_compositions(seed) for seed in range(10)}) > 5


def test_training_never_shows_a_held_out_composition_but_all_its_parts():
    held_out = held_out_compositions()
    training = random_drawings(2000, held_out=held_out)
    seen = set().union(*map(compositions_of, training))
    assert not seen & held_out
    assert seen == set(itertools.product(COLOURS, FORMS, POSITIONS)) - held_out
    for attribute, names in (("size", RADII), ("position", POSITIONS)):
        assert {getattr(shape, attribute) for drawing in training for shape in drawing.shapes} == set(names)
    assert {drawing.background for drawing in training} == set(BACKGROUNDS)


def test_held_out_drawings_show_a_held_out_composition_each():
    held_out = held_out_compositions()
    drawings = random_drawings(500, held_out=held_out, show_held_out=True)
    assert all(compositions_of(drawing) & held_out for drawing in drawings)
    assert {one for drawing in drawings for one in compositions_of(drawing) & held_out} == held_out


def test_drawings_are_canonical():
    drawings = random_drawings(500)
    places = list(POSITIONS)
    for drawing in drawings:
        order = [places.index(shape.position) for shape in drawing.shapes]
        assert order == sorted(set(order))
    assert set(Counter(len(drawing.shapes) for drawing in drawings)) == {1, 2}


def test_no_held_out_composition_to_show():
    with pytest.raises(ValueError, match="held_out must hold a composition to show, got none"):
        random_drawing(np.random.default_rng(0), NOTHING, show_held_out=True)


ASKED = make_drawing(RED_CIRCLE, BLUE_CROSS, background="grey")


@pytest.mark.parametrize(
    ("seen", "wrong"),
    [
        (ASKED, set()),
        (make_drawing(RED_CIRCLE, BLUE_CROSS, background="pink"), {"background"}),
        (make_drawing(RED_CIRCLE, ("small", *BLUE_CROSS[1:]), background="grey"), {"size"}),
        (make_drawing(("small", "blue", *RED_CIRCLE[2:]), BLUE_CROSS, background="grey"), {"colour"}),
        (make_drawing(("small", "red", "square", "top left"), BLUE_CROSS, background="grey"), {"form"}),
        (make_drawing(RED_CIRCLE, background="grey"), {"count", "position", "form", "colour", "size"}),
        (
            make_drawing(RED_CIRCLE, ("large", "red", "cross", "top right"), BLUE_CROSS, background="grey"),
            {"count", "position"},
        ),
        (
            make_drawing(RED_CIRCLE, (*BLUE_CROSS[:3], "bottom left"), background="grey"),
            {"position", "form", "colour", "size"},
        ),
        (Drawing((), "black"), set(ATTRIBUTES)),
    ],
)
def test_score(seen, wrong):
    result = score(ASKED, seen)
    assert {name for name in ATTRIBUTES if not result[name]} == wrong
    assert result["exact"] == (not wrong)
    assert set(result) == {*ATTRIBUTES, "exact"}


def read_folder(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_data_set(tmp_path):
    out = tmp_path / "new" / "shapes"
    assert write_shapes(out, train=60, heldout=20, size=48, seed=4) == {"train": 60, "heldout": 20}
    assert {path.name for path in out.iterdir()} == {"train", "heldout", "heldout.json"}
    held_out = {(one["colour"], one["form"], one["position"]) for one in json.loads((out / "heldout.json").read_text())}
    assert held_out == held_out_compositions(4)
    for folder, count in (("train", 60), ("heldout", 20)):
        images = sorted((out / folder).glob("*.png"))
        assert len(images) == count
        for path in images:
            image = Image.open(path)
            assert (image.size, image.mode) == ((48, 48), "RGB")
            drawing = read_drawing(np.asarray(image))
            assert path.with_suffix(".txt").read_text(encoding="utf-8") == drawing.caption + "\n"
            assert bool(compositions_of(drawing) & held_out) == (folder == "heldout")
        assert len(list(open_source(out / folder).captions())) == count


def test_data_set_follows_the_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_shapes(tmp_path / name, train=10, heldout=5, seed=seed)
    first, again, other = (
        {folder: read_folder(tmp_path / name / folder) for folder in ("train", "heldout")} for name in "abc"
    )
    assert first == again
    assert first != other
    assert first["train"]["000000.png"] != first["heldout"]["000000.png"]


def test_a_smaller_data_set_is_the_beginning_of_a_larger_one(tmp_path):
    write_shapes(tmp_path / "small", train=5, heldout=0)
    write_shapes(tmp_path / "large", train=9, heldout=3)
    assert read_folder(tmp_path / "small" / "train").items() <= read_folder(tmp_path / "large" / "train").items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 15}, "size must be an even number >= 16, got 15"),
        ({"size": 14}, "size must be an even number >= 16, got 14"),
        ({"size": 33}, "size must be an even number >= 16, got 33"),
        ({"train": 0}, "train must be >= 1 and heldout >= 0, got 0 and 1"),
        ({"heldout": -1}, "train must be >= 1 and heldout >= 0, got 1 and -1"),
    ],
)
def test_numbers_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        write_shapes(tmp_path / "out", **{"train": 1, "heldout": 1} | options)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    """Drawings of another seed beside these would show what is held out."""
    write_shapes(tmp_path, train=1, heldout=1)
    with pytest.raises(ValueError, match=re.escape(f"out must be a new or empty folder, got {tmp_path}")):
        write_shapes(tmp_path, train=1, heldout=1, seed=1)


def test_palette_stays_apart_under_the_jitter():
    for palette in (COLOURS, BACKGROUNDS):
        values = np.array(list(palette.values()))
        distances = np.linalg.norm(values[:, None] - values[None], axis=-1)
        assert distances[~np.eye(len(values), dtype=bool)].min() > 4 * np.sqrt(3) * shapes._COLOUR_JITTER

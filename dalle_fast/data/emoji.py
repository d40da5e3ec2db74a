"""A real data set from a font: every emoji, drawn and captioned with its English name.

    OUT/train/NAME.png, NAME.txt      OUT/heldout/NAME.png, NAME.txt      OUT/heldout.json

The names and sequences are those of the `emoji` package (fully qualified ones only), the pictures those of a
colour font, on a plain background. Emoji of people compose: "woman firefighter medium skin tone" is a role, a
gender and a skin tone. About one composition in twenty is held out, such that each pair of its parts, (role,
gender), (role, tone) and (gender, tone), still occurs in training: what a model has never seen is only the
three together. The choice is a function of the seed and of what the font can draw.

Source: Unicode emoji sequences and their CLDR short names, as the emoji package carries them.
Limits: `emoji` must be installed, and Pillow must lay out text with raqm, without which a sequence falls into
its parts. Bitmap fonts must have the 109-pixel strike of Noto Color Emoji. An emoji newer than the font, or
one that the font draws as several glyphs side by side, is left out and counted.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

STRIKE_SIZE = 109  # the one size at which Noto Color Emoji holds its bitmaps
HELDOUT_SHARE = 0.05
GENDERS = ("woman", "man", "person")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

_TONE_PATTERN = re.compile(rf"_({'|'.join(sorted(TONES, key=len, reverse=True))})_skin_tone")
_PROBE = "\U0001f600"  # a plain face: every emoji font has it, in colour and at full width
_UNASSIGNED = "\U0010fffd"  # a font shows its picture for "missing" here


@dataclass(frozen=True, order=True)
class Composition:
    """The parts of an emoji of one person, such as ("firefighter", "woman", "medium")."""

    role: str
    gender: str
    tone: str


@dataclass(frozen=True)
class EmojiSummary:
    """How many emoji `write_emoji` wrote to each folder, and how many the font could not draw."""

    train: int
    heldout: int
    left_out: int


def split_name(name: str) -> Composition | None:
    """The parts of an emoji's name, or None if it is not one role, one gender and one skin tone.

    Args:
        name: as in the emoji package without its colons, for example "woman_firefighter_dark_skin_tone".
    """
    tones = _TONE_PATTERN.findall(name)
    words = _TONE_PATTERN.sub("", name).split("_")
    genders = [word for word in words if word in GENDERS]
    role = " ".join(word for word in words if word not in GENDERS)
    if len(tones) != 1 or len(genders) != 1 or not role:
        return None
    return Composition(role, genders[0], tones[0])


def caption_of(name: str) -> str:
    """The caption for an emoji's name: spaces for underscores."""
    return name.strip(":").replace("_", " ")


def choose_heldout(compositions: Iterable[Composition], seed: int) -> set[Composition]:
    """Draws the compositions to hold out: a twentieth of them, fewer where the rule on pairs allows no more.

    Args:
        compositions: all there are; their order does not matter.
        seed: fixes the choice.

    Returns:
        Compositions each pair of whose parts is still in one that is not held out.
    """
    candidates = sorted(set(compositions))
    remaining = Counter(pair for composition in candidates for pair in _pairs(composition))
    wanted = round(HELDOUT_SHARE * len(candidates))
    chosen: set[Composition] = set()
    for i in np.random.default_rng(seed).permutation(len(candidates)):
        pairs = _pairs(candidates[i])
        if len(chosen) < wanted and all(remaining[pair] > 1 for pair in pairs):
            chosen.add(candidates[i])
            remaining.subtract(pairs)
    return chosen


def _pairs(composition: Composition) -> list[tuple[str, str, str]]:
    role, gender, tone = composition.role, composition.gender, composition.tone
    return [("role, gender", role, gender), ("role, tone", role, tone), ("gender, tone", gender, tone)]


def file_stems(names: dict[str, str]) -> dict[str, str]:
    """A plain ASCII file stem for every emoji, telling apart those whose names differ in other signs only.

    Args:
        names: emoji sequence to name.

    Returns:
        Emoji sequence to stem.
    """
    plain = {text: _plain(name) for text, name in names.items()}
    uses = Counter(plain.values())
    return {
        text: stem if stem and uses[stem] == 1 else "-".join(filter(None, [stem, *(f"{ord(c):x}" for c in text)]))
        for text, stem in plain.items()
    }


def _plain(name: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name.lower()).strip("-")


def write_emoji(
    out: str | Path,
    font_path: str | Path,
    size: int = 64,
    seed: int = 0,
    background: str = "white",
) -> EmojiSummary:
    """Draws all emoji and writes the data set.

    Args:
        out: a new or empty folder.
        font_path: a colour emoji font, for example NotoColorEmoji.ttf.
        size: side of the images in pixels.
        seed: fixes which compositions are held out.
        background: a colour name or #rrggbb.

    Returns:
        How many emoji were written where, and how many left out.

    Raises:
        ValueError: size below 8, out is not empty, or the font is missing or has no coloured emoji.
        RuntimeError: the emoji package or raqm is missing.
    """
    if size < 8:
        raise ValueError(f"size must be >= 8, got {size}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {out}")
    names = emoji_names()
    font = load_font(font_path)
    pictures = _draw_all(names, font, size, background)
    compositions = {text: composition for text in pictures if (composition := split_name(names[text]))}
    chosen = choose_heldout(compositions.values(), seed)
    stems = file_stems({text: names[text] for text in pictures})
    heldout = []
    for folder in ("train", "heldout"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for text, picture in pictures.items():
        composition = compositions.get(text)
        caption = caption_of(names[text])
        folder = "heldout" if composition in chosen else "train"
        if folder == "heldout":
            heldout.append({"key": stems[text], "caption": caption, **asdict(composition)})
        picture.save(out / folder / f"{stems[text]}.png")
        (out / folder / f"{stems[text]}.txt").write_text(f"{caption}\n", encoding="utf-8")
    listing = json.dumps({"seed": seed, "heldout": heldout}, ensure_ascii=False, indent=1)
    (out / "heldout.json").write_text(f"{listing}\n", encoding="utf-8")
    return EmojiSummary(len(pictures) - len(heldout), len(heldout), len(names) - len(pictures))


def emoji_names() -> dict[str, str]:
    """All fully qualified emoji sequences with their English names, without colons.

    Raises:
        RuntimeError: the emoji package is missing.
    """
    try:
        import emoji
    except ImportError as error:
        raise RuntimeError("the emoji package must be installed: pip install emoji") from error
    fully_qualified = emoji.STATUS["fully_qualified"]
    return {
        text: entry["en"].strip(":") for text, entry in emoji.EMOJI_DATA.items() if entry["status"] == fully_qualified
    }


def load_font(path: str | Path) -> ImageFont.FreeTypeFont:
    """Opens a colour emoji font.

    Raises:
        ValueError: no such file, not a font of a usable size, or one without coloured emoji.
        RuntimeError: Pillow lacks raqm.
    """
    if not Path(path).is_file():
        raise ValueError(f"font must exist, got {path} (on Debian: apt install fonts-noto-color-emoji)")
    if not features.check("raqm"):
        raise RuntimeError("Pillow must lay out text with raqm to draw emoji: apt install libfribidi0")
    try:
        font = ImageFont.truetype(str(path), STRIKE_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(f"font must be a font file usable at {STRIKE_SIZE} pixels, got {path}: {error}") from error
    probe = np.asarray(_draw(_PROBE, font, _canvas_side(font)))
    if not (probe[..., :3].max(axis=2) != probe[..., :3].min(axis=2)).any():
        raise ValueError(
            f"font must be a colour emoji font, got {path}, which has no coloured {_PROBE} "
            "(on Debian: apt install fonts-noto-color-emoji)"
        )
    return font


def _draw_all(
    names: dict[str, str], font: ImageFont.FreeTypeFont, size: int, background: str
) -> dict[str, Image.Image]:
    """The pictures of all emoji that the font draws as one glyph of its own."""
    side = _canvas_side(font)
    one_glyph = 1.2 * font.getlength(_PROBE)
    missing = _draw(_UNASSIGNED, font, side).tobytes()
    pictures = {}
    for text in names:
        if font.getlength(text) > one_glyph:
            continue
        glyph = _draw(text, font, side)
        if glyph.tobytes() == missing:
            continue
        canvas = Image.new("RGBA", glyph.size, background)
        canvas.alpha_composite(glyph)
        pictures[text] = canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    return pictures


def _canvas_side(font: ImageFont.FreeTypeFont) -> int:
    left, top, right, bottom = font.getbbox(_PROBE)
    return max(1, int(right - left), int(bottom - top))


def _draw(text: str, font: ImageFont.FreeTypeFont, side: int) -> Image.Image:
    """One line of text in the middle of a transparent square."""
    image = Image.new("RGBA", (side, side))
    left, top, right, bottom = font.getbbox(text)
    origin = ((side - right - left) / 2, (side - bottom - top) / 2)
    ImageDraw.Draw(image).text(origin, text, font=font, embedded_color=True)
    return image

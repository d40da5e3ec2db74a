"""``dalle-fast sample``: the files it writes, what can be drawn again, completion, Ctrl-C, and messages."""

import io
import json
import re
import shutil
import types

import numpy as np
import pytest
import torch
from helpers import tiny_pipeline
from PIL import Image

import dalle_fast
from dalle_fast import sample
from dalle_fast.cli import _make_parser, _parse, main
from dalle_fast.data.images import to_image
from dalle_fast.models.decoder import decoder_bytes
from dalle_fast.models.transformer import Dalle
from dalle_fast.pipeline import Pipeline
from dalle_fast.sampling import Sampler

CAPTIONS = ["a red dot", "a blue dot", "two dots"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sample") / "saved"
    tiny_pipeline(CAPTIONS).save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(checkpoint):
    return Pipeline.from_pretrained(checkpoint)


@pytest.fixture
def picture(pipeline, tmp_path):
    """An image file of twice the dVAE's size, and wider than high."""
    pixels = np.asarray(to_image(pipeline.dvae.decode(torch.randint(12, (1, 4, 4)))[0]))
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).resize((40, 32), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def draw(checkpoint, tmp_path):
    """draw(captions and flags) runs the command in a folder of its own and returns its record."""

    def draw(*words, out="out.png", status=0):
        assert main(["sample", str(checkpoint), *map(str, words), "-o", str(tmp_path / out)]) == status
        path = (tmp_path / out).with_suffix(".json")
        return json.loads(path.read_text()) if path.exists() else None

    return draw


def pixels(path):
    return np.asarray(Image.open(path))


def error_of(capsys, *words):
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("dalle-fast: error: ")


def usage_error_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition(": error: ")[2]


def test_files(draw, tmp_path, checkpoint, capsys):
    record = draw(CAPTIONS[0], "-n", 5, "--seed", 3, "--temperature", 0.9, "--top-k", 8, "--device", "cpu")
    assert capsys.readouterr().out == f"{tmp_path / 'out.png'}\n"
    assert Image.open(tmp_path / "out.png").size == (3 * 18 + 2, 2 * 18 + 2)
    assert record["dalle_fast"] == dalle_fast.__version__
    assert record["checkpoint"] == str(checkpoint)
    assert record["settings"] == {
        "temperature": 0.9,
        "top_k": 8,
        "top_p": None,
        "cond_scale": 1.0,
        "image": None,
        "keep_rows": None,
        "keep_mask": None,
        "cache_dtype": None,
        "num_images": 5,
        "best": None,
        "batch_size": None,
        "memory_budget": None,
        "dtype": "float32",
        "device": "cpu",
    }
    assert [entry["seed"] for entry in record["images"]] == [3, 4, 5, 6, 7]
    assert {entry["prompt"] for entry in record["images"]} == {CAPTIONS[0]}
    assert all(entry["score"] < 0 for entry in record["images"])
    names = [entry["file"] for entry in record["images"]]
    assert names == [f"out/{number:04}.png" for number in range(5)]
    grid = pixels(tmp_path / "out.png")
    for number, name in enumerate(names):
        row, column = divmod(number, 3)
        part = grid[2 + 18 * row : 18 + 18 * row, 2 + 18 * column : 18 + 18 * column]
        assert np.array_equal(part, pixels(tmp_path / name))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{number:04}.png" for number in range(5)]


@pytest.mark.parametrize("complete", [False, True])
def test_each_image_can_be_drawn_again(draw, tmp_path, picture, complete):
    flags = ["--top-p", 0.9, "--cond-scale", 2, *(["--image", picture] if complete else [])]
    record = draw(*CAPTIONS[:2], "-n", 2, "--seed", 11, *flags, "--batch-size", 3)
    assert [entry["seed"] for entry in record["images"]] == list(range(11, 15))
    for entry in record["images"]:
        again = draw(entry["prompt"], "-n", 1, "--seed", entry["seed"], *flags, out="again.png")
        assert np.array_equal(pixels(tmp_path / entry["file"]), pixels(tmp_path / "again" / "0000.png"))
        assert again["images"][0]["score"] == pytest.approx(entry["score"])


def test_each_caption_has_a_row(draw, tmp_path):
    draw(*CAPTIONS, "-n", 2)
    assert Image.open(tmp_path / "out.png").size == (2 * 18 + 2, 3 * 18 + 2)
    draw(*CAPTIONS[:2], "-n", 5)
    assert Image.open(tmp_path / "out.png").size == (5 * 18 + 2, 2 * 18 + 2)


def test_captions_before_and_after_the_flags(draw):
    assert [entry["prompt"] for entry in draw("-n", 1, *CAPTIONS)["images"]] == CAPTIONS
    assert [entry["prompt"] for entry in draw(CAPTIONS[0], "-n", 1, *CAPTIONS[1:])["images"]] == CAPTIONS


def test_captions_of_a_file(draw, tmp_path):
    (tmp_path / "captions.txt").write_text(f"{CAPTIONS[0]}\n\n  {CAPTIONS[1]} \n \n", encoding="utf-8")
    record = draw("--prompts", tmp_path / "captions.txt", "-n", 1)
    assert [entry["prompt"] for entry in record["images"]] == CAPTIONS[:2]


def test_captions_of_a_file_from_windows(draw, tmp_path):
    lines = f"{CAPTIONS[0]}\r\n\r\n{CAPTIONS[1]}\r\n"
    (tmp_path / "captions.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    record = draw("--prompts", tmp_path / "captions.txt", "-n", 1)
    assert [entry["prompt"] for entry in record["images"]] == CAPTIONS[:2]


@pytest.mark.parametrize(
    ("words", "captions"),
    [
        (["-n", 1, "--", "-dot"], ["-dot"]),
        (["a dot", "-n", 1, "--", "-dot", "--two", "dots"], ["a dot", "-dot", "--two", "dots"]),
        (["-n", 1, "- a dot"], ["- a dot"]),
        (["--", "-dot"], ["-dot"]),
    ],
)
def test_captions_that_begin_with_a_dash(checkpoint, words, captions):
    args = _parse(_make_parser(), ["sample", str(checkpoint), *map(str, words)])
    assert args.captions == captions


def test_best(draw, tmp_path):
    everything = draw(*CAPTIONS[:2], "-n", 5, out="all.png")["images"]
    best = draw(*CAPTIONS[:2], "-n", 5, "--best", 2, "--batch-size", 4)["images"]
    assert len(best) == 4
    for prompt in range(2):
        ranked = sorted(everything[5 * prompt : 5 * prompt + 5], key=lambda entry: -entry["score"])
        for kept, expected in zip(best[2 * prompt : 2 * prompt + 2], ranked, strict=False):
            assert (kept["seed"], kept["prompt"]) == (expected["seed"], expected["prompt"])
            assert np.array_equal(pixels(tmp_path / kept["file"]), pixels(tmp_path / expected["file"]))
    assert Image.open(tmp_path / "out.png").size == (2 * 18 + 2, 2 * 18 + 2)


def test_no_singles(draw, tmp_path):
    record = draw(CAPTIONS[0], "-n", 2, "--no-singles")
    assert [entry["file"] for entry in record["images"]] == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]


def test_no_singles_after_their_folder_is_gone(draw, tmp_path):
    draw(CAPTIONS[0], "-n", 2)
    shutil.rmtree(tmp_path / "out")
    draw(CAPTIONS[0], "-n", 1, "--no-singles")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]
    draw(CAPTIONS[0], "-n", 2)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("mine")
    draw(CAPTIONS[0], "-n", 1, "--no-singles")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_where_the_grid_goes(tmp_path, checkpoint, capsys):
    (tmp_path / "out.png").mkdir()
    message = error_of(capsys, "sample", checkpoint, CAPTIONS[0], "-n", 1, "-o", tmp_path / "out.png")
    assert message == f"{tmp_path / 'out.png'} is a folder; name another --out"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_an_earlier_sample_is_replaced_and_nothing_else(draw, tmp_path, checkpoint, capsys):
    draw(CAPTIONS[0], "-n", 5)
    draw(CAPTIONS[0], "-n", 2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000.png", "0001.png"]
    draw(CAPTIONS[0], "-n", 2, "--no-singles")
    assert not (tmp_path / "out").exists()
    draw(CAPTIONS[0], "-n", 2)
    foreign = tmp_path / "out" / "0002.png"
    foreign.write_bytes(b"mine")
    words = ["sample", checkpoint, CAPTIONS[0], "-n", 3, "-o", tmp_path / "out.png"]
    rule = "is in the way and of no earlier sample; name another --out"
    assert error_of(capsys, *words) == f"{foreign} {rule}, or pass --no-singles"
    draw(CAPTIONS[0], "-n", 2, "--no-singles")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0002.png"]
    assert foreign.read_bytes() == b"mine"


@pytest.mark.parametrize("text", ["{", "[]", '{"images": []}', '{"dalle_fast": "1", "images": [{}]}'])
def test_a_record_of_somebody_else(tmp_path, checkpoint, capsys, text):
    path = tmp_path / "settings.json"
    path.write_text(text)
    words = ["sample", checkpoint, CAPTIONS[0], "-n", 1, "-o", tmp_path / "settings.png"]
    assert error_of(capsys, *words) == f"{path} is in the way and of no earlier sample; name another --out"
    assert path.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_record_cannot_name_files_elsewhere(draw, tmp_path):
    other = tmp_path / "0007.png"
    other.write_bytes(b"mine")
    names = ["../0007.png", str(other), "out/../0007.png", "notes.txt"]
    (tmp_path / "out.json").write_text(json.dumps({"dalle_fast": "1", "images": [{"file": name} for name in names]}))
    draw(CAPTIONS[0], "-n", 1)
    assert other.read_bytes() == b"mine"


def interrupt(monkeypatch, batch):
    """Ctrl-C within this batch, counted from 0."""
    run, batches = Sampler.run, []

    def stopped(self, *args, on_token, **options):
        batches.append(None)

        def stop(position):
            on_token(position)
            if len(batches) > batch and position == 8:
                raise KeyboardInterrupt

        return run(self, *args, on_token=stop, **options)

    monkeypatch.setattr(Sampler, "run", stopped)


@pytest.mark.parametrize("flags", [(), ("--stream",), ("--best", 2)])
def test_control_c_keeps_what_is_finished(draw, tmp_path, monkeypatch, capsys, flags):
    whole = draw(*CAPTIONS, "-n", 3, "--batch-size", 3, out="whole.png")["images"]
    interrupt(monkeypatch, batch=2)
    capsys.readouterr()
    record = draw(*CAPTIONS, "-n", 3, "--batch-size", 3, *flags, status=130)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"dalle-fast: interrupted: 6 of 9 images are finished, in {tmp_path / 'out.png'}\n"
    kept = 2 if "--best" in flags else 3
    assert len(record["images"]) == len(list((tmp_path / "out").iterdir())) == 2 * kept
    assert Image.open(tmp_path / "out.png").size == (kept * 18 + 2, 2 * 18 + 2)
    finished = {entry["seed"]: entry for entry in whole}
    for entry in record["images"]:
        assert entry["prompt"] == finished[entry["seed"]]["prompt"]
        assert np.array_equal(pixels(tmp_path / entry["file"]), pixels(tmp_path / finished[entry["seed"]]["file"]))


def test_control_c_within_a_caption(draw, tmp_path, monkeypatch, capsys):
    """The second row of the grid has one image and white."""
    interrupt(monkeypatch, batch=3)
    record = draw(*CAPTIONS[:2], "-n", 4, "--batch-size", 2, status=130)
    assert "6 of 8 images are finished" in capsys.readouterr().err
    assert [entry["seed"] for entry in record["images"]] == list(range(6))
    grid = pixels(tmp_path / "out.png")
    assert grid.shape == (2 * 18 + 2, 4 * 18 + 2, 3)
    assert (grid[20:, 38:] == 255).all()
    assert np.array_equal(grid[20:36, 20:36], pixels(tmp_path / "out" / "0005.png"))


@pytest.mark.parametrize("flags", [(), ("--stream",)])
def test_control_c_before_anything_is_finished(draw, tmp_path, monkeypatch, capsys, flags):
    interrupt(monkeypatch, batch=0)
    assert draw(CAPTIONS[0], "-n", 3, *flags, status=130) is None
    assert capsys.readouterr().err == "dalle-fast: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_progress_bar(draw, monkeypatch):
    """On a terminal; elsewhere there is none."""
    shown = io.StringIO()
    bar = sample.tqdm
    monkeypatch.setattr(
        sample, "tqdm", lambda **options: bar(**options | {"disable": False, "file": shown, "mininterval": 0})
    )
    draw(*CAPTIONS[:2], "-n", 2, "--batch-size", 3)
    last = shown.getvalue().rstrip().splitlines()[-1].split("\r")[-1]
    assert re.search(r"100%.*64/64 \[.*token/s, [\d.e+]+ images/s\]", last), last


def test_stream(draw, tmp_path, monkeypatch):
    """With a clock on which each step takes 0.2 seconds, every second step is shown."""
    now = [0.0]
    monkeypatch.setattr(sample, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    shown = []
    write_grid = sample._Out.write_grid

    def watch(self, images, columns):
        write_grid(self, images, columns)
        shown.append((now[0], pixels(self.grid)))

    show = sample._Display.show

    def tick(self, progress):
        now[0] += 0.2
        show(self, progress)

    monkeypatch.setattr(sample._Out, "write_grid", watch)
    monkeypatch.setattr(sample._Display, "show", tick)
    draw(CAPTIONS[0], "-n", 2, "--batch-size", 1, "--stream")
    steps = [round(moment / 0.2) for moment, _ in shown]
    assert steps == [*range(1, 33, 2), 32]
    final = shown[-1][1]
    assert final.shape == (20, 38, 3)
    for step, (_, grid) in zip(steps[:-1], shown, strict=False):
        first, second = grid[2:18, 2:18], grid[2:18, 20:36]
        rows = step // 4 * 4 if step < 16 else 16
        assert (first[rows:] == 128).all() and not (first[:rows] == 128).all(axis=(1, 2)).any()
        if step >= 16:
            rows = (step - 16) // 4 * 4
            assert np.array_equal(first, final[2:18, 2:18])
            assert (second[rows:] == 128).all() and not (second[:rows] == 128).all(axis=(1, 2)).any()
        else:
            assert (second == 128).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.json", "out.png"]


def test_previews_take_a_tenth_of_the_time(draw, monkeypatch):
    """A grid that takes 2 seconds to write is next written 20 seconds later."""
    now, shown = [0.0], []
    monkeypatch.setattr(sample, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    show = sample._Display.show

    def tick(self, progress):
        now[0] += 4.0
        show(self, progress)

    def slow(self, images, columns):
        shown.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(sample._Out, "write_grid", slow)
    monkeypatch.setattr(sample._Display, "show", tick)
    draw(CAPTIONS[0], "-n", 1, "--stream")
    assert shown[:3] == [4.0, 26.0, 48.0]


def test_completion(draw, tmp_path, pipeline, picture):
    """The image is cut as for encoding, and its first row of four is kept where nothing else is said."""
    from dalle_fast.data.images import center_crop, decode_image, to_tensor

    tokens = pipeline.dvae.encode(to_tensor(center_crop(decode_image(picture.read_bytes()), 16))[None])
    captured = []
    decode = type(pipeline.dvae).decode

    def watch(self, tokens):
        captured.append(tokens)
        return decode(self, tokens)

    mask = tmp_path / "mask.png"
    Image.fromarray(np.kron(np.eye(4), np.full((5, 7), 255)).astype(np.uint8)).save(mask)
    kept = torch.zeros(4, 4, dtype=torch.bool)
    cases = {(): [0], ("--keep-rows", 1): [0], ("--keep-rows", 3): [0, 1, 2], ("--keep-rows", 4): [0, 1, 2, 3]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipeline.dvae), "decode", watch)
        for flags, rows in cases.items():
            draw(CAPTIONS[0], "-n", 2, "--image", picture, *flags)
            kept[:] = False
            kept[rows] = True
            assert torch.equal(captured[-1][:, kept], tokens[0, kept].expand(2, -1))
            assert torch.equal(captured[-1][0], tokens[0]) == (len(rows) == 4)
        record = draw(CAPTIONS[0], "-n", 2, "--image", picture, "--keep-mask", mask)
        kept = torch.eye(4, dtype=torch.bool)
        assert torch.equal(captured[-1][:, kept], tokens[0, kept].expand(2, -1))
        assert not torch.equal(captured[-1][0], captured[-1][1])
    assert (record["settings"]["image"], record["settings"]["keep_mask"]) == (str(picture), str(mask))


def test_a_mask_of_the_images_size_is_cut_as_the_image_is(tmp_path, pipeline):
    """Left half of the centre square; of another size it is stretched over the grid."""
    Image.new("RGB", (64, 32)).save(tmp_path / "wide.png")
    mask = Image.new("L", (64, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    mask.resize((16, 16), Image.Resampling.NEAREST).save(tmp_path / "square.png")
    for name, columns in (("mask.png", [0, 1]), ("square.png", [1])):
        options = {"image": tmp_path / "wide.png", "keep_rows": None, "keep_mask": tmp_path / name}
        _, keep = sample._read_completion(types.SimpleNamespace(**options), pipeline)
        expected = torch.zeros(4, 4, dtype=torch.bool)
        expected[:, columns] = True
        assert torch.equal(keep, expected)


def test_dtypes(draw, monkeypatch):
    cast = []
    cast_blocks = Dalle.cast_blocks
    monkeypatch.setattr(Dalle, "cast_blocks", lambda self, dtype: cast.append(dtype) or cast_blocks(self, dtype))
    assert draw(CAPTIONS[0], "-n", 1, "--device", "cpu")["settings"]["dtype"] == "float32"
    assert cast == [], "as it was saved"
    for dtype in ("bfloat16", "float16", "float32"):
        record = draw(CAPTIONS[0], "-n", 1, "--dtype", dtype, "--device", "cpu", "--cache-dtype", "float16")
        assert (record["settings"]["dtype"], record["settings"]["cache_dtype"]) == (dtype, "float16")
    assert cast == [torch.bfloat16, torch.float16, torch.float32]


def test_memory_budget(draw, checkpoint, pipeline, tmp_path, capsys):
    assert draw(CAPTIONS[0], "-n", 1, "--memory-budget", "1.5M")["settings"]["memory_budget"] == 3 * 2**19
    size = decoder_bytes(pipeline.dalle, 1, 1)
    message = error_of(capsys, "sample", checkpoint, "a", "-o", tmp_path / "o.png", "--memory-budget", "9K")
    assert message == f"memory_budget must be at least the {size} bytes that one image takes, got 9216"
    message = usage_error_of(capsys, "sample", checkpoint, "a", "--memory-budget", "4 elephants")
    assert message == "argument --memory-budget: must be a number of bytes such as 800M or 4G, got '4 elephants'"


@pytest.mark.parametrize(
    ("text", "size"), [("77", 77), ("4G", 2**32), ("4GB", 2**32), ("2GiB", 2**31), ("1t", 2**40), ("1.5k", 1536)]
)
def test_numbers_of_bytes(text, size):
    assert _make_parser().parse_args(["sample", "CKPT", "a", "--memory-budget", text]).memory_budget == size


def test_guidance_that_was_not_trained(draw, checkpoint, capsys):
    path = checkpoint / "config.json"
    saved = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(saved) | {"train": {"caption_drop": 0.0}}))
        draw(CAPTIONS[0], "-n", 1, "--cond-scale", 3)
    finally:
        path.write_text(saved)
    assert re.fullmatch(r"warning: this model was trained with caption_drop 0: .*\n", capsys.readouterr().err)


def test_long_captions_are_named(draw, capsys):
    draw(CAPTIONS[0], "abcdefghijklmnopqrstuvwxyz", "-n", 1)
    assert re.fullmatch(
        r"warning: caption 2 has \d+ tokens, and this model reads 11; the rest is cut\n", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--best", 0], "--best must be in 1..4, the number of images, got 0"),
        (["--best", 5], "--best must be in 1..4, the number of images, got 5"),
        (["--top-k", 13], "top_k must be at most the 12 codes of the vocabulary, got 13"),
        (["--cond-scale", "nan"], "cond_scale must be finite, got nan"),
        (["--seed", -1], f"seed must be in 0..{2**63 - 1}, got -1"),
        (["--batch-size", 0], "batch_size must be >= 1, got 0"),
        (["--image", "PICTURE", "--keep-rows", 0], "--keep-rows must be in 1..4, the rows of tokens, got 0"),
        (["--image", "PICTURE", "--keep-rows", 5], "--keep-rows must be in 1..4, the rows of tokens, got 5"),
        (["--image", "SMALL"], "image must be at least 16 pixels on its shorter side, got 20x8"),
        (["-o", "out.psd"], "--out must end in the suffix of an image format, got out.psd"),
    ],
)
def test_errors(checkpoint, tmp_path, picture, capsys, words, message):
    Image.new("RGB", (20, 8)).save(tmp_path / "small.png")
    paths = {"PICTURE": picture, "SMALL": tmp_path / "small.png"}
    out = [] if "-o" in words else ["-o", tmp_path / "out.png"]
    assert error_of(capsys, "sample", checkpoint, "a", "-n", 4, *out, *(paths.get(w, w) for w in words)) == message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "small.png"]


def test_a_file_without_captions(checkpoint, tmp_path, capsys):
    (tmp_path / "none.txt").write_text("\n \n")
    message = error_of(capsys, "sample", checkpoint, "--prompts", tmp_path / "none.txt", "-o", tmp_path / "out.png")
    assert message == f"--prompts must hold at least one caption, got none in {tmp_path / 'none.txt'}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: CAPTION or --prompts"),
        (["a", "--prompts", "b.txt"], "argument --prompts: not allowed with argument CAPTION"),
        (["a", "--keep-rows", "1"], "argument --keep-rows: needs --image"),
        (["a", "--keep-mask", "m.png"], "argument --keep-mask: needs --image"),
        (
            ["a", "--image", "i.png", "--keep-mask", "m.png", "--keep-rows", "1"],
            "argument --keep-rows: not allowed with argument --keep-mask",
        ),
        (["a", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["a", "--colour", "-n", "1", "--", "-b"], "unrecognized arguments: --colour -- -b"),
    ],
)
def test_usage_errors(checkpoint, capsys, words, message):
    assert usage_error_of(capsys, "sample", checkpoint, *words) == message

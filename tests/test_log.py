"""The run log: one valid JSON line a step, also after a kill and a resume; bar, images, TensorBoard."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_fast.data.images import image_grid
from dalle_fast.training.log import RunLog, read_log


def run(out, first, last, **options):
    with RunLog(out, total_steps=20, resume_step=first, **({"tensorboard": False} | options)) as log:
        for step in range(first, last):
            log.log(step, loss=1 / (step + 1), samples_per_s=100.0)


def steps_of(out):
    return [record["step"] for record in read_log(out / "log.jsonl")]


def test_log_round_trip(tmp_path):
    with RunLog(tmp_path / "run", total_steps=3, tensorboard=False, progress=False) as log:
        log.log(0, loss=torch.tensor(0.5), tokens=np.int64(7))
        log.log(1, loss=0.1)
    assert read_log(tmp_path / "run" / "log.jsonl") == [
        {"step": 0, "loss": 0.5, "tokens": 7},
        {"step": 1, "loss": 0.1},
    ]


def test_every_line_is_on_disk_at_once(tmp_path):
    with RunLog(tmp_path, total_steps=3, tensorboard=False, progress=False) as log:
        log.log(0, loss=1.0)
        assert steps_of(tmp_path) == [0]


def test_numbers_that_json_lacks(tmp_path):
    with RunLog(tmp_path, total_steps=1, tensorboard=False, progress=False) as log:
        log.log(0, a=math.nan, b=math.inf, c=-math.inf)
    line = (tmp_path / "log.jsonl").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(line, parse_constant=refuse) == {
        "step": 0,
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
    }
    record = read_log(tmp_path / "log.jsonl")[0]
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_resume_has_each_step_once(tmp_path):
    run(tmp_path, 0, 12, progress=False)
    run(tmp_path, 8, 15, progress=False)
    assert steps_of(tmp_path) == list(range(15))


def test_resume_after_a_kill_in_the_middle_of_a_line(tmp_path):
    run(tmp_path, 0, 6, progress=False)
    path = tmp_path / "log.jsonl"
    path.write_text(path.read_text()[:-9])
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4]
    run(tmp_path, 5, 8, progress=False)
    assert steps_of(tmp_path) == list(range(8))


def test_a_fresh_run_starts_the_log_anew(tmp_path):
    run(tmp_path, 0, 6, progress=False)
    run(tmp_path, 0, 2, progress=False)
    assert steps_of(tmp_path) == [0, 1]


def test_damaged_line_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log.jsonl line 2 is not JSON: 'rubbish'$"):
        read_log(path)


def test_total_steps_message(tmp_path):
    with pytest.raises(ValueError, match=r"^total_steps must be >= 1, got 0$"):
        RunLog(tmp_path, total_steps=0)


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    run(tmp_path, 0, 20, description="dvae")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "dvae  2/20  loss 0.5  samples/s 100"
    assert lines[-1].startswith("dvae  20/20  ")


def test_plain_lines_of_a_resumed_run_go_on(tmp_path, capsys):
    run(tmp_path, 10, 14)
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["12/20", "14/20"]


def test_forced_bar_shows_loss_and_throughput(tmp_path, capsys):
    run(tmp_path, 0, 20, progress=True, description="dvae")
    text = capsys.readouterr().err
    assert "dvae: 100%" in text
    assert "20/20" in text
    assert "loss=0.05, samples/s=100" in text


def test_no_progress(tmp_path, capsys):
    run(tmp_path, 0, 20, progress=False)
    assert capsys.readouterr().err == ""


def test_warn_goes_to_stderr(tmp_path, capsys):
    with RunLog(tmp_path, total_steps=1, tensorboard=False, progress=False) as log:
        log.warn("3 samples skipped")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "warning: 3 samples skipped\n")


def test_tensorboard_scalars(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, total_steps=3, progress=False) as log:
        log.log(0, loss=2.0)
        log.log(1, loss=1.0)
        log.images(1, "samples", torch.rand(2, 3, 4, 4))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 2.0), (1, 1.0)]
    assert events.Tags()["images"] == ["samples"]


def test_missing_tensorboard_is_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(tmp_path, 0, 3, tensorboard=True, progress=False)
    assert capsys.readouterr().err == (
        "warning: tensorboard is not installed, scalars go to log.jsonl only (pip install tensorboard)\n"
    )
    assert steps_of(tmp_path) == [0, 1, 2]


def test_images_are_written_as_a_grid(tmp_path):
    with RunLog(tmp_path, total_steps=1, tensorboard=False, progress=False) as log:
        log.images(500, "samples", torch.zeros(3, 3, 4, 6))
    with Image.open(tmp_path / "images" / "samples-0000500.png") as image:
        assert image.size == (2 * (6 + 2) + 2, 2 * (4 + 2) + 2)
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert image.getpixel((2, 2)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("count", "columns", "rows_and_columns"), [(1, None, (1, 1)), (5, None, (2, 3)), (5, 4, (2, 4))]
)
def test_image_grid_places_every_image(count, columns, rows_and_columns):
    images = torch.rand(count, 3, 4, 5, dtype=torch.float64)
    grid = image_grid(images, columns, padding=1)
    rows, columns = rows_and_columns
    assert grid.shape == (3, rows * 5 + 1, columns * 6 + 1)
    rest = grid.clone()
    for index in range(count):
        row, column = divmod(index, columns)
        cell = (slice(None), slice(row * 5 + 1, row * 5 + 5), slice(column * 6 + 1, column * 6 + 6))
        assert torch.equal(grid[cell], images[index].float())
        rest[cell] = 1.0
    assert bool((rest == 1.0).all())


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 4, 4), (2, 1, 4, 4)])
def test_image_grid_shape_message(shape):
    with pytest.raises(ValueError, match=r"^images must have shape \(N, 3, height, width\) with N >= 1, got \("):
        image_grid(torch.zeros(shape))


def test_image_grid_columns_message():
    with pytest.raises(ValueError, match=r"^columns must be >= 1, got 0$"):
        image_grid(torch.zeros(1, 3, 4, 4), columns=0)

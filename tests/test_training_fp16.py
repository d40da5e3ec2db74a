"""Training with --precision fp16: 16-bit matrices and moments, a gradient scale for each residual block."""

import math
import re

import pytest
import torch
from PIL import Image
from training_runs import assert_same_checkpoint, call_at, losses

from dalle_fast.checkpoint import latest_checkpoint, load_training_state, load_weights
from dalle_fast.models.half import Resblock
from dalle_fast.pipeline import Pipeline
from dalle_fast.training.grad_scale_log import draw_grad_scales
from dalle_fast.training.log import read_log

BLOCKS = {"dvae": 6, "dalle": 4}
SCALARS = {"grad_norm", "grad_scale_min", "grad_scale_max", "skipped_updates", "skipped_share"}


def spoil_gradients(monkeypatch, updates, block=None):
    """In some updates make the gradient of a matrix inf, or that of the last parameter outside all blocks."""
    from dalle_fast.training.loop import ResblockGradScaler

    original, calls = ResblockGradScaler.unscale_, []

    def unscale_(self, optimizer):
        calls.append(None)
        if len(calls) - 1 in updates:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            inside = [p for p in parameters if p.dtype == torch.float16]
            outside = [p for p in parameters if p.dtype == torch.float32]
            grad = (outside[-1] if block is None else inside[block]).grad
            grad[(-1,) * grad.ndim] = math.inf
        return original(self, optimizer)

    monkeypatch.setattr(ResblockGradScaler, "unscale_", unscale_)


def test_learns_like_fp32(start, tmp_path):
    """Update by update, up to a tenth of how much the losses differ between updates."""
    start(tmp_path / "half", steps=25, precision="fp16")
    start(tmp_path / "full", steps=25)
    half, full = (torch.tensor([loss for _, loss in losses(tmp_path / name)]) for name in ("half", "full"))
    assert (half - full).abs().mean() < 0.1 * full.std()
    assert read_log(tmp_path / "half" / "log.jsonl")[-1]["skipped_updates"] == 0


def test_run_directory(start, tmp_path):
    start(tmp_path, steps=3, precision="fp16")
    records = read_log(tmp_path / "log.jsonl")
    assert all(record.keys() >= SCALARS for record in records)
    assert records[0]["grad_scale_max"] == pytest.approx(2**13 * 2 ** (1 / 1000))
    rows = read_log(tmp_path / "grad_scales.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {len(row["scales"]) for row in rows} == {BLOCKS[start.kind]}
    assert {len(row["skips"]) for row in rows} == {BLOCKS[start.kind] + 1}
    with Image.open(tmp_path / "images" / "grad_scales.png") as picture:
        assert picture.width > picture.height > 200


def test_what_a_checkpoint_holds(start, tmp_path):
    last = start(tmp_path, steps=2, precision="fp16")
    weights, average = load_weights(last, ema=False), load_weights(last, ema=True)
    half = {name for name, tensor in weights.items() if tensor.dtype == torch.float16}
    assert len(half) == BLOCKS[start.kind] * (2 if start.kind == "dalle" else 4)
    assert all(weights[name].ndim > 1 for name in half)
    assert {tensor.dtype for name, tensor in weights.items() if name not in half} == {torch.float32}
    assert {tensor.dtype for tensor in average.values()} == {torch.float32}
    moments = load_training_state(last)["optimizer"]["state"].values()
    assert {state["exp_avg"].dtype for state in moments} == {torch.int16, torch.float32}
    if start.kind == "dalle":
        assert Pipeline.from_pretrained(tmp_path).generate(["a red circle"]).images.isfinite().all()


@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_run_is_bit_identical(start, tmp_path, stop):
    whole = start(tmp_path / "whole", steps=7, precision="fp16")
    start(tmp_path / "parts", steps=stop, precision="fp16")
    resumed = start(tmp_path / "parts", steps=7, precision="fp16", resume=True)
    assert_same_checkpoint(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert read_log(tmp_path / "whole" / "grad_scales.jsonl") == read_log(tmp_path / "parts" / "grad_scales.jsonl")


@pytest.mark.parametrize(("first", "second"), [("fp32", "fp16"), ("fp16", "bf16")])
def test_precision_of_a_resumed_run(start, tmp_path, first, second):
    start(tmp_path, steps=1, precision=first)
    message = f"precision of checkpoint {latest_checkpoint(tmp_path)} is {first!r}, expected {second!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        start(tmp_path, steps=2, precision=second, resume=True)


@pytest.mark.parametrize("block", [None, 0])
def test_an_overflow_skips_the_update_and_lowers_the_scale_of_its_block(start, tmp_path, monkeypatch, block):
    before = start(tmp_path / "before", steps=2, precision="fp16")
    with monkeypatch.context() as patch:
        spoil_gradients(patch, {2}, block)
        after = start(tmp_path / "after", steps=3, precision="fp16")
    for name, weight in load_weights(before, ema=False).items():
        assert torch.equal(load_weights(after, ema=False)[name], weight)
    *_, before_it, last = read_log(tmp_path / "after" / "grad_scales.jsonl")
    fell = [new < old for old, new in zip(before_it["scales"], last["scales"], strict=True)]
    skips = [new - old for old, new in zip(before_it["skips"], last["skips"], strict=True)]
    expected = [index == block for index in range(len(fell))]
    assert fell == expected
    assert skips == [*map(int, expected), int(block is None)]
    record = read_log(tmp_path / "after" / "log.jsonl")[-1]
    assert (record["skipped_updates"], record["skipped_share"], record["grad_norm"]) == (1, 1.0, math.inf)


def test_one_loss_that_is_nan_costs_its_update_alone(start, tmp_path, monkeypatch):
    original, calls = start.model.loss, []

    def loss(self, *args, **options):
        calls.append(None)
        result = original(self, *args, **options)
        return result._replace(total=result.total * (math.nan if len(calls) == 2 else 1.0))

    monkeypatch.setattr(start.model, "loss", loss)
    start(tmp_path, steps=4, precision="fp16")
    assert [math.isnan(loss) for _, loss in losses(tmp_path)] == [False, True, False, False]
    assert read_log(tmp_path / "log.jsonl")[-1]["skipped_updates"] == 1


def test_losses_that_stay_nan_stop_the_run(start, tmp_path, monkeypatch):
    original = start.model.loss

    def loss(self, *args, **options):
        result = original(self, *args, **options)
        return result._replace(total=result.total * math.nan)

    monkeypatch.setattr(start.model, "loss", loss)
    with pytest.raises(FloatingPointError, match="the loss became nan by update 20; go on from the start"):
        start(tmp_path, steps=30, precision="fp16")


def test_gradients_that_stay_infinite_are_told(start, tmp_path, monkeypatch, capsys):
    spoil_gradients(monkeypatch, range(1000))
    start(tmp_path, steps=130, precision="fp16", log_every=13, ema_decay=0.0)
    said = capsys.readouterr().err
    assert said.count("warning: parameters outside the blocks had non-finite gradients in each of the last 130") == 1


def test_picture_needs_lines(tmp_path):
    (tmp_path / "grad_scales.jsonl").touch()
    with pytest.raises(ValueError, match="holds no gradient scales"):
        draw_grad_scales(tmp_path / "grad_scales.jsonl", tmp_path / "scales.png")


def test_a_run_without_matplotlib_says_so_once(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    start(tmp_path, steps=2, precision="fp16", images_every=1)
    assert capsys.readouterr().err.count("matplotlib is not installed") == 1
    assert not (tmp_path / "images" / "grad_scales.png").exists()


def test_blocks_run_scaled(start, tmp_path, monkeypatch):
    seen = []

    def look():
        seen.extend(float(block.grad_scale) for block in models[0].modules() if isinstance(block, Resblock))

    models, original = [], start.model.set_grad_scales
    monkeypatch.setattr(
        start.model, "set_grad_scales", lambda self, scales: (models.append(self), original(self, scales))
    )
    call_at(monkeypatch, start.model, 2, look)
    start(tmp_path, steps=2, precision="fp16")
    assert seen == [pytest.approx(2**13 * 2 ** (1 / 1000))] * BLOCKS[start.kind]

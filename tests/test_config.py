"""Dataclasses as flags and as JSON. Annotations here are strings; `Eager` has its own as objects."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest

from dalle_fast.config import add_arguments, from_arguments, from_dict, to_dict


@dataclass(frozen=True)
class Model:
    width: int = field(default=64, metadata={"help": "channels, 100% of them"})
    grid: tuple[int, int] = (8, 8)
    kind: Literal["small", "large"] = "small"
    bias: bool = True


@dataclass
class Train:
    data: Path
    learning_rate: float = field(default=3e-4, metadata={"help": "peak step size"})
    name: Optional[str] = None  # noqa: UP045 both spellings are supported
    top_k: int | None = None
    crop: int | tuple[int, int] = 4
    levels: tuple[float, ...] = (0.5,)
    ema: bool | None = None
    layers: Literal[2, 4] = 2
    seen: int = field(default=0, init=False)
    model: Model = field(default_factory=lambda: Model(width=32))


Eager = dataclasses.make_dataclass("Eager", [("steps", int, 5), ("model", Model, Model())])


def parse(arguments, config_class=Train, **options):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser, config_class, **options)
    return from_arguments(config_class, parser.parse_args(arguments), **options)


def help_of(config_class, **options):
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=200))
    add_arguments(parser, config_class, **options)
    return parser.format_help()


def test_defaults_including_those_of_a_nested_factory():
    assert parse(["--data", "x"]) == Train(data=Path("x"))
    assert parse(["--data", "x"]).model == Model(width=32)


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--learning-rate", "1e-2"], {"learning_rate": 1e-2}),
        (["--name", "run"], {"name": "run"}),
        (["--name", "none"], {"name": None}),
        (["--top-k", "7"], {"top_k": 7}),
        (["--top-k", "none"], {"top_k": None}),
        (["--crop", "6"], {"crop": 6}),
        (["--crop", "6x9"], {"crop": (6, 9)}),
        (["--levels", "1,0.25,1e-3"], {"levels": (1.0, 0.25, 1e-3)}),
        (["--ema", "true"], {"ema": True}),
        (["--layers", "4"], {"layers": 4}),
        (["--model-width", "128"], {"model": Model(width=128)}),
        (["--model-grid", "4,6", "--no-model-bias"], {"model": Model(width=32, grid=(4, 6), bias=False)}),
        (["--model-kind", "large", "--model-bias"], {"model": Model(width=32, kind="large")}),
    ],
)
def test_flags(flags, changes):
    assert parse(["--data", "x", *flags]) == dataclasses.replace(Train(data=Path("x")), **changes)


def test_annotations_as_objects():
    assert parse(["--steps", "9", "--model-width", "2"], Eager) == Eager(steps=9, model=Model(width=2))


def test_prefix():
    assert parse(["--decoder-width", "2"], Model, prefix="decoder") == Model(width=2)


def test_given_flags_are_laid_over_another_configuration():
    base = Train(data=Path("y"), learning_rate=1.0, model=Model(width=7, bias=False))
    changed = parse(["--model-width", "8"], defaults=base)
    assert changed == dataclasses.replace(base, model=Model(width=8, bias=False))


def test_help_shows_text_and_defaults():
    text = help_of(Train, defaults=Train(data=Path("y"), crop=(3, 5)))
    assert "--learning-rate FLOAT" in text
    assert "peak step size (default: 0.0003)" in text
    assert "channels, 100% of them (default: 32)" in text
    assert "(default: 3,5)" in text
    assert "--model-kind {small,large}" in text
    assert "--model-bias, --no-model-bias" in text
    assert "(default: none)" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model-width", "wide"], "argument --model-width: must be int, got 'wide'"),
        (["--model-grid", "4"], "argument --model-grid: must be int,int, got '4'"),
        (["--model-kind", "medium"], r"argument --model-kind: must be \{small,large\}, got 'medium'"),
        (["--top-k", "some"], r"argument --top-k: must be int\|none, got 'some'"),
        (["--ema", "maybe"], r"argument --ema: must be bool\|none, got 'maybe'"),
    ],
)
def test_flag_messages(flags, message):
    with pytest.raises(argparse.ArgumentError, match=f"^{message}$"):
        parse(["--data", "x", *flags])


def test_missing_required_flag(capsys):
    with pytest.raises((SystemExit, argparse.ArgumentError)) as raised:
        parse([])
    assert "the following arguments are required: --data" in capsys.readouterr().err + str(raised.value)


def test_type_that_cannot_be_a_flag():
    odd = dataclasses.make_dataclass("Odd", [("table", dict, field(default_factory=dict))])
    with pytest.raises(TypeError, match=r"^Odd.table has type dict, which cannot be a command-line flag$"):
        add_arguments(argparse.ArgumentParser(), odd)


def test_json_round_trip():
    config = Train(data=Path("a/b"), crop=(1, 2), levels=(1.0, 2.0), ema=False, model=Model(grid=(3, 4)))
    values = json.loads(json.dumps(to_dict(config) | {}))
    del values["seen"]
    assert values["model"] == {"width": 64, "grid": [3, 4], "kind": "small", "bias": True}
    assert from_dict(Train, values) == config


def test_integers_become_floats_where_a_float_is_asked_for():
    config = from_dict(Train, {"data": "x", "learning_rate": 1})
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"data": "x", "learningrate": 1.0},
            ValueError,
            "Train has no field learningrate; did you mean learning_rate?",
        ),
        ({"data": "x", "zzz": 1.0}, ValueError, "Train has no field zzz"),
        ({"data": "x", "model": {"depth": 1}}, ValueError, "Train.model has no field depth"),
        ({}, ValueError, "Train lacks the field data"),
        ({"data": 3}, TypeError, "Train.data must be Path, got 3"),
        ({"data": "x", "learning_rate": "1"}, TypeError, "Train.learning_rate must be float, got '1'"),
        ({"data": "x", "learning_rate": True}, TypeError, "Train.learning_rate must be float, got True"),
        ({"data": "x", "top_k": 1.5}, TypeError, "Train.top_k must be int|none, got 1.5"),
        ({"data": "x", "layers": 3}, TypeError, "Train.layers must be {2,4}, got 3"),
        ({"data": "x", "model": {"width": True}}, TypeError, "Train.model.width must be int, got True"),
        ({"data": "x", "model": {"bias": 1}}, TypeError, "Train.model.bias must be bool, got 1"),
        ({"data": "x", "model": {"grid": [1]}}, TypeError, "Train.model.grid must be int,int, got [1]"),
        ({"data": "x", "model": [1]}, TypeError, "Train.model must be a dict, got [1]"),
    ],
)
def test_from_dict_messages(values, error, message):
    with pytest.raises(error) as raised:
        from_dict(Train, values)
    assert str(raised.value) == message

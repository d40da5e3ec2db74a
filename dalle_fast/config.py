"""Dataclass configurations as command-line flags and as JSON.

    @dataclass
    class Train:
        learning_rate: float = field(default=3e-4, metadata={"help": "peak step size"})
        model: Model = field(default_factory=Model)

    add_arguments(parser, Train)                       # --learning-rate FLOAT, --model-width INT, ...
    train = from_arguments(Train, parser.parse_args())
    assert from_dict(Train, to_dict(train)) == train

Field types: int, float, str, bool, Path, Literal, tuples of these, unions of these (`X | None` reads `none`),
and dataclasses, whose flags carry the field's name as a prefix. A bool is `--name` and `--no-name`, a tuple
is `--grid 16,16` or `--grid 16x16`. Annotations may be strings (`from __future__ import annotations`) of
names that are visible in the module of the dataclass.

Flags that are not given leave no trace in the parsed arguments, so `from_arguments` can lay the given ones
over another configuration than the defaults, for example that of a checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

Config = TypeVar("Config")

_BOOLS = {"true": True, "false": False}


def add_arguments(
    parser: argparse.ArgumentParser,
    config_class: type[Config],
    prefix: str = "",
    defaults: Config | None = None,
) -> None:
    """Give `parser` one flag for each field of dataclass `config_class`.

    Args:
        prefix: put before every flag, `"model"` makes `--model-width` of `width`.
        defaults: values to show as defaults in the help; without it, those of the class. Fields that have
            neither are required flags.

    Raises:
        TypeError: a field has a type that cannot be written as a flag.
    """
    for field, hint in _fields(config_class):
        name = f"{prefix}_{field.name}" if prefix else field.name
        default = getattr(defaults, field.name) if defaults is not None else _default(field)
        required = default is dataclasses.MISSING
        if dataclasses.is_dataclass(hint):
            add_arguments(parser, hint, name, None if required else default)
            continue
        text = field.metadata.get("help", "")
        if not required:
            text = f"{text} (default: {_show(default)})".lstrip()
        options: dict[str, Any] = {
            "help": text.replace("%", "%%"),
            "dest": name,
            "required": required,
            "default": argparse.SUPPRESS,
        }
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _flag_parser(hint, f"{config_class.__name__}.{field.name}")
            options["metavar"] = _describe(hint).upper() if get_origin(hint) is not Literal else _describe(hint)
        parser.add_argument("--" + name.replace("_", "-"), **options)


def from_arguments(
    config_class: type[Config], args: argparse.Namespace, prefix: str = "", defaults: Config | None = None
) -> Config:
    """The configuration that the flags of `add_arguments(parser, config_class, prefix)` ask for.

    Args:
        defaults: where the values of the flags that were not given come from; without it, the class.
    """
    values = {}
    for field, hint in _fields(config_class):
        name = f"{prefix}_{field.name}" if prefix else field.name
        default = getattr(defaults, field.name) if defaults is not None else _default(field)
        if dataclasses.is_dataclass(hint):
            values[field.name] = from_arguments(hint, args, name, None if default is dataclasses.MISSING else default)
        elif hasattr(args, name):
            values[field.name] = getattr(args, name)
        elif default is not dataclasses.MISSING:
            values[field.name] = default
    return config_class(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values: nested dicts, tuples as lists, paths as strings."""
    return _to_json(dataclasses.asdict(config))


def from_dict(config_class: type[Config], values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; fields with a default may be left out.

    Raises:
        ValueError: a field is unknown, or one without default is missing.
        TypeError: a value has the wrong type.
    """
    return _from_dict(config_class, values, config_class.__name__)


def _from_dict(config_class: type[Config], values: Any, path: str) -> Config:
    if not isinstance(values, dict):
        raise TypeError(f"{path} must be a dict, got {values!r}")
    fields = {field.name: (field, hint) for field, hint in _fields(config_class)}
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.8)
            raise ValueError(f"{path} has no field {name}" + (f"; did you mean {close[0]}?" if close else ""))
    arguments = {}
    for name, (field, hint) in fields.items():
        if name in values:
            arguments[name] = _convert(values[name], hint, f"{path}.{name}")
        elif _default(field) is dataclasses.MISSING:
            raise ValueError(f"{path} lacks the field {name}")
    return config_class(**arguments)


def _fields(config_class: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    """The fields that the constructor takes, each with its type."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.init:
            yield field, hints[field.name]


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _flag_parser(hint: Any, path: str) -> Callable[[str], Any]:
    _check_supported(hint, path)

    def parse(text: str) -> Any:
        try:
            return _parse(text, hint)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {_describe(hint)}, got {text!r}") from None

    return parse


def _check_supported(hint: Any, path: str) -> None:
    if _is_union(hint) or get_origin(hint) is tuple:
        for member in get_args(hint):
            if member is not Ellipsis:
                _check_supported(member, path)
    elif get_origin(hint) is not Literal and hint not in (int, float, str, bool, Path, types.NoneType):
        raise TypeError(f"{path} has type {_describe(hint)}, which cannot be a command-line flag")


def _parse(text: str, hint: Any) -> Any:
    """`text` as a value of type `hint`, or ValueError."""
    if _is_union(hint):
        # None first: every text is a str.
        for member in sorted(get_args(hint), key=lambda member: member is not types.NoneType):
            try:
                return _parse(text, member)
            except ValueError:
                continue
        raise ValueError(text)
    if hint is types.NoneType or hint is bool:
        words = {"none": None} if hint is types.NoneType else _BOOLS
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    if get_origin(hint) is Literal:
        words = {str(choice): choice for choice in get_args(hint)}
        if text not in words:
            raise ValueError(text)
        return words[text]
    if get_origin(hint) is tuple:
        parts = re.split("[,x]", text)
        return tuple(_parse(part, member) for part, member in zip(parts, _members(hint, parts), strict=True))
    return hint(text)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """JSON `value` as a value of type `hint`, or TypeError."""
    if dataclasses.is_dataclass(hint):
        return _from_dict(hint, value, path)
    if _is_union(hint):
        for member in get_args(hint):
            try:
                return _convert(value, member, path)
            except TypeError:
                continue
    elif get_origin(hint) is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(hint)):
            return value
    elif get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            members = _members(hint, value)
            if len(members) == len(value):
                pairs = zip(value, members, strict=True)
                return tuple(_convert(entry, member, path) for entry, member in pairs)
    elif hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise TypeError(f"{path} must be {_describe(hint)}, got {value!r}")


def _members(hint: Any, values: list | tuple) -> tuple:
    """The types of a tuple's entries, `tuple[int, ...]` made as long as `values`."""
    members = get_args(hint)
    return (members[0],) * len(values) if members[-1] is Ellipsis else members


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _describe(hint: Any) -> str:
    if _is_union(hint):
        return "|".join(_describe(member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if get_origin(hint) is tuple:
        return ",".join("..." if member is Ellipsis else _describe(member) for member in get_args(hint))
    if hint is types.NoneType:
        return "none"
    return getattr(hint, "__name__", str(hint))


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_show, value))
    return "none" if value is None else str(value)


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value

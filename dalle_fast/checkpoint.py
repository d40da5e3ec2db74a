"""Checkpoint directories: written atomically, read strictly, never pickled.

A run writes `OUT/step-0000500/`, each holding

    config.json           format_version, kind ("dvae" | "dalle"), step, model, and what the caller adds
    model.safetensors     the model's state dict
    ema.safetensors       optional: its moving average
    training.safetensors  optional: the tensors of the training state (optimiser moments, RNG states, ...)
    training.json         optional: the rest of that state, with a reference in place of every tensor
    ...                   optional: files and folders of the caller (tokenizer.json, dvae/), hard-linked

Atomicity: everything is written to a hidden sibling and fsynced, then renamed once; older checkpoints are
deleted after that, each renamed to a hidden name first. A process killed at any moment therefore leaves the
last good checkpoint, and the next save removes what it left half done. A step that is saved again keeps its
previous directory as `step-0000500.old` for the instant in which the new one takes its name.

Limits: one writer per run directory. Tensors come back contiguous and on the CPU; tensors that share memory
are stored once for each name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT_VERSION = 1
KINDS = ("dvae", "dalle")

_CONFIG, _MODEL, _EMA = "config.json", "model.safetensors", "ema.safetensors"
_TRAINING_TENSORS, _TRAINING_VALUES = "training.safetensors", "training.json"
_OWN_FILES = (_CONFIG, _MODEL, _EMA, _TRAINING_TENSORS, _TRAINING_VALUES)
# What torch's restricted unpickler raises on a file that is damaged or holds other objects than tensors.
_NOT_A_STATE_DICT = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    AssertionError,
    TypeError,
    AttributeError,
)
_STEP_NAME = re.compile(r"step-(\d+)(\.old)?")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message is one sentence with the path and the cause."""


def write_checkpoint(
    target: str | Path,
    *,
    config: dict[str, Any],
    model: dict[str, Tensor],
    ema: dict[str, Tensor] | None = None,
    training: dict[str, Any] | None = None,
    files: dict[str, Path] | None = None,
) -> None:
    """Write directory `target` atomically; one that is there already is replaced.

    Args:
        target: the directory; its parent is made if missing.
        config: JSON values with at least `kind` and `model`; `format_version` is added.
        model: state dict. Any device, any strides, tied tensors allowed.
        ema: state dict of the averaged weights.
        training: nested dicts (keys str or int), lists and tuples of tensors, numbers, strings and None, as
            `Optimizer.state_dict()` and `torch.get_rng_state()` give. `load_training_state` gives it back.
        files: name in the checkpoint -> file or folder, hard-linked, or copied where links are not possible.

    Raises:
        ValueError, TypeError: an argument breaks the rules above; nothing is written.
        CheckpointError: the disk is full, the directory is not writable, ...; what was there before survives.
    """
    if config.get("kind") not in KINDS:
        raise ValueError(f"config['kind'] must be one of {', '.join(KINDS)}, got {config.get('kind')!r}")
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"config['model'] must be a dict, got {config.get('model')!r}")
    files = files or {}
    for name in files:
        if name in _OWN_FILES or name in (".", "..") or Path(name).name != name:
            raise ValueError(f"files must have plain names other than the checkpoint's own, got {name!r}")

    values = {_CONFIG: {"format_version": FORMAT_VERSION} | config}
    tensors = {_MODEL: model}
    if ema is not None:
        tensors[_EMA] = ema
    if training is not None:
        tensors[_TRAINING_TENSORS] = {}
        values[_TRAINING_VALUES] = _encode(training, "training", tensors[_TRAINING_TENSORS])
    texts = {name: json.dumps(value, indent=2, allow_nan=False) + "\n" for name, value in values.items()}

    target = Path(target)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(".step-*.tmp"):
            shutil.rmtree(stale)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for name, state in tensors.items():
            save_file(_storable(state), temporary / name)
            # safetensors makes its files readable by their owner only; follow the umask instead.
            shutil.copymode(temporary / _CONFIG, temporary / name)
        for name, source in files.items():
            if Path(source).is_dir():
                shutil.copytree(source, temporary / name, copy_function=_link_or_copy)
            else:
                _link_or_copy(source, temporary / name)
        _fsync_tree(temporary)
        _move_into_place(temporary, target)
        _fsync(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write checkpoint {target}: {_cause(error)}; earlier checkpoints are kept"
        ) from error


def save_checkpoint(
    out: str | Path,
    step: int,
    *,
    config: dict[str, Any],
    model: dict[str, Tensor],
    ema: dict[str, Tensor] | None = None,
    training: dict[str, Any] | None = None,
    files: dict[str, Path] | None = None,
    keep: int = 2,
) -> Path:
    """Write `out/step-<step>` atomically, then delete all but the `keep` newest checkpoints up to `step`.

    Args:
        out: run directory, made if missing.
        step: updates done so far; names the directory, and is added to config.json.
        config, model, ema, training, files: see `write_checkpoint`.
        keep: checkpoints to keep, at least 1. Checkpoints of later steps, as a run has them that went back to
            an earlier one, are left alone.

    Returns:
        The new checkpoint directory.

    Raises:
        ValueError, TypeError, CheckpointError: as `write_checkpoint`; the older checkpoints survive.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    target = Path(out) / f"step-{step:07d}"
    write_checkpoint(target, config={"step": step} | config, model=model, ema=ema, training=training, files=files)
    try:
        _delete_older(target, keep)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {target} is written, but an older one cannot be deleted: {_cause(error)}"
        ) from error
    return target


def latest_checkpoint(out: str | Path) -> Path:
    """The newest complete checkpoint of run directory `out`, or `out` itself if it is a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    out = Path(out)
    if not out.is_dir():
        raise CheckpointError(f"no checkpoint at {out}: not a directory")
    if _is_complete(out):
        return out
    checkpoints = _checkpoints(out)
    if not checkpoints:
        raise CheckpointError(f"no checkpoint at {out}: neither {_CONFIG} and {_MODEL} nor step-* folders in it")
    return checkpoints[-1]


def load_config(path: str | Path, kind: str) -> dict[str, Any]:
    """Read config.json of checkpoint directory `path` and check its format version, fields and kind.

    Raises:
        CheckpointError: the file is missing, not JSON, lacks a field, is of a later version or another kind.
    """
    config = _read_json(Path(path) / _CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"checkpoint {path}: {_CONFIG} must hold an object, got {type(config).__name__}")
    for field, field_type in (("format_version", int), ("kind", str), ("model", dict)):
        if field not in config:
            raise CheckpointError(f"checkpoint {path}: {_CONFIG} lacks the field {field}")
        value = config[field]
        if not isinstance(value, field_type):
            raise CheckpointError(
                f"checkpoint {path}: {field} in {_CONFIG} must be {field_type.__name__}, got {value!r}"
            )
        # Before the other fields: a later version may have renamed them.
        if field == "format_version" and value > FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {path} has format version {value}, this dalle_fast reads up to "
                f"{FORMAT_VERSION}; upgrade dalle_fast"
            )
    if config["kind"] != kind:
        raise CheckpointError(f"checkpoint {path} is of kind {config['kind']}, expected {kind}")
    return config


def load_weights(path: str | Path, *, ema: bool) -> dict[str, Tensor]:
    """State dict of checkpoint directory `path`: the averaged weights if `ema`, else the weights themselves.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return _read_safetensors(Path(path) / (_EMA if ema else _MODEL))


def load_training_state(path: str | Path) -> dict[str, Any]:
    """The `training` argument of the `save_checkpoint` call that wrote checkpoint directory `path`.

    Raises:
        CheckpointError: the checkpoint has no training state, or it is damaged.
    """
    path = Path(path)
    if not (path / _TRAINING_VALUES).exists():
        raise CheckpointError(f"checkpoint {path} cannot be resumed: it has no {_TRAINING_VALUES}")
    values, tensors = _read_json(path / _TRAINING_VALUES), _read_safetensors(path / _TRAINING_TENSORS)
    try:
        return _decode(values, tensors)
    except KeyError as error:
        raise CheckpointError(f"checkpoint {path}: {_TRAINING_TENSORS} lacks tensor {error.args[0]}") from error


def load_model_state(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load `state` into `module`, strictly: same names, same shapes; values are cast to the module's dtypes.

    A module on the meta device takes its parameters from `state`, on the device of `state`; buffers that are
    not part of its state dict stay on the meta device.

    Args:
        source: where `state` comes from, for the message.

    Raises:
        ValueError: names the first missing, unexpected or mis-shaped tensor; `module` is unchanged.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    if missing:
        raise ValueError(f"{source} lacks tensor {missing[0]}{_and_more(missing)}")
    unexpected = [name for name in state if name not in own]
    if unexpected:
        raise ValueError(f"{source} holds tensor {unexpected[0]} unknown to the model{_and_more(unexpected)}")
    differing = [name for name in own if own[name].shape != state[name].shape]
    if differing:
        name = differing[0]
        raise ValueError(
            f"tensor {name} has shape {tuple(state[name].shape)} in {source}, "
            f"the model needs {tuple(own[name].shape)}{_and_more(differing)}"
        )
    if any(tensor.is_meta for tensor in own.values()):
        module.load_state_dict({name: state[name].to(own[name].dtype) for name in own}, assign=True)
    else:
        module.load_state_dict(state)


def check_match(field: str, checkpoint_value: Any, expected_value: Any, path: str | Path) -> None:
    """Raise ValueError with `field` and both values unless they are equal; a tuple equals the same list."""
    if _lists(checkpoint_value) != _lists(expected_value):
        raise ValueError(f"{field} of checkpoint {path} is {checkpoint_value!r}, expected {expected_value!r}")


def load_foreign_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a plain state dict of another tool: .safetensors, or with any other suffix through `torch.load`.

    `torch.load` runs with `weights_only=True`: a file that pickles anything but tensors is refused, not run.

    Raises:
        CheckpointError: the file is missing, damaged, or not a dict of tensors.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {_cause(error)}") from error
    except _NOT_A_STATE_DICT as error:
        raise CheckpointError(
            f"cannot read {path}: it is damaged or pickles more than tensors, which is never loaded; "
            "write model.state_dict() with torch.save or safetensors"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must hold a dict of tensors, got {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} must hold a dict from names to tensors, got {type(value).__name__} under {name!r}"
            )
    return {name: value.detach() for name, value in state.items()}


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_complete(path: Path) -> bool:
    return (path / _CONFIG).is_file() and (path / _MODEL).is_file()


def _checkpoints(out: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; `.old` counts as older than the step that replaced it."""
    found = []
    for path in out.iterdir():
        match = _STEP_NAME.fullmatch(path.name)
        if match and _is_complete(path):
            found.append((int(match[1]), match[2] is None, path))
    return [path for _, _, path in sorted(found)]


def _move_into_place(temporary: Path, target: Path) -> None:
    if target.exists():
        previous = target.with_name(f"{target.name}.old")
        if previous.exists():
            _discard(previous)
        os.rename(target, previous)
    os.rename(temporary, target)


def _delete_older(target: Path, keep: int) -> None:
    replaced = target.with_name(f"{target.name}.old")
    if replaced.exists():
        _discard(replaced)
    checkpoints = _checkpoints(target.parent)
    older = checkpoints[: checkpoints.index(target)]
    for path in older[: max(0, len(older) - (keep - 1))]:
        _discard(path)


def _discard(path: Path) -> None:
    # Hidden first: a kill during rmtree must not leave a half-deleted directory under a checkpoint's name.
    hidden = path.with_name(f".{path.name}.tmp")
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def _link_or_copy(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(os.path.realpath(source), destination)
    except OSError:
        # Another file system, or one without hard links.
        shutil.copyfile(source, destination)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(root: Path) -> None:
    for path in root.rglob("*"):
        _fsync(path)
    _fsync(root)


def _storable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors no two of which share memory, as safetensors asks."""
    storable: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        storable[name] = tensor
    return storable


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON form of a nested state; its tensors go to `tensors`. What JSON lacks is marked by a `$` key."""
    if isinstance(value, Tensor):
        name = f"{path}#{len(tensors)}"
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int):
                raise TypeError(f"keys of the training state must be str or int, got {key!r} at {path}")
        items = [(key, _encode(entry, f"{path}.{key}", tensors)) for key, entry in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(items)
        return {"$dict": items}
    if isinstance(value, list | tuple):
        entries = [_encode(entry, f"{path}.{index}", tensors) for index, entry in enumerate(value)]
        return {"$tuple": entries} if isinstance(value, tuple) else entries
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        "the training state must hold tensors, numbers, strings, None, dicts, lists and tuples, "
        f"got {type(value).__name__} at {path}"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$dict" in value:
        return {key: _decode(entry, tensors) for key, entry in value["$dict"]}
    if "$tuple" in value:
        return tuple(_decode(entry, tensors) for entry in value["$tuple"])
    if "$float" in value:
        return float(value["$float"])
    return {key: _decode(entry, tensors) for key, entry in value.items()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {_cause(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"cannot read {path}: not JSON ({error})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        # safetensors raises its own FileNotFoundError, without errno.
        cause = _cause(error) if path.exists() else "no such file"
        raise CheckpointError(f"cannot read {path}: {cause}") from error
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: damaged ({error})") from error


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_lists(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    return value

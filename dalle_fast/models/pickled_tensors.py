"""The tensors of a file that torch.save wrote, read without running anything.

A pickle is a program. This module interprets it: a few opcodes that build tuples, lists and dicts, and a closed list of
names, none of which is imported or called. A module becomes a record with a dict, a tensor a record with a place in a
storage, and only when the program has ended are the bytes of the storages read. Whatever else a file asks for is
refused by name.

    zip file (torch >= 1.6)   NAME/data.pkl, the program; NAME/data/KEY, the bytes of each storage
    one stream (before)       magic number, version, platform, the program, the keys, and a count and bytes for each key

What is read is a whole pickled module of the published dVAE, or a dict from names to tensors. The time and memory that
a file can ask for are bounded by its own length: zip members must be stored as they are, and tensors must not be larger
than their storages.

Source: the formats as torch/serialization.py writes them, and the opcodes of Python's pickletools.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["read_tensors"]

_MODULES = {
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
}
_STORAGES = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
}
# Name -> fewest and most arguments, the first of which say what the tensor is.
_TENSORS = {"torch._utils._rebuild_tensor": (4, 4), "torch._utils._rebuild_tensor_v2": (6, 7)}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
# Values of a module's attributes that no tensor depends on.
_IGNORED = {"__builtin__.set", "builtins.set", "functools.partial", "torch.device"}
_DICT = "collections.OrderedDict"
_NAMES = {*_MODULES, *_STORAGES, *_TENSORS, *_PARAMETERS, *_IGNORED, _DICT}

_ZIP_MAGIC = b"PK\x03\x04"
_STREAM_MAGIC, _STREAM_VERSION = 0x1950A86A20F9469CFC6C, 1001
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS_AND_TEXT = {
    "BINFLOAT",
    "BININT",
    "BININT1",
    "BININT2",
    "BINUNICODE",
    "LONG1",
    "SHORT_BINUNICODE",
}
_NEW = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Far above what there is. Without them a small file could ask for a product of very many sizes, for modules inside
# modules whose names fill the memory, or for a dict of numbers that all have the same hash.
_MOST_DIMS, _LONGEST_NAME, _LARGEST_KEY = 64, 1024, 1 << 31

# What reading a file that is cut or altered runs into, in this module and in zipfile, pickletools and torch.
_DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
)


class _RefusedError(ValueError):
    """The file is whole, and asks for something that is not on the list."""


class _Name:
    """A name of the closed list; it stands for nothing."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Object:
    """What would be a module, or another object, were it made."""

    __slots__ = ("name", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: dict[str, Any] = {}


class _Storage:
    __slots__ = ("dtype", "key", "numel")

    def __init__(self, dtype: torch.dtype, key: str, numel: int) -> None:
        self.dtype, self.key, self.numel = dtype, key, numel

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _View:
    """A tensor before its bytes are there."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any) -> None:
        if not isinstance(storage, _Storage):
            raise _RefusedError(f"a tensor must lie in a storage, got {_kind(storage)}")
        if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)):
            raise _RefusedError(f"a tensor must have a stride for each size, got {_kind(size)} and {_kind(stride)}")
        if len(size) > _MOST_DIMS:
            raise _RefusedError(f"a tensor must have at most {_MOST_DIMS} dimensions, got {len(size)}")
        for number in (offset, *size, *stride):
            if type(number) is not int or number < 0:
                raise _RefusedError(f"sizes, strides and offset of a tensor must be integers >= 0, got {number!r}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # A stride of 0 would make a large tensor of a small storage.
        if math.prod(size) > storage.numel or (math.prod(size) and last >= storage.numel):
            raise _RefusedError(
                f"a tensor must fit its storage of {storage.numel} values, "
                f"got size {size}, stride {stride}, offset {offset}"
            )
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a pickled module, or of a dict from names to tensors, and run nothing.

    Args:
        path: a file of torch.save, of either format; with the suffix .safetensors, one of safetensors.

    Returns:
        State dict: name to tensor, on the CPU, contiguous, in the dtype of the file; no two share memory.

    Raises:
        ValueError: the file is missing, damaged, or holds anything but tensors; the message names it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return _read_zip(content) if content.startswith(_ZIP_MAGIC) else _read_stream(content)
    except _RefusedError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    except _DAMAGE as error:
        cause = str(error) or type(error).__name__
        raise ValueError(f"cannot read {path}: it is damaged, or was not written by torch.save ({cause})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    # Here and not above: the models work without this package.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"cannot read {path}: it is damaged ({error})") from error


def _read_zip(content: bytes) -> dict[str, Tensor]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: info for info in archive.infolist()}
        programs = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(programs) != 1:
            raise _RefusedError(f"a zip file of torch.save has one data.pkl, got {len(programs)}")
        root = programs[0].removesuffix("data.pkl")
        unread = len(content)

        def read(name: str) -> bytes:
            nonlocal unread
            if members[name].compress_type != zipfile.ZIP_STORED:
                raise _RefusedError(f"members of a zip file of torch.save are not compressed, got {name}")
            # Some versions of zipfile read members that lie inside each other, which together have any size.
            unread -= members[name].file_size
            if unread < 0:
                raise _RefusedError(f"members of a zip file of torch.save do not overlap, got {name}")
            return archive.read(name)

        if f"{root}byteorder" in members and read(f"{root}byteorder") != b"little":
            raise _RefusedError("its bytes are in big-endian order, which is not supported")
        views = _views(_run(io.BytesIO(read(programs[0]))))
        return _materialise(views, lambda storage: read(f"{root}data/{storage.key}"))


def _read_stream(content: bytes) -> dict[str, Tensor]:
    file = io.BytesIO(content)
    if _run(file) != _STREAM_MAGIC:
        raise ValueError("no magic number at its start")
    if (version := _run(file)) != _STREAM_VERSION:
        raise ValueError(f"version {version} instead of {_STREAM_VERSION}")
    platform = _run(file)
    if not isinstance(platform, dict) or platform.get("little_endian") is not True:
        raise _RefusedError("its bytes are in big-endian order, which is not supported")
    views = _views(_run(file))
    keys = _run(file)
    if not isinstance(keys, list):
        raise ValueError("no list of storages")
    places: dict[Any, tuple[int, int]] = {}  # key -> values, position of the first
    sizes = {view.storage.key: view.storage.dtype.itemsize for view in views.values()}
    for key in keys:
        if key not in sizes:
            raise _RefusedError(f"it has a storage that no tensor uses, {key!r}")
        (numel,) = struct.unpack("<q", file.read(8))
        if numel < 0:  # would go back, to storages that lie inside each other
            raise ValueError(f"storage {key} has {numel} values")
        places[key] = numel, file.tell()
        file.seek(numel * sizes[key], io.SEEK_CUR)

    def read(storage: _Storage) -> bytes:
        numel, start = places[storage.key]
        if numel != storage.numel:
            raise ValueError(f"storage {storage.key} has {numel} values instead of {storage.numel}")
        return content[start : start + storage.nbytes]

    return _materialise(views, read)


def _materialise(views: dict[str, _View], read: Callable[[_Storage], bytes]) -> dict[str, Tensor]:
    """The tensors, from the bytes that ``read`` gives of a storage."""
    flats: dict[str, Tensor] = {}
    unused: dict[str, int] = {}  # key -> values of the storage that no tensor has had yet
    tensors = {}
    for name, view in views.items():
        storage, key = view.storage, view.storage.key
        if key not in flats:
            data = read(storage)
            if len(data) != storage.nbytes:
                raise ValueError(f"the storage of {name} has {len(data)} bytes instead of {storage.nbytes}")
            empty = torch.empty(0, dtype=storage.dtype)
            flats[key] = torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else empty
            unused[key] = storage.numel
        flat = flats[key]
        unused[key] -= math.prod(view.size)
        # Many tensors on one storage would be much memory from a small file.
        if unused[key] < 0 or (flat.dtype, flat.numel()) != (storage.dtype, storage.numel):
            raise _RefusedError(f"each tensor must have memory of its own, got another one's under {name}")
        tensor = flat.as_strided(view.size, view.stride, view.offset)
        tensors[name] = tensor.contiguous() if tensor.numel() == flat.numel() else tensor.clone()
    return tensors


def _views(root: Any) -> dict[str, _View]:
    """Name to tensor of a module and those inside it, or of a dict."""
    if isinstance(root, dict):
        for name, value in root.items():
            if not isinstance(value, _View):
                raise _RefusedError(f"it must hold tensors alone, got {_kind(value)} under {name!r}")
            if type(name) is not str:
                raise _RefusedError(f"its tensors must have names, got {name!r}")
        return root
    if not _is_module(root):
        raise _RefusedError(f"it must hold a module of the published dVAE or a dict of tensors, got {_kind(root)}")
    views: dict[str, _View] = {}
    seen, pending = {id(root)}, [("", root)]
    for prefix, module in pending:  # grows while it is walked
        for field in ("_parameters", "_buffers", "_modules"):
            entries = module.state.get(field, {})
            if not isinstance(entries, dict):
                raise _RefusedError(f"{field} of a module must be a dict, got {_kind(entries)}")
            # Otherwise a module inside itself, or the same one twice at each of many levels, had no end, and many
            # modules with one dict had more entries than the file is long.
            if entries and id(entries) in seen:
                raise _RefusedError(f"{field} of each module must be a dict of its own, got another one's")
            if entries:
                seen.add(id(entries))
            for name, value in entries.items():
                full_name = f"{prefix}{name}"
                if len(full_name) > _LONGEST_NAME:
                    start = f"{full_name[:40]}..."
                    raise _RefusedError(
                        f"names must have at most {_LONGEST_NAME} characters, got {len(full_name)} in {start}"
                    )
                if value is None:
                    continue
                if field == "_modules" and _is_module(value):
                    if id(value) in seen:
                        raise _RefusedError(f"module {full_name} must appear once, got it twice")
                    seen.add(id(value))
                    pending.append((f"{full_name}.", value))
                elif field != "_modules" and isinstance(value, _View):
                    views[full_name] = value
                else:
                    rule = "a module" if field == "_modules" else "a tensor"
                    raise _RefusedError(f"{full_name} must be {rule}, got {_kind(value)}")
    return views


def _is_module(value: Any) -> bool:
    return isinstance(value, _Object) and value.name in _MODULES


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    if isinstance(value, _View):
        return "a tensor"
    return value.name if isinstance(value, _Name | _Object) else type(value).__name__


def _run(file: BinaryIO) -> Any:
    """Interpret the program at the file's position, up to its end."""
    stack: list[Any] = []
    marked: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in _NUMBERS_AND_TEXT:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name == "TUPLE":
            items, stack = tuple(stack), marked.pop()
            stack.append(items)
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(_top(stack, count))]
        elif name == "APPEND":
            value = stack.pop()
            _extend(stack[-1], [value])
        elif name == "APPENDS":
            items, stack = stack, marked.pop()
            _extend(stack[-1], items)
        elif name == "SETITEM":
            key, value = stack.pop(-2), stack.pop()
            _set(stack[-1], [key, value])
        elif name == "SETITEMS":
            items, stack = stack, marked.pop()
            _set(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_name(*_top(stack, 2))]
        elif name == "BINPERSID":
            stack[-1] = _persistent(stack[-1])
        elif name == "REDUCE":
            stack[-2:] = [_reduce(*_top(stack, 2))]
        elif name == "NEWOBJ":
            stack[-2:] = [_new(*_top(stack, 2))]
        elif name == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise _RefusedError(f"it has the pickle opcode {name}, which torch.save does not use for tensors")
    raise EOFError("no end")


def _top(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("too little on the stack")
    return stack[-count:]


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise _RefusedError(f"only lists are extended, got {_kind(target)}")
    target.extend(items)


def _set(target: Any, items: list[Any]) -> None:
    if type(target) is not dict:
        raise _RefusedError(f"only dicts get items, got {_kind(target)}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise _RefusedError(f"the keys of a dict must be names or numbers, got {_kind(key)}")
        if type(key) is int and abs(key) >= _LARGEST_KEY:
            raise _RefusedError(f"numbers that are keys of a dict must be below {_LARGEST_KEY}, got {key}")
        target[key] = value


def _name(module: Any, name: Any) -> _Name:
    full_name = f"{module}.{name}"
    if type(module) is not str or type(name) is not str or full_name not in _NAMES:
        raise _RefusedError(f"it asks for {full_name}, which is not needed for tensors and is never run")
    return _Name(full_name)


def _persistent(value: Any) -> _Name | _Storage:
    """("storage", class, key, device, values[, None]), and in a stream ("module", class, file, source)."""
    if type(value) is tuple and len(value) == 4 and value[0] == "module" and isinstance(value[1], _Name):
        return value[1]
    if type(value) is not tuple or not 5 <= len(value) <= 6 or value[0] != "storage" or value[5:] not in ((), (None,)):
        raise _RefusedError("it refers to something outside the pickle that is no storage")
    _, kind, key, _, numel = value[:5]
    if not isinstance(kind, _Name) or kind.name not in _STORAGES:
        raise _RefusedError(f"a storage must hold floating-point numbers, got {_kind(kind)}")
    if type(key) is not str or type(numel) is not int or numel < 0:
        raise _RefusedError(f"a storage must have a name and a size >= 0, got {key!r} and {numel!r}")
    return _Storage(_STORAGES[kind.name], key, numel)


def _reduce(function: Any, arguments: Any) -> Any:
    if type(arguments) is not tuple or not isinstance(function, _Name):
        raise _RefusedError(f"it calls {_kind(function)}, which is never run")
    name = function.name
    if name in _TENSORS:
        fewest, most = _TENSORS[name]
        if not fewest <= len(arguments) <= most:
            raise _RefusedError(f"{name} takes {fewest} to {most} arguments, got {len(arguments)}")
        return _View(*arguments[:4])
    if name in _PARAMETERS and arguments and isinstance(arguments[0], _View):
        return arguments[0]
    if name == _DICT and not arguments:
        return {}
    if name in _IGNORED:
        return _Object(name)
    raise _RefusedError(f"it calls {name} with other arguments than torch.save writes, which is never run")


def _new(kind: Any, arguments: Any) -> _Object:
    if not isinstance(kind, _Name) or kind.name not in _MODULES or arguments != ():
        raise _RefusedError(f"it makes an object of {_kind(kind)}, which is never run")
    return _Object(kind.name)


def _build(target: Any, state: Any) -> None:
    """The attributes of a module; those of an ordered dict and of what is ignored are dropped."""
    if _is_module(target):
        if type(state) is not dict:
            raise _RefusedError(f"the state of {target.name} must be a dict, got {_kind(state)}")
        target.state = state
    elif type(target) is not dict and not isinstance(target, _Object):
        raise _RefusedError(f"only modules and dicts have a state, got one for {_kind(target)}")

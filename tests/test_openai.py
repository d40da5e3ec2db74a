"""The published dVAE's files: read without running anything, refused by name, equal to the published code."""

import functools
import os
import pickle
import random
import re
import struct
import sys
import time
import types
import zipfile
import zlib

import pytest
import torch
from helpers import randomize, tiny_dvae
from published import save_published
from safetensors.torch import save_file
from torch import nn

from dalle_fast.models.dvae import DVAE, map_pixels, unmap_pixels
from dalle_fast.models.openai import sizes_of
from dalle_fast.models.pickled_tensors import read_tensors
from dalle_fast.pipeline import load_dvae, load_dvae_config, save_dvae

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
each_format = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "stream"])


@pytest.fixture
def dvae():
    model = tiny_dvae(blocks_per_group=2)
    randomize(model)
    return model.eval()


def assert_same_state(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


@each_format
def test_reads_pickled_modules(dvae, tmp_path, monkeypatch, legacy):
    paths = save_published(dvae, tmp_path, monkeypatch, legacy=legacy)
    assert zipfile.is_zipfile(paths[0]) is not legacy
    assert "dall_e.encoder" not in sys.modules
    read = DVAE.from_openai(*paths, image_size=16)
    assert read.config == dvae.config
    assert_same_state(read, dvae)
    assert not read.training
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in read.parameters())
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(read.logits(images), dvae.logits(images))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_state_dicts(dvae, tmp_path, suffix, dtype):
    dvae = dvae.to(dtype)
    paths = [tmp_path / f"{part}{suffix}" for part in ("encoder", "decoder")]
    for path in paths:
        state = getattr(dvae, path.stem).state_dict()
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    read = DVAE.from_openai(*map(str, paths), image_size=16)
    assert_same_state(read, dvae.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@each_format
def test_reads_any_strides(tmp_path, dtype, legacy):
    state = {
        "transposed": torch.randn(3, 4).to(dtype).t(),
        "part": torch.randn(5, 6).to(dtype)[1:, 2:4],
        "number": torch.tensor(3.0, dtype=dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "parameter": nn.Parameter(torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=torch.channels_last)),
    }
    torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=not legacy)
    read = read_tensors(tmp_path / "state.pt")
    assert list(read) == list(state)
    for name, tensor in state.items():
        assert read[name].dtype == dtype
        assert read[name].is_contiguous()
        assert torch.equal(read[name], tensor)
        assert read[name].untyped_storage().nbytes() == tensor.numel() * dtype.itemsize


@each_format
def test_higher_pickle_protocol(dvae, tmp_path, legacy):
    path = tmp_path / "encoder.pt"
    torch.save(dvae.encoder.state_dict(), path, pickle_protocol=4, _use_new_zipfile_serialization=not legacy)
    assert read_tensors(path).keys() == dvae.encoder.state_dict().keys()


def test_load_dvae_of_a_folder_with_both_files(dvae, tmp_path, monkeypatch):
    dvae = tiny_dvae(image_size=256)
    save_published(dvae, tmp_path, monkeypatch)
    assert load_dvae_config(tmp_path) == dvae.config
    read = load_dvae(str(tmp_path))
    assert_same_state(read, dvae)
    save_dvae(read, tmp_path / "saved")
    again = load_dvae(tmp_path / "saved")
    assert again.config == dvae.config
    assert_same_state(again, dvae)
    (tmp_path / "decoder.pkl").unlink()
    with pytest.raises(ValueError, match=r"^cannot read .*decoder\.pkl: No such file or directory$"):
        load_dvae(tmp_path)


@pytest.mark.parametrize("size", [64, 256])
def test_equals_the_published_code(tmp_path, monkeypatch, size):
    """Full size; needs the package (pip install --no-deps DALL-E attrs)."""
    pytest.importorskip("attr")
    try:
        import requests  # noqa: F401
    except ImportError:
        monkeypatch.setitem(sys.modules, "requests", types.ModuleType("requests"))  # it downloads with it
    published = pytest.importorskip("dall_e")
    parts = {"encoder": published.Encoder(), "decoder": published.Decoder()}
    for name, part in parts.items():
        for tensor_name, parameter in part.named_parameters():
            if tensor_name.endswith(".b"):  # 0 at the start
                nn.init.normal_(parameter, std=0.1)
        torch.save(part, tmp_path / f"{name}.pkl", _use_new_zipfile_serialization=name == "encoder")
    dvae = DVAE.from_openai(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl")
    images = torch.rand(1, 3, size, size)
    with torch.no_grad():
        logits = parts["encoder"](map_pixels(images))
        torch.testing.assert_close(dvae.logits(images), logits, rtol=0, atol=1e-5)
        tokens = logits.argmax(1)
        codes = nn.functional.one_hot(tokens, 8192).permute(0, 3, 1, 2).float()
        statistics = parts["decoder"](codes)
        torch.testing.assert_close(dvae.decoder(codes), statistics, rtol=0, atol=1e-5)
        torch.testing.assert_close(dvae.decode(tokens), unmap_pixels(statistics[:, :3].sigmoid()), rtol=0, atol=1e-5)
        assert (dvae.encode(images) == tokens).float().mean() > 0.999


def test_swapped_files(dvae, tmp_path, monkeypatch):
    encoder, decoder = save_published(dvae, tmp_path, monkeypatch)
    with pytest.raises(
        ValueError, match=r"^encoder_path must hold the encoder and decoder_path the decoder, got them sw"
    ):
        DVAE.from_openai(decoder, encoder)
    with pytest.raises(
        ValueError, match=r"^encoder_path must hold the encoder of a dVAE, got the decoder of one in .*pkl"
    ):
        DVAE.from_openai(decoder, decoder)
    with pytest.raises(
        ValueError, match=r"^decoder_path must hold the decoder of a dVAE, got the encoder of one in .*pkl"
    ):
        DVAE.from_openai(encoder, encoder)


FIRST, LAST, BLOCK = "blocks.input.w", "blocks.output.conv.w", "blocks.group_2.block_1.res_path.conv_1.w"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("encoder", {FIRST: None}, f"encoder_path must hold the encoder of a dVAE, got no tensor {FIRST} in PATH"),
        (
            "encoder",
            {FIRST: (8, 3, 5, 5)},
            f"{FIRST} must have shape (hidden, channels, 7, 7), got (8, 3, 5, 5) in PATH",
        ),
        ("decoder", {FIRST: (6,)}, f"{FIRST} must have shape (codebook_dim, vocab_size, 1, 1), got (6,) in PATH"),
        ("encoder", {LAST: None}, f"{LAST} must have shape (vocab_size, channels, 1, 1), got none in PATH"),
        ("encoder", {LAST: (12,)}, f"{LAST} must have shape (vocab_size, channels, 1, 1), got (12,) in PATH"),
        ("encoder", {BLOCK: None}, f"a dVAE of these sizes must have the tensor {BLOCK}, got none in PATH"),
        ("decoder", {"extra": (1,)}, "a dVAE of these sizes must not have the tensor extra, got one in PATH"),
        (
            "decoder",
            {FIRST: (6, 13, 1, 1)},
            f"{FIRST} must have shape (6, 12, 1, 1) to fit the encoder's sizes, got (6, 13, 1, 1) in PATH",
        ),
        (
            "encoder",
            {BLOCK: (4, 8, 1, 1)},
            f"{BLOCK} must have shape (4, 8, 3, 3) to fit the encoder's sizes, got (4, 8, 1, 1) in PATH",
        ),
        ("encoder", {FIRST: (10, 3, 7, 7)}, "hidden must be a multiple of 4, got 10"),
    ],
)
def test_tensors_that_do_not_fit(dvae, tmp_path, part, change, message):
    paths = [tmp_path / "encoder.pt", tmp_path / "decoder.pt"]
    for path in paths:
        state = dict(getattr(dvae, path.stem).state_dict())
        if path.stem == part:
            state |= {name: shape and torch.zeros(shape) for name, shape in change.items()}
        torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    message = message.replace("PATH", str(tmp_path / f"{part}.pt"))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DVAE.from_openai(*paths, image_size=16)


def test_without_blocks(dvae, tmp_path):
    paths = [tmp_path / "encoder.pt", tmp_path / "decoder.pt"]
    for path in paths:
        state = getattr(dvae, path.stem).state_dict()
        torch.save({name: tensor for name, tensor in state.items() if "group" not in name}, path)
    with pytest.raises(
        ValueError, match=r"encoder\.pt must hold tensors named blocks\.group_1\.block_1\.\*, got none$"
    ):
        DVAE.from_openai(*paths)


@pytest.mark.parametrize(("part", "name"), [("encoder", "output.conv"), ("decoder", "input")])
def test_sizes_without_values_are_refused(dvae, tmp_path, part, name):
    paths = [tmp_path / "encoder.pt", tmp_path / "decoder.pt"]
    for path in paths:
        large = {f"blocks.{name}.w": torch.empty(1 << 62, 0, 1, 1)} if path.stem == part else {}
        torch.save(getattr(dvae, path.stem).state_dict() | large, path)
    message = rf"^blocks\.{name}\.w must have values, got shape \(4611686018427387904, 0, 1, 1\) in .*{part}\.pt$"
    with pytest.raises(ValueError, match=message):
        DVAE.from_openai(*paths, image_size=16)


def test_integers_are_refused(dvae, tmp_path):
    paths = [tmp_path / "encoder.safetensors", tmp_path / "decoder.safetensors"]
    for path in paths:
        save_file({name: tensor.int() for name, tensor in getattr(dvae, path.stem).state_dict().items()}, path)
    with pytest.raises(ValueError, match=r"\.[wb] must be floating point, got torch\.int32 in .*encoder\.safetensors$"):
        DVAE.from_openai(*paths, image_size=16)


class Call:
    """Unpickling this calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@each_format
@pytest.mark.parametrize(
    ("name", "function"),
    [
        (f"{os.system.__module__}.system", lambda trap: Call(os.system, f"touch {trap}")),
        ("__builtin__.eval", lambda trap: Call(eval, f"open({str(trap)!r}, 'w')")),
        ("__builtin__.exec", lambda trap: Call(exec, f"open({str(trap)!r}, 'w')")),
        ("__builtin__.getattr", lambda trap: Call(getattr, trap, "touch")),
        ("torch.serialization.load", lambda trap: Call(torch.load, str(trap))),
        (f"{os.system.__module__}.system", lambda trap: functools.partial(os.system, f"touch {trap}")),
    ],
)
def test_calls_are_refused_and_not_run(tmp_path, legacy, name, function):
    trap, path = tmp_path / "trap", tmp_path / "encoder.pkl"
    torch.save({"weight": torch.ones(1), "x": function(trap)}, path, _use_new_zipfile_serialization=not legacy)
    message = f"cannot read {path}: it asks for {name}, which is not needed for tensors and is never run"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DVAE.from_openai(path, path)
    assert not trap.exists()


def stream(program: bytes, keys: tuple[str, ...] = (), *, little_endian: bool = True, after: bytes = b"") -> bytes:
    """A file of the older format with this program."""
    start = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": little_endian})
    return b"".join(pickle.dumps(part, 2) for part in start) + program + pickle.dumps(list(keys), 2) + after


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


CONV, TENSOR = name_of("dall_e.utils", "Conv2d"), name_of("torch._utils", "_rebuild_tensor_v2")
STORAGE = b"(" + text("storage") + name_of("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x02tQ"
OBJECT = b"\x80\x02" + CONV + b")\x81"


def tensor_of(size: bytes, stride: bytes, offset: bytes = b"K\x00", storage: bytes = STORAGE) -> bytes:
    return b"\x80\x02}" + text("w") + TENSOR + b"(" + storage + offset + size + stride + b"\x89}tRs."


@pytest.mark.parametrize(
    ("program", "message"),
    [
        # Ways to reach or to change what was not asked for by name.
        (
            b"\x80\x04" + text("os") + text("system") + b"\x93" + text("true") + b"\x85R.",
            "it asks for os.system, which",
        ),
        (
            b"\x80\x02" + name_of("dall_e.utils", "Conv2d.__init__") + b".",
            "it asks for dall_e.utils.Conv2d.__init__, wh",
        ),
        (b"\x80\x04K\x01K\x02\x93.", "it asks for 1.2, which is not needed"),
        (b"(ios\nsystem\n.", "it has the pickle opcode INST, which torch.save does not use"),
        (b"\x80\x02(" + CONV + b"o.", "it has the pickle opcode OBJ, which"),
        (b"\x80\x02\x82\x01.", "it has the pickle opcode EXT1, which"),
        (b"\x80\x02" + CONV + b")R.", "it calls dall_e.utils.Conv2d with other arguments than torch.save writes"),
        (b"\x80\x02" + text("x") + b")R.", "it calls str, which is never run"),
        (b"\x80\x02" + TENSOR + b")\x81.", "it makes an object of torch._utils._rebuild_tensor_v2, which is never run"),
        (b"\x80\x02" + CONV + b"K\x01\x85\x81.", "it makes an object of dall_e.utils.Conv2d, which is never run"),
        (
            b"\x80\x02" + name_of("collections", "OrderedDict") + b"]\x85R.",
            "it calls collections.OrderedDict with other a",
        ),
        (b"\x80\x02" + TENSOR + b"K\x01\x85R.", "torch._utils._rebuild_tensor_v2 takes 6 to 7 arguments, got 1"),
        (OBJECT + b"N}\x86b.", "the state of dall_e.utils.Conv2d must be a dict, got tuple"),
        (b"\x80\x02" + CONV + b"}b.", "only modules and dicts have a state, got one for dall_e.utils.Conv2d"),
        (b"\x80\x02]}b.", "only modules and dicts have a state, got one for list"),
        (OBJECT + text("a") + text("b") + b"s.", "only dicts get items, got dall_e.utils.Conv2d"),
        (OBJECT + b"K\x01a.", "only lists are extended, got dall_e.utils.Conv2d"),
        (b"\x80\x02})K\x01s.", "the keys of a dict must be names or numbers, got tuple"),
        (b"\x80\x02K\x01Q.", "it refers to something outside the pickle that is no storage"),
        # Values that are no tensors, or too large.
        (b"\x80\x02K\x01.", "it must hold a module of the published dVAE or a dict of tensors, got int"),
        (b"\x80\x02}" + text("a") + b"K\x01s.", "it must hold tensors alone, got int under 'a'"),
        (OBJECT + b"}" + text("_modules") + b"Nsb.", "_modules of a module must be a dict, got NoneType"),
        (OBJECT + b"}" + text("_parameters") + b"}" + text("w") + b"K\x01ssb.", "w must be a tensor, got int"),
        (
            OBJECT + b"q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb.",
            "module a must appear once, got it twice",
        ),
        (
            tensor_of(b"K\x03\x85", b"K\x01\x85"),
            "a tensor must fit its storage of 2 values, got size (3,), stride (1,)",
        ),
        (
            tensor_of(b"K\x02\x85", b"K\x01\x85", b"K\x01"),
            "a tensor must fit its storage of 2 values, got size (2,), st",
        ),
        (
            tensor_of(b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"),
            "a tensor must fit its storage of 2 values, got size (21474",
        ),
        (
            tensor_of(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"),
            "sizes, strides and offset of a tensor must be integers >= 0",
        ),
        (tensor_of(b"K\x02\x85", b")"), "a tensor must have a stride for each size, got tuple and tuple"),
        (
            tensor_of(b"(" + 65 * b"K\x01" + b"t", b"(" + 65 * b"K\x01" + b"t"),
            "a tensor must have at most 64 dimensions, got 65",
        ),
        (
            b"\x80\x02}\x8a\x05\0\0\0\x80\0K\x01s.",
            "numbers that are keys of a dict must be below 2147483648, got 2147483648",
        ),
        (
            tensor_of(b"K\x01\x85", b"K\x01\x85").replace(text("w"), b"K\x07"),
            "its tensors must have names, got 7",
        ),
        (
            OBJECT
            + b"}("
            + text("_parameters")
            + b"}q\x05"
            + text("w")
            + b"Ns"
            + text("_modules")
            + b"}"
            + text("a")
            + OBJECT[2:]
            + b"}"
            + text("_parameters")
            + b"h\x05sbsub.",
            "_parameters of each module must be a dict of its own, got another one's",
        ),
        (
            OBJECT
            + b"}"
            + text("_modules")
            + b"}"
            + text("a")
            + OBJECT[2:]
            + b"}"
            + text("_parameters")
            + b"}"
            + text(1023 * "w")
            + b"Nssbssb.",
            "names must have at most 1024 characters, got 1025 in a.www",
        ),
        (tensor_of(b"K\x02\x85", b"K\x01\x85", storage=b"N"), "a tensor must lie in a storage, got NoneType"),
        (
            tensor_of(b")", b")", storage=STORAGE.replace(b"Float", b"Long").replace(b"FloatS", b"LongS")),
            "it asks for torch.LongStorage, which is not needed for tensors",
        ),
        (
            tensor_of(b")", b")", storage=STORAGE.replace(b"ctorch\nFloatStorage\n", name_of("torch", "device"))),
            "a storage must hold floating-point numbers, got torch.device",
        ),
        (tensor_of(b")", b")", storage=STORAGE.replace(b"K\x02", b"N")), "a storage must have a name and a size >= 0"),
    ],
)
def test_programs_that_are_refused(tmp_path, program, message):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(stream(program))
    with pytest.raises(ValueError, match=f"^{re.escape(f'cannot read {path}: {message}')}"):
        read_tensors(path)


def test_what_such_programs_are_made_of(tmp_path):
    """The hand-made programs above fail for what they are, not for how they are built."""
    values = struct.pack("<q", 2) + struct.pack("<2f", 3.0, 4.0)
    (tmp_path / "x.pkl").write_bytes(stream(tensor_of(b"K\x02\x85", b"K\x01\x85"), ("0",), after=values))
    assert read_tensors(tmp_path / "x.pkl")["w"].tolist() == [3, 4]
    (tmp_path / "x.pkl").write_bytes(stream(OBJECT + b"}b."))
    assert read_tensors(tmp_path / "x.pkl") == {}


TENSORS = tensor_of(b"K\x02\x85", b"K\x01\x85")[:-1] + text("v") + tensor_of(b"K\x01\x85", b"K\x01\x85")[9:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (stream(OBJECT + b"}b.", little_endian=False), "its bytes are in big-endian order, which is not supported"),
        (stream(OBJECT + b"}b.", ("0",)), "it has a storage that no tensor uses, '0'"),
        (
            stream(TENSORS, ("0",), after=struct.pack("<q2f", 2, 3.0, 4.0)),
            "each tensor must have memory of its own, got another one's under v",
        ),
        (b"", "it is damaged, or was not written by torch.save ("),
        (b"rubbish", "it is damaged, or was not written by torch.save ("),
        (b"PK\x03\x04 cut", "it is damaged, or was not written by torch.save ("),
        (pickle.dumps(3, 2), "it is damaged, or was not written by torch.save (no magic number at its start)"),
        (
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(7, 2),
            "it is damaged, or was not written by torch.save (version 7 instead of 1001)",
        ),
        (
            stream(tensor_of(b"K\x02\x85", b"K\x01\x85"), ("0",), after=struct.pack("<qf", 2, 3.0)),
            "it is damaged, or was not written by torch.save (the storage of w has 4 bytes instead of 8)",
        ),
        (
            stream(tensor_of(b"K\x02\x85", b"K\x01\x85"), ("0",), after=struct.pack("<qf", 1, 3.0)),
            "it is damaged, or was not written by torch.save (storage 0 has 1 values instead of 2)",
        ),
    ],
)
def test_files_that_are_refused(tmp_path, content, message):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'cannot read {path}: {message}')}"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("members", "compression", "message"),
    [
        ({"x/other": b""}, zipfile.ZIP_STORED, "a zip file of torch.save has one data.pkl, got 0"),
        (
            {"x/data.pkl": b"", "y/data.pkl": b""},
            zipfile.ZIP_STORED,
            "a zip file of torch.save has one data.pkl, got 2",
        ),
        (
            {"x/data.pkl": b"\0" * 10_000},
            zipfile.ZIP_DEFLATED,
            "members of a zip file of torch.save are not compressed, g",
        ),
        (
            {"x/data.pkl": b"}.", "x/byteorder": b"big"},
            zipfile.ZIP_STORED,
            "its bytes are in big-endian order, which is",
        ),
        (
            {"x/data.pkl": tensor_of(b")", b")")},
            zipfile.ZIP_STORED,
            "it is damaged, or was not written by torch.save (",
        ),
    ],
)
def test_zip_files_that_are_refused(tmp_path, members, compression, message):
    path = tmp_path / "encoder.pkl"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'cannot read {path}: {message}')}"):
        read_tensors(path)


def empty_tensor(key: str, numel: int) -> bytes:
    """A name and an empty tensor in a storage of that name."""
    storage = STORAGE.replace(text("0"), text(key)).replace(b"K\x02tQ", b"J" + struct.pack("<i", numel) + b"tQ")
    return text(key) + tensor_of(b"K\x00\x85", b"K\x01\x85", storage=storage)[9:-2]


def test_zip_members_inside_each_other(tmp_path):
    """Members that all end with the same bytes would be much memory from a small file."""
    content, directory, program = bytes(4000), b"", b"\x80\x02}("
    members = []

    def prepend(name: str, data: bytes) -> None:
        nonlocal content
        sizes = struct.pack("<IIIH", zlib.crc32(data), len(data), len(data), len(name))
        header = struct.pack("<IHHHHH", 0x04034B50, 20, 0, 0, 0, 0) + sizes + b"\0\0" + name.encode()
        content = header + data + content.removeprefix(data)
        members.append((name, sizes, len(content)))

    for number in range(20):
        key = f"{number:04d}"  # such that the header's length is a multiple of 4
        program += empty_tensor(key, len(content) // 4)
        prepend(f"xyzz/data/{key}", content)
    prepend("xyzz/data.pkl", program + b"u.")
    for name, sizes, from_end in members:
        place = struct.pack("<HHHII", 0, 0, 0, 0, len(content) - from_end)
        directory += struct.pack("<IHHHHHH", 0x02014B50, 20, 20, 0, 0, 0, 0) + sizes + b"\0\0" + place + name.encode()
    counts = struct.pack("<HHII", len(members), len(members), len(directory), len(content))
    path = tmp_path / "encoder.pkl"
    path.write_bytes(content + directory + struct.pack("<IHH", 0x06054B50, 0, 0) + counts + b"\0\0")
    with pytest.raises(ValueError, match=r"(?i)^cannot read .*encoder\.pkl: .*overlap"):
        read_tensors(path)


def test_storages_inside_each_other(tmp_path):
    """A count below 0 would go back into the storage before."""
    program = b"\x80\x02}(" + empty_tensor("a", 6) + empty_tensor("b", 6) + empty_tensor("x", 0) + b"u."
    # The count of a; in its bytes the count of b, whose bytes hold the first count of x; the second count of x.
    after = struct.pack("<qq4fqq", 6, 6, 0, 0, 0, 0, -8, 0)
    path = tmp_path / "encoder.pkl"
    path.write_bytes(stream(program, ("a", "x", "b", "x"), after=after))
    with pytest.raises(
        ValueError, match=r"it is damaged, or was not written by torch\.save \(storage x has -8 values\)$"
    ):
        read_tensors(path)


def test_many_groups_take_no_longer_than_their_names(dvae):
    encoder, decoder = dvae.encoder.state_dict(), dvae.decoder.state_dict()
    encoder |= {f"blocks.group_{number}.block_1.x": torch.empty(0) for number in range(3, 30_003)}
    begin = time.process_time()
    assert sizes_of(encoder, decoder, "encoder.pkl")["groups"] == 30_002
    assert time.process_time() - begin < 5


def test_missing_and_damaged_safetensors(tmp_path):
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(ValueError, match=r"^cannot read .*encoder\.safetensors: No such file or directory"):
        read_tensors(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"^cannot read .*encoder\.safetensors: it is damaged \("):
        read_tensors(path)


@each_format
def test_cut_and_altered_files(tmp_path, monkeypatch, legacy):
    """Whatever became of the bytes, the file is read or refused with ValueError."""
    path, _ = save_published(tiny_dvae(), tmp_path, monkeypatch, legacy=legacy)
    content, rng = path.read_bytes(), random.Random(0)
    for share in (0.01, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"^cannot read .*encoder\.pkl: it is damaged"):
            read_tensors(path)
    refused = 0
    for _ in range(300):
        altered = bytearray(content)  # of which the program comes first
        altered[rng.randrange(8000)] = rng.randrange(256)
        path.write_bytes(altered)
        try:
            read_tensors(path)
        except ValueError as error:
            assert str(error).startswith(f"cannot read {path}: ")
            refused += 1
    assert refused > 100

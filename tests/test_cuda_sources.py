"""The machine code of every csrc/**/*.cu for sm_80, sm_90 and sm_100: needs nvcc, but no GPU.

Compiled without a warning, no register spilled, memory accessed 16 bytes at a time, and the same code whether the
compiler may fuse products and sums or not: a fused one would give other bits than the CPU's code.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
ARCHITECTURES = (80, 90, 100)
REGISTERS, THREADS = 65536, 256  # of a multiprocessor, which hands them out to a warp by 8 a thread; and of a block


class Kernel(NamedTuple):
    """What the code of a kernel is meant to be."""

    source: str
    blocks: int  # that fit on a multiprocessor, for enough bytes to be on their way
    loads: int  # of 16 bytes, at least
    stores: int


# By what their names contain; a kernel that takes its path at run time has the loads of all of them.
KERNELS = {
    "encode_kernel": Kernel("formats.cu", 6, 2, 1),
    "decode_kernel": Kernel("formats.cu", 6, 1, 2),
    "resblock_scale_kernelINS_7Float32": Kernel("grad_scale.cu", 6, 1, 1),
    "resblock_scale_kernel": Kernel("grad_scale.cu", 6, 2, 1),
    "resblock_unscale_add_kernel": Kernel("grad_scale.cu", 6, 2, 1),
    # Three types, in four packs at once and in one; without `write` with and without a division.
    "unscale_kernelILb0": Kernel("grad_scale.cu", 4, 2 * 3 * 5, 0),
    "unscale_kernelILb1": Kernel("grad_scale.cu", 4, 3 * 5, 3 * 5),
    # float32; two types of 16 bits: with a master, to nearest, and stochastically.
    "adamw16_kernel": Kernel("adamw16.cu", 3, 4 + 2 * (5 + 4 + 4), 3 + 2 * (5 + 3 + 3)),
}


@functools.cache
def find_nvcc() -> str | None:
    # Not torch's CUDA_HOME: that is None beside a CPU build of torch.
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{cuda_home}/bin")


@functools.cache
def find_cuobjdump() -> str | None:
    """That of the toolkit, or Triton's."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(find_nvcc() or "").parent]
    folders += [Path(spec.origin).parent / "backends" / "nvidia" / "bin"] if spec is not None else []
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is neither on the PATH nor in CUDA_HOME")
needs_cuobjdump = pytest.mark.skipif(find_cuobjdump() is None, reason="neither CUDA nor Triton brings a cuobjdump")
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)


class Compiled(NamedTuple):
    """An object file with code for every architecture, and what the compilers said."""

    path: Path
    status: int
    output: str


@pytest.fixture(scope="module")
def compile_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")

    @functools.cache
    def compile_source(source: Path, *options: str) -> Compiled:
        path = folder / f"{source.stem}{''.join(options)}.o"
        command = [find_nvcc(), str(source), "-o", str(path), "-std=c++20", "-O3"]
        # One call: the host's part is compiled once.
        command += options or ["-c", *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES)]
        command += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Werror", "-Xptxas=-v", "-DUSE_CUDA"]
        command += cpp_extension.COMMON_NVCC_FLAGS
        command += [f"-isystem={path}" for path in cpp_extension.include_paths(device_type="cpu")]
        result = subprocess.run(command, capture_output=True, text=True)
        return Compiled(path, result.returncode, result.stdout + result.stderr)

    return compile_source


def disassemble(compiled: Compiled) -> dict[tuple[str, str], list[str]]:
    """Architecture and mangled name of each kernel, and its instructions."""
    command = [find_cuobjdump(), "-sass", str(compiled.path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code, architecture, instructions = {}, "", []
    for line in text.splitlines():
        if found := re.search(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function : (\w+)", line):
            instructions = code.setdefault((architecture, found[1]), [])
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(found[1])
    return code


def kernel_of(name: str) -> Kernel:
    """The first that the mangled name contains: a longer one comes before what it begins with."""
    return next(kernel for part, kernel in KERNELS.items() if part in name)


def count(instructions: list[str], pattern: str) -> int:
    """How many have an operation that the pattern matches whole; two for one of 32 bytes."""
    operations = (re.sub(r"^@!?U?P\w+ ", "", each).split()[0] for each in instructions)
    return sum(2 if ".256" in each else 1 for each in operations if re.fullmatch(pattern, each))


def test_there_are_cuda_sources():
    assert {source.name for source in SOURCES} == {kernel.source for kernel in KERNELS.values()}


@needs_nvcc
@each_source
def test_compiles_without_warnings(source, compile_source):
    compiled = compile_source(source)
    assert compiled.status == 0, compiled.output
    assert "warning" not in compiled.output.lower(), compiled.output


@needs_nvcc
@each_source
def test_registers(source, compile_source):
    """None is spilled, and as many blocks as are meant to fit on a multiprocessor do."""
    output = compile_source(source).output
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", output)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", output)]
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output)
    assert {architecture for _, architecture in kernels} == {f"sm_{n}" for n in ARCHITECTURES}
    assert set(stacks) == {("0", "0", "0")}
    found = defaultdict(set)
    for (name, architecture), number in zip(kernels, registers, strict=True):
        kernel = kernel_of(name)
        assert kernel.source == source.name
        assert REGISTERS // (-(-number // 8) * 8 * THREADS) >= kernel.blocks, (name, architecture, number)
        found[kernel].add(architecture)
    assert set(found) == {kernel for kernel in KERNELS.values() if kernel.source == source.name}


@needs_nvcc
@needs_cuobjdump
@each_source
def test_memory_accesses(source, compile_source):
    code = disassemble(compile_source(source))
    assert {architecture for architecture, _ in code} == {f"sm_{n}" for n in ARCHITECTURES}
    for (architecture, name), instructions in code.items():
        kernel = kernel_of(name)
        assert count(instructions, r"LDG\.E\.(?:\w+\.)*(?:128|256)(?:\.\w+)*") >= kernel.loads, (architecture, name)
        assert count(instructions, r"STG\.E\.(?:\w+\.)*(?:128|256)(?:\.\w+)*") >= kernel.stores, (architecture, name)
        # Generic accesses, whose address could be of any memory, and those of spilled registers.
        assert count(instructions, r"(?:LD|ST|LDL|STL)\..*") == 0, (architecture, name)


@needs_nvcc
@needs_cuobjdump
@each_source
def test_nothing_is_fused_that_is_not_written_so(source, compile_source):
    code = disassemble(compile_source(source))
    unfused = disassemble(compile_source(source, "-cubin", "-arch=sm_90", "-fmad=false"))
    # Without the names, which differ by a hash of the options.
    fused = [instructions for (architecture, _), instructions in code.items() if architecture == "sm_90"]
    assert sum(map(len, fused)) > 500
    assert fused == list(unfused.values())

"""The machine code of the Triton kernels, made and read without a GPU.

The kernels list what their tables ship (``shipped_configs``). It is compiled for sm_80, sm_90 and sm_100 by the ptxas
that comes with Triton and disassembled by its cuobjdump. ``measure`` counts what decides its speed;
``faults`` says which rules the counts break, ``regressions`` what became worse since sass.json was written, which
has figures for each version of Triton.

What is expected of the code (scores per thread, number of products) is counted in Triton's own intermediate code, after
its pipelining has copied parts of the loops, so that the rules hold for every tile. Clocks in the table are of one step
of a loop and one multiprocessor of an H200, from the numbers of instructions alone: no latency, no memory.

    python tests/sass.py [NAME...]           figures and faults of the kernels whose names contain every NAME
    python tests/sass.py --update [NAME...]  write them to sass.json, for the installed version of Triton
    python tests/sass.py --table             sass.json as Markdown
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from dalle_fast.kernels import (
    attention_backward,
    attention_forward,
    cross_entropy,
    draw_token,
    gumbel,
    gumbel_backward,
    kv_cache,
)
from dalle_fast.kernels.common import Compilation, Device
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RECORD = Path(__file__).with_suffix(".json")
GROWTH = 1.05  # of registers and shared memory, that goes unnoticed


class Chip(NamedTuple):
    """What the programs of a multiprocessor share. CUDA programming guide, table of compute capabilities."""

    device: Device
    shared: int
    tensor_columns: int = 0
    macs: int = 0  # of 16-bit numbers, a clock
    registers: int = 65536
    warps: int = 64


CHIPS = {
    80: Chip(Device((8, 0), 163 * 1024, 108), 164 * 1024, macs=1024),
    90: Chip(Device((9, 0), 227 * 1024, 132), 228 * 1024, macs=2048),
    100: Chip(Device((10, 0), 227 * 1024, 148), 228 * 1024, tensor_columns=512),
}
RESERVED_SHARED = 1024  # by the system, of each program


class Job(NamedTuple):
    """A compilation for an architecture; always: the tests repeat it each time, others only `--update` does."""

    name: str
    architecture: int
    always: bool = True

    @property
    def label(self) -> str:
        return f"{self.name}-sm_{self.architecture}"

    @property
    def kernel(self) -> str:
        """ "fwd", "dq", "dkdv", "weights", "dl", "dcodebook", "cross_entropy_rows", "attend_step", "draw_step", or
        "sum", which adds up shares.
        """
        return self.name.partition("-")[0].removeprefix("attention_").removeprefix("gumbel_")

    @property
    def is_gumbel(self) -> bool:
        """Whether it is a kernel of Gumbel quantisation, whose exponentials are not those of scores."""
        return self.name.startswith("gumbel_")

    @property
    def is_rounded(self) -> bool:
        """Whether the factors of a product have few enough bits for the tensor cores."""
        return "-float32" not in self.name


# Names of what is compiled, without "attention_": for every architecture, and for sm_90 alone.
KERNEL = "(fwd|dq|dkdv)"
ALWAYS_EVERYWHERE = [f"{KERNEL}-(row|column|conv)-32-64-bfloat16", "sum-row-32-64-bfloat16-splits"]
ALWAYS = [
    f"{KERNEL}-(conv-64|row-128)-64-bfloat16",
    f"{KERNEL}-row-32-(16|128|256)-bfloat16",
    f"{KERNEL}-row-32-32-float32",
    "fwd-row-32-64-(float16|bfloat16-text_lens)",
    "dkdv-row-32-64-bfloat16-(groups|splits)",
]
SELDOM_EVERYWHERE = [f"{KERNEL}-row-32-(16|32|128|256)-bfloat16", f"{KERNEL}-row-32-64-float32"]
SELDOM = [
    f"{KERNEL}-[^-]+-[0-9]+-64-bfloat16",
    f"{KERNEL}-row-32-[0-9]+-(bfloat16|float32)",
    f"{KERNEL}-conv-64-(128|256)-bfloat16",
    f"{KERNEL}-row-32-64-(float16|bfloat16-(text_lens|groups|splits))",
]


# The same of Gumbel quantisation, without "gumbel_": layout of the logits, columns of the codebook.
GUMBEL_ALWAYS_EVERYWHERE = ["(fwd|dl|dcodebook)-(first|last)-128-bfloat16", "sum-first-128-bfloat16"]
GUMBEL_ALWAYS = ["weights-(first|last)-128-bfloat16", "(fwd|dl|dcodebook)-first-128-float32"]
GUMBEL_SELDOM_EVERYWHERE = ["(fwd|dl|dcodebook)-first-128-float32"]
GUMBEL_SELDOM = [
    "(fwd|dl|dcodebook)-first-(16|64)-bfloat16",
    "(fwd|dl|dcodebook)-first-128-(float16|bfloat16-ragged)",
]

# The same of a step of decoding; without "attend_step-" and "draw_step-".
ATTEND_ALWAYS_EVERYWHERE = ["(row|column|conv)-32-64-bfloat16", "row-32-64-bfloat16-single"]
ATTEND_ALWAYS = ["row-32-(16|128|256)-bfloat16", "row-32-64-(float32|float16|bfloat16-wide)"]
ATTEND_SELDOM_EVERYWHERE = ["row-32-[0-9]+-(bfloat16|float32)(-single)?"]
ATTEND_SELDOM = ["[^-]+-[0-9]+-64-bfloat16"]
DRAW_ALWAYS_EVERYWHERE = ["8192-all"]
DRAW_ALWAYS = [".*"]


@functools.cache
def compilations(architecture: int) -> dict[str, Compilation]:
    """What the kernels' tables ship, by name."""
    device = CHIPS[architecture].device
    modules = attention_forward, attention_backward, gumbel, gumbel_backward, kv_cache
    found = {found.name: found for module in modules for found in module.shipped_configs(device=device)}
    return found | {found.name: found for module in (cross_entropy, draw_token) for found in module.shipped_configs()}


def shipped() -> list[Job]:
    """What is compiled of all that: not every pattern with every head size, nor everything for each architecture."""

    matrices = named_jobs(
        (True, "attention_", ALWAYS_EVERYWHERE, ALWAYS),
        (False, "attention_", SELDOM_EVERYWHERE, SELDOM),
        (True, "gumbel_", GUMBEL_ALWAYS_EVERYWHERE, GUMBEL_ALWAYS),
        (False, "gumbel_", GUMBEL_SELDOM_EVERYWHERE, GUMBEL_SELDOM),
    )
    decoding = named_jobs(
        (True, "attend_step-", ATTEND_ALWAYS_EVERYWHERE, ATTEND_ALWAYS),
        (False, "attend_step-", ATTEND_SELDOM_EVERYWHERE, ATTEND_SELDOM),
        (True, "draw_step-", DRAW_ALWAYS_EVERYWHERE, DRAW_ALWAYS),
    )
    return [*matrices, *cross_entropy_jobs(), *decoding]


def named_jobs(*selections: tuple[bool, str, list[str], list[str]]) -> list[Job]:
    """Of each architecture what is selected: always, a prefix, and patterns for all and for sm_90 alone."""
    jobs = {}
    for architecture in CHIPS:
        for always, prefix, everywhere, more in selections:
            patterns = everywhere + (more if architecture == 90 else [])
            wanted = re.compile(prefix + "(" + "|".join(patterns) + ")")
            for name in filter(wanted.fullmatch, compilations(architecture)):
                jobs.setdefault((name, architecture), Job(name, architecture, always))
    return list(jobs.values())


# Cross-entropy: one program a row, no products.


def cross_entropy_jobs() -> list[Job]:
    """All that is shipped for sm_90, and for the others float32 alone."""
    names = [compilation.name for compilation in cross_entropy.shipped_configs()]
    others = [Job(names[0], architecture) for architecture in CHIPS if architecture != 90]
    return [*(Job(name, 90) for name in names), *others]


def cross_entropy_faults(job: Job, figures: "Figures") -> list[str]:
    """Of a kernel that is bound by memory: too few programs to hide it, and logits that are read one by one."""
    found = []
    most = CHIPS[job.architecture].warps // figures.warps
    if figures.programs < most:
        found.append(f"{figures.programs} programs fit on a multiprocessor, meant are {most}")
    # Of four logits in each of two loops, or with a bias of twice as many; the target, its logit, bias and factor.
    vectors = cross_entropy.BLOCK_N // (32 * figures.warps * 4) * (1 if job.name.endswith("-loss") else 2)
    loads = 2 * vectors + 4 if "-bias" in job.name else vectors + 2
    if figures.loads > loads:
        found.append(f"{figures.loads} loads, meant are {loads}: of 16 bytes each")
    return found


def draw_faults(job: Job, figures: "Figures") -> list[str]:
    """Of the kernel that draws tokens: products, which it has none of, and scores that are read one by one."""
    found = []
    if figures.hgmma + figures.hmma + figures.utcmma:
        found.append("uses tensor cores without a product")
    constants = named_constants(compilations(job.architecture)[job.name])
    if int(job.name.split("-")[1]) % 16 == 0:
        # Of four scores for each word of a counter, with guidance twice; position, seed, the token's score and the sum;
        # what is kept and whether.
        vectors = 4 * max(1, constants["BLOCK_K"] // (32 * figures.warps * 16)) * (2 if constants["GUIDED"] else 1)
        loads = vectors + (4 if "keep" in constants else 6)
        if figures.loads > loads:
            found.append(f"{figures.loads} loads, meant are {loads}: of 16 bytes each")
    return found


def measure_job(job: Job) -> "Figures":
    return measure(compilations(job.architecture)[job.name], job.architecture)


def named_constants(compilation: Compilation) -> dict[str, Any]:
    return {compilation.kernel.arg_names[index]: value for (index,), value in compilation.constants.items()}


def intended_programs(job: Job, figures: "Figures") -> int:
    """How many programs of a multiprocessor are to hide each other's waits: as many as a bound on the registers buys,
    and two warps a scheduler at least."""
    options = compilations(job.architecture)[job.name].options
    bound = options.get("maxnreg", 255)
    return max(CHIPS[job.architecture].registers // (32 * bound * figures.warps), 8 // figures.warps)


def stated_shared(job: Job) -> int:
    """Bytes of shared memory by the kernels' tables, which refuse a device that has less."""
    tables = {"fwd": attention_forward.TILES, "dq": attention_backward.DQ_TILES, "dkdv": attention_backward.DKDV_TILES}
    if job.is_gumbel:
        tables = {"fwd": gumbel.FORWARD_TILES, "dl": gumbel_backward.DL_TILES}
        tables["dcodebook"] = gumbel_backward.DCODEBOOK_TILES
        width = int(job.name.split("-")[2])
        _, shared = tables[job.kernel][job.architecture // 10, 2 if job.is_rounded else 4, width]
        return shared
    if job.kernel == "attend_step":
        table = kv_cache.FEW_TILES if job.name.endswith("-single") else kv_cache.MANY_TILES
        tables = {"attend_step": table}
    block_d = named_constants(compilations(job.architecture)[job.name])["BLOCK_D"]
    _, shared = tables[job.kernel][job.architecture // 10, 2 if job.is_rounded else 4, block_d]
    return shared


class Figures(NamedTuple):
    """What one kernel takes of a multiprocessor, and its instructions.

    Attributes:
        tiles: BLOCK_M, BLOCK_N, BLOCK_W, LANES, as far as the kernel has them.
        programs: that fit on a multiprocessor at a time.
        spills: instructions that read or write local memory.
        products: tl.dot after pipelining, on sm_90 those of warp groups alone.
        scores: exponentials of matrices a thread computes, after pipelining.
        wide_copies: those of the asynchronous copies from global memory that move 8 or 16 bytes a thread, or a tile.
        narrow_loads: loads from global memory of one or two bytes.
        loops: the innermost loops that compute products, in the order of their addresses.
    """

    tiles: list[int]
    warps: int
    stages: int
    registers: int
    shared: int
    tensor_columns: int
    programs: int
    stack: int
    spills: int
    products: int
    scores: float
    instructions: int
    hgmma: int
    hmma: int
    utcmma: int
    warpgroup: int
    ffma: int
    ex2: int
    copies: int
    wide_copies: int
    loads: int
    narrow_loads: int
    loops: list[dict[str, int]]


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*);", re.MULTILINE)
# Matrices alone: of the running maximum and its kin each thread holds copies.
MATRIX_EXP2 = re.compile(r"= math\.exp2 .*? : tensor<(\d+)x(\d+)xf32")
PRODUCTS = {80: r"= tt\.dot ", 90: r"= ttng\.warp_group_dot ", 100: r"ttng\.tc_gen5_mma "}


def measure(compilation: Compilation, architecture: int) -> Figures:
    """Compile and disassemble.

    Raises:
        RuntimeError: what the compiler said.
    """
    name, *source, options = compilation
    target = GPUTarget("cuda", architecture, 32)
    try:
        compiled = triton.compile(ASTSource(*source), target=target, options=dict(options))
    except triton.TritonError as error:  # some of these cannot be sent to another process
        raise RuntimeError(f"{name} for sm_{architecture}: {error}") from None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = instructions(listing)
    count = _counter(opcode for _, opcode, _ in code)
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", listing)}

    constants = named_constants(compilation)
    intermediate, metadata = compiled.asm["ttgir"], compiled.metadata
    scores = sum(math.prod(map(int, shape)) for shape in MATRIX_EXP2.findall(intermediate))
    tensor_columns = getattr(metadata, "tmem_size", None) or 0
    return Figures(
        tiles=[constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_W", "LANES") if name in constants],
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        registers=resources["REG"],
        shared=metadata.shared,
        tensor_columns=tensor_columns,
        programs=programs_that_fit(
            CHIPS[architecture], resources["REG"], metadata.shared, tensor_columns, metadata.num_warps
        ),
        stack=resources["STACK"],
        spills=count("LDL|STL"),
        products=len(re.findall(PRODUCTS[architecture], intermediate)),
        scores=scores / 32 / metadata.num_warps,
        instructions=len(code),
        hgmma=count("HGMMA"),
        hmma=count("HMMA"),
        utcmma=count(r"UTC\w*MMA"),
        warpgroup=count(r"WARPGROUP\.(ARRIVE|DEPBAR)"),
        ffma=count("FFMA") + 2 * count("FFMA2"),
        ex2=count(r"MUFU\.EX2"),
        copies=count("LDGSTS|UTMALDG"),
        wide_copies=count(r"LDGSTS[.\w]*\.(64|128)|UTMALDG"),
        loads=count("LDG"),
        narrow_loads=count(r"LDG[.\w]*\.[US](8|16)"),
        # The waits of sm_100 are loops themselves, and its products do not tell their shape.
        loops=loops(code) if architecture < 100 else [],
    )


def instructions(listing: str) -> list[tuple[int, str, str]]:
    """Address, opcode and operands."""
    return [(int(address, 16), opcode, operands) for address, opcode, operands in INSTRUCTION.findall(listing)]


def _counter(opcodes: Iterable[str]) -> Callable[[str], int]:
    """A function that counts the opcodes that begin with a pattern, as words: LDG is LDG.E and not LDGSTS."""
    numbers = Counter(opcodes)
    return lambda pattern: sum(n for opcode, n in numbers.items() if re.match(rf"(?:{pattern})(?![A-Z0-9])", opcode))


def programs_that_fit(chip: Chip, registers: int, shared: int, tensor_columns: int, warps: int) -> int:
    # A warp is given registers 256 at a time, a program shared memory 128 bytes at a time.
    register_warps = chip.registers // (math.ceil(registers * 32 / 256) * 256)
    programs = [min(register_warps, chip.warps) // warps]
    programs.append(chip.shared // (math.ceil(shared / 128) * 128 + RESERVED_SHARED))
    if tensor_columns:
        programs.append(chip.tensor_columns // tensor_columns)
    return min(programs)


def loops(code: list[tuple[int, str, str]]) -> list[dict[str, int]]:
    """The spans from the target of a backward branch to the branch that compute products and hold no other such."""
    spans = []
    for end, opcode, operands in code:
        target = re.search(r"\b0x([0-9a-f]+)$", operands.strip())
        if not opcode.startswith("BRA") or not target or int(target[1], 16) >= end:
            continue
        body = [op for address, op, _ in code if int(target[1], 16) <= address <= end]
        count = _counter(body)
        macs = sum(map(_tensor_macs, body)) or 32 * count("FFMA")
        if macs >= 2048:
            loop = {
                "instructions": len(body),
                "macs": macs,
                "ex2": count(r"MUFU\.(EX2|LG2)"),
                "fp32": count("FFMA|FADD|FMUL|FMNMX|FSEL|FSETP"),
                "copies": count("LDGSTS|UTMALDG"),
            }
            spans.append((int(target[1], 16), end, loop))
    spans.sort(key=lambda span: span[:2])
    return [
        loop
        for start, end, loop in spans
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e, _ in spans)
    ]


def _tensor_macs(opcode: str) -> int:
    """Multiplications of the warp that issues it."""
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        return math.prod(map(int, match.groups())) // 4  # the other warps of the group issue it too
    if match := re.match(r"HMMA\.(16816|1688|1684)(?!\d)", opcode):
        return {"16816": 2048, "1688": 1024, "1684": 512}[match[1]]
    return 0


def faults(job: Job, figures: Figures) -> list[str]:
    """The rules that the code breaks, whatever it was before."""
    f, found = figures, []

    def check(holds: bool, fault: str) -> None:
        if not holds:
            found.append(fault)

    check(f.stack == f.spills == 0, f"spills registers: {f.stack} bytes a thread, {f.spills} instructions")
    intended = intended_programs(job, figures)
    check(
        f.programs >= intended,
        f"{f.programs} programs fit on a multiprocessor, meant are {intended}: {f.registers} registers x {f.warps} "
        f"warps, {f.shared} bytes of shared memory, {f.tensor_columns} columns of tensor memory",
    )
    # Whether a token is kept is a byte.
    most_narrow = 1 if job.kernel == "draw_step" else 0
    check(f.narrow_loads <= most_narrow, f"{f.narrow_loads} loads of one or two bytes")
    if job.kernel == "draw_step":
        return found + draw_faults(job, f)
    if job.kernel == "cross_entropy_rows":
        return found + cross_entropy_faults(job, figures)
    if job.kernel == "sum":
        check(f.hgmma + f.hmma + f.utcmma == 0, "uses tensor cores to add")
        return found
    if job.kernel == "weights":
        check(f.hgmma + f.hmma + f.utcmma == 0, "uses tensor cores without a product")
        return found

    stated = stated_shared(job)
    check(f.shared <= stated, f"{f.shared} bytes of shared memory, {stated} by the table of tiles")
    counts = {"HGMMA": f.hgmma, "HMMA": f.hmma, "UTCMMA": f.utcmma}
    unit = tensor_cores_of(job, f)
    for opcode, number in counts.items():
        check((number > 0) == (opcode == unit), f"{number} {opcode}, meant is {unit or 'no tensor core'}")
    if unit is None:
        check(f.ffma >= 8 * max(f.scores, 1), f"{f.ffma} FFMA for {f.scores:g} scores: the products are not in float32")
    if unit == "HGMMA":
        # One to start and one to wait for each product; a compiler that cannot keep it asynchronous puts them around
        # each HGMMA.
        check(f.warpgroup <= 2 * f.products, f"{f.warpgroup} WARPGROUP for {f.products} products: they are serialised")
    if job.is_gumbel:
        # Exponentials of y, and of q where it has a part; twice where the pipeline begins with a step of its own.
        weights = f.tiles[0] * 4 * f.tiles[1] / (32 * f.warps) * (1 if job.kernel == "dcodebook" else 2)
        check(weights <= f.ex2 <= 2 * weights * max(1, f.products) + 16, f"{f.ex2} MUFU.EX2 for {weights:g} weights")
        return found
    if f.stages > 1:
        check(f.wide_copies > 0, f"{f.wide_copies} asynchronous copies of 8 or 16 bytes, of {f.copies}")
    # Triton lets warps that find no rows of their own compute those of others, where the scores feed another product.
    most = f.scores * (max(1, 16 * f.warps / rows_of(job, f)) if unit else 1)
    check(
        0 < f.scores <= f.ex2 <= 1.5 * most + 8,
        f"{f.ex2} MUFU.EX2 for {f.scores:g} scores: one each, and a few for the running maximum",
    )
    check(f.ffma >= f.scores, f"{f.ffma} FFMA for {f.scores:g} scores: the scale is not folded into the exponent")
    return found


def tensor_cores_of(job: Job, figures: Figures) -> str | None:
    """The instruction that the products are meant to be; None is float32."""
    if not job.is_rounded:
        return None
    if job.is_gumbel:
        wide = rows_of(job, figures) >= 64 and figures.warps >= 4
        return {80: "HMMA", 90: "HGMMA" if wide else "HMMA", 100: "UTCMMA" if wide else "HMMA"}[job.architecture]
    # Warp groups compute 64 rows at a time.
    if job.architecture == 80 or rows_of(job, figures) < 64:
        return "HMMA"
    return "HGMMA" if job.architecture == 90 else "UTCMMA"


def rows_of(job: Job, figures: Figures) -> int:
    """Of the matrix of scores: queries or samples, for the gradients of key and value keys; for that of a codebook its
    columns.
    """
    if job.kernel == "dcodebook":
        return int(job.name.split("-")[2])
    return figures.tiles[1 if job.kernel == "dkdv" else 0]


def regressions(figures: Figures, recorded: Figures) -> list[str]:
    """What became worse."""
    new, old, found = figures._asdict(), recorded._asdict(), []
    for name in ("registers", "shared", "tensor_columns", "copies"):
        if new[name] > GROWTH * old[name]:
            found.append(f"{name}: {new[name]}, were {old[name]}")
    for name in ("stack", "spills"):
        if new[name] > old[name]:
            found.append(f"{name}: {new[name]}, were {old[name]}")
    if new["programs"] < old["programs"]:
        found.append(f"programs on a multiprocessor: {new['programs']}, were {old['programs']}")
    for name in ("hgmma", "hmma", "utcmma", "copies", "wide_copies", "loads", "narrow_loads"):
        if (new[name] > 0) != (old[name] > 0):
            found.append(f"{name}: {new[name]}, were {old[name]}")
    return found


def missing_tools() -> str:
    """Why nothing can be compiled, and "" if it can."""
    if "nvidia" not in triton.backends.backends:
        return "this Triton does not compile for NVIDIA devices"
    for tool in ("ptxas", "ptxas_blackwell", "cuobjdump"):
        try:
            assert getattr(triton.knobs.nvidia, tool).path
        except RuntimeError as error:
            return f"Triton has no {tool}: {error}"
    return ""


def read_record() -> dict[str, dict[str, Figures]]:
    """sass.json: figures by version of Triton and name of the job."""
    versions = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return {version: {name: Figures(**f) for name, f in jobs.items()} for version, jobs in versions.items()}


def write_record(record: dict[str, dict[str, Figures]]) -> None:
    """One line a job, so that a change of the kernels shows as what it changed."""
    versions = []
    for version, jobs in sorted(record.items()):
        lines = [f"  {json.dumps(name)}: {json.dumps(figures._asdict())}" for name, figures in jobs.items()]
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n }")
    RECORD.write_text("{\n" + ",\n".join(versions) + "\n}\n")


@contextmanager
def compilers(cache: Path, processes: int = 2) -> Iterator[ProcessPoolExecutor]:
    """Processes for :func:`measure_job`, which keep what they compile in the folder ``cache``."""
    # Not forked: torch may have threads already.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_compiler, (str(cache),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_compiler(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)


def table(record: dict[str, dict[str, Figures]]) -> str:
    """What is recorded, as Markdown: all of it for the newest version of Triton, and the registers for the others."""
    newest, *others = sorted(record, key=lambda version: [int(n) for n in version.split(".")], reverse=True)
    head = ["kernel", "sm", "tiles", "warps, stages", f"registers ({newest})", *(f"({v})" for v in others)]
    head += ["shared memory", "programs", "instructions", "loops: instructions", "clocks: issue", "tensor", "ex2"]
    rows = [head, ["---"] * len(head)]
    for name, f in record[newest].items():
        kernel, _, architecture = name.removeprefix("attention_").rpartition("-sm_")
        steps = "+".join(map(str, f.tiles[1:]))
        row = [kernel, architecture, f"{f.tiles[0]} x {steps}" if steps else f"{f.tiles[0]}", f"{f.warps}, {f.stages}"]
        row += [str(record[v][name].registers) if name in record[v] else "" for v in (newest, *others)]
        row += [f"{f.shared / 1024:.0f} KB", str(f.programs), str(f.instructions)]
        parts = [clocks(loop, f, int(architecture)) for loop in f.loops]
        row += [" / ".join(str(loop["instructions"]) for loop in f.loops)]
        row += [" / ".join(f"{part[kind]:.0f}" for part in parts) for kind in range(3)]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def clocks(loop: dict[str, int], figures: Figures, architecture: int) -> tuple[float, float, float]:
    """Of one step of a program, if it had the multiprocessor to itself: to issue, to multiply, to exponentiate."""
    # Four schedulers; multiplications of the tensor cores for 16 bits, or of the 128 lanes; 16 exponentials.
    macs = CHIPS[architecture].macs if figures.hgmma + figures.hmma else 128
    return (
        loop["instructions"] * figures.warps / 4,
        loop["macs"] * figures.warps / macs,
        loop["ex2"] * 32 * figures.warps / 16,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="kernels whose names contain every NAME")
    parser.add_argument("--update", action="store_true", help="write the figures to sass.json")
    parser.add_argument("--table", action="store_true", help="print sass.json as Markdown and compile nothing")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="that compile at a time (default: 2)")
    arguments = parser.parse_args()
    record = read_record()
    if arguments.table:
        print(table(record))
        return 0

    old = record.get(triton.__version__, {})
    jobs = [job for job in shipped() if all(name in job.label for name in arguments.names)]
    new, status = {}, 0
    with tempfile.TemporaryDirectory() as cache, compilers(Path(cache), arguments.processes) as pool:
        for job, future in [(job, pool.submit(measure_job, job)) for job in jobs]:
            new[job.label] = figures = future.result()
            found = faults(job, figures)
            if job.label in old:
                found += [f"worse than recorded: {text}" for text in regressions(figures, old[job.label])]
            numbers = {name: value for name, value in figures._asdict().items() if value and name != "loops"}
            print(job.label, *(f"{name}={value}" for name, value in numbers.items()), flush=True)
            for text in found:
                status = 1
                print(f"  {text}", flush=True)
    if arguments.update:
        kept = old | new if arguments.names else new
        names = [job.label for job in shipped()]
        record[triton.__version__] = {name: kept[name] for name in names if name in kept}
        write_record(record)
    return status


if __name__ == "__main__":
    sys.exit(main())

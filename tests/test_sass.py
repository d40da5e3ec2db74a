"""The compiled Triton kernels: tensor cores, registers, copies, and nothing worse than sass.json says. Needs no GPU."""

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import roofline
import sass
import torch
import triton
import triton.language as tl
from dalle_fast.kernels import (
    attention_backward,
    attention_forward,
    cross_entropy,
    draw_token,
    gumbel,
    gumbel_backward,
    kv_cache,
)
from dalle_fast.kernels.common import Compilation, Launch
from sass import CHIPS, Figures, Job, compilations, faults, measure, regressions, shipped
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

pytestmark = [
    pytest.mark.skipif(bool(sass.missing_tools()), reason=sass.missing_tools()),
    pytest.mark.usefixtures("compiled"),  # which compiles while the first tests run
]

RECORD = sass.read_record()
RECORDED = RECORD.get(triton.__version__, {})
UPDATE = "if that is meant: python tests/sass.py --update"
JOBS = [job for job in shipped() if job.always]


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """Figures to come of the jobs that the selected tests name."""
    selected = [item.callspec.params.get("job") for item in request.session.items if hasattr(item, "callspec")]
    jobs = dict.fromkeys(job for job in selected if isinstance(job, Job))
    with sass.compilers(tmp_path_factory.mktemp("triton")) as pool:
        yield {job: pool.submit(sass.measure_job, job) for job in jobs}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """What a test compiles itself is kept nowhere."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


ROW = Job("attention_fwd-row-32-64-bfloat16", 90)
ROW_FLOAT32 = Job("attention_fwd-row-32-64-float32", 90)


def changed(job: Job, constants: dict | None = None, options: dict | None = None) -> Compilation:
    """A shipped compilation with other constants and options of the compiler."""
    shipped = compilations(job.architecture)[job.name]
    names = shipped.kernel.arg_names
    other = {(names.index(name),): value for name, value in (constants or {}).items()}
    return shipped._replace(constants=shipped.constants | other, options=shipped.options | (options or {}))


def test_a_launch_compiles_what_is_compiled_here(monkeypatch):
    """Triton's own just-in-time compiler, asked what it would make of each launch."""
    launches, compilation_of = [], Launch.compilation

    def remember(launch, name):
        launches.append((launch, compilation_of(launch, name)))
        return launches[-1][1]

    monkeypatch.setattr(Launch, "compilation", remember)
    for kernels in (attention_forward, attention_backward, kv_cache):
        kernels.shipped_configs(head_dims=(64, 80))
    for kernels in (gumbel, gumbel_backward, cross_entropy, draw_token):
        kernels.shipped_configs()
    assert len(launches) > 200
    backend = make_backend(GPUTarget("cuda", 90, 32))
    for launch, compilation in launches:
        kernel, values = launch.kernel, launch.arguments | launch.constants | launch.options
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        arguments, specialization, options = bind(**values, debug=False)
        packed = kernel._pack_args(backend, values, arguments, specialization, options)
        options, signature, constants, attributes = packed
        assert compilation.signature == signature, compilation.name
        assert compilation.constants == constants, compilation.name
        assert compilation.attributes == {place: attribute for place, attribute in attributes.items() if attribute}
        assert launch.options.items() <= vars(options).items(), compilation.name


def is_found(fault: str, job: Job, figures: Figures) -> bool:
    return any(fault in found for found in faults(job, figures))


@pytest.mark.parametrize(
    ("job", "constants", "options", "found"),
    [
        (ROW, {}, {"maxnreg": 64}, ["spills registers"]),
        (ROW, {"BLOCK_M": 128, "BLOCK_N": 128}, {"num_stages": 3, "maxnreg": None}, ["they are serialised"]),
        (ROW, {}, {"num_stages": 6}, ["2 programs fit on a multiprocessor, meant are 4", "by the table"]),
        (ROW, {}, {"num_warps": 2}, ["0 HGMMA, meant is HGMMA", "HMMA, meant is HGMMA"]),
        (ROW_FLOAT32, {"PRECISION": "tf32"}, {}, ["MMA, meant is no tensor core", "not in float32"]),
    ],
    ids=["registers", "serial", "shared_memory", "small_products", "rounded"],
)
def test_a_bad_launch_is_found(job, constants, options, found, cache):
    figures = measure(changed(job, constants, options), job.architecture)
    for fault in found:
        assert is_found(fault, job, figures), (fault, faults(job, figures))


def test_missing_tensor_cores_are_found(cache):
    figures = measure(changed(ROW_FLOAT32), 90)
    for architecture, unit in ((80, "HMMA"), (90, "HGMMA"), (100, "UTCMMA")):
        job = ROW._replace(architecture=architecture)
        assert is_found(f"0 {unit}, meant is {unit}", job, figures._replace(tiles=[64, 64, 32]))


def test_unaligned_loads_are_found(cache):
    figures = measure(changed(ROW)._replace(attributes={}), 90)
    assert is_found("loads of one or two bytes", ROW, figures)
    assert is_found("0 asynchronous copies of 8 or 16 bytes, of 0", ROW, figures)
    # Four bytes can be copied.
    figures = measure(changed(ROW_FLOAT32)._replace(attributes={}), 90)
    assert figures.copies > 0
    assert is_found("0 asynchronous copies of 8 or 16 bytes", ROW_FLOAT32, figures)


def test_logits_that_are_read_one_by_one_are_found(cache):
    job = sass.cross_entropy_jobs()[0]
    figures = measure(compilations(90)[job.name]._replace(attributes={}), 90)
    assert is_found("18 loads, meant are 6: of 16 bytes each", job, figures)


def test_scores_of_codes_that_are_read_one_by_one_are_found(cache):
    job = Job("draw_step-8192", 90)
    figures = measure(compilations(90)[job.name]._replace(attributes={}), 90)
    assert is_found("12 loads, meant are 8: of 16 bytes each", job, figures)


def test_a_cache_that_is_not_aligned_is_found(cache):
    job = Job("attend_step-row-32-64-bfloat16", 90)
    figures = measure(changed(job)._replace(attributes={}), 90)
    assert is_found("loads of one or two bytes", job, figures)
    assert is_found("0 asynchronous copies of 8 or 16 bytes", job, figures)
    assert is_found("0 HMMA, meant is HMMA", job, figures._replace(hmma=0))


@triton.jit
def _weights_kernel(scores, weights, scale, FORM: tl.constexpr):
    lane = tl.arange(0, 64)
    place = lane[:, None] * 64 + lane[None, :]
    x = tl.load(scores + place)
    m = tl.max(x, 1)[:, None]
    if FORM == "folded":
        p = tl.exp2(tl.fma(x, scale, -m))
    elif FORM == "apart":
        p = tl.exp2(x * scale - m)
    elif FORM == "twice":
        p = tl.exp2(tl.fma(x, scale, -m)) + tl.exp(x)
    else:
        p = tl.exp(tl.fma(x, scale, -m))
    tl.store(weights + place, p)


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ("folded", None),
        ("apart", "0 FFMA for 32 scores: the scale is not folded"),
        ("twice", "64 MUFU.EX2 for 32 scores"),
        ("natural", "32 MUFU.EX2 for 0 scores"),
    ],
)
def test_wrong_exponentials_are_found(form, fault, cache):
    matrix = torch.empty(64, 64, device="meta")
    arguments = {"scores": matrix, "weights": matrix, "scale": 0.5}
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    launch = Launch(_weights_kernel, 1, arguments, {"FORM": form}, options)
    figures = measure(launch.compilation("weights"), 90)._replace(tiles=[64, 64, 32])
    found = [text for text in faults(ROW, figures) if "scores" in text]
    assert found == [] if fault is None else any(fault in text for text in found)


def test_gumbel_of_one_position_and_one_code_compiles(cache):
    """Sizes of 1 are constants of the compilation."""
    logits, stats = torch.empty(1, 1, 1, dtype=torch.bfloat16, device="meta"), torch.empty(6, 1, device="meta")
    seed, numbers = torch.empty((), dtype=torch.int64, device="meta"), torch.empty(1, device="meta")
    indices, options = torch.empty(1, dtype=torch.int64, device="meta"), {"tau": 1.0, "device": CHIPS[90].device}
    tensors = logits, logits[0], seed, stats
    launches = [
        gumbel.plan_fwd(*tensors, indices, numbers, numbers[None], logits, hard=True, **options),
        gumbel.plan_weights(logits, seed, stats, logits, **options),
        *gumbel_backward.plan_bwd(*tensors, numbers[None], logits, None, logits, logits[0], **options),
    ]
    assert len(launches) == 4
    for launch in launches:
        assert measure(launch.compilation(launch.kernel.fn.__name__), 90).spills == 0


def test_decoding_of_one_head_and_one_code_compiles(cache):
    """Sizes of 1 are constants of the compilation."""
    one, number = torch.empty(1, 1, 1, 1, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    pattern = (0, 1, 1, 1, 0, 0)
    launches = [
        kv_cache.plan_step(*[one] * 7, number, number, one, pattern=pattern, scale=1.0, device=CHIPS[90].device),
        draw_token.plan_step(
            one[0, 0], number, number, None, number[None], one[0, 0, 0],
            temperature=1.0, top_k=1, top_p=1.0, cond_scale=None,
        ),
    ]  # fmt: skip
    for launch in launches:
        assert measure(launch.compilation(launch.kernel.fn.__name__), 90).spills == 0


FIGURES = Figures(
    tiles=[64, 64, 32],
    warps=4,
    stages=2,
    registers=120,
    shared=40960,
    tensor_columns=0,
    programs=4,
    stack=0,
    spills=0,
    products=6,
    scores=64.0,
    instructions=2000,
    hgmma=20,
    hmma=0,
    utcmma=0,
    warpgroup=12,
    ffma=94,
    ex2=70,
    copies=32,
    wide_copies=32,
    loads=4,
    narrow_loads=0,
    loops=[],
)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"registers": 126}, []),
        ({"registers": 127}, ["registers: 127, were 120"]),
        ({"registers": 90, "shared": 43008, "loads": 9, "instructions": 3000}, []),
        ({"shared": 43009}, ["shared: 43009, were 40960"]),
        ({"tensor_columns": 128}, ["tensor_columns: 128, were 0"]),
        ({"copies": 64}, ["copies: 64, were 32"]),
        ({"stack": 8, "spills": 2}, ["stack: 8, were 0", "spills: 2, were 0"]),
        ({"programs": 3}, ["programs on a multiprocessor: 3, were 4"]),
        ({"hgmma": 0, "hmma": 128}, ["hgmma: 0, were 20", "hmma: 128, were 0"]),
        ({"copies": 0, "wide_copies": 0}, ["copies: 0, were 32", "wide_copies: 0, were 32"]),
        ({"narrow_loads": 1}, ["narrow_loads: 1, were 0"]),
    ],
)
def test_regressions_are_found(change, found):
    assert regressions(FIGURES._replace(**change), FIGURES) == found


def test_programs_that_fit():
    # 65536 registers, given to warps 256 at a time; 227 KB of shared memory to spend, 1 KB of it each time.
    def programs(registers, shared, warps=4, architecture=90, tensor_columns=0):
        return sass.programs_that_fit(CHIPS[architecture], registers, shared, tensor_columns, warps)

    assert [programs(registers, 0) for registers in (32, 80, 96, 128, 129, 168, 169, 255)] == [16, 6, 5, 4, 3, 3, 2, 2]
    assert [programs(registers, 0, warps=8) for registers in (128, 129, 255)] == [2, 1, 1]
    assert [programs(32, kilobytes * 1024) for kilobytes in (56, 56.5, 113, 113.5, 227)] == [4, 3, 2, 1, 1]
    assert [programs(32, kilobytes * 1024, architecture=80) for kilobytes in (81, 81.5, 163)] == [2, 1, 1]
    assert programs(32, 0, architecture=100, tensor_columns=256) == 2


def test_loops_are_the_innermost_that_compute_products():
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x00 */
        /*0010*/              @!P0 BRA 0x90 ;   /* 0x00 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR6][R4.64] ;   /* 0x00 */
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT ;   /* 0x00 */
        /*0040*/                   MUFU.EX2 R119, R119 ;   /* 0x00 */
        /*0050*/             @!UP1 HGMMA.64x32x16.F32.BF16 R24, gdesc[UR20], R24 ;   /* 0x00 */
        /*0060*/               @P0 BRA 0x20 ;   /* 0x00 */
        /*0070*/                   FADD R1, R1, R1 ;   /* 0x00 */
        /*0080*/                   BRA 0x70 ;   /* 0x00 */
        /*0090*/              @!P5 BRA 0x10 ;   /* 0x00 */
        /*00a0*/                   BRA 0xa0;   /* 0x00 */
    """
    code = sass.instructions(listing)
    assert len(code) == 11
    macs = 64 * 64 * 16 // 4 + 64 * 32 * 16 // 4
    assert sass.loops(code) == [{"instructions": 5, "macs": macs, "ex2": 1, "fp32": 0, "copies": 1}]


def test_record_is_read_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sass, "RECORD", tmp_path / "sass.json")
    record = {
        "3.6.0": {"a-sm_90": FIGURES},
        "3.9.0": {"a-sm_90": FIGURES._replace(loops=[{"ex2": 1}]), "b-sm_80": FIGURES},
    }
    assert sass.read_record() == {}
    sass.write_record(record)
    assert sass.read_record() == record
    assert sum("sm_" in line for line in sass.RECORD.read_text().splitlines()) == 3


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.label)
def test_code_is_what_it_is_meant_to_be(job, compiled):
    assert not faults(job, compiled[job].result())


@pytest.mark.skipif(not RECORDED, reason=f"sass.json has nothing of Triton {triton.__version__}")
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.label)
def test_code_is_no_worse_than_recorded(job, compiled):
    assert not regressions(compiled[job].result(), RECORDED[job.label]), UPDATE


@pytest.mark.parametrize("version", RECORD)
def test_record_has_every_job_and_no_fault(version):
    jobs = {job.label: job for job in shipped()}
    assert list(RECORD[version]) == list(jobs), UPDATE
    assert not {name: found for name, job in jobs.items() if (found := faults(job, RECORD[version][name]))}


@pytest.mark.skipif(not RECORD, reason="sass.json is empty")
def test_roofline_in_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "attention.md").read_text(encoding="utf-8")
    assert roofline.table(RECORD) in text, "python tests/roofline.py"
    assert roofline.step_table(RECORD) in text, "python tests/roofline.py"
    text = (Path(__file__).parents[1] / "docs" / "gumbel.md").read_text(encoding="utf-8")
    assert roofline.gumbel_table(RECORD) in text, "python tests/roofline.py"


def test_roofline_of_one_step():
    """Work that is easily counted: 496 heads on 132 multiprocessors, every tile of columns its own."""
    names = [f"attention_fwd-{name}-64-bfloat16-sm_90" for name in ("column-32", "row-32")]
    column, row = (RECORD["3.9.0"][name] for name in names)
    seconds = roofline.least_seconds("fwd", "column-32", column)
    # 64 queries are two columns of 32: 4 blocks of text, and 2 steps of 16 rows. Text: 0 to 3 blocks and 2 halves.
    geometry = roofline.tile_geometry(roofline.SHIPPED_PATTERNS["column-32"], 64, 32)
    assert roofline.steps_of_loops("fwd", geometry, roofline.TABLES["fwd"][9, 2, 64][0]) == [70, 8, 32]
    assert seconds["tensor"] == pytest.approx((78 * 64 * 64 - 8 * 64 * 32 + 32 * 64 * 32) * 128 * 496 / (790e12 / 2))
    assert seconds["memory"] == pytest.approx(4 * 496 * 1280 * 128 / 4.3e12)
    with pytest.raises(ValueError, match="fwd of row-32 has 1 loops in its machine code, not 3"):
        roofline.least_seconds("fwd", "row-32", row._replace(loops=row.loops[:1]))


def test_roofline_of_a_step_of_decoding():
    """Work that is easily counted: 16 samples a program, a step of 32 earlier keys each, none at the first position."""
    figures = RECORD["3.9.0"]["attend_step-row-32-64-bfloat16-sm_90"]
    seconds = roofline.least_step_seconds("row-32", figures)
    steps = [4 * 64, 16 * 32 * 1023 / 1024]
    assert seconds["tensor"] == pytest.approx(sum(steps) * 2 * 16 * 64 * 32 * 62 / (790e12 / 2))
    row = 62 * 64 * 2
    assert roofline.earlier_keys("row-32") == pytest.approx(33264 / 1024 - 1)
    image = 512 * row * (2 * (33264 / 1024 - 1) + 6)
    assert seconds["memory"] == pytest.approx((image + 2 * 256 * row) / 4.3e12)
    assert seconds["L2"] == pytest.approx((image + 32 * 2 * 256 * row) / 5.5e12)
    assert roofline.dense_step_seconds("row-32") == pytest.approx(512 * row * 2 * 768.5 / 4.3e12)
    with pytest.raises(ValueError, match="attend_step of row-32 has 1 loops in its machine code, not 3"):
        roofline.least_step_seconds("row-32", figures._replace(loops=figures.loops[:1]))

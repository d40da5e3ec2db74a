"""What benchmarks/ is made of: the float64 truth, the rivals' masks, memory, reports, the plot and the GPU run."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dalle_fast import reference
from dalle_fast.patterns import Column, Conv, Full, Row

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the tests run without the source tree", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

import bench_attention  # noqa: E402
import exercise  # noqa: E402
import gpu  # noqa: E402
import gpu_table  # noqa: E402
import measure  # noqa: E402
import oracle  # noqa: E402
import peers  # noqa: E402
import profiled  # noqa: E402
import report  # noqa: E402
import rivals  # noqa: E402
import sampling_rivals  # noqa: E402

TEXT_LEN, GRID = 5, (3, 4)
PAPER = [Full(TEXT_LEN, GRID), Row(TEXT_LEN, GRID), Column(TEXT_LEN, GRID), Conv(TEXT_LEN, GRID, kernel_size=3)]
each_pattern = pytest.mark.parametrize("pattern", PAPER, ids=lambda pattern: pattern.name)
on_linux = pytest.mark.skipif(not measure.CLEAR_REFS.exists(), reason="the resident set's peak cannot be reset here")
MIB = 1 << 20


def make_case(pattern, mode="training", dtype=torch.float32):
    return oracle.Case("small", pattern, 2, 3, 8, dtype, "cpu", mode)


def load_conftest():
    spec = importlib.util.spec_from_file_location("conftest_of_benchmarks", BENCHMARKS / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The truth, and what counts as right


@each_pattern
@pytest.mark.parametrize("block_bytes", [1, 1 << 12, 1 << 24])
def test_blocks_make_the_reference(monkeypatch, pattern, block_bytes):
    monkeypatch.setitem(oracle.BLOCK_BYTES, "cpu", block_bytes)
    query, key, value, upstream = (tensor.double() for tensor in make_case(pattern).inputs())
    found = oracle.blockwise_attention(query, key, value, upstream, pattern, with_gradients=True)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out = reference.attention(*leaves, pattern)
    expected = [out, *torch.autograd.grad(out, leaves, upstream)]
    for name, tensor in zip(oracle.NAMES, expected, strict=True):
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-12, atol=1e-12)
    alone = oracle.blockwise_attention(query, key, value, upstream, pattern, with_gradients=False)
    assert list(alone) == ["out"] and torch.equal(alone["out"], found["out"])


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slightly_different_mask_is_refused(mode, dtype):
    pattern = Row(TEXT_LEN, GRID)
    case = make_case(pattern, mode, dtype)
    truth, peers_found = oracle.truth_and_peers(case)
    right = {name: truth[name].to(dtype) for name in case.names}
    assert oracle.worst_error(right, truth, peers_found) <= torch.finfo(dtype).eps
    narrower = Row(TEXT_LEN, GRID, variant="same_row")
    wrong, _ = oracle.truth_and_peers(replace(case, pattern=narrower))
    with pytest.raises(AssertionError, match="is off by"):
        oracle.worst_error({name: wrong[name].to(dtype) for name in case.names}, truth, peers_found)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_results_and_peers_that_are_not_finite_are_refused(bad):
    truth, (peer,) = oracle.truth_and_peers(make_case(PAPER[1], "forward"))
    poisoned = {"out": peer["out"].clone()}
    poisoned["out"][0, 0, 0, 0] = bad
    with pytest.raises(AssertionError, match="out is off by"):
        oracle.worst_error(poisoned, truth, [peer])
    with pytest.raises(AssertionError, match="a peer's out is off by"):
        oracle.worst_error(peer, truth, [peer, poisoned])
    with pytest.raises(AssertionError, match=r"out has shape \(2, 3, 16, 8\), not \(2, 3, 17, 8\)"):
        oracle.worst_error({"out": peer["out"][:, :, 1:]}, truth, [peer])


def test_work_of_a_case():
    case = oracle.Case("", Row(256, 32), 2, 16, 64, torch.bfloat16, "cpu", "forward")
    assert case.flops == 2 * 16 * 4 * 64 * 328_304
    assert replace(case, mode="backward").flops == 2.5 * case.flops
    assert replace(case, mode="training").flops == 3.5 * case.flops
    assert case.io_bytes == 4 * 2 * 16 * 1280 * 64 * 2
    assert replace(case, mode="training").io_bytes == 3 * case.io_bytes
    assert case.mask_ceiling == 819_840 / 328_304


# The rivals


@each_pattern
def test_mask_mods_are_the_patterns(pattern):
    position = torch.arange(pattern.seq_len)
    mask = rivals.mask_mod(pattern)(0, 0, position[:, None], position)
    assert torch.equal(mask, pattern.dense())


def test_no_mask_mod_for_other_variants():
    for pattern in (Row(5, 3, variant="same_row"), Conv(5, 3, variant="clip"), Conv(5, 3, dilation=2)):
        with pytest.raises(ValueError, match="pattern must be Full or a variant of the paper's, got"):
            rivals.mask_mod(pattern)


def test_column_major_mask_is_the_pattern_permuted():
    pattern = PAPER[2]
    position = torch.arange(pattern.seq_len)
    mask = rivals.column_major_mask_mod(pattern)(0, 0, position[:, None], position)
    order = rivals._transpose_image(position.view(1, 1, -1, 1), TEXT_LEN, *GRID).flatten()
    assert torch.equal(mask, pattern.dense()[order][:, order])


@pytest.mark.parametrize("pattern", [kind(100, 14) for kind in (Full, Row, Column, Conv)], ids=lambda p: p.name)
def test_block_mask_is_that_of_pytorch(pattern):
    mask_mod, length = rivals.mask_mod(pattern), pattern.seq_len
    ours = rivals.block_mask(mask_mod, length, "cpu")
    theirs = create_block_mask(mask_mod, None, None, length, length, device="cpu")
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(ours, f"{kind}_num_blocks")
        assert torch.equal(counts, getattr(theirs, f"{kind}_num_blocks"))
        for row, count in enumerate(counts.flatten()):
            lists = (getattr(mask, f"{kind}_indices")[0, 0, row, :count] for mask in (ours, theirs))
            assert torch.equal(*(each.sort().values for each in lists))


@pytest.mark.parametrize("mode", ["forward", "backward", "training"])
@pytest.mark.parametrize(
    "op", ["attention", "attention_qkvpacked", "sdpa_causal", "sdpa_mask", "flex", "flex_permuted"]
)
def test_every_op_computes_its_case(monkeypatch, op, mode):
    if "flex" in op and mode != "forward":
        pytest.skip("FlexAttention has no backward on a CPU")
    monkeypatch.setattr(rivals, "_compile", lambda function, mode: function)
    for pattern in {"sdpa_causal": PAPER[:1], "flex_permuted": PAPER[2:3]}.get(op, PAPER):
        case = make_case(pattern, mode)
        call = rivals.make_call(op, case)
        for _ in range(2):  # a backward pass alone is called again and again
            found = rivals.read_result(op, case, call())
            assert set(found) == set(case.names)
            oracle.worst_error(found, *oracle.truth_and_peers(case))


def test_eager_flex_attention_is_what_was_tested(monkeypatch):
    seen = []
    monkeypatch.setattr(rivals, "_compile", lambda function, mode: seen.append(function) or function)
    rivals.make_call("flex", make_case(PAPER[1], "forward"))
    assert seen == [flex_attention]


class FakeBenchmark:
    """Stands in for pytest-benchmark's fixture where nothing may be timed."""

    disabled = False
    group = None

    def pedantic(self, *arguments, **options):
        raise RuntimeError("a wrong result was timed")


def test_a_wrong_result_is_not_timed(monkeypatch):
    case = make_case(PAPER[1], "forward")
    wrong = rivals.Op(lambda case: rivals.OPS["attention"].make(replace(case, pattern=PAPER[2])))
    monkeypatch.setitem(rivals.OPS, "wrong", wrong)
    with pytest.raises(AssertionError, match="out is off by"):
        bench_attention.time_op(FakeBenchmark(), "attention-forward", case, "wrong")
    with pytest.raises(RuntimeError, match="a wrong result was timed"):
        bench_attention.time_op(FakeBenchmark(), "attention-forward", case, "attention")


def test_every_row_has_its_own_id_and_no_backward_of_flex_on_a_cpu():
    ids = [row.id for row in bench_attention.ROWS]
    assert len(set(ids)) == len(ids)
    for row in bench_attention.ROWS:
        case, op = row.values
        assert bench_attention.ON_GPU or case.mode == "forward" or "flex" not in op
        assert op not in ("sdpa_causal", "flash_attn") or isinstance(case.pattern, Full)


# Layers of other packages


def test_a_module_is_imported_past_its_package(tmp_path, monkeypatch):
    inner = tmp_path / "heavy_package" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner.parent, inner):
        folder.joinpath("__init__.py").write_text("raise SystemExit('was run')")
    inner.joinpath("helper.py").write_text("value = 7")
    inner.joinpath("wanted.py").write_text("from .helper import value")
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(2):
        assert peers.import_past_packages("heavy_package", "inner.wanted").value == 7
    for name in [name for name in sys.modules if name.startswith("heavy_package")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_missing_package_comes_with_the_command():
    with pytest.raises(ImportError, match=r"no_such_package is not installed: pip install \.\[rivals\] && pip install"):
        peers.import_past_packages("no_such_package", "attention")


@pytest.mark.parametrize("package", peers.DISTRIBUTIONS)
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_layers_agree(package, mode):
    if peers.version(package) is None:
        pytest.skip(f"{package} is not installed: {peers.INSTALL}")
    for kind in peers.patterns_of(package, 6, 5):
        case = peers.LayerCase(package, kind, mode, 2, 3, 24, 6, 5, torch.float32, "cpu")
        truth, peers_found = peers.truth_and_peers(case)
        for name in ("attention", package):
            found = peers.read_result(peers.make_layer_call(name, case)())
            assert oracle.worst_error(found, truth, peers_found) > 0


@pytest.mark.parametrize("attention", [sampling_rivals.FULL, sampling_rivals.STATIC], ids=["full", "static"])
def test_the_cache_of_dalle_pytorch(monkeypatch, attention):
    """Dropped as it is called, and right where it is handed on and grows from the caption."""
    if sampling_rivals.why_missing() is not None:
        pytest.skip(sampling_rivals.why_missing())
    sizes = {"DEPTH": 4, "WIDTH": 32, "HEADS": 2, "HEAD_DIM": 16, "TEXT_LEN": 5, "GRID": 4, "IMAGE_LEN": 16}
    for name, value in (sizes | {"PREFIXES": [3, 9]}).items():
        monkeypatch.setattr(sampling_rivals, name, value)
    model = sampling_rivals.make_rival(attention, hidden=20)
    assert sampling_rivals.cache_error(model, 10) < 1e-5
    assert sampling_rivals.cache_bytes(model, 2) >= 4 * 2 * 2 * 32 * (5 + 16) * 4  # layers, samples, k and v

    lengths: list[int] = []
    model.transformer.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    sampling_rivals.time_as_called(model)
    assert min(lengths) > 5 and len(set(lengths)) == len(lengths)
    lengths.clear()
    sampling_rivals.time_cached(model)
    assert sorted(lengths)[:-2] == [1] * (len(lengths) - 2)


def test_a_sampling_rival_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(sampling_rivals, "_NEEDS", ("no_such_package", "torch"))
    with pytest.raises(ImportError, match=r"no_such_package is not installed: pip install \.\[rivals\] && pip install"):
        sampling_rivals.make_rival()


# Memory and time


def make_allocating_call(name, size):
    """Module-level, so that a fresh process can import it: allocates ``size`` bytes, and keeps them by that name."""
    kept = []

    def call():
        if name == "kept":
            kept[:] = kept or [torch.ones(size, dtype=torch.uint8)]
            return kept[0]
        if name == "fails":
            raise ValueError("on purpose")
        return torch.ones(size, dtype=torch.uint8)

    return call


@on_linux
def test_peak_memory():
    noise = [torch.ones(3 * MIB, dtype=torch.uint8) for _ in range(20)]
    call = make_allocating_call("freed", 40 * MIB)
    call()
    del noise  # free blocks that the call could use unseen
    assert measure.host_peak_bytes(call) == pytest.approx(40 * MIB, abs=2 * MIB)


@on_linux
@pytest.mark.parametrize("name", ["freed", "kept"])
def test_peak_memory_in_a_fresh_process(name):
    peak = measure.fresh_host_peak_bytes(make_allocating_call, name, 40 * MIB, 1)
    assert peak == pytest.approx(40 * MIB, abs=2 * MIB)


@on_linux
def test_a_fresh_process_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="the process that measures peak memory ended without a result"):
        measure.fresh_host_peak_bytes(make_allocating_call, "fails", MIB, 1)


def test_ceilings_are_measured_once_for_a_dtype_and_a_number_of_threads(monkeypatch):
    measured = []
    monkeypatch.setattr(measure, "_best_seconds", lambda call: measured.append(call) or 0.5)
    measure.matmul_flops_per_s.cache_clear()
    try:
        for dtype, threads in ((torch.float32, 1), (torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 2)):
            rate = measure.matmul_flops_per_s(dtype, threads)
        assert len(measured) == 3
        assert rate == 2 * measured[-1]().shape[0] ** 3 / 0.5
    finally:
        measure.matmul_flops_per_s.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_clock_on_cuda_counts_the_device_alone(monkeypatch):
    def call():
        torch.cuda._sleep(20_000_000)
        time.sleep(0.05)  # while the device spins or sleeps, so no part of its time

    call()
    monkeypatch.setattr(measure, "SPIN_CYCLES", 400_000_000)
    assert 0.003 < measure.seconds_of(call) < 0.045


# Reports


def row(op, pattern, median, *, grid=32, group="attention-forward", shape=None, **info):
    shape = f"{grid} x {grid}" if shape is None else shape
    extra = {"op": op, "pattern": pattern, "shape": shape, "grid": grid, "peak_bytes": 3 * MIB, "error": 1.5e-6}
    extra |= {"batch": 1, "heads": 1, "head_dim": 64, "text_len": 256, "dtype": "float32", "threads": 2}
    extra |= {"tflop_per_s": 0.125, "roofline": 0.5, "mask_ceiling": 2.5} | info
    stats = {"median": median, "data": [median, 2 * median], "rounds": 2}
    return {"name": f"test_{op}", "group": group, "extra_info": extra, "stats": stats}


MACHINE = {
    "cpu": {"brand_raw": "a CPU"},
    "threads": 2,
    "cuda": None,
    "driver": None,
    "cuda_runtime": None,
    "triton": None,
    "cpp": None,
    "torch_cpu_capability": "AVX512",
    "system": "Linux",
    "machine": "x86_64",
    "python_version": "3.11.7",
    "torch": "2.13.0",
    "dalle_fast": "0.1.0",
}


def make_run(*rows, **machine):
    run = {
        "machine_info": MACHINE | machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": list(rows),
    }
    load_conftest().pytest_benchmark_update_json(None, [], run)
    return run


def test_rows_are_compared_within_their_case_and_with_dense_causal_attention():
    run = make_run(
        row("attention", "full", 8.0),
        row("sdpa_causal", "full", 6.0),
        row("attention", "row", 2.0),
        row("sdpa_mask", "row", 9.0),
        row("attention", "row", 5.0, grid=64),
        row("attention", "row", 7.0, group="attention-training"),
    )
    slower = [each["extra_info"]["slower"] for each in run["benchmarks"]]
    assert slower[0] == {"sdpa_causal": 0.75}
    assert slower[1] == {"attention": 8 / 6}
    assert slower[2] == {"sdpa_causal": 3.0, "sdpa_mask": 4.5}
    assert slower[3] == {"sdpa_causal": 6 / 9, "attention": 2 / 9}
    assert slower[4] == {} and slower[5] == {}


def test_report_of_ops():
    run = make_run(
        row("sdpa_causal", "full", 0.006),
        row("attention", "row", 0.002),
        row("sdpa_mask", "row", 0.009, peak_bytes=None),
    )
    text = report.report(run)
    assert "### attention-forward, 32 x 32" in text.splitlines()
    assert "| pattern | op | median | p20 to p80 | rounds | TFLOP/s | roofline | memory | ceiling | error |" in text
    assert "| error | sdpa_causal / op | attention / op | sdpa_mask / op |" in text
    line = "| row | attention | 2 ms | 2.4 to 3.6 | 2 | 0.125 | 50% | 3 MiB | 2.50 | 1.5e-06 | 3.00 |  | 4.50 |"
    assert line in text.splitlines()
    assert "| 50% |  | 2.50 |" in text  # memory unknown


def test_report_of_rows_without_an_op():
    plain = {"name": "test_encode", "group": "encode", "extra_info": {"gigabytes_per_s": 123.4}}
    stats = [{"median": 0.004, "data": [0.004], "rounds": 1}, {"median": 0.001, "data": [0.001], "rounds": 1}]
    text = report.report(make_run(*(plain | {"stats": each} for each in stats)))
    assert "| benchmark | median | p20 to p80 | rounds | speed | gigabytes/s |" in text
    assert "| encode | 1 ms | 1 to 1 | 1 | 4.00 | 123 |" in text


def test_report_names_the_gpu():
    assert "GPU: none, " in report.report(make_run())
    gpu_machine = {"cuda": "NVIDIA H200", "driver": "580.1", "cuda_runtime": "13.0", "triton": "3.6.0"}
    assert "GPU: NVIDIA H200 (driver 580.1, CUDA 13.0, triton 3.6.0), " in report.report(make_run(**gpu_machine))


# The plot


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    import plot

    rows = [row(op, "row", 1e-6 * grid**2, grid=grid) for op in ("attention", "flex") for grid in (8, 16, 32)]
    rows += [row("sdpa_causal", "full", 1e-7 * grid**3, grid=grid) for grid in (8, 16, 32)]
    rows += [row("attention", "full", 1.0, grid=8), row("attention_qkvpacked", "row", 1.0, grid=8)]
    rows += [row("attention", "row", 1.0, heads=16), row("attention", "row", 1.0, group="attention-training")]
    lines, sizes = plot.read_lines(make_run(*rows))
    times = {grid: pytest.approx(1e-3 * grid**2) for grid in (8, 16, 32)}
    dense = {grid: pytest.approx(1e-4 * grid**3) for grid in (8, 16, 32)}
    assert lines["row"] == {"attention": times, "flex": times, "sdpa_causal": dense}
    assert lines["column"] == lines["conv"] == {"sdpa_causal": dense}
    assert sizes["heads"] == 1

    source, out = tmp_path / "run.json", tmp_path / "plot.png"
    source.write_text(json.dumps(make_run(*rows)))
    command = [sys.executable, str(BENCHMARKS / "plot.py"), str(source), "-o", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000

    with pytest.raises(ValueError, match="must have attention-forward rows of one size at two grids or more"):
        plot.read_lines(make_run(row("attention", "row", 1.0)))


# Which benchmarks run, and for how long


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """One test and one benchmark under this project's settings."""
    folder = tmp_path_factory.mktemp("benchmarks") / "project"
    for name, text in {
        "tests/test_it.py": "def test_it(): pass",
        "benchmarks/bench_it.py": "def test_speed(benchmark): benchmark(sum, [1, 2])",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(BENCHMARKS / "conftest.py", folder / "benchmarks")
    return folder


def run_pytest(project, *arguments, **variables):
    command = [sys.executable, "-P", "-m", "pytest", "-v", "-p", "no:cacheprovider", "--benchmark-max-time=0.01"]
    result = subprocess.run(
        [*command, *arguments], cwd=project, env=os.environ | variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_pytest_alone_leaves_the_benchmarks_out(project):
    output = run_pytest(project)
    assert "test_it.py::test_it PASSED" in output and "bench_it.py" not in output


@pytest.mark.parametrize("arguments", [["--benchmark-only"], ["benchmarks", "--benchmark-only"], ["benchmarks"]])
def test_pytest_runs_the_benchmarks_it_is_asked_for(project, arguments):
    output = run_pytest(project, *arguments)
    assert "bench_it.py::test_speed PASSED" in output
    assert "test_it PASSED" not in output


def test_past_its_time_limit_a_run_still_writes_its_file(project, tmp_path):
    options = ["--benchmark-only", f"--benchmark-json={tmp_path / 'run.json'}", "-rs"]
    output = run_pytest(project, *options, DALLE_FAST_BENCH_SECONDS="0", DALLE_FAST_COMMIT="abc")
    assert "the time limit of 0 s is over" in output and "1 passed" not in output
    output = run_pytest(project, *options, DALLE_FAST_BENCH_SECONDS="1000", DALLE_FAST_COMMIT="abc")
    run = json.loads((tmp_path / "run.json").read_text())
    assert [each["name"] for each in run["benchmarks"]] == ["test_speed"]
    assert run["commit_info"]["id"] == "abc"
    assert {"driver", "cuda_runtime", "threads", "cpp"} <= set(run["machine_info"])


def test_an_interrupted_run_still_writes_its_file(tmp_path):
    tmp_path.joinpath("bench_it.py").write_text("""
from bench_attention import time_call

def interrupt():
    raise KeyboardInterrupt

def test_before(benchmark):
    time_call(benchmark, lambda: None)

def test_interrupted(benchmark, monkeypatch):
    monkeypatch.setattr("measure.seconds_of", lambda call: 1.0)
    time_call(benchmark, interrupt)
""")
    command = [sys.executable, "-P", "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    command += [str(tmp_path / "bench_it.py"), "--benchmark-only", f"--benchmark-json={tmp_path / 'run.json'}"]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == pytest.ExitCode.INTERRUPTED, result.stdout + result.stderr
    run = json.loads((tmp_path / "run.json").read_text())
    assert [each["name"] for each in run["benchmarks"]] == ["test_before"]


# make gpu


@pytest.fixture
def stages(tmp_path):
    return gpu.Run(tmp_path / "log.txt")


def python(code):
    return [sys.executable, "-c", code]


def test_a_failing_stage_keeps_no_other_from_running(stages, tmp_path):
    stages.stage("one", python("print('first'); raise SystemExit(3)"), 60)
    output = stages.stage("two", python("import os; print(os.environ['WHAT'])"), 60, WHAT="second")
    stages.stage("three", python("print('never')"), 1)
    stages.stage("four", python("print('odd')"), 60, lambda status, output: (gpu.FAILED, f"{status} {output.strip()}"))
    assert [(each.result, each.detail) for each in stages.outcomes] == [
        (gpu.FAILED, "exit status 3"),
        (gpu.PASSED, ""),
        (gpu.SKIPPED, "no time left"),
        (gpu.FAILED, "0 odd"),
    ]
    assert output == "second\n"
    assert stages.failed() == ["one", "four"]
    log = (tmp_path / "log.txt").read_text()
    assert "\nfirst\n" in log and "== one: failed after " in log and "\nnever\n" not in log


def test_a_stage_past_its_limit_may_clean_up_and_takes_its_children_along(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
try:
    time.sleep(1000)
except KeyboardInterrupt:
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
"""
    stages.stage("slow", python(code), 4)
    assert [(each.result, each.detail) for each in stages.outcomes] == [(gpu.FAILED, "stopped at its limit of 4 s")]
    assert (tmp_path / "saved").exists()
    assert not is_running((tmp_path / "child").read_text())


def is_running(pid: str) -> bool:
    """Whether the process is there, and more than an entry that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stage_that_does_not_stop_is_killed(stages, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1)
    start = time.monotonic()
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(100)"
    assert stages.stage("deaf", python(code), 3) == "on\n"
    assert stages.failed() == ["deaf"] and time.monotonic() - start < 30


def test_time_left(tmp_path):
    run = gpu.Run(tmp_path / "log.txt")
    assert run.left("build") == gpu.LIMIT_SECONDS["build"]
    assert run.left("benchmark", keep_seconds=gpu.TOTAL_SECONDS - 10) == pytest.approx(10, abs=1)
    assert gpu.Run(tmp_path / "log.txt", patience=2.0).left("build") == 2 * gpu.LIMIT_SECONDS["build"]
    assert gpu.TOTAL_SECONDS + gpu.GRACE_SECONDS < 8 * 60


def test_names_and_test_files():
    assert gpu.slug("NVIDIA H200") == "nvidia-h200"
    files = gpu.gpu_test_files()
    assert {"tests/test_formats.py", "tests/test_precision_devices.py"} <= set(files)
    assert not {"tests/test_cuda_sources.py", "tests/test_cuda_kernels.py"} & set(files)
    assert all((ROOT / file).is_file() for file in (*files, *gpu.BENCHMARKS))


def test_tests_are_counted(tmp_path):
    junit = tmp_path / "tests.xml"
    assert gpu.count_tests(junit) == {"passed": 0, "failed": 0, "skipped": 0}
    cases = "<testcase/><testcase><failure/></testcase><testcase><error/></testcase><testcase><skipped/></testcase>"
    junit.write_text(f"<testsuites><testsuite>{cases}<testcase><system-out/></testcase></testsuite></testsuites>")
    assert gpu.count_tests(junit) == {"passed": 2, "failed": 2, "skipped": 1}


def test_files_of_a_stage_that_was_stopped(tmp_path):
    junit, benchmarks = tmp_path / "tests.xml", tmp_path / "benchmark.json"
    assert gpu.read_benchmarks(benchmarks) == {}
    for broken in ("", '<testsuites><testsuite><testcase name="a"', '{"benchmarks": ['):
        junit.write_text(broken)
        benchmarks.write_text(broken)
        assert gpu.count_tests(junit) == {"passed": 0, "failed": 0, "skipped": 0}
        assert gpu.count_without_gpu(junit) == 0
        assert gpu.read_benchmarks(benchmarks) == {}
    benchmarks.write_text('{"benchmarks": []}')
    assert gpu.read_benchmarks(benchmarks) == {"benchmarks": []}


def test_tests_that_found_no_device_are_counted(tmp_path):
    junit = tmp_path / "tests.xml"
    assert gpu.count_without_gpu(junit) == 0
    reasons = ["no CUDA device, or no extension", "needs a GPU", "needs a machine without a GPU", "nvcc is missing"]
    cases = "".join(f'<testcase><skipped message="{reason}"/></testcase>' for reason in reasons)
    junit.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert gpu.count_without_gpu(junit) == 2


def test_sanitizer_verdicts():
    assert gpu._judge_sanitizer(0, "========= ERROR SUMMARY: 0 errors")[0] == gpu.PASSED
    assert gpu._judge_sanitizer(9, "========= ERROR SUMMARY: 1 error") == (gpu.FAILED, "exit status 9")
    assert gpu._judge_sanitizer(1, "========= Error: Device not supported.")[0] == gpu.SKIPPED


def test_results(tmp_path, stages):
    stages.note(gpu.Outcome("build", gpu.PASSED, 12.0))
    stages.note(gpu.Outcome("test", gpu.FAILED, 3.0, "1 failed"))
    machine = {"gpu": "NVIDIA H200", "driver": "580.1", "capability": None, "commit": "abc"}
    tests = {"passed": 4, "failed": 1, "skipped": 0}
    run = make_run(row("attention", "row", 0.002))
    written = gpu.write_results(tmp_path / "results", "nvidia-h200", machine, stages, tests, run)
    assert [path.name for path in written] == ["nvidia-h200.json", "nvidia-h200.md"]
    gathered = json.loads(written[0].read_text())
    assert gathered["machine"] == machine and gathered["tests"] == tests
    assert gathered["benchmarks"]["benchmarks"][0]["extra_info"]["op"] == "attention"
    assert [each["result"] for each in gathered["stages"]] == ["passed", "failed"]
    lines = written[1].read_text().splitlines()
    assert lines[0] == "# NVIDIA H200"
    assert {"- driver: 580.1", "- commit: abc", "| test | failed | 3 | 1 failed |"} <= set(lines)
    assert "### attention-forward, 32 x 32" in lines
    assert gpu.write_results(tmp_path, "none", machine, stages, tests, {})[1].exists()  # no benchmark came to its end


def test_all_parts_one_after_the_other(monkeypatch):
    commands = []

    def run(command, cwd):
        commands.append(command)
        return subprocess.CompletedProcess(command, -9 if command[-1] == "proof" else 0)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--part", "all", "--dry-run"])
    assert gpu.main() == 1
    assert [command[-1] for command in commands] == list(gpu.PARTS)
    assert all("--dry-run" in command for command in commands)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "BUILD", tmp_path / "build")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 1
    output = capsys.readouterr().out
    assert f"make gpu needs an NVIDIA GPU, and torch {torch.__version__} is " in output
    assert "make gpu DRY_RUN=1 runs what a CPU can of it." in output


def test_results_of_another_part(tmp_path, stages):
    written = gpu.write_results(tmp_path, "nvidia-h200-models", {"gpu": "NVIDIA H200"}, stages, {}, {}, "models")
    assert "Made by `make gpu PART=models`." in written[1].read_text()


PART_STAGES = [
    ("models", "benchmark"),
    ("proof", "proof"),
    ("profile", "profile"),
    ("tiles", "tiles"),
    ("demo", "demo"),
]


@pytest.mark.parametrize(("part", "stage"), PART_STAGES)
def test_parts_are_one_stage_each(part, stage, tmp_path, monkeypatch):
    """What is run, without running it."""
    calls = []
    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu.Run, "stage", lambda self, name, command, *rest, **more: calls.append((name, command)))
    run = gpu.Run(tmp_path / "log.txt")
    assert gpu.run_part(run, part, dry_run=False) == ({}, {})
    name, command = calls[0]
    assert name == stage
    words = {
        "models": "benchmarks/bench_model.py",
        "proof": "cuda",
        "profile": "ncu",
        "demo": "emoji",
        "tiles": "--out",
    }
    assert words[part] in command
    assert all((ROOT / word).exists() for word in command if word.endswith(".py"))


def test_kernels_of_an_update(tmp_path, stages, monkeypatch):
    pytest.importorskip("matplotlib")
    import plot_kernels

    kernels = {"nvjet_tst_128x256": 0.5, "a kernel with a name of more than sixty characters, as templates have": 0.25}
    run = make_run(plain_row("test_training[bf16]", 0.1, "model-training", kernels=kernels), plain_row("other", 0.1))
    text = report.report(run)
    assert "Kernels of training[bf16]: `nvjet_tst_128x256` 50.0%, `a kernel" in text
    monkeypatch.setattr(gpu, "BUILD", tmp_path)
    (tmp_path / "benchmark.json").write_text(json.dumps(run))
    gpu.plot_kernels(stages, tmp_path / "models", run)
    gpu.plot_kernels(stages, tmp_path / "models", {})
    assert [(outcome.stage, outcome.result) for outcome in stages.outcomes] == [("plot", "passed"), ("plot", "skipped")]
    assert (tmp_path / "models" / "kernels.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="a row with its kernels"):
        plot_kernels.draw(make_run(plain_row("other", 0.1)))


def test_a_profile_needs_its_profiler(tmp_path, stages, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    gpu.run_profile(stages, tmp_path / "profile", dry_run=False)
    assert [str(outcome) for outcome in stages.outcomes] == ["profile: skipped after 0 s, ncu is not installed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_calls_that_the_profiler_watches(capsys):
    profiled.run_profiled()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["attention row", "attention column", "attention conv"]
    assert {"decode row", "gumbel_quantize", "linear_cross_entropy"} <= set(lines)


def test_small_files_of_a_part_are_kept(tmp_path):
    (tmp_path / "part" / "data").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for name in ("samples.png", "metrics.json", "model.safetensors", "data/0.png"):
        (tmp_path / "part" / name).touch()
    gpu._copy_small_files(tmp_path / "part", tmp_path / "out")
    gpu._copy_small_files(tmp_path / "nothing", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "samples.png"]


def test_a_module_is_the_command():
    command = [sys.executable, "-m", "dalle_fast", "demo", "--help"]
    assert "usage: dalle-fast demo" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def plain_row(name, median, group="adamw16", **info):
    stats = {"median": median, "data": [median], "rounds": 1}
    return {"name": name, "group": group, "extra_info": info, "stats": stats}


def gpu_run(*rows, name="NVIDIA H200"):
    return {"machine": {"gpu": name, "driver": "580.1", "torch": "2.11"}, "benchmarks": make_run(*rows)}


def test_the_table_of_gpus():
    ops = gpu_run(
        row("attention", "row", 0.002),
        row("sdpa_mask", "row", 0.009),
        row("attention", "row", 0.005, grid=64, batch=0),
        row("sdpa_mask", "row", 0.009, grid=64, batch=0),
        plain_row("test_adamw16[float16]", 0.001, copy_share=0.856, fused_over_own=1.4),
    )
    models = gpu_run(plain_row("test_training[bf16]", 0.1, "model-training", tokens_per_s=123456.0, matrix_share=0.5))
    other = gpu_run(plain_row("test_copy", 0.2, "copies"), name="NVIDIA H100")
    lines = gpu_table.table([ops, models, other, {"machine": {"gpu": "NVIDIA L4"}, "benchmarks": {}}]).splitlines()
    assert lines == [
        "On one NVIDIA H200 (driver 580.1, torch 2.11):",
        "",
        "|  | median | rivals' times over it, or its share |",
        "| --- | --: | --- |",
        "| `attention`, row, attention-forward, 32 x 32 | 2 ms | sdpa_mask 4.50x |",
        "| adamw16: adamw16[float16] | 1 ms | copy_share 86%, fused_over_own 1.40 |",
        "| model-training: training[bf16] | 100 ms | matrix_share 50%, 123456 tokens/s |",
        "",
        "On one NVIDIA H100 (driver 580.1, torch 2.11):",
        "",
        "|  | median | rivals' times over it, or its share |",
        "| --- | --: | --- |",
        "| copies: copy | 200 ms |  |",
    ]


def test_the_readme_has_the_table_of_now():
    block = gpu_table.table(gpu_table.read_runs(gpu_table.RESULTS))
    text = (ROOT / "README.md").read_text("utf-8")
    assert gpu_table.put_into(text, block) == text
    assert gpu_table.put_into(gpu_table.put_into(text, "other"), block) == text
    with pytest.raises(ValueError, match="must hold the lines"):
        gpu_table.put_into("no marks", block)


def test_two_runs_are_compared(tmp_path, monkeypatch, capsys):
    def rows(rival, second, share):
        return make_run(
            row("attention", "row", 2.0),
            row("sdpa_mask", "row", rival),
            plain_row("first", 1.0),
            plain_row("second", second, copy_share=share),
        )["benchmarks"]

    base = rows(9.0, 2.0, 0.8)
    assert gpu_table.compare(base, rows(9.4, 2.08, 0.79)) == []
    different = gpu_table.compare(base, rows(10.0, 1.5, 0.5))
    assert [line.split(":")[0] for line in different] == ["second", "second", "test_attention", "test_sdpa_mask"]
    assert "second: time / the group's first: 2, then 1.5 (-25%)" in different
    assert gpu_table.compare(base, base[:3]) == [
        "only in the first run: second: copy_share",
        "only in the first run: second: time / the group's first",
    ]

    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file, second in zip(files, (2.0, 3.0), strict=True):
        file.write_text(json.dumps({"benchmarks": {"benchmarks": rows(9.0, second, 0.8)}}))
    for two, status in ((files[0], 0), (files[1], 1)):
        monkeypatch.setattr(sys, "argv", ["gpu_table.py", "--compare", str(files[0]), str(two)])
        assert gpu_table.main() == status
    output = capsys.readouterr().out
    assert output.startswith("5 ratios, all within 5%\n")
    assert "then 3 (+50%)" in output


def test_the_calls_that_the_sanitizer_watches(capsys):
    exercise.exercise()
    assert capsys.readouterr().out == f"312 calls on {measure.DEVICE}, all finite\n"

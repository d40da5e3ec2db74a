"""Everything that needs a GPU: ``make gpu PART=all``, or part by part in under eight minutes each.

The package is built into build/gpu/site, offline and with what is installed, and used from there; nothing outside the
repository is written to, and build/gpu keeps what is compiled too. The stages, each with a time limit:

    machine      what is there: GPU, driver, versions, commit
    build        the package with its C++ and CUDA extension, for this GPU alone; where that fails, without it
    test         every test with cuda, gpu or triton in its name, in several processes where pytest-xdist is installed
    compile      the rivals of every row of the benchmarks, on all cores: one after the other takes minutes
    benchmark    bench_grad_scale, bench_adamw16, bench_kv_cache, bench_gumbel, bench_cross_entropy and bench_attention
                 of benchmarks/; as many rows as there is time for
    exercise     small calls of every op
    memcheck     the same under compute-sanitizer, where it is installed
    racecheck    the same

That is ``make gpu``, the part "ops". The others have machine and build too, and then

    PART=models  benchmark    bench_model: updates in training, whole images and the token step of large transformers
                 plot         what an update spends its time in
    PART=proof   proof        precision_proof.py: a deep network in fp32, bf16, and fp16 with each way of scaling
    PART=profile profile      every kernel at its benchmark's size under Nsight Compute: speed of light, occupancy, why
                              warps wait; build/gpu/profile/kernels.csv
    PART=tiles   tiles        tune_tiles.py: variations of the attention kernels' tiles, compiled on all cores; what it
                              printed is in the log, and in build/gpu/tiles/tiles.json
    PART=demo    demo         the emoji demo; it needs what training needs, and the font at $FONT, Noto Color Emoji. A
                              dry run makes the one of shapes, and tunes nothing

A stage that fails, overruns or leaves a broken file does not keep the later ones from running. Which did is said last,
and is the exit status. The results go to benchmarks/results/<gpu>.json and .md, those of another part to
<gpu>-<part>.json and .md, what else a part makes to build/gpu/<part>; all also to the folder $OUT where that is set,
with the log of all output. Where the folder is no git repository, DALLE_FAST_COMMIT names the commit.
``gpu_table.py`` makes tables of the results, and compares two runs.

    make gpu DRY_RUN=1 [PART=...]

runs what a CPU can of every stage, a few rows of the benchmark among it, with ten times the patience, and writes to
build/gpu alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
RESULTS = ROOT / "benchmarks" / "results"
# The few rows first, since a time limit cuts the end off.
BENCHMARKS = [
    f"benchmarks/bench_{name}.py"
    for name in ("grad_scale", "adamw16", "kv_cache", "gumbel", "cross_entropy", "attention")
]
MODEL_BENCHMARKS = ["benchmarks/bench_model.py"]

PARTS = ("ops", "models", "proof", "profile", "tiles", "demo")
FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"

TOTAL_SECONDS = 460
LIMIT_SECONDS = {
    "machine": 40,
    "build": 140,
    "install": 30,
    "test": 140,
    "compile": 80,
    "benchmark": 220,
    "exercise": 30,
    "memcheck": 60,
    "racecheck": 60,
    "models": 400,
    "plot": 20,
    "proof": 400,
    "profile": 300,
    "tiles": 400,
    "demo": 400,
}
SANITIZER_SECONDS = 70  # what the benchmark leaves for the stages after it
LAST_ROW_SECONDS = 25  # from the benchmark's own limit, past which it begins no row, to its end
GRACE_SECONDS = 15  # from the interrupt to the kill; pytest-benchmark writes its file in it
LEAST_SECONDS = 5  # with less left, a stage is not started

DRY_RUN_ROWS = "small-row"
DRY_RUN_SELECTION = f"{DRY_RUN_ROWS} or forward-gumbel_quantize or small-linear_cross_entropy"
DRY_RUN_PATIENCE = 10.0

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
TESTS_OF_GPU = "cuda or gpu or triton"
FOUND_NO_GPU = re.compile(r"\b(?:needs a|no) (?:CUDA|GPU)")  # in the reason of a skip
NEED_NO_GPU = {"test_cuda_sources.py", "test_cuda_kernels.py"}  # compilers alone
SANITIZER = "compute-sanitizer"
PROFILER = "ncu"
PROFILE = [PROFILER, "--profile-from-start", "off", "--nvtx", "--clock-control", "none", "--csv", "--page", "details"]
PROFILE_SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "WarpStateStats")
SANITIZER_REFUSES = "Device not supported"

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

ASK_MACHINE = """
import json, platform, torch
from importlib.metadata import PackageNotFoundError, version
def version_of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
gpu = torch.cuda.is_available()
print(json.dumps({
    "gpu": torch.cuda.get_device_name() if gpu else None,
    "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
    "memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpu else None,
    "cuda_runtime": torch.version.cuda,
    "python": platform.python_version(),
    **{name: version_of(name) for name in ("torch", "triton", "pytest", "pytest-benchmark", "setuptools", "numpy")},
}))
"""


@dataclass
class Outcome:
    """How a stage ended: PASSED, FAILED or SKIPPED, after how long, and a word on why."""

    stage: str
    result: str
    seconds: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.stage}: {self.result} after {self.seconds:.0f} s{self.detail and ', ' + self.detail}"


class Run:
    """The stages of one run: their output, outcomes and the time that is left.

    Args:
        log: gets all output as well as the terminal.
        patience: factor of every time limit.
    """

    def __init__(self, log: Path, patience: float = 1.0) -> None:
        self.outcomes: list[Outcome] = []
        self._patience = patience
        self._end = time.monotonic() + patience * TOTAL_SECONDS
        self._log = log.open("w", encoding="utf-8")
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(SITE), os.environ.get("PYTHONPATH")])),
            "PYTHONSAFEPATH": "1",  # the working folder holds dalle_fast too, without its extension
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(BUILD / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(BUILD / "inductor"),
        }

    def say(self, text: str) -> None:
        """Print and log a line."""
        print(text, flush=True)
        self._log.write(f"{text}\n")
        self._log.flush()

    def left(self, stage: str, keep_seconds: float = 0) -> float:
        """Seconds that a stage may take, when the stages after it are to have ``keep_seconds``."""
        return min(self._patience * LIMIT_SECONDS[stage], self._end - time.monotonic() - keep_seconds)

    def stage(
        self,
        name: str,
        command: list[str],
        seconds: float,
        judge: Callable[[int, str], tuple[str, str]] | None = None,
        **environment: str,
    ) -> str:
        """Run a command for at most so many seconds and note how it ended.

        Args:
            judge: from exit status and output, the result and a word on it; by default, 0 passes.

        Returns:
            The command's output, standard error included.
        """
        self.say(f"\n== {name}: {' '.join(command)}")
        if seconds < LEAST_SECONDS:
            self.note(Outcome(name, SKIPPED, 0, "no time left"))
            return ""
        start = time.monotonic()
        status, output = self._run(command, seconds, self._environment | environment)
        if status is None:
            result, detail = FAILED, f"stopped at its limit of {seconds:.0f} s"
        elif judge is not None:
            result, detail = judge(status, output)
        else:
            result, detail = (PASSED, "") if status == 0 else (FAILED, f"exit status {status}")
        self.note(Outcome(name, result, time.monotonic() - start, detail))
        return output

    def note(self, outcome: Outcome) -> None:
        """Keep an outcome and say it."""
        self.outcomes.append(outcome)
        self.say(f"== {outcome}")

    def failed(self) -> list[str]:
        """The stages that did."""
        return [outcome.stage for outcome in self.outcomes if outcome.result == FAILED]

    def _run(self, command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
        """Exit status, None where the command had to be stopped, and output."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        lines: list[str] = []

        def read() -> None:
            for line in process.stdout:
                lines.append(line)
                self.say(line.rstrip("\n"))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        status: int | None = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self.say(f"== killed after {GRACE_SECONDS} more seconds")
        finally:
            _kill_group(process.pid)
        process.wait()
        reader.join(GRACE_SECONDS)
        return status, "".join(lines)


def _kill_group(leader: int) -> None:
    # What a stage started must not live on: a forgotten worker would disturb the next one's timings.
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def commit() -> str:
    """The commit of the working tree, marked where there are changes, or what DALLE_FAST_COMMIT says."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.returncode == 0:
            return result.stdout.strip()
    return os.environ.get("DALLE_FAST_COMMIT", "unknown")


def driver() -> str | None:
    """The NVIDIA driver's version."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.splitlines()[0].strip() if found.returncode == 0 and found.stdout else None


def slug(name: str) -> str:
    """A name as part of a file's name: NVIDIA H200 is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gpu_test_files() -> list[str]:
    """The test files in which a GPU occurs, so that no other has to be importable."""
    words = re.compile(TESTS_OF_GPU.replace(" or ", "|"), re.IGNORECASE)
    files = sorted((ROOT / "tests").glob("test_*.py"))
    wanted = [path for path in files if path.name not in NEED_NO_GPU and words.search(path.read_text("utf-8"))]
    return [str(path.relative_to(ROOT)) for path in wanted]


def count_tests(junit: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped; all 0 where pytest got no further than its start."""
    counts = dict.fromkeys((PASSED, FAILED, SKIPPED), 0)
    for case in read_junit(junit).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            counts[FAILED] += 1
        else:
            counts[SKIPPED if "skipped" in outcomes else PASSED] += 1
    return counts


def read_junit(junit: Path) -> ElementTree.Element:
    """The report's root; an empty one where a pytest that was stopped left none, or only part of one."""
    try:
        return ElementTree.parse(junit).getroot()
    except (FileNotFoundError, ElementTree.ParseError):
        return ElementTree.Element("testsuites")


def read_benchmarks(path: Path) -> dict[str, Any]:
    """pytest-benchmark's file; {} where a pytest that was stopped left none, an empty one or part of one."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def count_without_gpu(junit: Path) -> int:
    """How many tests were skipped because they found no GPU."""
    reasons = [each.get("message", "") for each in read_junit(junit).iter("skipped")]
    return sum(FOUND_NO_GPU.search(reason) is not None for reason in reasons)


def build(run: Run, machine: dict[str, Any]) -> None:
    """Build the package into SITE."""
    python = [sys.executable, "-m"]
    shutil.rmtree(SITE, ignore_errors=True)
    for stale in (ROOT / "build").glob("lib*"):  # files deleted from the tree would live on in it
        shutil.rmtree(stale)
    install = ["pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(SITE), "."]
    environment = {"DALLE_FAST_BUILD": "require"}
    if machine["capability"] and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        environment["TORCH_CUDA_ARCH_LIST"] = machine["capability"]
    run.stage("build", [*python, *install], run.left("build"), **environment)
    if run.failed():
        # The Triton kernels need no compiler, and without an installation another one might be tested in its place.
        shutil.rmtree(SITE, ignore_errors=True)
        run.stage("install", [*python, *install], run.left("install"), DALLE_FAST_BUILD="skip")


def run_ops(run: Run, dry_run: bool) -> tuple[dict[str, int], dict[str, Any]]:
    """The stages of the part "ops" after the build; the tests counted, and the benchmarks' parsed file."""
    junit = BUILD / "tests.xml"
    junit.unlink(missing_ok=True)
    select = ["-k", TESTS_OF_GPU, "-rs", "--continue-on-collection-errors", f"--junitxml={junit}"]

    def judge_tests(status: int, output: str) -> tuple[str, str]:
        counts, without_gpu = count_tests(junit), count_without_gpu(junit)
        said = ", ".join(f"{count} {result}" for result, count in counts.items())
        if without_gpu:
            said += f", {without_gpu} of them for want of a GPU"
        # Where there is one, a test that did not find it has not tested anything.
        passed = status == 0 and counts[PASSED] > 0 and (dry_run or not without_gpu)
        return (PASSED if passed else FAILED), said

    workers = []
    if importlib.util.find_spec("xdist"):  # compiling the kernels takes most of the time, and one core each
        workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    run.stage("test", [*PYTEST, *workers, *select, *gpu_test_files()], run.left("test"), judge_tests)

    this = [sys.executable, str(Path(__file__).resolve())]
    rows = DRY_RUN_ROWS if dry_run else ""
    # The compiled code is found again in Inductor's cache on disk.
    run.stage("compile", [*this, "--compile", rows], run.left("compile"), TORCHINDUCTOR_COMPILE_THREADS="1")

    seconds = run.left("benchmark", keep_seconds=SANITIZER_SECONDS)
    benchmarks = run_benchmarks(run, BENCHMARKS, seconds, ["-k", DRY_RUN_SELECTION] if dry_run else [])

    exercise = [*this, "--exercise"]
    # Without the sanitizer first: it would slow the compiler down, too.
    run.stage("exercise", exercise, run.left("exercise"))
    for tool in ("memcheck", "racecheck"):
        if shutil.which(SANITIZER) is None:
            run.note(Outcome(tool, SKIPPED, 0, f"{SANITIZER} is not installed"))
            continue
        command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", *exercise]
        # Blocks of PyTorch's own allocator border on each other: an access past one's end would land in the next.
        run.stage(tool, command, run.left(tool), _judge_sanitizer, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return count_tests(junit), benchmarks


def run_benchmarks(
    run: Run, files: list[str], seconds: float, options: list[str], **environment: str
) -> dict[str, Any]:
    """The stage "benchmark"; its parsed file."""
    benchmark_json = BUILD / "benchmark.json"
    benchmark_json.unlink(missing_ok=True)
    command = [*PYTEST, *files, "--benchmark-only", "-rs", f"--benchmark-json={benchmark_json}"]
    command += ["--benchmark-columns=median,rounds", *options]
    environment["DALLE_FAST_BENCH_SECONDS"] = f"{max(0.0, seconds - LAST_ROW_SECONDS):.0f}"
    run.stage("benchmark", command, seconds, DALLE_FAST_COMMIT=commit(), **environment)
    return read_benchmarks(benchmark_json)


def run_part(run: Run, part: str, dry_run: bool) -> tuple[dict[str, int], dict[str, Any]]:
    """The stages of a part after the build; as :func:`run_ops`."""
    folder = BUILD / part
    if part == "ops":
        return run_ops(run, dry_run)
    shutil.rmtree(folder, ignore_errors=True)
    if part == "models":
        benchmarks = run_benchmarks(run, MODEL_BENCHMARKS, run.left("models"), [], DALLE_FAST_BENCH_SMALL="1")
        plot_kernels(run, folder, benchmarks)
        return {}, benchmarks
    device = "cpu" if dry_run else "cuda"
    if part == "proof":
        command = [sys.executable, str(ROOT / "benchmarks" / "precision_proof.py"), "--device", device]
        run.stage("proof", [*command, "--out", str(folder)], run.left("proof"))
    elif part == "profile":
        run_profile(run, folder, dry_run)
    elif part == "tiles":
        folder.mkdir(parents=True)
        command = [sys.executable, str(ROOT / "benchmarks" / "tune_tiles.py")]
        command += ["--help"] if dry_run else ["--out", str(folder / "tiles.json")]
        # PYTHONSAFEPATH keeps the script from the files beside it.
        run.stage("tiles", command, run.left("tiles"), PYTHONPATH=f"{SITE}{os.pathsep}{ROOT / 'benchmarks'}")
    else:
        data = ["shapes"] if dry_run else ["emoji", "--font", os.environ.get("FONT", FONT)]
        command = [sys.executable, "-m", "dalle_fast", "demo", "--out", str(folder), "--data", *data]
        run.stage("demo", command, run.left("demo"))
    return {}, {}


def plot_kernels(run: Run, folder: Path, benchmarks: dict[str, Any]) -> None:
    """The stage "plot"."""
    if importlib.util.find_spec("matplotlib") is None or not benchmarks:
        run.note(Outcome("plot", SKIPPED, 0, "matplotlib is not installed" if benchmarks else "nothing to draw"))
        return
    folder.mkdir(parents=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "plot_kernels.py"), str(BUILD / "benchmark.json")]
    run.stage("plot", [*command, "--out", str(folder / "kernels.png")], run.left("plot"))


def run_profile(run: Run, folder: Path, dry_run: bool) -> None:
    """The stage "profile"; a dry run makes the calls without the profiler."""
    command = [sys.executable, str(Path(__file__).resolve()), "--profiled"]
    if not dry_run and shutil.which(PROFILER) is None:
        run.note(Outcome("profile", SKIPPED, 0, f"{PROFILER} is not installed"))
        return
    folder.mkdir(parents=True)
    sections = [word for section in PROFILE_SECTIONS for word in ("--section", section)]
    watched = [] if dry_run else [*PROFILE, *sections, "--log-file", str(folder / "kernels.csv")]
    run.stage("profile", [*watched, *command], run.left("profile"))


def _judge_sanitizer(status: int, output: str) -> tuple[str, str]:
    if SANITIZER_REFUSES in output:
        return SKIPPED, f"{SANITIZER} does not support this device"
    return (PASSED, "") if status == 0 else (FAILED, f"exit status {status}")


def write_results(
    folder: Path,
    name: str,
    machine: dict[str, Any],
    run: Run,
    tests: dict[str, int],
    benchmarks: dict[str, Any],
    part: str = "ops",
) -> list[Path]:
    """The two files of results: all of it as JSON, and as Markdown to read."""
    stages = [vars(outcome) for outcome in run.outcomes]
    gathered = {"machine": machine, "stages": stages, "tests": tests, "benchmarks": benchmarks}
    command = "make gpu" if part == "ops" else f"make gpu PART={part}"
    lines = [f"# {machine['gpu'] or 'Dry run without a GPU'}", "", f"Made by `{command}`.", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items() if value is not None]
    lines += ["", "| stage | result | seconds | |", "| --- | --- | --: | --- |"]
    lines += [f"| {each.stage} | {each.result} | {each.seconds:.0f} | {each.detail} |" for each in run.outcomes]
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.json", folder / f"{name}.md"]
    # First, so that whatever is wrong with the tables, the numbers are kept.
    files[0].write_text(json.dumps(gathered, indent=1) + "\n", encoding="utf-8")
    if benchmarks:
        from report import report

        lines += ["", "## Benchmarks", "", report(benchmarks)]
    files[1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def compile_rivals(words: str) -> None:
    """Run every row of the benchmarks that compiles code, in as many processes as there are cores.

    Args:
        words: only rows whose id holds them.
    """
    import bench_attention
    import bench_gumbel
    import rivals

    rows = [row.values for row in bench_attention.ROWS if words in row.id]
    # Tuning takes the GPU for itself.
    wanted = [(op, case) for case, op in rows if rivals.OPS[op].compiles and op != "flex_autotuned"]
    sizes = [bench_gumbel.LARGE._replace(forward=forward) for forward in (True, False)]
    sizes = [each for each in sizes if words in ("forward-compiled" if each.forward else "training-compiled")]
    context = multiprocessing.get_context("spawn")  # a fork cannot use the GPU
    with ProcessPoolExecutor(min(len(wanted) + len(sizes), os.cpu_count() or 1), context) as pool:
        futures = [pool.submit(_quantize_once, each) for each in sizes]
        futures += [pool.submit(_call_once, op, case) for op, case in wanted]
        for future in as_completed(futures):
            future.result()
    print(f"{len(futures)} rows compiled")


def _call_once(op: str, case: Any) -> None:
    import rivals
    import torch

    rivals.make_call(op, case)()
    torch.cuda.empty_cache()  # the other processes need memory, too


def _quantize_once(sizes: Any) -> None:
    import bench_gumbel
    import torch

    if sizes.forward:
        bench_gumbel.assert_quantizes("compiled", bench_gumbel.LARGE)
    bench_gumbel.make_call("compiled", sizes)()
    torch.cuda.empty_cache()


def _copy_small_files(source: Path, target: Path) -> None:
    """Pictures and numbers that a part made; not its data and checkpoints."""
    for file in sorted(source.glob("*")):
        if file.suffix in (".png", ".json", ".jsonl", ".csv", ".md"):
            shutil.copy(file, target)


def main() -> int:
    """Run the stages; the exit status."""
    parser = argparse.ArgumentParser(description="GPU tests, benchmarks, memory checks and training.")
    parser.add_argument("--dry-run", action="store_true", help="what a CPU can of every stage")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="ops", help="what is run (default: %(default)s)")
    parser.add_argument("--exercise", action="store_true", help="only the calls that compute-sanitizer watches")
    parser.add_argument("--profiled", action="store_true", help="only the calls that the profiler watches")
    parser.add_argument("--compile", metavar="WORDS", help="only compile the rivals of rows whose id holds the words")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # for the other files here; PYTHONSAFEPATH keeps it out
    if arguments.exercise:
        from exercise import exercise

        exercise()
        return 0
    if arguments.part == "all":
        this = [sys.executable, str(Path(__file__).resolve()), *(["--dry-run"] if arguments.dry_run else [])]
        statuses = [subprocess.run([*this, "--part", part], cwd=ROOT).returncode for part in PARTS]
        return 1 if any(statuses) else 0  # a part that was killed has a negative one
    if arguments.profiled:
        from profiled import run_profiled

        run_profiled()
        return 0
    if arguments.compile is not None:
        compile_rivals(arguments.compile)
        return 0
    BUILD.mkdir(parents=True, exist_ok=True)
    log = BUILD / "log.txt"
    run = Run(log, DRY_RUN_PATIENCE if arguments.dry_run else 1.0)
    answer = run.stage("machine", [sys.executable, "-c", ASK_MACHINE], run.left("machine"))
    if run.failed():
        run.say(f"make gpu needs torch in {sys.executable}; name another one with: make gpu PYTHON=/path/to/python3")
        return 1
    machine = json.loads(answer.splitlines()[-1])
    if machine["gpu"] is None and not arguments.dry_run:
        cause = "built without CUDA" if machine["cuda_runtime"] is None else "without a CUDA device"
        run.say(f"make gpu needs an NVIDIA GPU, and torch {machine['torch']} is {cause}.")
        run.say("make gpu DRY_RUN=1 runs what a CPU can of it.")
        return 1
    machine |= {"driver": driver(), "system": platform.platform(), "commit": commit()}
    files = [log]
    try:
        part = arguments.part
        build(run, machine)
        tests, benchmarks = run_part(run, part, arguments.dry_run)
        folder, name = (BUILD, "dry-run") if arguments.dry_run else (RESULTS, slug(machine["gpu"]))
        name += "" if part == "ops" else f"-{part}"
        files += write_results(folder, name, machine, run, tests, benchmarks, part)
        run.say("")
        for outcome in run.outcomes:
            run.say(str(outcome))
        failed = run.failed()
        run.say(f"results: {files[-1].relative_to(ROOT)}")
        run.say(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    finally:
        if os.environ.get("OUT"):
            for file in files:
                shutil.copy(file, os.environ["OUT"])
            _copy_small_files(BUILD / arguments.part, Path(os.environ["OUT"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""The package as it is built and installed: its files, its metadata, what an import pulls in."""

import email
import importlib.metadata
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import dalle_fast

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_SOURCE = shutil.ignore_patterns(
    ".git",
    ".venv",
    ".*_cache",
    ".hypothesis",
    ".benchmarks",
    "build",
    "dist",
    "demo",
    "*.egg-info",
    "*.so",
    "__pycache__",
)


def setup_py(source: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "DALLE_FAST_BUILD"}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=source, env=environment | variables, capture_output=True, text=True)


def shadow_torch(folder: Path, statement: str) -> str:
    """A PYTHONPATH on which `import torch` runs the statement."""
    folder.joinpath("torch.py").write_text(statement)
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree, free of anything built in the original."""
    folder = tmp_path_factory.mktemp("packaging") / "source"
    shutil.copytree(ROOT, folder, ignore=NOT_SOURCE)
    return folder


@pytest.fixture(scope="module")
def sdist(source):
    """The source distribution, unpacked."""
    result = setup_py(source, "-q", "sdist", "--formats=tar")
    assert result.returncode == 0, result.stderr
    (archive,) = (source / "dist").glob("*.tar")
    with tarfile.open(archive) as tar:
        tar.extractall(source.parent, filter="data")
    return source.parent / archive.stem


def files_below(folder: Path, *patterns: str) -> set[str]:
    return {str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern) if path.is_file()}


def test_sdist_has_every_source_file(source, sdist):
    patterns = [
        "dalle_fast/**/*.py",
        "kernels/**/*.py",
        "csrc/**/*",
        "tests/**/*",
        "benchmarks/**/*",
        "docs/**/*",
    ]
    patterns += ["Makefile", "requirements.txt", "setup.py", "pyproject.toml", "*.md", "LICENSE", ".ci/run"]
    wanted = files_below(source, *patterns)
    assert {"csrc/common/formats.h", "csrc/cuda/formats.cu", "kernels/__init__.py", "LICENSE"} <= wanted
    assert not wanted - files_below(sdist, "**/*")


def test_wheel_from_the_sdist_has_every_module_and_nothing_else(source, sdist):
    result = setup_py(sdist, "-q", "bdist_wheel", DALLE_FAST_BUILD="skip")
    assert result.returncode == 0, result.stderr
    (wheel,) = (sdist / "dist").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kernels = {f"dalle_fast/{name}" for name in files_below(source, "kernels/**/*.py")}
    assert packed == files_below(source, "dalle_fast/**/*.py") | kernels


def test_every_package_is_listed():
    folders = {path.parent for path in (ROOT / "dalle_fast").rglob("__init__.py")}
    names = {str(folder.relative_to(ROOT)).replace(os.sep, ".") for folder in folders}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == names | {"dalle_fast.kernels"}


def test_version_has_one_source(source):
    assert "version" in PYPROJECT["project"]["dynamic"]
    assert importlib.metadata.version("dalle_fast") == dalle_fast.__version__
    result = setup_py(source, "--version")
    assert result.stdout.splitlines()[-1] == dalle_fast.__version__, result.stderr


def test_metadata_does_not_import_torch(source, tmp_path):
    path = shadow_torch(tmp_path, "raise SystemExit('torch was imported')")
    result = setup_py(source, "-q", "egg_info", "--egg-base", str(tmp_path), PYTHONPATH=path)
    assert result.returncode == 0, result.stdout + result.stderr
    metadata = email.message_from_string((tmp_path / "dalle_fast.egg-info/PKG-INFO").read_text())
    assert metadata["Name"] == "dalle_fast"
    assert metadata["License-Expression"] == "MIT"
    assert "torch>=2.11" in metadata.get_all("Requires-Dist")


def build_ext(source: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    libraries = ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    result = setup_py(source, "-q", "build_ext", *libraries, **variables)
    assert not (folder / "lib").exists()
    return result


def test_without_torch_the_extension_is_left_out_with_a_warning(source, tmp_path):
    path = shadow_torch(tmp_path, "raise ImportError('no torch here')")
    result = build_ext(source, tmp_path, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("WARNING: dalle_fast._C is not built") == 1
    assert "(no torch here)" in result.stderr
    assert "run: pip install --no-build-isolation ." in result.stderr


def test_without_a_compiler_the_extension_is_left_out_with_a_warning(source, tmp_path):
    result = build_ext(source, tmp_path, CXX="no-such-compiler -O2")
    assert result.returncode == 0, result.stderr
    assert "the C++ compiler 'no-such-compiler' is not there" in result.stderr


def test_require_makes_a_missing_compiler_an_error(source, tmp_path):
    result = build_ext(source, tmp_path, CXX="no-such-compiler", DALLE_FAST_BUILD="require")
    assert result.returncode != 0
    assert "RuntimeError: dalle_fast._C is not built: the C++ compiler 'no-such-compiler'" in result.stderr


def test_skip_builds_nothing_and_says_nothing(source, tmp_path):
    path = shadow_torch(tmp_path, "raise SystemExit('torch was imported')")
    result = build_ext(source, tmp_path, PYTHONPATH=path, DALLE_FAST_BUILD="skip")
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr


def test_unknown_build_mode_is_refused(source, tmp_path):
    result = build_ext(source, tmp_path, DALLE_FAST_BUILD="maybe")
    assert result.returncode != 0
    assert "DALLE_FAST_BUILD must be one of auto, require, skip, got 'maybe'" in result.stderr


def test_a_compile_error_is_an_error(source, tmp_path):
    broken = tmp_path / "source"
    shutil.copytree(source, broken, ignore=NOT_SOURCE)
    (broken / "csrc/module.cpp").write_text("this is no C++\n")
    for path in (broken / "csrc/cpu").iterdir():
        path.unlink()
    result = build_ext(broken, tmp_path)
    assert result.returncode != 0
    assert "error:" in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("known", "architectures"),
    [
        ("sm_75 sm_80 sm_90 sm_100 sm_120", "8.0;9.0;10.0"),
        ("sm_80 sm_86 sm_90", "8.0;9.0"),
        ("", "8.0;9.0;10.0"),
        (None, "8.0;9.0;10.0"),
    ],
)
def test_default_cuda_architectures(known, architectures, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    names = runpy.run_path("setup.py")
    if known is not None:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-code ] && printf "%s\\n" {known}\n')
        nvcc.chmod(0o755)
    assert names["default_cuda_architectures"](str(tmp_path)) == architectures


def test_build_requirements_leave_torch_out():
    assert not [name for name in PYPROJECT["build-system"]["requires"] if name.startswith("torch")]


def test_kernels_are_installed_inside_the_package(tmp_path):
    # From elsewhere, because in the source tree the folder kernels/ itself can be imported.
    code = "from importlib.util import find_spec; import dalle_fast.kernels; print(find_spec('kernels'))"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert result.stdout.split() == ["None"], result.stderr


def test_import_needs_torch_alone():
    # torch itself may import some of these, so what counts is what dalle_fast adds.
    heavy = {
        "triton",
        "tokenizers",
        "webdataset",
        "matplotlib",
        "tensorboard",
        "tqdm",
        "emoji",
        "safetensors",
        "PIL",
    }
    code = "import sys, torch; before = set(sys.modules); import dalle_fast; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = {name.partition(".")[0] for name in result.stdout.split()}
    assert "dalle_fast" in added
    assert not added & heavy

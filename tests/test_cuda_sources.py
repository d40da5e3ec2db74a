"""Every csrc/**/*.cu compiles for sm_80 and sm_90 without a warning: needs nvcc, but no GPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))


def find_nvcc() -> str | None:
    # Not torch's CUDA_HOME: that is None beside a CPU build of torch.
    cuda_home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{cuda_home}/bin")


def test_there_are_cuda_sources():
    assert SOURCES


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is neither on the PATH nor in CUDA_HOME")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_warnings(source, architecture, tmp_path):
    command = [find_nvcc(), "-c", str(source), f"-arch={architecture}", "-std=c++20", "-O3"]
    command += ["-Werror=all-warnings", "-Xcompiler=-Wall,-Werror", "-DUSE_CUDA"]
    command += [f"-isystem={path}" for path in cpp_extension.include_paths(device_type="cpu")]
    result = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert "warning" not in output.lower(), output

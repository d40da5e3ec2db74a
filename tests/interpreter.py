"""Triton's interpreter, for tests of kernels on a machine without a GPU.

It is chosen when triton is imported, and other tests need its compiler: a module of such tests marks them as
``interpreted`` and runs itself once more, in a process of its own, with :func:`run_interpreted`.
"""

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, see test_in_the_interpreter")


def run_interpreted(module: str, *arguments: str) -> None:
    """Run the tests of a module, by its file, in the interpreter; they have to pass."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", module]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout

"""dalle_fast.ops.backends: a part that is missing is named with its cause and its remedy."""

import importlib.util

import pytest
import torch
from helpers import needs_extension

from dalle_fast.ops import backends

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_error", ImportError("undefined symbol: torch_x"))


@needs_extension
def test_build_info_says_how_the_extension_was_built():
    info = backends.load_extension().build_info()
    assert set(info) == {"compiler", "cpp_standard", "torch", "cpu_levels", "cpu_level", "cuda_architectures"}
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["cpp_standard"] >= 202002
    assert info["cpu_levels"][0] == "scalar" and info["cpu_level"] in info["cpu_levels"]


@needs_extension
def test_set_cpu_level_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"cpu level must be one of scalar.*, got sse9"):
        backends.load_extension().set_cpu_level("sse9")


@needs_extension
def test_set_cpu_level_is_what_build_info_reports():
    extension = backends.load_extension()
    level = extension.build_info()["cpu_level"]
    try:
        extension.set_cpu_level("scalar")
        assert extension.build_info()["cpu_level"] == "scalar"
    finally:
        extension.set_cpu_level(level)


def test_load_extension_names_cause_and_remedy(without_extension):
    with pytest.raises(RuntimeError, match=r"undefined symbol: torch_x.*pip install --no-build-isolation \.") as caught:
        backends.load_extension()
    assert caught.value.__cause__ is backends.extension_error


@needs_extension
def test_cpp_on_other_devices_is_refused():
    with pytest.raises(RuntimeError, match='backend="cpp" runs on cpu and cuda tensors, got a tensor on meta'):
        backends.require_cpp_backend(torch.device("meta"))


@needs_extension
def test_cpp_on_cuda_names_the_missing_half(monkeypatch):
    monkeypatch.setattr(backends, "has_cuda_extension", False)
    with pytest.raises(RuntimeError, match=r"needs the CUDA half of dalle_fast\._C, which was not built"):
        backends.require_cpp_backend(torch.device("cuda", 0))


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(backends, "has_triton", False)
    for device in (CPU, GPU):
        assert not backends.has_triton_backend(device)
        with pytest.raises(RuntimeError, match=r"triton is not installed; .* pip install triton"):
            backends.require_triton_backend(device)


@needs_triton
def test_triton_on_the_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match='got a tensor on cpu; use backend="auto", or set TRITON_INTERPRET=1'):
        backends.require_triton_backend(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends.require_triton_backend(CPU)
    assert not backends.has_triton_backend(CPU)


@needs_triton
def test_triton_on_old_and_new_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not backends.has_triton_backend(GPU)
    with pytest.raises(RuntimeError, match=r"needs compute capability 8\.0 or newer, got 7\.5; use backend"):
        backends.require_triton_backend(GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backends.require_triton_backend(GPU)
    assert backends.has_triton_backend(GPU)


@needs_triton
def test_triton_on_amd_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not backends.has_triton_backend(GPU)
    with pytest.raises(RuntimeError, match=r'for NVIDIA GPUs and .* use backend="auto"'):
        backends.require_triton_backend(GPU)


def test_available_has_a_cause_for_everything_missing():
    parts = backends.available()
    assert parts["torch"] == torch.__version__
    for name in ("cuda", "triton", "cpp"):
        assert (parts[name] is None) == (name in parts["missing"])


def test_describe_reports_what_is_there():
    text = backends.describe()
    assert torch.__version__ in text
    for cause in backends.available()["missing"].values():
        assert cause in text


def test_describe_reports_a_missing_extension(without_extension):
    assert backends.available()["cpp"] is None
    assert "_C      none: undefined symbol: torch_x; build it" in backends.describe()


def test_describe_tells_no_device_from_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in backends.describe()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds no CUDA device" in backends.describe()

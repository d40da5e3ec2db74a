"""dalle_fast.ops.backends: a part that is missing is named with its cause and its remedy."""

import pytest
import torch

from dalle_fast.ops import backends

needs_extension = pytest.mark.skipif(
    backends.extension is None, reason=f"dalle_fast._C is not built: {backends.extension_error}"
)


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

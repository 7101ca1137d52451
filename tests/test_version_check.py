"""An extension that was built for another torch is refused in one readable line."""

from __future__ import annotations

import sys
import types

import pytest

from blockswap import _version_check
from blockswap._version_check import TorchVersion, find_mismatch, find_unsupported_platform


@pytest.mark.parametrize(
    ("built_for", "found"),
    [
        (TorchVersion("2.13.0+cpu"), TorchVersion("2.13.0+cpu")),
        (TorchVersion("2.13.0+cpu"), TorchVersion("2.13.1+cpu")),
        (TorchVersion("2.13.0+cu130", cuda="13.0"), TorchVersion("2.13.0+cu132", cuda="13.2")),
        (TorchVersion("2.13.0+rocm7.0", hip="7.0.1"), TorchVersion("2.13.1+rocm7.2", hip="7.2.0")),
        (TorchVersion("2.13.0+cpu"), TorchVersion("2.13.0+cu130", cuda="13.0")),
        (TorchVersion("2.14.0.dev20270101"), TorchVersion("2.14.0")),
    ],
)
def test_the_same_minor_and_the_same_cuda_major_are_accepted(built_for, found):
    assert find_mismatch(built_for, found) is None


def test_another_torch_minor_is_refused_with_both_versions_and_the_command():
    reason = find_mismatch(TorchVersion("2.13.0+cpu"), TorchVersion("2.11.0+cu130", cuda="13.0"))
    assert reason is not None
    assert "built for torch 2.13 but found torch 2.11.0+cu130" in reason
    assert "pip install --no-build-isolation" in reason
    assert "\n" not in reason


def test_minor_2_1_is_not_taken_for_2_13():
    assert find_mismatch(TorchVersion("2.13.0"), TorchVersion("2.1.0")) is not None


def test_another_cuda_major_is_refused():
    reason = find_mismatch(
        TorchVersion("2.13.0+cu130", cuda="13.0"), TorchVersion("2.13.0+cu128", cuda="12.8")
    )
    assert reason is not None
    assert "built for CUDA 13" in reason
    assert "CUDA 12.8" in reason


def test_a_torch_without_cuda_is_refused_by_a_cuda_build():
    reason = find_mismatch(
        TorchVersion("2.13.0+cu130", cuda="13.0"), TorchVersion("2.13.0+cpu", cuda=None)
    )
    assert reason is not None
    assert "one without CUDA" in reason


def test_a_cuda_torch_is_refused_by_a_rocm_build():
    reason = find_mismatch(
        TorchVersion("2.13.0+rocm7.0", hip="7.0.1"), TorchVersion("2.13.0+cu130", cuda="13.0")
    )
    assert reason is not None
    assert "one without ROCm" in reason


def test_native_windows_is_refused_in_one_sentence():
    reason = find_unsupported_platform("win32")
    assert reason is not None
    assert "WSL2" in reason
    assert reason.count(". ") == 0


def test_linux_is_supported():
    assert find_unsupported_platform("linux") is None


def test_check_raises_import_error_when_the_build_does_not_fit(monkeypatch):
    pytest.importorskip("torch")
    stale = types.ModuleType("blockswap._build_info")
    stale.TORCH, stale.CUDA, stale.HIP = "1.0.0", None, None
    monkeypatch.setitem(sys.modules, "blockswap._build_info", stale)
    monkeypatch.setattr(sys.modules["blockswap"], "_build_info", stale, raising=False)
    with pytest.raises(ImportError, match=r"built for torch 1\.0 but found torch"):
        _version_check.check()


def test_check_names_the_command_when_nothing_was_built(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "blockswap._build_info", None)
    monkeypatch.delattr(sys.modules["blockswap"], "_build_info", raising=False)
    with pytest.raises(ImportError, match="has not been built"):
        _version_check.check()

"""Refuses to load an extension that was built for another torch: the C++ ABI changes each minor.

Loading it anyway would end in an undefined symbol at best, in wrong memory at worst.
"""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps blockswap"
REBUILD = f"{REINSTALL} (in a checkout: make build)"


class TorchVersion(NamedTuple):
    """The versions that decide whether an extension fits, as torch itself spells them.

    `cuda` and `hip` are None where the torch, or the extension, was built without them.
    """

    torch: str
    cuda: str | None = None
    hip: str | None = None


def find_mismatch(built_for: TorchVersion, found: TorchVersion) -> str | None:
    """Return why an extension built for one torch cannot run with another, or None when it can.

    An extension without GPU part runs with any torch of its minor.
    """
    if _minor(built_for.torch) != _minor(found.torch):
        return (
            f"blockswap was built for torch {_minor(built_for.torch)} "
            f"but found torch {found.torch}: {REBUILD}"
        )
    for name, built, here in (
        ("CUDA", built_for.cuda, found.cuda),
        ("ROCm", built_for.hip, found.hip),
    ):
        if built is not None and (here is None or _major(built) != _major(here)):
            there = f"one for {name} {here}" if here else f"one without {name}"
            return (
                f"blockswap was built for {name} {_major(built)} "
                f"but torch {found.torch} is {there}: {REBUILD}"
            )
    return None


def find_unsupported_platform(platform: str) -> str | None:
    """Return why blockswap does not run on `platform` (a value of sys.platform), or None."""
    if platform in ("win32", "cygwin"):
        return "blockswap runs on Linux and under WSL2, not on native Windows: use it inside WSL2."
    return None


def check() -> None:
    """Check this process before the extension is loaded.

    Raises:
        ImportError: the extension was built for another torch or not at all, or the platform is not
            supported; the text holds the command that mends it.
    """
    refused = find_unsupported_platform(sys.platform)
    if refused:
        raise ImportError(refused)

    import torch

    try:
        _build_info = importlib.import_module("blockswap._build_info")  # written by setup.py
    except ImportError:
        raise ImportError(f"blockswap's extension has not been built: {REBUILD}") from None
    built_for = TorchVersion(_build_info.TORCH, _build_info.CUDA, _build_info.HIP)
    found = TorchVersion(str(torch.__version__), torch.version.cuda, torch.version.hip)
    mismatch = find_mismatch(built_for, found)
    if mismatch:
        raise ImportError(mismatch)


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _major(version: str) -> str:
    return version.split(".")[0]

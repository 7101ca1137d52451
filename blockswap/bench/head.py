"""The head of every result file: what ran, where, with what."""

from __future__ import annotations

import datetime
import hashlib
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]


def command_line(*program: str, argv: Sequence[str]) -> str:
    """Return what was called; files by name alone, without the folders of one machine."""
    given = [Path(word).name if word.startswith("/") else word for word in argv[1:]]
    return shlex.join([*program, *given])


def make_head(command: str) -> dict[str, Any]:
    """Return schema, date, commit, machine and command; no commit where this is no checkout."""
    is_checkout = (ROOT / ".git").exists()
    head: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD") if is_checkout else None,
        "sources": _sources(),
        "gpu": None,
        "driver": None,
        "clocks": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
        "command": command,
    }
    if torch.cuda.is_available():
        head["gpu"] = torch.cuda.get_device_name()
        head["driver"] = _query("driver_version")
        head["clocks"] = _query("clocks.sm,clocks.mem")
        head["link"] = _query("pcie.link.gen.max,pcie.link.width.max")
    return head


def _sources() -> str:
    """Return what tells the measured tree from its commit: a hash of all that is installed."""
    digest = hashlib.sha256()
    files = [path for folder in ("csrc", "blockswap") for path in (ROOT / folder).rglob("*")]
    for path in sorted(files):
        if path.suffix in (".cpp", ".h", ".py") and path.name != "_build_info.py":
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def gpu_uuid() -> str:
    """Return what the driver calls the current GPU: it does not know CUDA_VISIBLE_DEVICES."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _query(fields: str) -> str | None:
    chosen = f"--id={gpu_uuid()}"
    return _output("nvidia-smi", chosen, f"--query-gpu={fields}", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()

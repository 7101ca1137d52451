"""What is missing or slow on this machine, and what to do about it.

`look` gathers facts, `diagnose` judges them: pure, so that tests can show it any machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import resource
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from blockswap.sizes import format_bytes

GIB = 2**30
LITTLE_MEMORY = 16 * GIB  # a 12B model in bf16 has 22 GiB of weights
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

Severity = Literal["wrong", "slow", "note"]


@dataclass(frozen=True)
class Machine:
    """Facts about this machine.

    Attributes:
        platform: as `sys.platform`.
        kernel: release of the operating system's kernel.
        torch: its version.
        torch_gpu: "cuda" or "rocm": what torch was built for; None: the CPU alone.
        build: what blockswap was built for: "cuda", "rocm" or "cpu".
        gpus: names of the devices that torch sees.
        memory_bytes: host memory in all.
        available_bytes: of it, what programs may take now.
        lock_limit_bytes: how much one process may lock; None: no limit.
        huge_pages: "always", "madvise", "never"; "" where the kernel does not say.
        diffusers: whether it can be imported.
    """

    platform: str
    kernel: str
    torch: str
    torch_gpu: str | None
    build: str
    gpus: tuple[str, ...]
    memory_bytes: int
    available_bytes: int
    lock_limit_bytes: int | None
    huge_pages: str
    diffusers: bool


@dataclass(frozen=True)
class Finding:
    """One thing to know: ``wrong`` stops streaming to a GPU, ``slow`` costs time."""

    severity: Severity
    what: str
    way_out: str


def diagnose(machine: Machine) -> list[Finding]:
    """Return what is wrong or slow, worst first."""
    order: tuple[Severity, ...] = ("wrong", "slow", "note")
    return sorted(_findings(machine), key=lambda finding: order.index(finding.severity))


def _findings(m: Machine) -> Iterator[Finding]:
    yield from _gpu(m)
    if "microsoft" in m.kernel.lower():
        yield Finding(
            "slow",
            f"WSL2 pins about half of its {format_bytes(m.memory_bytes)} of memory at most; weights"
            " beyond that are copied several times slower",
            "raise memory= in .wslconfig, then `wsl --shutdown`; or choose a smaller model",
        )
    if m.lock_limit_bytes is not None and m.lock_limit_bytes < m.memory_bytes // 2:
        yield Finding(
            "slow",
            f"one process may lock {format_bytes(m.lock_limit_bytes)} of"
            f" {format_bytes(m.memory_bytes)}: where the driver counts that, weights beyond it are"
            " not pinned and their copies are slow",
            "raise `ulimit -l` (in a container: --ulimit memlock=-1)",
        )
    if m.huge_pages == "never":
        yield Finding(
            "slow",
            "transparent huge pages are off: attaching takes longer, each page is pinned by itself",
            f"echo madvise | sudo tee {HUGE_PAGES}",
        )
    if m.available_bytes < LITTLE_MEMORY:
        yield Finding(
            "note",
            f"{format_bytes(m.available_bytes)} of host memory are available: all weights of a"
            " streamed model must fit",
            "close other programs or choose a smaller model",
        )
    if not m.diffusers:
        yield Finding(
            "note",
            "diffusers is not installed: models can be attached, pipelines and the demo need it",
            "pip install diffusers transformers accelerate",
        )


def _gpu(m: Machine) -> Iterator[Finding]:
    if m.torch_gpu is None:
        yield Finding(
            "note",
            f"torch {m.torch} is a CPU build: models stream on the CPU, for trials only",
            "install a CUDA or ROCm build of torch, then reinstall blockswap beside it",
        )
        return
    if m.build != m.torch_gpu:
        yield Finding(
            "wrong",
            f"blockswap was built for {m.build}, but torch {m.torch} is a {m.torch_gpu} build",
            "pip install --no-build-isolation --force-reinstall --no-deps blockswap",
        )
    if not m.gpus:
        yield Finding(
            "wrong",
            f"torch {m.torch} is a {m.torch_gpu} build but sees no GPU",
            "check the driver (nvidia-smi or rocm-smi) and CUDA_VISIBLE_DEVICES",
        )


def look() -> Machine:
    """Return the facts about this machine."""
    import psutil
    import torch

    info = importlib.import_module("blockswap._build_info")
    memory = psutil.virtual_memory()
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return Machine(
        platform=sys.platform,
        kernel=platform.release(),
        torch=str(torch.__version__),
        torch_gpu="cuda" if torch.version.cuda else "rocm" if torch.version.hip else None,
        build=info.BUILD,
        gpus=tuple(torch.cuda.get_device_name(i) for i in gpus),
        memory_bytes=memory.total,
        available_bytes=memory.available,
        lock_limit_bytes=None if soft == resource.RLIM_INFINITY or os.geteuid() == 0 else soft,
        huge_pages=_chosen(HUGE_PAGES),
        diffusers=importlib.util.find_spec("diffusers") is not None,
    )


def _chosen(path: Path) -> str:
    """Return the word in brackets: ``always [madvise] never``."""
    try:
        return path.read_text("ascii").partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def as_json(machine: Machine, findings: list[Finding]) -> dict[str, object]:
    """Return facts and findings for `json.dumps`."""
    return {"machine": asdict(machine), "findings": [asdict(finding) for finding in findings]}

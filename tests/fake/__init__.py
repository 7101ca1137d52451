"""The fake accelerator: a torch device named "fake" for tests without a GPU.

Streams are threads, events are real, memory has a limit and, where a test wants it, a cache like CUDA's;
operators run later than they are called. What is a race on a GPU is a race here, and the delays below
make it show.

    from tests import fake
    device_module = fake.load()          # builds once, then quick; also torch.fake
    device_module.set_body_delay(0.01)   # every operator now lags behind its caller
    x = torch.ones(4, device="fake:1")

One such backend per process, and while it is there `torch.accelerator` means it, even beside CUDA: tests that
load it run in a pytest process of their own. `load` sets PyTorch to one thread per operator, so that
sums on the fake device and on the CPU have the same bits.
"""

from __future__ import annotations

import atexit
import fcntl
import os
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def build_directory() -> Path:
    """Where this torch version's build lies; git ignores it."""
    import torch

    return ROOT / "build" / f"fake-{torch.__version__}"


def load(verbose: bool = False) -> ModuleType:
    """Build the backend if its sources changed, register it once, and return `torch.fake`."""
    import torch
    from torch.utils import cpp_extension

    from .device_module import FakeDeviceModule

    # The process knows whether it was loaded; this file may be imported under two names by pytest.
    device_module: ModuleType | None = getattr(torch, "fake", None)
    if device_module is None:
        directory = build_directory()
        directory.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("MAX_JOBS", str(max(1, (os.cpu_count() or 2) // 2)))
        with (directory / "one_builder").open("w") as one_builder:
            fcntl.flock(one_builder, fcntl.LOCK_EX)
            # PyTorch's own lock outlives a builder that was killed, and is waited for for ever.
            (directory / "lock").unlink(missing_ok=True)
            extension = cpp_extension.load(
                name="blockswap_fake",
                sources=[str(path) for path in sorted(HERE.glob("*.cpp"))],
                build_directory=str(directory),
                extra_cflags=["-O1", "-g0", *WARNINGS],
                verbose=verbose,
            )
        torch.utils.rename_privateuse1_backend("fake")
        device_module = FakeDeviceModule(extension)
        torch._register_device_module("fake", device_module)
        torch.utils.generate_methods_for_privateuse1_backend()
        torch.set_num_threads(1)
        # Workers must not run kernels while the process takes PyTorch apart.
        atexit.register(device_module.drain)
    return device_module

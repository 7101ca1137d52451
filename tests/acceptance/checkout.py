"""A copy of diffusers' tests that runs here: beside the installed diffusers, without a network.

The copy leaves the checkout's own package behind, so that the installed one is tested, and gives
the tests a folder to run in.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.acceptance import fake_device
from tests.acceptance.stand_ins import make_stand_ins

# These tests return at once, or are skipped, unless the device is one of the two that had streams
# when they were written.
WITH_STREAMS = '["cuda", "xpu"]'
GUARDED = ("hooks/test_group_offloading.py",)


def copy_tests(checkout: Path, folder: Path, device: str) -> None:
    """Copy tests/ of a checkout of diffusers into a folder.

    Args:
        checkout: holds tests/.
        folder: exists and is empty.
        device: what runs the tests; the fake accelerator counts as a device with streams.
    """
    tests = folder / "tests"
    shutil.copytree(checkout / "tests", tests)
    make_stand_ins(folder)
    if device == fake_device.DEVICE_NAME:
        shutil.copy(fake_device.__file__, folder)
        for name in GUARDED:
            source = (tests / name).read_text("utf-8")
            with_fake = WITH_STREAMS.replace("]", f', "{device}"]')
            (tests / name).write_text(source.replace(WITH_STREAMS, with_fake), "utf-8")

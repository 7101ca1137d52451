"""`python -m tests.acceptance --diffusers-tests PATH [-- pytest's options]`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

# Read when the libraries are imported, which is below.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


def main(arguments: list[str]) -> int:
    """Run the selection on a GPU, or on the fake accelerator where there is none."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance", description=main.__doc__)
    parser.add_argument(
        "--diffusers-tests", type=Path, required=True, help="a checkout of diffusers"
    )
    parser.add_argument("options", nargs="*", help="options of pytest, after --")
    asked = parser.parse_args(arguments)
    checkout = asked.diffusers_tests.resolve()
    if not (checkout / "tests/testing_utils.py").is_file():
        parser.error(f"{checkout} holds no tests/testing_utils.py: give a checkout of diffusers")
    device = "cuda" if torch.cuda.is_available() else "fake"
    os.environ["DIFFUSERS_TEST_DEVICE"] = device
    if device == "fake":
        from tests import fake

        fake.load()  # before diffusers looks for an accelerator
        os.environ["DIFFUSERS_TEST_DEVICE_SPEC"] = "fake_device.py"
    from tests.acceptance.checkout import copy_tests
    from tests.acceptance.selection import FILES, KEYWORD

    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        copy_tests(checkout, Path(folder), device)
        options = ["-p", "tests.acceptance.plugin", "--diffusers-tests", folder]
        options += ["--rootdir", folder, "-p", "no:cacheprovider", "--timeout", "300"]
        options += ["-q", "-rfE", "--disable-warnings", "-k", KEYWORD, *asked.options]
        os.chdir(folder)
        try:
            return int(pytest.main([*options, *(f"tests/{name}" for name in FILES)]))
        finally:
            os.chdir(here)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

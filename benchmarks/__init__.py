"""The project's own measurements; `blockswap bench` is the one for users."""

import shlex
from pathlib import Path


def command_line(argv: list[str]) -> str:
    """Return what was called; files by name alone, without the folders of one machine."""
    given = [Path(word).name if word.startswith("/") else word for word in argv[1:]]
    return shlex.join(["python", "-m", f"benchmarks.{Path(argv[0]).stem}", *given])

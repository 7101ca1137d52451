"""Files that commands write: refused before work begins, whole or not there at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from blockswap.errors import ConfigError

PICTURES = (".png", ".svg", ".pdf")


def check_file(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Refuse what could not be written.

    Args:
        option: that named it.
        path: the file.
        suffixes: it must end in one of them.

    Raises:
        ConfigError: a wrong suffix, or no folder to write into.
    """
    if path.suffix not in suffixes:
        raise ConfigError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder: name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"{option} {path}: the folder {path.parent} does not exist or cannot be written to"
        )


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write that takes its name once it is complete, and else leaves nothing behind."""
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

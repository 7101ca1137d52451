"""Checks files as such: each ends in one newline, no line ends in blanks, none is over 500 KiB.

check_files.py [--size-only] [FILE ...]     without files: all that git tracks or would track
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 500 * 1024
# Pictures and benchmark results are data, written by scripts.
DATA_SUFFIXES = (".png", ".svg", ".json", ".gif", ".webp")


def check(path: Path, size_only: bool) -> Iterator[str]:
    if path.stat().st_size > MAX_BYTES:
        yield f"{path}: {path.stat().st_size // 1024} KiB; the limit is {MAX_BYTES // 1024} KiB"
    if size_only or path.suffix in DATA_SUFFIXES:
        return
    content = path.read_bytes()
    if b"\0" in content:
        return
    if content and (not content.endswith(b"\n") or content.endswith(b"\n\n")):
        yield f"{path}: must end in exactly one newline"
    if b"\r\n" in content:
        yield f"{path}: has Windows line ends"
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.endswith((b" ", b"\t")):
            yield f"{path}:{number}: ends in blanks"


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def main(arguments: list[str]) -> int:
    size_only = "--size-only" in arguments
    files = [Path(name) for name in arguments if name != "--size-only"] or tracked_files()
    violations = [line for path in files if path.is_file() for line in check(path, size_only)]
    print("\n".join(violations) if violations else f"files: {len(files)} are fine")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The project's own measurements; `blockswap bench` is the one for users."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blockswap.bench import head


def command_line(argv: list[str]) -> str:
    """Return what was called; files by name alone, without the folders of one machine."""
    return head.command_line("python", "-m", f"benchmarks.{Path(argv[0]).stem}", argv=argv)


def write_rows(rows: Iterable[dict[str, Any]], about: dict[str, Any], out: Path) -> None:
    """Write a result file anew with each row as it comes: what was measured is never lost."""
    written: list[dict[str, Any]] = []
    for row in rows:
        written.append(row)
        out.write_text(json.dumps(about | {"rows": written}, indent=1, default=str) + "\n")

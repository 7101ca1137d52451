"""The pages in docs/: their text, fenced blocks and tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NAMES = [page.name for page in PAGES]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: what its fence says, its text, and the line where that begins."""

    language: str
    options: tuple[str, ...]
    text: str
    line: int

    @property
    def commands(self) -> list[str]:
        return [line for line in self.text.splitlines() if line and not line.startswith("#")]

    @property
    def exit_codes(self) -> set[int]:
        claims = [option for option in self.options if option.startswith("exit=")]
        return {int(code) for code in (claims or ["exit=0"])[0][5:].split("|")}


def blocks_of(page: str) -> list[Block]:
    found: list[Block] = []
    head: list[str] | None = None
    begin, lines = 0, []
    for number, line in enumerate(page.splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif head is None:
            head, begin, lines = line[3:].split(), number + 1, []
        else:
            assert line == "```", f"line {number}: a fence inside a fence"
            language = head[0] if head else ""
            found.append(Block(language, tuple(head[1:]), "\n".join(lines), begin))
            head = None
    assert head is None, f"the block of line {begin} is not closed"
    return found


def prose_of(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def read(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table whose first heading is that."""
    lines = page.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" |")])
    return rows

"""The project's own measurements; `blockswap bench` is the one for users."""

from pathlib import Path

from blockswap.bench import head


def command_line(argv: list[str]) -> str:
    """Return what was called; files by name alone, without the folders of one machine."""
    return head.command_line("python", "-m", f"benchmarks.{Path(argv[0]).stem}", argv=argv)

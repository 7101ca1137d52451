"""What `blockswap bench` shows: a table and a picture, of a run or of a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from blockswap.bench import zoo
from blockswap.bench.compare import Comparison, compare
from blockswap.bench.head import command_line
from blockswap.bench.request import BenchRequest
from blockswap.bench.rows import GIB, Row
from blockswap.bench.run import run_bench
from blockswap.errors import ConfigError
from blockswap.files import PICTURES, check_file
from blockswap.plot_frontier import plot_frontier

Say = Callable[[str, str], None]


def bench_and_show(
    models: tuple[str, ...],
    size: str,
    engines: tuple[str, ...],
    steps: int,
    device: str,
    out: Path,
    picture: Path | None,
    draw: bool,
    say: Say,
) -> bool:
    """Measure or read, then show.

    Returns:
        Whether ours ran, gave the same bits, and was faster than each other engine.

    Raises:
        ConfigError: unknown names, an unreadable file, a picture that cannot be written.
    """
    if picture is not None:
        check_file("--picture", picture, PICTURES)
    if not draw:
        check_file("--out", out, (".json",))
    if draw:
        comparisons = [c for rows in _by_model(read_rows(out)).values() for c in compare(rows)]
    else:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and torch.cuda.is_available():
            torch.cuda.set_device(torch.device(device).index or 0)  # clocks and peaks are its
        request = BenchRequest(
            cast("tuple[zoo.Kind, ...]", models),
            cast("zoo.Size", size),
            engines,
            steps,
            device,
            out,
        )
        command = command_line("blockswap", argv=sys.argv)
        comparisons = run_bench(request, say, command)
        say("written", str(out))
    if comparisons:
        # In a file or a pipe nothing says how wide it may be: wide enough for every word.
        Console(width=None if sys.stdout.isatty() else 160).print(table_of(comparisons))
    else:
        say("alone", "no other engine ran beside ours: nothing to compare")
    if picture is not None:
        plot_frontier(read_rows(out), picture)
        say("written", str(picture))
    ours = [row for row in read_rows(out) if row["engine"] == "blockswap"]
    wrong = [row for row in ours if row["status"] == "ok" and not row["bit_identical"]]
    for row in wrong:
        say("WRONG", f"{row['model']} {settings_text(row['settings'])}: the output differs")
    ran = any(row["status"] == "ok" for row in ours)
    return ran and not wrong and all(comparison.holds for comparison in comparisons)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a result file.

    Raises:
        ConfigError: it is none.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))["rows"]
        usable = [row for row in rows if row["status"] and row["engine"] and row["model"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no results of blockswap bench: {error}") from None
    return usable


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def table_of(comparisons: Sequence[Comparison]) -> Table:
    """Return one line per engine and setting, ours at no more memory beside it."""
    table = Table(
        title="ms per step, peak GiB (and reserved); ours at no more memory than the peak"
    )
    for name in ("model", "engine", "settings"):
        table.add_column(name, overflow="fold")
    for name in ("GiB", "ms", "our GiB", "our ms", "times as fast"):
        table.add_column(name, justify="right")
    table.add_column("")
    for c in comparisons:
        note = {
            "streams": "",
            "in use": f"{c.in_use_bytes / GIB:.1f} GiB in use",
            "keeps all": "keeps all weights",
            "below our smallest": f"ours at its smallest: {c.gap_mib:.0f} MiB more",
        }[c.kind]
        table.add_row(
            c.model,
            c.engine,
            settings_text(c.settings),
            gib_text(c.peak_bytes, c.device_bytes),
            f"{c.step_ms:.1f}",
            gib_text(c.our_peak_bytes, c.our_device_bytes),
            f"{c.our_step_ms:.1f}",
            f"{c.ratio:.2f}",
            note if c.holds else f"{note} SLOWER".strip(),
        )
    return table


def gib_text(peak_bytes: int, device_bytes: int) -> str:
    """Return a peak of what was allocated and, in brackets, of what was reserved for it."""
    return f"{peak_bytes / GIB:.2f} ({device_bytes / GIB:.1f})"


def settings_text(settings: dict[str, Any]) -> str:
    """Return settings in few words: switches by name, the rest as name=value."""
    words = [
        name if value is True else f"{name}={value}"
        for name, value in settings.items()
        if name != "offload_type" and value is not False
    ]
    return " ".join(words) or "default"

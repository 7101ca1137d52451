"""Draws the README's table from result files: `python -m benchmarks.tables` rewrites it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CHANGELOG.md")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
GIB = 2**30
NAMES = {"flux": "FLUX.1 12B", "wan": "Wan2.1 14B", "qwen": "Qwen-Image 20B", "sdxl": "SDXL UNet"}
SHOWN = {
    "flux": (None, 0.03, 0.2, 0.5, 0.85),
    "wan": (None,),
    "qwen": (0.1, 0.5),
    "sdxl": (0.2, 0.5),
}


def newest_results(results: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the files of whole-model rows, oldest first."""
    found = [(path.name, json.loads(path.read_text())) for path in results.glob("*-core.json")]
    return sorted(found, key=lambda item: (item[1]["date"], item[0]))


def chosen_rows(results: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of the table with their file; a newer file's row replaces an older one's."""
    rows: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for name, result in results:
        for row in result["rows"]:
            settings = row["settings"]
            if row["status"] != "ok" or "throttle" in settings:
                continue
            if settings.get("kept") in SHOWN.get(row["model"], ()):
                rows[row["model"], json.dumps(settings.get("kept"))] = (name, row)
    order = list(NAMES)
    return sorted(
        rows.values(), key=lambda item: (order.index(item[1]["model"]), item[1]["step_ms"] * -1)
    )


def make_table(results: list[tuple[str, dict[str, Any]]]) -> str:
    """Return the table, with machine, date and files."""
    rows = chosen_rows(results)
    if not rows:
        return "No result file yet."
    lines = [
        "| model | GiB on the GPU (peak) | ms per step | all resident: GiB, ms | of the bound |"
        " same bits |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for _, row in rows:
        lines.append(
            f"| {NAMES[row['model']]} | {row['peak_allocated_bytes'] / GIB:.2f}"
            f" | {row['step_ms']:.0f}"
            f" | {row['resident_peak_allocated_bytes'] / GIB:.1f}, {row['resident_ms']:.0f}"
            f" | {row['efficiency']:.3f} | {'yes' if row['bit_identical'] else 'NO'} |"
        )
    files = {name for name, _ in rows}
    heads = [result for name, result in results if name in files]
    head = heads[-1]
    dates = " to ".join(sorted({heads[0]["date"], heads[-1]["date"]}))
    links = ", ".join(f"[{name}](benchmarks/results/{name})" for name in sorted(files))
    lines += ["", f"{head['gpu']}, {dates}, torch {head['torch']}, bf16, eager: {links}."]
    return "\n".join(lines)


def rewrite(page: str, table: str) -> str:
    """Return the page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    """Rewrite README.md and the CHANGELOG's Measured section."""
    table = make_table(newest_results(ROOT / "benchmarks" / "results"))
    for name in PAGES:
        path = ROOT / name
        path.write_text(rewrite(path.read_text(), table))


if __name__ == "__main__":
    main()

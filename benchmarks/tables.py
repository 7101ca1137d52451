"""Draws tables and the chart from result files: `python -m benchmarks.tables` rewrites them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.caps import about_cap
from blockswap.bench.command import gib_text, settings_text
from blockswap.bench.compare import compare
from blockswap.plot_frontier import plot_frontier

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CHANGELOG.md")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
ENGINES_PAGE, CHART = "docs/engines.md", "docs/pictures/engines.png"
ENGINES = "<!-- engines: begin -->", "<!-- engines: end -->"
CAPS_PAGE = "docs/sharing.md"
CAPS = "<!-- caps: begin -->", "<!-- caps: end -->"
PIPELINES_PAGE = "docs/pipelines.md"
PIPELINES = "<!-- pipelines: begin -->", "<!-- pipelines: end -->"
GIB = 2**30
OWN = "PyTorch's own settings"  # of its allocator
NAMES = {"flux": "FLUX.1 12B", "wan": "Wan2.1 14B", "qwen": "Qwen-Image 20B", "sdxl": "SDXL UNet"}
PIPELINE_NAMES = {
    "flux": "FLUX with T5",
    "flux-loras": "FLUX with two LoRAs",
    "qwen": "Qwen-Image",
    "sd35": "SD 3.5 large",
    "sdxl": "SDXL",
    "sdxl-controlnet-ip": "SDXL, ControlNet, IP-Adapter",
    "wan22": "Wan 2.2, both experts",
    "hunyuanvideo": "HunyuanVideo",
    "ltx": "LTX",
}
SHOWN = {
    "flux": (None, 0.03, 0.2, 0.5, 0.85),
    "wan": (None,),
    "qwen": (0.1, 0.5),
    "sdxl": (0.2, 0.5),
}


def newest_results(results: Path, kind: str = "core") -> list[tuple[str, dict[str, Any]]]:
    """Return the files of whole-model rows, or of one other kind, oldest first."""
    found = [(path.name, json.loads(path.read_text())) for path in results.glob(f"*-{kind}.json")]
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


def make_engines_table(benches: list[tuple[str, dict[str, Any]]]) -> str:
    """Return one line per engine and setting, of each model's newest bench."""
    lines = [
        "| model | engine | settings | GiB (reserved) | ms | ours: GiB (reserved), ms"
        " | times as fast | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    newest = {row["model"]: (name, result) for name, result in benches for row in result["rows"]}
    for model in (model for model in NAMES if model in newest):
        for c in compare([row for row in newest[model][1]["rows"] if row["model"] == model]):
            note = {
                "streams": "",
                "in use": f"{c.in_use_bytes / GIB:.1f} GiB in use",
                "keeps all": "keeps all weights",
                "below our smallest": f"{c.gap_mib:.0f} MiB below our smallest",
            }[c.kind]
            lines.append(
                f"| {NAMES[model]} | {c.engine} | {settings_text(c.settings)}"
                f" | {gib_text(c.peak_bytes, c.device_bytes)} | {c.step_ms:.0f}"
                f" | {gib_text(c.our_peak_bytes, c.our_device_bytes)}, {c.our_step_ms:.0f}"
                f" | {c.ratio:.2f}"
                f" | {note if c.holds else f'{note} slower'.strip()} |"
            )
    heads = dict(newest.values())
    for name, head in sorted(heads.items()):
        link = f"[{name}](../benchmarks/results/{name})"
        lines += ["", f"{head['gpu']}, {head['date']}, torch {head['torch']}, bf16, eager:", link]
    return "\n".join(lines)


def chosen_caps(
    sweeps: list[tuple[str, dict[str, Any]]],
) -> dict[tuple[str, int], tuple[str, dict[str, Any]]]:
    """Return a row with its file for each model and number of a cap, the newest one.

    Of one day, the file of some numbers is newer than that of all.
    """

    def age(sweep: tuple[str, dict[str, Any]]) -> tuple[str, bool]:
        return sweep[1]["date"], re.search(r"--numbers \d", sweep[1]["command"]) is not None

    return {
        (row["model"], row["number"]): (name, row)
        for name, result in sorted(sweeps, key=age)
        for row in result["rows"]
        if row["engine"] == "blockswap"
    }


def make_caps_table(sweeps: list[tuple[str, dict[str, Any]]]) -> str:
    """Return one line per model and cap, the lowest first."""
    lines = [
        "| model | cap, GiB | peak | by the driver | ms per step | of the bound | same bits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    chosen = chosen_caps(sweeps)
    for model in NAMES:
        ours = [row for (of, _), (_, row) in chosen.items() if of == model]
        link_gb_per_s = max((row.get("link_gb_per_s", 0.0) for row in ours), default=0.0)
        for row in sorted(ours, key=_cap_of):
            cells = ["refused", "", "", "", ""]
            if row["status"] == "ok":
                cells = _cells_of_cap(row, link_gb_per_s)
            lines.append(f"| {NAMES[model]} | {_cap_of(row) / GIB:.2f} | {' | '.join(cells)} |")
    files = {name for name, _ in chosen.values()}
    return "\n".join(lines + _sources({name: head for name, head in sweeps if name in files}))


def make_pipelines_table(files: list[tuple[str, dict[str, Any]]]) -> str:
    """Return one line per pipeline and setting of PyTorch's allocator, the newest of each."""
    newest = {
        (row["model"], row.get("allocator", OWN)): (name, result, row)
        for name, result in files
        for row in result["rows"]
        if "call_s" in row
    }
    order = list(PIPELINE_NAMES)
    lines = [
        "| pipeline | call | cap, GiB | peak | s per call | unswapped | over the least"
        " | same bits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    chosen = sorted(newest.items(), key=lambda item: (order.index(item[0][0]), item[0][1] != OWN))
    for (model, allocator), (_, _, row) in chosen:
        name = PIPELINE_NAMES[model] + ("" if allocator == OWN else ", expandable segments")
        lines.append(
            f"| {name} | {_call_text(row)}"
            f" | {row['cap_bytes'] / GIB:.2f} | {row['peak_device_bytes'] / GIB:.2f}"
            f" | {row['call_s']:.2f} | {row['unswapped_call_s']:.2f}"
            f" | {row['call_over_floor']:.3f} | {'yes' if row['bit_identical'] else 'NO'} |"
        )
    return "\n".join(lines + _sources({name: result for name, result, _ in newest.values()}))


def _call_text(row: dict[str, Any]) -> str:
    call = row["settings"]["call"]
    size = f"{call['width']}x{call['height']}, {call['num_inference_steps']} steps"
    frames = f", {call['num_frames']} frames" if "num_frames" in call else ""
    tiles = row["tiling"].replace("the VAE decodes", "VAE in")
    tiling = "" if tiles == "none" else f"; {tiles}"
    return size + frames + tiling


def _sources(files: dict[str, dict[str, Any]]) -> list[str]:
    """Return lines that say on which machine and day which files were written."""
    lines, said = [], ""
    for name, head in sorted(files.items(), key=lambda item: (item[1]["date"], item[0])):
        machine = f"{head['gpu']}, {head['date']}, torch {head['torch']}, bf16, eager:"
        lines += ["", machine] if machine != said else []
        lines.append(f"[{name}](../benchmarks/results/{name})")
        said = machine
    return lines


def _cap_of(row: dict[str, Any]) -> int:
    return int(row["cap_bytes"] if "cap_bytes" in row else row["settings"]["vram"])


def _cells_of_cap(row: dict[str, Any], link_gb_per_s: float) -> list[str]:
    """Return what a row of a sweep shows; one with a whole call knows less."""
    driver = ""
    if "driver_peak_bytes" in row:
        driver = f"{(row['driver_peak_bytes'] - row['driver_before_bytes']) / GIB:.2f}"
    bound = ""
    if "efficiency_of_cap" in row:
        bound = f"{about_cap(row, link_gb_per_s)['efficiency_of_cap']:.3f}"
    same = "yes" if row["bit_identical"] else "NO"
    return [f"{row['peak_device_bytes'] / GIB:.2f}", driver, f"{row['step_ms']:.0f}", bound, same]


def chart_rows(
    benches: list[tuple[str, dict[str, Any]]], results: list[tuple[str, dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the rows of the newest benches, and of ours between the ends of each."""
    newest = {row["model"]: result for _, result in benches for row in result["rows"]}
    found = [row for model in newest for row in newest[model]["rows"] if row["model"] == model]
    ours = {}
    for _, result in results:
        for row in result["rows"]:
            kept = row["settings"].get("kept")
            if row["model"] in newest and kept and "throttle" not in row["settings"]:
                ours[row["model"], kept] = row
    return found + list(ours.values())


def rewrite(page: str, table: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """Return the page with the table between its marks."""
    begin, end = marks
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> None:
    """Rewrite README.md, the CHANGELOG's Measured section, and the pages with tables."""
    folder = ROOT / "benchmarks" / "results"
    results, benches = newest_results(folder), newest_results(folder, "bench")
    table = make_table(results)
    for name in PAGES:
        path = ROOT / name
        path.write_text(rewrite(path.read_text(), table))
    page = ROOT / ENGINES_PAGE
    page.write_text(rewrite(page.read_text(), make_engines_table(benches), ENGINES))
    sweeps = newest_results(folder, "cap-sweep")
    page = ROOT / CAPS_PAGE
    page.write_text(rewrite(page.read_text(), make_caps_table(sweeps), CAPS))
    (ROOT / CHART).parent.mkdir(exist_ok=True)
    page = ROOT / PIPELINES_PAGE
    whole_calls = newest_results(folder, "pipelines")
    page.write_text(rewrite(page.read_text(), make_pipelines_table(whole_calls), PIPELINES))
    plot_frontier(chart_rows(benches, results), ROOT / CHART)


if __name__ == "__main__":
    main()

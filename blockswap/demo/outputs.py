"""What the demo leaves behind: the image, pictures and trace of a step, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from blockswap.bench.head import make_head
from blockswap.plot import plot_timeline
from blockswap.plot_memory import plot_memory

if TYPE_CHECKING:
    from blockswap.demo.run import DemoResult

Pixels = np.ndarray[Any, Any]


def write_outputs(
    folder: Path, result: DemoResult, swapped: Pixels, resident: Pixels, title: str
) -> list[str]:
    """Writes into `folder` and returns the files' names.

    Args:
        folder: exists.
        result: of both runs.
        swapped: image of the swapped run, [1, H, W, 3] or [1, frames, H, W, 3], 0 to 1.
        resident: image of the unswapped run; written only when it differs.
        title: of the pictures of a step.
    """
    files = _write_picture(folder, "image", swapped)
    if not result.identical:
        files += _write_picture(folder, "unswapped", resident)
    if result.timeline is not None:
        plot_timeline(result.timeline, folder / "timeline.png", title, result.report)
        plot_memory(result.timeline, result.report, folder / "memory.png", title)
        result.timeline.save_trace(folder / "trace.json")
        files += ["timeline.png", "memory.png", "trace.json"]
    text = f"{result.report}\n\n{result.report.explain}\n"
    (folder / "report.txt").write_text(text, "utf-8")
    numbers = make_head("blockswap demo") | {
        "title": title,
        "identical": result.identical,
        "num_different": result.num_different,
        "resident_step_ms": result.resident_step_ms,
        "step_ms": result.step_ms,
        "resident_peak_bytes": result.resident_peak_bytes,
        "peak_bytes": result.peak_bytes,
        "report": result.report.to_dict(),
    }
    (folder / "report.json").write_text(json.dumps(numbers, indent=2) + "\n", "utf-8")
    return [*files, "report.txt", "report.json"]


def _write_picture(folder: Path, name: str, image: Pixels) -> list[str]:
    """A PNG; a video's middle frame, and all of it as a looping GIF beside it."""
    pixels = (np.nan_to_num(image[0]) * 255).round().astype(np.uint8)
    if pixels.ndim == 3:
        Image.fromarray(pixels).save(folder / f"{name}.png")
        return [f"{name}.png"]
    frames = [Image.fromarray(frame) for frame in pixels]
    frames[len(frames) // 2].save(folder / f"{name}.png")
    frames[0].save(
        folder / f"{name}.gif", save_all=True, append_images=frames[1:], duration=62, loop=0
    )
    return [f"{name}.png", f"{name}.gif"]

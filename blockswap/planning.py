"""What `blockswap plan` says and draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from blockswap import _C
from blockswap.errors import ConfigError
from blockswap.files import PICTURES, check_file
from blockswap.plot_frontier import plot_frontier
from blockswap.profile import Profile
from blockswap.sizes import format_bytes, parse_size

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_picture(profile: Profile, path: Path) -> None:
    """Refuse what could not be drawn, before anything is said.

    Raises:
        ConfigError: the profile holds no times, or the suffix names no picture.
    """
    check_file("--picture", path, PICTURES)
    if not profile.is_timed:
        raise ConfigError(
            "--picture needs a profile with times: run `blockswap demo`, or save"
            " blockswap.profile.Profile.of(session) after a few steps"
        )


def open_profile(path: Path, dtype: str) -> Profile:
    """Return the profile in a file, or the outline of the model in a folder.

    Raises:
        ConfigError: neither, or an unknown dtype.
    """
    if path.is_file():
        return Profile.load(path)
    from blockswap.outline import outline

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r}: one of {', '.join(DTYPES)}")
    return outline(path, DTYPES[dtype])


def explain_plan(profile: Profile, vram: str | None) -> Iterator[tuple[str, str]]:
    """Yield label and text of each line.

    Raises:
        ConfigError: `vram` is no size, or below the smallest plan.
    """
    cap = (profile.smallest_cap + profile.largest_cap) // 2
    if vram is not None:
        cap = parse_size(vram, "--vram")
    plan, request = profile.plan(cap)
    unknown = "" if profile.is_timed else "; activations come on top, which only a run tells"
    yield "model", f"{profile.model}, {len(profile.leaves)} leaf modules, {profile.device}"
    yield "blocks", f"{format_bytes(profile.total_bytes)} can stream"
    yield "fixed", f"{format_bytes(profile.fixed_bytes)} never streams{unknown}"
    yield (
        "caps",
        (
            f"{format_bytes(profile.smallest_cap)} is the smallest, with"
            f" {format_bytes(profile.largest_cap)} everything stays"
        ),
    )
    yield "cap", f"{format_bytes(cap)}{'' if vram else ' (half of what can stream; --vram)'}"
    copies = sum(not piece.resident for piece in plan.pieces)
    yield "resident", f"{format_bytes(plan.resident_bytes)}"
    yield "ring", f"{format_bytes(plan.ring_bytes)}"
    yield "streamed", f"{format_bytes(plan.streamed_bytes)} per step in {copies} copies"
    if profile.is_timed:
        for line in _C.explain(plan, request).splitlines():
            yield "", line


def draw_curve(profile: Profile, path: Path) -> None:
    """Draw the expected step over the cap; `check_picture` has passed."""
    points = profile.curve()
    resident_cap, resident_ms = points[-1]
    rows = [
        {
            "model": f"{profile.model}, expected on {profile.device}",
            "engine": "blockswap",
            "step_ms": step_ms,
            "peak_allocated_bytes": cap,
            "resident_ms": resident_ms,
            "resident_peak_allocated_bytes": resident_cap,
            "link_gb_per_s": profile.link_bytes_per_s / 1e9,
        }
        for cap, step_ms in points
    ]
    plot_frontier(rows, path)

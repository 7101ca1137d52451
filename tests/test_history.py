"""Memory over a pipeline's call: what is recorded, and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as images

from blockswap.errors import ConfigError
from blockswap.history import MemoryHistory, Moment
from blockswap.plot import STALL_RED
from blockswap.plot_history import _bands

MIB = 2**20


def moment(seconds: float, part: str, pool: int, peak: int) -> Moment:
    return Moment(seconds, part, pool * MIB, MIB, peak * MIB, (peak + 1) * MIB)


def history(cap_mib: int | None, peak_of_vae: int = 20) -> MemoryHistory:
    made = MemoryHistory(None if cap_mib is None else cap_mib * MIB)
    made.moments += [moment(0.0, "", 0, 1), moment(0.1, "text_encoder", 0, 2)]
    made.moments += [moment(0.2, "", 0, 8)]
    for step in range(4):
        made.moments += [moment(0.3 + step, "unet", 16, 17), moment(1.29 + step, "", 16, 22)]
    made.moments += [moment(4.4, "vae", 0, 17), moment(5.0, "", 0, peak_of_vae)]
    return made


def area_of(path: Path, color: str) -> int:
    """Return how many pixels have a colour; the legend's patch has some 400."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    pixels = np.round(images.imread(path)[..., :3] * 255)
    return int((np.abs(pixels - wanted).max(axis=-1) < 2).sum())


def test_the_peak_is_the_most_of_all_parts() -> None:
    assert history(None).peak_bytes == 22 * MIB
    assert MemoryHistory(None).peak_bytes == 0


def test_steps_of_one_component_are_one_band_and_end_where_the_last_one_ends() -> None:
    bands = list(_bands(history(None).moments))
    assert [(band.part, band.times) for band in bands] == [
        ("text_encoder", 1),
        ("unet", 4),
        ("vae", 1),
    ]
    assert (bands[1].begin, bands[1].end) == (0.3, 4.29)


def test_the_picture_is_red_only_where_the_cap_was_passed(tmp_path: Path) -> None:
    history(24).save(tmp_path / "under.png")
    history(24, peak_of_vae=30).save(tmp_path / "over.png")
    assert area_of(tmp_path / "under.png", STALL_RED) == 0
    assert area_of(tmp_path / "over.png", STALL_RED) > 5000


def test_every_format_is_written_and_nothing_recorded_is_refused(tmp_path: Path) -> None:
    for suffix in (".png", ".svg", ".pdf"):
        history(None).save(tmp_path / f"h{suffix}", "a call")
        assert (tmp_path / f"h{suffix}").stat().st_size > 1000
    with pytest.raises(ConfigError, match=r"must end in \.png"):
        history(None).save(tmp_path / "h.txt")
    with pytest.raises(ConfigError, match="nothing was recorded"):
        MemoryHistory(None).save(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_json_holds_every_moment() -> None:
    told = json.loads(history(24).to_json())
    assert told["cap_bytes"] == 24 * MIB
    assert len(told["moments"]) == len(history(24).moments)
    assert told["moments"][1]["part"] == "text_encoder"

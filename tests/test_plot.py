"""The pictures: what is in them is counted in pixels."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from blockswap.plot import STALL_RED, plot_frontier, plot_timeline
from blockswap.report import PieceSpan, Timeline

RED = tuple(round(255 * part) for part in to_rgb(STALL_RED))
WHITE = (255, 255, 255)


def make_timeline(num_pieces, copy_ms, run_ms, num_bytes=64 * 2**20):
    """Pieces of two lists, each fetched after the one before; steady, so it wraps."""
    spans, compute_ms, link_ms = [], 0.0, -copy_ms
    for index in range(num_pieces):
        block = f"{'blocks' if index < num_pieces // 2 else 'single_blocks'}.{index}"
        copy = (link_ms, link_ms + copy_ms)
        link_ms += copy_ms
        wait = (compute_ms, max(compute_ms, copy[1]))
        compute_ms = wait[1] + run_ms
        spans.append(PieceSpan(index, f"{block}.ff", block, num_bytes, *copy, *wait, compute_ms))
    return Timeline(step_ms=compute_ms, spans=tuple(spans))


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB"))


def is_color(pixels, color):
    return (pixels == np.array(color)).all(axis=-1)


@pytest.mark.parametrize("num_pieces", [3, 40, 300])
def test_red_appears_when_compute_waits(tmp_path, num_pieces):
    plot_timeline(make_timeline(num_pieces, copy_ms=3.0, run_ms=1.0), tmp_path / "t.png")
    assert is_color(pixels_of(tmp_path / "t.png"), RED).sum() > 500


@pytest.mark.parametrize("num_pieces", [3, 40, 300])
def test_no_red_appears_when_every_copy_is_hidden(tmp_path, num_pieces):
    plot_timeline(make_timeline(num_pieces, copy_ms=1.0, run_ms=3.0), tmp_path / "t.png")
    pixels = pixels_of(tmp_path / "t.png")
    assert not is_color(pixels, RED).any()
    assert (~is_color(pixels, WHITE)).mean() > 0.1  # and yet it is a picture


def test_stalls_are_drawn_to_scale(tmp_path):
    timeline = make_timeline(6, copy_ms=4.0, run_ms=1.0)
    plot_timeline(timeline, tmp_path / "t.png")
    red = is_color(pixels_of(tmp_path / "t.png"), RED)
    row = red[red.sum(axis=1).argmax()]  # one that crosses the compute lane
    columns = row.nonzero()[0]
    # From the first stall's begin to the last one's end: all stalls, all runs but the outer two.
    expected = timeline.stall_ms / (timeline.step_ms - 2 * 1.0)
    assert row.sum() / (columns[-1] - columns[0]) == pytest.approx(expected, abs=0.02)


def test_a_step_without_copies_is_drawn(tmp_path):
    plot_timeline(Timeline(step_ms=12.0, spans=()), tmp_path / "t.png")
    assert not is_color(pixels_of(tmp_path / "t.png"), RED).any()


def test_resident_pieces_leave_the_link_free(tmp_path):
    resident = PieceSpan(0, "blocks.0.ff", "blocks.0", 2**20, 0.0, 0.0, 0.0, 0.0, 9.0)
    plot_timeline(Timeline(9.0, (resident,)), tmp_path / "one.png")
    plot_timeline(Timeline(9.0, ()), tmp_path / "none.png")
    assert (pixels_of(tmp_path / "one.png") == pixels_of(tmp_path / "none.png")).all()


def frontier_row(engine, gib, step_ms, **more):
    return {"model": "flux", "engine": engine, "peak_allocated_bytes": gib * 2**30} | {
        "step_ms": step_ms, "resident_ms": 174.0, "resident_peak_allocated_bytes": 22.7 * 2**30,
        "link_gb_per_s": 55.4, **more,
    }  # fmt: skip


def test_frontier_picture_shows_every_engine_and_skips_rows_without_a_time(tmp_path):
    rows = [frontier_row("blockswap", gib, 420.0 - 10 * gib) for gib in range(1, 20, 3)]
    plot_frontier(rows, tmp_path / "ours.png")
    rows += [frontier_row("diffusers-block", 1.8, 467.0), frontier_row("mmgp", 1.0, None)]
    plot_frontier(rows, tmp_path / "both.png")
    ours, both = pixels_of(tmp_path / "ours.png"), pixels_of(tmp_path / "both.png")
    assert (~is_color(ours, WHITE)).mean() > 0.1
    assert ours.shape != both.shape or (ours != both).any()


def test_an_engine_far_off_the_scale_does_not_flatten_the_others(tmp_path):
    rows = [frontier_row("blockswap", gib, 420.0 - 10 * gib) for gib in range(1, 20, 3)]
    plot_frontier([*rows, frontier_row("accelerate", 1.0, 1e3)], tmp_path / "a.png")
    plot_frontier([*rows, frontier_row("accelerate", 1.0, 9e9)], tmp_path / "b.png")
    a, b = pixels_of(tmp_path / "a.png"), pixels_of(tmp_path / "b.png")
    assert a.shape == b.shape
    assert (a != b).any(axis=-1).mean() < 0.01  # the number beside the mark


def test_frontier_without_usable_rows_is_refused():
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_frontier([frontier_row("mmgp", 1.0, None)], "unused.png")

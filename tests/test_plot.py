"""The pictures: what is in them is counted in pixels."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from blockswap.plot import HUES, RESIDENT_GREY, STALL_RED, plot_timeline
from blockswap.plot_frontier import plot_frontier
from blockswap.plot_memory import (
    ACTIVATION_SAND,
    FILLING_BLUE,
    FIXED_GREY,
    IN_USE_BLUE,
    READY_BLUE,
    plot_memory,
)
from blockswap.report import PieceSpan, Report, Timeline


def rgb(color):
    return tuple(round(255 * part) for part in to_rgb(color))


RED = rgb(STALL_RED)
WHITE = (255, 255, 255)
GIB = 2**30


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


@pytest.mark.parametrize("early_ms", [-5.0, -500.0])
def test_a_copy_made_long_before_leaves_the_step_its_width(tmp_path, early_ms):
    early = PieceSpan(0, "a.0.ff", "a.0", 2**20, early_ms, early_ms + 1.0, 0.0, 0.0, 9.0)
    plot_timeline(Timeline(10.0, (early,)), tmp_path / "t.png")
    pixels = pixels_of(tmp_path / "t.png")
    runs = is_color(pixels, rgb(HUES[0][0])).sum(axis=1).max()  # 9 of the step's 10 ms
    assert runs > 0.5 * pixels.shape[1]


def test_no_width_is_kept_for_copies_that_all_ended_long_before(tmp_path):
    def step_with(begin_ms):
        span = PieceSpan(0, "a.0.ff", "a.0", 2**20, begin_ms, begin_ms + 1.0, 0.0, 0.0, 9.0)
        plot_timeline(Timeline(10.0, (span,)), tmp_path / "t.png")
        return is_color(pixels_of(tmp_path / "t.png"), rgb(HUES[0][0])).sum(axis=1).max()

    assert step_with(-500.0) > 1.08 * step_with(-1.5)


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


# Memory ------------------------------------------------------------------------------------------


def make_report(**memory):
    fields = {
        "cap_bytes": 10 * GIB, "fixed_bytes": GIB, "resident_bytes": 3 * GIB,
        "ring_bytes": 2 * GIB, "activation_bytes": None, "streamed_bytes": 16 * GIB,
    }  # fmt: skip
    return Report(
        model="Model", device="cuda:0", state="ready", steps=9, weight_bytes=20 * GIB,
        leaf_bytes=19 * GIB, host_bytes=0, pinned_bytes=0, copies_per_step=8, link_gb_per_s=50.0,
        **fields | memory,
    )  # fmt: skip


def one_piece(num_bytes=2 * GIB):
    """Its slot fills for 2 ms, is ready for 3, in use for 4 and free for 1."""
    span = PieceSpan(0, "blocks.0.ff", "blocks.0", num_bytes, 0.0, 2.0, 5.0, 5.0, 9.0)
    return Timeline(10.0, (span,))


def panels_of(path):
    """The pixels of the upper and of the lower panel."""
    pixels = pixels_of(path)
    middle = round(0.56 * len(pixels))
    return pixels[:middle], pixels[middle:]


def lines_of(panel):
    """The rows of black lines that cross most of the panel, dashed ones included, from the top."""
    rows = ((panel < 100).all(axis=-1).mean(axis=1) > 0.4).nonzero()[0]
    return [row for before, row in itertools.pairwise([-9, *rows]) if row - before > 1]


@pytest.mark.parametrize("num_pieces", [3, 40, 300])
def test_memory_shows_red_when_compute_waits_and_only_then(tmp_path, num_pieces):
    report = make_report(ring_bytes=128 * 2**20)
    plot_memory(make_timeline(num_pieces, 3.0, 1.0), report, tmp_path / "waits.png")
    plot_memory(make_timeline(num_pieces, 1.0, 3.0), report, tmp_path / "hidden.png")
    assert is_color(pixels_of(tmp_path / "waits.png"), RED).sum() > 500
    assert not is_color(pixels_of(tmp_path / "hidden.png"), RED).any()


def test_what_the_ring_does_is_drawn_to_scale_of_time(tmp_path):
    plot_memory(one_piece(), make_report(), tmp_path / "m.png")
    for panel in panels_of(tmp_path / "m.png"):
        row = panel[is_color(panel, rgb(IN_USE_BLUE)).sum(axis=1).argmax()]
        widths = [is_color(row, rgb(c)).sum() for c in (FILLING_BLUE, READY_BLUE, IN_USE_BLUE)]
        assert [round(9 * width / sum(widths), 1) for width in widths] == [2.0, 3.0, 4.0]


def test_what_stands_on_the_device_is_drawn_to_scale_of_bytes(tmp_path):
    plot_memory(one_piece(), make_report(), tmp_path / "m.png")
    upper, _ = panels_of(tmp_path / "m.png")
    column = upper[:, upper.shape[1] // 2]  # the piece is in use then
    layers = [is_color(column, rgb(c)) for c in (FIXED_GREY, RESIDENT_GREY, IN_USE_BLUE)]
    gib = layers[0].sum() + layers[1].sum()  # 4 GiB
    assert [round(4 * layer.sum() / gib, 1) for layer in layers] == [1.0, 3.0, 2.0]
    # From the top: the cap at 10 GiB and the end of the weights at 6.
    cap, weights, *_ = lines_of(upper)
    assert 4 * (weights - cap) / gib == pytest.approx(4.0, abs=0.1)


def test_a_half_filled_ring_leaves_half_of_it_white(tmp_path):
    plot_memory(one_piece(num_bytes=GIB), make_report(), tmp_path / "m.png")
    _, lower = panels_of(tmp_path / "m.png")
    column = lower[:, lower.shape[1] // 2]
    filled = is_color(column, rgb(IN_USE_BLUE)).nonzero()[0]
    size, *_ = lines_of(lower)
    assert len(filled) / (filled[-1] - size) == pytest.approx(0.5, abs=0.02)


def test_what_is_ready_stands_upon_what_is_in_use(tmp_path):
    runs, waits = (
        PieceSpan(i, "ff", "blocks.0", GIB, 0.0, 1.0, 2.0 + 4 * i, 2.0 + 4 * i, 6.0 + 4 * i)
        for i in range(2)
    )
    plot_memory(Timeline(10.0, (runs, waits)), make_report(), tmp_path / "m.png")
    for panel in panels_of(tmp_path / "m.png"):
        column = panel[:, round(0.4 * panel.shape[1])]
        in_use = is_color(column, rgb(IN_USE_BLUE)).nonzero()[0]
        ready = is_color(column, rgb(READY_BLUE)).nonzero()[0]
        assert abs(len(in_use) - len(ready)) <= 2
        assert ready[-1] < in_use[0]


def test_without_a_cap_no_cap_is_drawn(tmp_path):
    plot_memory(one_piece(), make_report(), tmp_path / "with.png")
    plot_memory(one_piece(), make_report(cap_bytes=None), tmp_path / "without.png")
    with_cap, without = (panels_of(tmp_path / f"{n}.png")[0] for n in ("with", "without"))
    assert len(lines_of(with_cap)) == len(lines_of(without)) + 1


def test_activations_fill_the_room_above_the_weights_without_fixed_weights_twice(tmp_path):
    plot_memory(one_piece(), make_report(activation_bytes=None), tmp_path / "none.png")
    plot_memory(one_piece(), make_report(activation_bytes=GIB), tmp_path / "fixed.png")
    plot_memory(one_piece(), make_report(activation_bytes=3 * GIB), tmp_path / "more.png")
    none, fixed, more = (pixels_of(tmp_path / f"{name}.png") for name in ("none", "fixed", "more"))
    assert none.shape == fixed.shape and (none == fixed).all()
    assert is_color(more, rgb(ACTIVATION_SAND)).mean() > 0.05


@pytest.mark.filterwarnings("error")
def test_a_step_without_a_ring_is_drawn(tmp_path):
    report = make_report(ring_bytes=0, streamed_bytes=0)
    plot_memory(Timeline(step_ms=12.0, spans=()), report, tmp_path / "m.png")
    pixels = pixels_of(tmp_path / "m.png")
    assert is_color(pixels, rgb(RESIDENT_GREY)).mean() > 0.05
    assert is_color(pixels, rgb(READY_BLUE)).sum() < 500  # the legend's

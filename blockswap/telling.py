"""From a session's state to its report and timeline."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from blockswap import _C
from blockswap.report import BlockStall, PieceSpan, Report, State, Timeline
from blockswap.sizes import format_bytes
from blockswap.together import name_of

if TYPE_CHECKING:
    from blockswap.host import Host
    from blockswap.steward import Steward


def make_timeline(steward: Steward) -> Timeline | None:
    """Return the last complete step's timeline; None when nothing streamed or ran."""
    times = steward.state.engine.step_times()
    pieces = steward.plans.plan.pieces
    leaves, blocks = steward.plans.request.leaves, steward.plans.request.blocks
    spans = []
    for span in times.pieces:
        first = leaves[pieces[span.piece].first_leaf]
        moments = [span.copy_begin, span.copy_end, span.wait_begin, span.wait_end, span.run_end]
        if any(math.isnan(moment) for moment in moments):
            continue
        spans.append(
            PieceSpan(
                span.piece,
                first.name,
                blocks[first.block].name,
                pieces[span.piece].bytes,
                *(1e3 * moment for moment in moments),
            )
        )
    if not spans or math.isnan(times.step_seconds):
        return None
    return Timeline(
        1e3 * times.step_seconds,
        tuple(spans),
        fixed_bytes=steward.state.fixed.bytes,
        resident_bytes=steward.plans.plan.resident_bytes + steward.state.small_bytes,
        ring_bytes=steward.plans.plan.ring_bytes,
    )


def pageable_note(host: Host) -> str | None:
    """Return what to tell where weights are not pinned."""
    if not host.pageable_bytes:
        return None
    how = (
        f"they pass through a pinned ring of {format_bytes(host.bounce_bytes)}"
        if host.bounce_bytes
        else "nor a ring for them: the host waits for their copies"
    )
    if host.pinner.was_refused:
        return (
            f"{format_bytes(host.pageable_bytes)} of the weights could not be pinned (locked-memory"
            f" limit), {how}; raise `ulimit -l` or the container's limit"
        )
    return f"{format_bytes(host.pageable_bytes)} of the weights are not pinned (host_memory), {how}"


def make_report(steward: Steward, session_state: State) -> Report:
    """Return what happened up to the last step."""
    state = steward.state
    if not state.is_taken:
        return Report(
            model=name_of(state.model),
            device=str(state.device),
            state=session_state,
            steps=steward.steps,
            cap_bytes=state.config.vram_bytes,
            weight_bytes=state.weight_bytes,
            leaf_bytes=0,
            resident_bytes=0,
            ring_bytes=0,
            fixed_bytes=0,
            activation_bytes=None,
            host_bytes=0,
            pinned_bytes=0,
            streamed_bytes=0,
            copies_per_step=0,
            link_gb_per_s=None,
            sheds=steward.totals.sheds,
            growths=steward.totals.growths,
            ooms=steward.totals.ooms,
            ladder=dict(steward.totals.rungs),
        )
    plan, counters = steward.plans.plan, state.engine.counters
    state.memory.note_peak()
    timeline = make_timeline(steward)
    step_seconds = state.engine.step_times().step_seconds
    learned = steward.learned
    ready = session_state == "ready"
    streamed = [piece for piece in plan.pieces if not piece.resident]
    busy_ms = timeline.link_busy_ms if timeline else 0.0
    stall_ms = timeline.stall_ms if timeline else 0.0
    streams, is_placed = bool(streamed), steward.plans.is_placed
    return Report(
        model=name_of(state.model),
        device=str(state.device),
        state=session_state,
        steps=steward.steps,
        cap_bytes=state.config.vram_bytes,
        weight_bytes=state.weight_bytes,
        leaf_bytes=state.leaves.block_bytes,
        resident_bytes=plan.resident_bytes + state.small_bytes if is_placed else 0,
        ring_bytes=plan.ring_bytes if streamed and is_placed else 0,
        fixed_bytes=state.fixed.bytes,
        activation_bytes=learned.torch_peak_bytes or None,
        host_bytes=state.host.arena.bytes,
        pinned_bytes=state.host.pinner.pinned_bytes + state.fixed.pinned_bytes,
        bounce_bytes=state.host.bounce_bytes,
        pool_bytes=state.pool.bytes,
        peak_allocated_bytes=state.memory.peak_allocated_bytes or None,
        peak_device_bytes=state.memory.peak_device_bytes or None,
        streamed_bytes=plan.streamed_bytes,
        copies_per_step=len(streamed),
        link_gb_per_s=_measured_link(timeline) or steward.plans.link.speed / 1e9,
        idle_link_gb_per_s=steward.plans.link.measured / 1e9,
        throttle_gb_per_s=state.config.throttle_gb_per_s,
        step_ms=1e3 * step_seconds if step_seconds > 0 else None,
        stall_ms=stall_ms if timeline or (step_seconds > 0 and not streams) else None,
        predicted_ms=1e3 * plan.predicted_seconds if ready else None,
        bound_ms=1e3 * plan.bound_seconds if ready else None,
        overlap=max(0.0, 1 - stall_ms / busy_ms) if busy_ms > 0 else None,
        mispredicted=steward.totals.mispredicted + counters.mispredicted,
        refetched=steward.totals.refetched + counters.refetched + state.recopied,
        sheds=steward.totals.sheds,
        growths=steward.totals.growths,
        ooms=steward.totals.ooms,
        ladder=dict(steward.totals.rungs),
        num_pieces=len(plan.pieces),
        num_resident_pieces=len(plan.pieces) - len(streamed),
        stalls=_stalls(timeline),
        notes=tuple(steward.notes),
        explain=_C.explain(plan, steward.plans.request) if ready else "",
    )


def _measured_link(timeline: Timeline | None) -> float | None:
    """Return the last step's copies' own speed in GB/s; None when nothing was copied."""
    if timeline is None or timeline.link_busy_ms <= 0:
        return None
    return timeline.streamed_bytes / timeline.link_busy_ms / 1e6


def _stalls(timeline: Timeline | None) -> tuple[BlockStall, ...]:
    spans: dict[str, list[PieceSpan]] = defaultdict(list)
    for span in timeline.spans if timeline else ():
        spans[span.block].append(span)
    rows = []
    for block, of_block in spans.items():
        num_bytes = sum(span.bytes for span in of_block)
        copy_ms = sum(span.copy_ms for span in of_block)
        stall_ms = sum(span.stall_ms for span in of_block)
        speed = num_bytes / copy_ms / 1e6 if copy_ms > 0 else 0.0
        rows.append(BlockStall(block, stall_ms, num_bytes, speed))
    return tuple(rows)

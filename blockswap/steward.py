"""Decides when a session learns and when it plans; performs it through the model's state."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable

from blockswap import _C
from blockswap.errors import CapError
from blockswap.learning import (
    RELEARN_AFTER,
    SETTLING_STEPS_OF_HOST,
    SHORT_LAG_S,
    TIMED_STEPS,
    Learned,
    Stage,
    copy_speed,
    take_times,
    traced_order,
    traced_runs,
    with_strangers,
)
from blockswap.link import Link
from blockswap.model_state import ModelState
from blockswap.refine import refine
from blockswap.report import Report, State, Timeline
from blockswap.request import MARGIN_BYTES, Requests
from blockswap.sizes import format_bytes
from blockswap.telling import make_report, make_timeline, pageable_note

logger = logging.getLogger("blockswap")

MAX_RELEARNED = 2
MEASURED_AT_FIRST = 4
MEASURED_EVERY = 32  # of which two steps: the first one times the copies for the second
WORTH_INSTALLING = 0.995  # a refined plan replaces the running one when it is this much shorter


class Steward:
    """Keeps what was learned per input shape; installs plans.

    Attributes:
        runs: leaf numbers of the pieces that began to run in this step, in order.
        plan, request, order: what is installed.
    """

    def __init__(self, state: ModelState, on_install: Callable[[], None]) -> None:
        self.state = state
        self._on_install = on_install
        self.runs: list[int] = []
        self.notes: list[str] = []
        self.request: _C.PlanRequest
        self.link: Link
        self.steps = self.mispredicted = self.refetched = 0
        self._learned: dict[Hashable, Learned] = {}
        self._key: Hashable = None
        self._seen = self._steps_of_plan = 0  # mispredictions so far; steps under the plan
        self._usually_missed: int | None = None  # mispredictions in a step under the plan
        self._completed = self._is_vacated = False
        self._is_alone = False  # a block runs outside its model's forward

    @property
    def learned(self) -> Learned:
        """Return what is known about the current input shape."""
        return self._learned.get(self._key) or Learned()

    @property
    def is_ready(self) -> bool:
        """Whether the current input shape's plan is settled."""
        return self.learned.stage is Stage.READY

    @property
    def traces(self) -> bool:
        """Whether each leaf is a streamed piece of its own now, and announces itself."""
        return self.learned.stage in (Stage.TRACE, Stage.TIME)

    def start(self) -> None:
        """Measure the link and stream everything, in declared order, until more is known."""
        state = self.state
        self.stop()
        self.notes.clear()
        state.memory.watch()
        self._requests = Requests(
            state.leaves, state.config, state.priorities, state.host.image_bytes, state.host.follows
        )
        self._room: int | None = None
        self._cap = state.config.vram_bytes
        self._available = state.memory.available_bytes() if self._cap is None else None
        if self._cap is not None:
            self._room = max(0, self._cap - state.memory.allocated_bytes())
        self.link = Link(state.engine, state.config.throttle_gb_per_s)
        self.link.measure(state.host, state.pool, self._room, state.device.type == "cuda")
        if state.is_asynchronous and (note := pageable_note(state.host)):
            self.notes.append(note)
            logger.warning(note)
        self._stream([leaf.index for leaf in state.leaves.streamable])

    def stop(self) -> None:
        """Forget what is installed; what was learned holds only for it."""
        self._learned.clear()
        self._key = None

    def vacate(self) -> None:
        """Take everything off the device; the next forward puts it back."""
        if self._completed and self._key is not None:
            self._advance(self.learned)
        self._completed = False
        self._is_vacated = True
        self.state.vacate()

    # Steps ---------------------------------------------------------------------------------------

    def before_step(self, key: Hashable) -> None:
        """Go on learning, or switch to the plan of another input shape.

        Args:
            key: the input shape; None for a block that is called alone: nothing is learned.

        Raises:
            CapError: the cap cannot hold this shape's activations.
        """
        if self._completed and self._key is not None:
            self._advance(self.learned)
        self._is_alone = key is None
        if key is None:
            self._completed = False
            self.state.engine.measure(False)
            if self._is_vacated:
                self._stream(self.order)
            return
        if key != self._key or self._is_vacated:
            self._switch(key)
        self._completed = False
        self.runs = []
        self.state.engine.measure(self._measures())
        self._steps_of_plan += 1
        if not self.is_ready:
            self.state.memory.begin_span()

    def _measures(self) -> bool:
        """Whether to time each piece of the next step: host and device pay for five events each."""
        if not self.is_ready:
            return self.learned.is_measured_next(self.learned.steps)
        return self._steps_of_plan < MEASURED_AT_FIRST or self.steps % MEASURED_EVERY < 2

    def after_step(self, completed: bool) -> None:
        """Note the end of a step; one that failed teaches nothing."""
        self.steps += 1
        self._completed = completed = completed and not self._is_alone
        if completed and self._key is not None and not self.is_ready:
            pool = self.state.pool.bytes if self.state.memory.counts_pool else 0
            peak = self.state.memory.span_peak_bytes() - pool
            self.learned.torch_peak_bytes = max(self.learned.torch_peak_bytes, peak)

    def _switch(self, key: Hashable) -> None:
        self.link.slow_down(1.0)  # learning of the shape before may have slowed it
        known = self.learned.order
        self._key = key
        learned = self._learned.setdefault(key, Learned())
        if learned.plan is not None and learned.request is not None:
            self._install(learned.plan, learned.request, learned.order)
        elif learned.order or known or self._is_vacated:
            self._stream(learned.order or known or self.order)

    def _advance(self, learned: Learned) -> None:
        strangers = self.state.strangers - set(learned.order)
        self.state.strangers.clear()
        if strangers and learned.stage is not Stage.TRACE:
            # Skipped when the order was learned, they run now: they belong into the plan.
            learned.seconds.clear()
            self._time(learned, with_strangers(learned.order, strangers))
            return
        if learned.stage is Stage.READY:
            self._watch_order(learned)
            return
        learned.steps += 1
        if learned.stage is Stage.TRACE:
            order = traced_order(self.runs) or self.order
            learned.runs = traced_runs(self.runs)
            read = [u.index for u in self.state.units.values() if u.is_read_outside]
            self._time(learned, order + [leaf for leaf in read if leaf not in order])
        elif learned.stage is Stage.TIME:
            times = self.state.engine.step_times()
            take_times(learned, times, self._members())
            self.link.slow_down(1.0)
            if learned.steps == 1 and self.state.is_asynchronous:
                host = self.state.engine.host_times()
                self.link.outlast(host.step_seconds, times.step_seconds, self.plan.streamed_bytes)
            if learned.steps >= TIMED_STEPS:
                learned.plan, learned.request = self._make_plan(learned)
                learned.enter(Stage.SETTLE)
                self._install(learned.plan, learned.request, learned.order)
        else:
            self._watch_settling(learned)
            if learned.steps >= learned.settling_steps:
                self._settle(learned)
                learned.enter(Stage.READY)

    def _time(self, learned: Learned, order: list[int]) -> None:
        """Stream every leaf in its order, to see how long each computes."""
        learned.order = order
        self.state.engine.stop()
        self.state.host.arrange(order)
        self._stream(order)
        learned.enter(Stage.TIME)

    def _watch_settling(self, learned: Learned) -> None:
        """Note the host's times; have the stage's last step begin with an idle device."""
        if learned.is_measured_next(done=learned.steps - 1):
            learned.hosts += [self.state.engine.host_times()] if self.state.is_asynchronous else []
            return
        begin = time.perf_counter()
        learned.unmeasured_seconds = self.state.engine.step_seconds()  # waits for its end
        if self.state.is_asynchronous and time.perf_counter() - begin < SHORT_LAG_S:
            learned.settling_steps = SETTLING_STEPS_OF_HOST

    def _settle(self, learned: Learned) -> None:
        """Plan once more with the times of a real step; prefer the plan that runs."""
        refine(learned, times := self.state.engine.step_times(), learned.hosts, self._members())
        sizes = [piece.bytes for piece in self.plan.pieces]
        speed = copy_speed(times, sizes, self.request.link.seconds_per_copy)
        if speed > 0:
            self.link.learn(speed)
        plan, request = self._make_plan(learned)
        _C.predict(self.plan, request)
        if plan.predicted_seconds < WORTH_INSTALLING * self.plan.predicted_seconds:
            self._install(plan, request, learned.order)
        self.request = request
        learned.plan, learned.request = self.plan, request

    def _watch_order(self, learned: Learned) -> None:
        """Learn anew when steps keep running otherwise than planned."""
        now = self.state.engine.counters.mispredicted
        missed, self._seen = now - self._seen, now
        if self._usually_missed is None:  # a leaf that runs again later is missed every time
            self._usually_missed = missed
        learned.disordered_steps = (
            learned.disordered_steps + 1 if missed > self._usually_missed else 0
        )
        if learned.disordered_steps >= RELEARN_AFTER and learned.relearned < MAX_RELEARNED:
            logger.info("pieces run in another order than planned: learning it anew")
            learned.relearned += 1
            learned.disordered_steps = 0
            learned.seconds.clear()
            learned.enter(Stage.TRACE)
            self._stream(learned.order)

    # Plans ---------------------------------------------------------------------------------------

    def _members(self) -> list[list[int]]:
        """Return the leaves of each installed piece."""
        return [self.order[p.first_leaf : p.end_leaf] for p in self.plan.pieces]

    def _stream(self, order: list[int]) -> None:
        plan, request = self._requests.streaming(order, self._room)
        self._install(plan, request, order)

    def _make_plan(self, learned: Learned) -> tuple[_C.Plan, _C.PlanRequest]:
        budget = self._budget(learned)
        pinned = {u.index for u in self.state.units.values() if u.is_read_outside}
        for unit in self.state.units.values():
            note = f"{unit.name} stays on the device: its weights are read outside its own call"
            if unit.is_read_outside and note not in self.notes:
                self.notes.append(note)
        try:
            return self._requests.planned(learned, self.link.speed, budget, pinned)
        except CapError:
            if not pinned:
                raise
            return self._requests.planned(learned, self.link.speed, budget, set())

    def _budget(self, learned: Learned) -> int | None:
        """Return what the cap leaves for residents and ring."""
        cap = self._cap if self._cap is not None else self._available
        if cap is None:
            return None
        taken = learned.torch_peak_bytes + self.state.small_bytes + MARGIN_BYTES
        smallest = self._requests.largest_bytes
        if cap - taken < smallest and self._cap is not None:
            raise CapError(
                f"the cap is {format_bytes(cap)}, but activations and weights outside the blocks"
                f" take {format_bytes(learned.torch_peak_bytes)} for this input, small parameters"
                f" {format_bytes(self.state.small_bytes)}, and the smallest ring"
                f" {format_bytes(smallest)}: raise vram to {format_bytes(taken + smallest)} or"
                " make the input smaller"
            )
        return max(cap - taken, smallest)

    def _install(self, plan: _C.Plan, request: _C.PlanRequest, order: list[int]) -> None:
        counters = self.state.engine.counters
        self.mispredicted += counters.mispredicted
        self.refetched += counters.refetched
        self._seen, self._usually_missed = 0, None
        self.plan, self.request, self.order = plan, request, list(order)
        self.state.place(plan, request, self.order, self.learned.runs)
        self._steps_of_plan = 0
        self._is_vacated = False
        self._on_install()

    def timeline(self) -> Timeline | None:
        """Return the last step's timeline."""
        return make_timeline(self) if self.state.is_taken else None

    def report(self, state: State) -> Report:
        """Return what happened so far."""
        return make_report(self, state)

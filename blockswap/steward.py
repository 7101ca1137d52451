"""Decides when a session learns and when it plans; performs it through the model's state."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable

from blockswap.budget import bytes_of
from blockswap.cores import num_cores
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
from blockswap.model_state import ModelState
from blockswap.plans import Plans
from blockswap.refine import refine
from blockswap.relief import Relief
from blockswap.report import Report, State, Timeline
from blockswap.step_memory import OTHER_ALGORITHM, StepMemory
from blockswap.telling import make_report, make_timeline, pageable_note
from blockswap.totals import Totals

logger = logging.getLogger("blockswap")

MAX_RELEARNED = 2
WATCHED_STEPS = 8  # under a plan, for whether PyTorch has room enough
MEASURED_AT_FIRST = 4
MEASURED_EVERY = 32  # of which two steps: the first one times the copies for the second


class Steward:
    """Keeps what was learned per input shape; installs plans.

    Attributes:
        runs: leaf numbers of the pieces that began to run in this step, in order.
        plans: what is installed.
        totals: what happened since attach.
        relief: what is given up where PyTorch finds no memory.
    """

    def __init__(self, state: ModelState, on_install: Callable[[], None]) -> None:
        self.state = state
        self._on_install = on_install
        self.runs: list[int] = []
        self.notes: list[str] = []
        self.plans: Plans
        self.totals = Totals()
        self.steps = 0
        self._learned: dict[Hashable, Learned] = {}
        self._key: Hashable = None
        self._steps_of_plan = self._seen = 0  # mispredictions before the step
        self._usually_missed: int | None = None  # mispredictions in a step under the plan
        self._completed = False
        self._is_alone = False  # a block runs outside its model's forward
        self._is_interleaved = False  # the step before was of another input shape
        self._memory = StepMemory(state.memory)
        self.relief = Relief(self)

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
        self.plans = Plans(state, self.notes, self.totals, self._installed)
        self.plans.budget.is_tight = self.relief.is_tight
        if state.is_asynchronous and (note := pageable_note(state.host)):
            self.notes.append(note)
            logger.warning(note)
        self.plans.stream([leaf.index for leaf in state.leaves.streamable], self.learned)

    def stop(self) -> None:
        """Forget what is installed; what was learned holds only for it."""
        self._learned.clear()
        self._key = None

    def vacate(self, at_least_bytes: int | None = None) -> None:
        """Take everything off the device, or so much; the next forward puts it back."""
        try:
            self._take_in()  # what the last step taught goes with the engine
        except CapError:
            self._completed = False  # the next forward learns it again
        finally:
            self.plans.vacate(at_least_bytes)

    def least_bytes(self) -> int | None:
        """Return what the next step takes on the device at least, if it is as the last one was.

        None: that is not known.
        """
        learned, fixed = self.learned, self.state.fixed
        if not learned.step_reserved_bytes or self.relief.is_crowded:
            return None
        # What is being timed stays as it is.
        timed = learned.plan or self.plans.plan
        planned = self.plans.largest_bytes if self.is_ready else bytes_of(timed)
        activations = learned.step_reserved_bytes + learned.spare_bytes
        weights = self.state.small_bytes + (fixed.bytes if fixed.are_away else 0)
        return weights + planned + activations

    # Steps ---------------------------------------------------------------------------------------

    def before_step(self, key: Hashable) -> None:
        """Go on learning, or switch to the plan of another input shape.

        Args:
            key: the input shape; None for a block that is called alone: nothing is learned.

        Raises:
            CapError: the cap cannot hold this shape's activations.
        """
        self.state.fixed.come_back()
        self._take_in()
        self._is_alone = key is None
        self._completed = False
        self.plans.budget.look()
        self._memory.skip()
        if key is None:
            self.state.engine.measure(False)
            self.state.memory.dismiss_neighbours()
            if not self.plans.is_placed:
                self.plans.stream(self.plans.order, self.learned)
            return
        self._is_interleaved = key != self._key
        if self._is_interleaved or not self.plans.is_placed:
            self._switch(key)
        elif self.is_ready:
            self.plans.follow(self.learned)
        self.runs = []
        self._seen = self.state.engine.counters.mispredicted
        if self._is_interleaved and self.learned.is_last_next():
            self.state.engine.step_seconds()  # waits for the other shape's step
        self.state.engine.measure(self._measures())
        self._steps_of_plan += 1
        is_capped = self.state.config.vram_bytes is not None
        if not self.is_ready:
            self._memory.begin(is_first=is_capped and self.learned.stage is Stage.TRACE)
        elif is_capped and self._steps_of_plan <= WATCHED_STEPS:
            self._memory.begin()

    def learn_anew(self) -> None:
        """Memory was out: forget the plan of the input that ran, and keep more free than before."""
        if self._key is not None and not self._is_alone:
            self.learned.forget_plan()

    def _take_in(self) -> None:
        """Go on after a step that is complete; once, even if no memory is found for its plan."""
        completed, self._completed = self._completed, False
        if completed and self._key is not None:
            try:
                self._advance(self.learned)
            except CapError:
                self._completed = True  # the next forward hears it, too
                raise

    def _measures(self) -> bool:
        """Whether to time each piece of the next step: host and device pay for five events each."""
        if not self.is_ready:
            return self.learned.is_measured_next(self.learned.steps)
        return self._steps_of_plan < MEASURED_AT_FIRST or self.steps % MEASURED_EVERY < 2

    def after_step(self, completed: bool) -> None:
        """Note the end of a step; one that failed teaches nothing."""
        self.steps += 1
        self._completed = completed = completed and not self._is_alone
        need = self._memory.end()
        if not completed or need is None:
            return
        if need.found_none and OTHER_ALGORITHM not in self.notes:
            self.notes.append(OTHER_ALGORITHM)
            logger.warning(OTHER_ALGORITHM)
        if not self.is_ready:
            self.learned.note_peak(need.allocated, need.reserved, need.held)
        elif need.flushed:
            self.plans.budget.note_flush(self.learned)

    def _switch(self, key: Hashable) -> None:
        self.plans.link.slow_down(1.0)  # learning of the shape before may have slowed it
        known = self.learned.order
        self._key = key
        learned = self._learned.setdefault(key, Learned())
        if not learned.step_reserved_bytes:
            self.state.memory.dismiss_neighbours()  # what a step takes is not known yet
        if learned.plan is not None:
            self.plans.switch(learned)
        elif learned.order or known or not self.plans.is_placed:
            self.plans.stream(learned.order or known or self.plans.order, learned)

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
            order = traced_order(self.runs) or self.plans.order
            learned.runs = traced_runs(self.runs)
            read = [u.index for u in self.state.units.values() if u.is_read_outside]
            self._time(learned, order + [leaf for leaf in read if leaf not in order])
        elif learned.stage is Stage.TIME:
            times = self.state.engine.step_times()
            take_times(learned, times, self.plans.members())
            self.plans.link.slow_down(1.0)
            if learned.steps == 1 and self.state.is_asynchronous:
                host = self.state.engine.host_times()
                streamed_bytes = self.plans.plan.streamed_bytes
                own_seconds = host.step_seconds - host.waiting_seconds
                self.plans.link.outlast(own_seconds, times.step_seconds, streamed_bytes)
            if learned.steps >= TIMED_STEPS:
                self.plans.make(learned)
                learned.enter(Stage.SETTLE)
                self.plans.install(learned)
        elif learned.settling_plan not in (None, self.plans.plan):
            learned.enter(Stage.SETTLE)  # a smaller plan was installed, or that was broken off
        else:
            learned.settling_plan = self.plans.plan
            self._watch_settling(learned)
            if learned.steps >= learned.settling_steps:
                self._settle(learned)

    def _time(self, learned: Learned, order: list[int]) -> None:
        """Stream every leaf in its order, to see how long each computes."""
        learned.order = order
        self.plans.is_placed = False  # should the next lines be broken off
        self.state.engine.stop()
        self.state.host.arrange(order)
        self.plans.stream(order, learned)
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
            if learned.is_paced_by_host() and num_cores() > 1:
                self.state.engine.issue_on_thread()
                learned.hosts.clear()  # it needed longer
        if not self._is_interleaved:
            learned.earlier_times = self.state.engine.step_times()  # of the one before

    def _settle(self, learned: Learned) -> None:
        """Plan once more with the times of real steps; prefer the plan that runs."""
        times = self.state.engine.step_times()
        refine(learned, times, learned.hosts, self.plans.members(), learned.earlier_times)
        sizes = [piece.bytes for piece in self.plans.plan.pieces]
        speed = copy_speed(times, sizes, self.plans.request.link.seconds_per_copy)
        if speed > 0:
            self.plans.link.learn(speed)
        seconds = min(times.step_seconds, learned.unmeasured_seconds)
        if self.state.is_asynchronous and not learned.is_explained(
            self.plans.expected_seconds(learned), seconds
        ):
            learned.enter(Stage.SETTLE)
            return
        self.plans.improve(learned)
        learned.enter(Stage.READY)

    def _watch_order(self, learned: Learned) -> None:
        """Learn anew when steps keep running otherwise than planned."""
        if self._steps_of_plan < 2:
            return  # nothing had been fetched ahead of it
        missed = self.state.engine.counters.mispredicted - self._seen
        if self._usually_missed is None:  # a leaf that runs again later is missed every time
            self._usually_missed = missed
        is_off = missed > self._usually_missed
        learned.disordered_steps = learned.disordered_steps + 1 if is_off else 0
        if learned.disordered_steps >= RELEARN_AFTER and learned.relearned < MAX_RELEARNED:
            logger.info("pieces run in another order than planned: learning it anew")
            learned.forget_order()
            self.plans.stream(learned.order, learned)

    def _installed(self) -> None:
        self._usually_missed = None
        self._steps_of_plan = 0
        self._on_install()

    def timeline(self) -> Timeline | None:
        """Return the last step's timeline."""
        return make_timeline(self) if self.state.is_taken else None

    def report(self, state: State) -> Report:
        """Return what happened so far."""
        return make_report(self, state)

"""Makes plans of what was learned, and installs them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from blockswap import _C
from blockswap.budget import Budget, bytes_of
from blockswap.errors import CapError, DeviceError
from blockswap.kept import are_alike, is_one_run, missing_bytes
from blockswap.learning import Learned, Stage
from blockswap.link import Link
from blockswap.loan import Loan
from blockswap.model_state import ModelState
from blockswap.request import Requests
from blockswap.sizes import format_bytes
from blockswap.totals import Totals

logger = logging.getLogger("blockswap")

MOST_TRIES = 3  # to install a plan while others take memory
WORTH_INSTALLING = 0.995  # a refined plan replaces the running one when it is this much shorter


class Plans:
    """One session's plans.

    Args:
        state: of the model.
        notes: where a plan says what it had to do.
        totals: counted on.
        on_install: called when another plan is installed.

    Attributes:
        budget: what they may take.
        link: what they count on.
        plan, request, order: what is installed.
        is_placed: it is on the device.
    """

    plan: _C.Plan
    request: _C.PlanRequest
    order: list[int]

    def __init__(
        self,
        state: ModelState,
        notes: list[str],
        totals: Totals,
        on_install: Callable[[], None],
    ) -> None:
        self._state = state
        self._notes = notes
        self._totals = totals
        self._on_install = on_install
        self._requests = Requests(
            state.leaves,
            state.config,
            state.priorities,
            state.host.image_bytes,
            lambda leaf, before: state.host.follows(leaf, before),  # keeps no host that is given up
        )
        self.budget = Budget(state.memory, state.config, self._requests)
        self.link = Link(state, state.config.throttle_gb_per_s)
        is_gpu = state.device.type == "cuda"
        room = self.budget.before_learning()
        self.link.measure(state.host, state.pool, state.token, room, self.largest_bytes, is_gpu)
        self.is_placed = False
        self._owner: Learned | None = None  # of what is installed
        self._loan: Loan | None = None  # the input that runs is not the owner
        self._has_planned = False
        self._most_bytes: int | None = None  # that the device was seen to have

    @property
    def largest_bytes(self) -> int:
        """Return the size of the smallest ring."""
        return self._requests.largest_bytes

    def members(self) -> list[list[int]]:
        """Return the leaves of each installed piece."""
        return [self.order[p.first_leaf : p.end_leaf] for p in self.plan.pieces]

    def make(self, learned: Learned) -> bool:
        """Make the best plan for what was learned and the room that there is now.

        Returns:
            Whether there is one: False when others leave too little for these options, or the cap
            does for this input, though it did not for an earlier one.

        Raises:
            CapError: the cap cannot hold it.
        """
        if learned.plan is None:
            self.budget.check(learned, self._state.small_bytes)
        granted = self.budget.grants(learned, self._state.small_bytes)
        cap, others = granted
        if others is not None and self._most_bytes is not None:
            others = min(others, self._most_bytes)
            granted = granted._replace(others=others)
        is_capped = others is None or (cap is not None and cap <= others)
        left = cap if is_capped else max(others or 0, self._requests.largest_bytes)
        try:
            made = self._planned(learned, left)
        except CapError as error:
            if is_capped and not self._has_planned:
                raise
            if is_capped:
                self._tell_streams(cap or 0, error)
            else:
                logger.info("others leave %s: %s", format_bytes(max(0, others or 0)), str(error))
            return False
        learned.plan, learned.request = made
        learned.granted, learned.arrangement = granted, self._state.host.arrangement
        self._has_planned = True
        return True

    def _tell_streams(self, left: int, error: CapError) -> None:
        """Say that the options are not kept: this input leaves them too little of the cap."""
        note = f"all streams: the cap leaves {format_bytes(left)} for residents and ring; {error}"
        if note not in self._notes:
            self._notes.append(note)
            logger.warning(note)

    def stream(self, order: list[int], learned: Learned) -> None:
        """Install the plan that keeps nothing: every leaf a streamed piece, a small ring."""
        plan, request = self._requests.streaming(order, self.budget.before_learning())
        self._install(plan, request, order, learned)
        self.budget.note(plan, self.budget.grants(learned, self._state.small_bytes))

    def install(self, learned: Learned) -> None:
        """Install what was planned, or less where somebody has taken the memory meanwhile.

        Raises:
            DeviceError: there is no memory even for the smallest ring.
        """
        for _ in range(MOST_TRIES):
            if learned.plan is None or learned.request is None:
                break
            try:
                self._install(learned.plan, learned.request, learned.order, learned)
                self.budget.note(learned.plan, learned.granted)
                return
            except DeviceError as error:
                free = self._state.memory.free_bytes() or 0  # PyTorch's cache is empty now
                self._most_bytes = max(0, free - self._state.small_bytes)
                # As text: a handler that keeps the record must not keep what the traceback holds.
                logger.warning("no room for residents and ring: %s", str(error))
                self.budget.hold_off()
            try:
                if not self.budget.follows or not self.make(learned):
                    break  # the plan waits until its memory is there
            finally:
                self._most_bytes = None
        self.stream(learned.order, learned)

    def switch(self, learned: Learned) -> None:
        """Go on with another input shape: under the plan that is there, or under its own."""
        if not self._is_whole(learned) and not self.make(learned):
            learned.plan = learned.request = None
            self.stream(learned.order, learned)
            return
        _C.predict(learned.plan, learned.request)  # others may have run under it
        self._loan = self._loan_for(learned)
        is_there = self.is_placed and self._owner is learned and self.plan is learned.plan
        if self._loan is None and (not is_there or self._is_too_large(learned)):
            self._install_own(learned)
            return
        self.request = learned.request
        if self._loan is None and learned.stage is Stage.READY:
            self.follow(learned)

    def follow(self, learned: Learned) -> None:
        """Plan anew if others have taken room, or left more, since the plan was made."""
        if self._loan is not None:
            if not self._lends_to(learned) or not self._loan.pay():
                self._install_own(learned)
            return
        # Another one runs where this one found no memory, and where a block was called alone.
        waits = learned.plan is not None and self.plan is not learned.plan
        if waits and self.budget.has_room(learned, self._state.small_bytes):
            self.install(learned)
        elif self.budget.is_off(learned):
            self._renew(learned)

    def expected_seconds(self, learned: Learned) -> float:
        """Return how long a step under the installed plan takes, by what was learned so far."""
        request = self._requests.unbounded(learned, self.link.speed)
        _C.predict(self.plan, request)
        return float(self.plan.predicted_seconds)

    def improve(self, learned: Learned) -> None:
        """Plan once more with better times; the plan that runs stays unless it is clearly slower.

        Predictions are fixed from here on.
        """
        running = self.plan
        if not self.make(learned) or learned.plan is None:
            return
        _C.predict(running, learned.request)
        is_large = bytes_of(learned.plan) < bytes_of(running) and not self._leaves_room(learned)
        limit = WORTH_INSTALLING * running.predicted_seconds
        if is_large or learned.plan.predicted_seconds < limit:
            self.install(learned)
        else:
            learned.plan, self.request = running, learned.request

    def vacate(self, at_least_bytes: int | None = None) -> None:
        """Take everything, or so much, off the device; a plan must follow before a forward."""
        self.is_placed = False
        self._state.vacate(at_least_bytes)

    def _install_own(self, learned: Learned) -> None:
        """Install an input shape's plan; anew if it was made for another time's room."""
        self._loan = None
        is_ready = learned.stage is Stage.READY  # else it is being timed under its plan
        if is_ready and self.budget.is_outdated(learned, self._state.small_bytes):
            self._renew(learned)
            return
        if self._is_too_large(learned):
            self.make(learned)
        self.install(learned)

    def _is_too_large(self, learned: Learned) -> bool:
        """Whether a plan that is being timed was made before its step's input was there."""
        is_timed = learned.stage is Stage.SETTLE
        return is_timed and self.budget.is_short(learned, self._state.small_bytes)

    def _loan_for(self, learned: Learned) -> Loan | None:
        """Return the terms on which an input shape runs under what is installed; None: not."""
        owner = self._owner
        own = learned.plan
        if not self.is_placed or owner is None or owner is learned or own is None:
            return None
        have_plans = {owner.stage, learned.stage} <= {Stage.SETTLE, Stage.READY}
        is_planned = have_plans and owner.plan is self.plan  # or it found no memory for that
        if not is_planned or (self.order, owner.runs) != (learned.order, learned.runs):
            return None
        if not self._leaves_room(learned):
            return None
        own_seconds = own.predicted_seconds
        _C.predict(self.plan, learned.request)
        loss = max(0.0, self.plan.predicted_seconds - own_seconds)
        return Loan(loss, lambda: self._install_seconds(own))

    def _leaves_room(self, learned: Learned) -> bool:
        return self.budget.fits(self.plan, learned, self._state.small_bytes)

    def _lends_to(self, learned: Learned) -> bool:
        """Whether the installed plan may stay: there is room, and no more to gain than was then."""
        gains = self.plan.streamed_bytes > 0
        more = gains and self.budget.has_grown_for(learned, self._state.small_bytes)
        return self._leaves_room(learned) and not more

    def _is_whole(self, learned: Learned) -> bool:
        """Whether each piece of its plan is one run of images; another order moves them."""
        host = self._state.host
        if learned.arrangement != host.arrangement:
            if not is_one_run(learned.plan, learned.order, host.follows):
                return False
            learned.arrangement = host.arrangement
        return True

    def _install_seconds(self, plan: _C.Plan) -> float:
        """Return how long the link takes for what a plan keeps and the installed one does not."""
        sizes = [self._state.host.image_bytes[leaf] for leaf in self.order]
        return missing_bytes(plan, self.plan, sizes) / self.link.speed

    def _renew(self, learned: Learned) -> None:
        before = bytes_of(learned.plan) if learned.plan is not None else 0
        if not self.make(learned) and self.is_placed:
            return  # with these options there is no smaller one
        is_its_own = self.is_placed and self._owner is learned and self.order == learned.order
        if is_its_own and are_alike(self.plan, learned.plan):
            learned.plan, learned.request = self.plan, self.request
            self.budget.note(self.plan, learned.granted)
            return
        self.install(learned)
        now = bytes_of(self.plan)
        if now != before:
            self._totals.sheds += now < before
            self._totals.growths += now > before
            logger.info(
                "residents and ring take %s, before it was %s: there is %s memory for them",
                format_bytes(now),
                format_bytes(before),
                "less" if now < before else "more",
            )

    def _planned(
        self, learned: Learned, budget_bytes: int | None
    ) -> tuple[_C.Plan, _C.PlanRequest]:
        pinned = {u.index for u in self._state.units.values() if u.is_read_outside}
        for unit in self._state.units.values():
            note = f"{unit.name} stays on the device: its weights are read outside its own call"
            if unit.is_read_outside and note not in self._notes:
                self._notes.append(note)
        try:
            return self._requests.planned(learned, self.link.speed, budget_bytes, pinned)
        except CapError:
            if not pinned:
                raise
            return self._requests.planned(learned, self.link.speed, budget_bytes, set())

    def _install(
        self, plan: _C.Plan, request: _C.PlanRequest, order: list[int], learned: Learned
    ) -> None:
        counters = self._state.engine.counters
        mispredicted, refetched = counters.mispredicted, counters.refetched
        self.plan, self.request, self.order = plan, request, list(order)
        self._owner, self._loan = learned, None
        self.is_placed = False  # unless all of it succeeds
        self.budget.clear_for(bytes_of(plan) + self._state.small_bytes)
        self._state.place(plan, self.order, learned.runs)
        self.is_placed = True
        self._totals.mispredicted += mispredicted
        self._totals.refetched += refetched
        self._on_install()

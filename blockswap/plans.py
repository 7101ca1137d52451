"""Makes plans of what was learned, and installs them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from blockswap import _C
from blockswap.budget import Budget
from blockswap.errors import CapError, DeviceError
from blockswap.learning import Learned
from blockswap.link import Link
from blockswap.model_state import ModelState
from blockswap.request import Requests
from blockswap.sizes import format_bytes

logger = logging.getLogger("blockswap")

MOST_TRIES = 3  # to install a plan while others take memory


@dataclass
class Totals:
    """What happened since attach.

    Attributes:
        mispredicted, refetched: pieces, under the plans before the installed one.
        sheds, growths: plans for less, for more memory, since others took or left it.
        ooms: forwards that PyTorch ended for lack of memory.
    """

    mispredicted: int = 0
    refetched: int = 0
    sheds: int = 0
    growths: int = 0
    ooms: int = 0


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
            state.leaves, state.config, state.priorities, state.host.image_bytes, state.host.follows
        )
        self.budget = Budget(state.memory, state.config, self._requests)
        self.link = Link(state.engine, state.config.throttle_gb_per_s)
        is_gpu = state.device.type == "cuda"
        self.link.measure(
            state.host, state.pool, state.token, self.budget.before_learning(Learned()), is_gpu
        )
        self.is_placed = False

    def members(self) -> list[list[int]]:
        """Return the leaves of each installed piece."""
        return [self.order[p.first_leaf : p.end_leaf] for p in self.plan.pieces]

    def make(self, learned: Learned) -> tuple[_C.Plan, _C.PlanRequest]:
        """Return the best plan for what was learned and the room that there is now.

        Raises:
            CapError: the cap cannot hold it.
        """
        budget = self.budget.of(learned, self._state.small_bytes)
        pinned = {u.index for u in self._state.units.values() if u.is_read_outside}
        for unit in self._state.units.values():
            note = f"{unit.name} stays on the device: its weights are read outside its own call"
            if unit.is_read_outside and note not in self._notes:
                self._notes.append(note)
        try:
            return self._requests.planned(learned, self.link.speed, budget, pinned)
        except CapError:
            if not pinned:
                raise
            return self._requests.planned(learned, self.link.speed, budget, set())

    def stream(self, order: list[int], learned: Learned) -> None:
        """Install the plan that keeps nothing: every leaf a streamed piece, a small ring."""
        plan, request = self._requests.streaming(order, self.budget.before_learning(learned))
        self._install(plan, request, order, learned)

    def install(self, learned: Learned) -> None:
        """Install what was planned, or less where somebody has taken the memory meanwhile."""
        plan, request = learned.plan, learned.request
        if plan is None or not self.budget.fits(plan, learned, self._state.small_bytes):
            plan, request = self.make(learned)
        for _ in range(MOST_TRIES):
            learned.plan, learned.request = plan, request
            self.budget.note(plan, learned)
            try:
                self._install(plan, request, learned.order, learned)
                return
            except DeviceError as error:
                logger.warning("no room for residents and ring (%s): planning for less", error)
                plan, request = self.make(learned)
        self.stream(learned.order, learned)

    def follow(self, learned: Learned) -> None:
        """Plan anew if others have taken room, or left more, since the plan was made."""
        if not self.budget.is_off(learned):
            return
        before = self._state.pool.bytes
        learned.plan, learned.request = self.make(learned)
        self.install(learned)
        now = self._state.pool.bytes
        self._totals.sheds += now < before
        self._totals.growths += now > before
        logger.info(
            "residents and ring take %s, before it was %s: others %s memory",
            format_bytes(now),
            format_bytes(before),
            "took" if now < before else "left",
        )

    def vacate(self) -> None:
        """Take everything off the device; another plan must follow before the next forward."""
        self.is_placed = False
        self._state.vacate()

    def _install(
        self, plan: _C.Plan, request: _C.PlanRequest, order: list[int], learned: Learned
    ) -> None:
        counters = self._state.engine.counters
        self._totals.mispredicted += counters.mispredicted
        self._totals.refetched += counters.refetched
        self.plan, self.request, self.order = plan, request, list(order)
        self.is_placed = False  # unless all of it succeeds
        self._state.place(plan, request, self.order, learned.runs)
        self.is_placed = True
        self._on_install()

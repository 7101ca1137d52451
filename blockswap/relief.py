"""Gives memory up, rung by rung of the ladder, where PyTorch finds none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from blockswap.ladder import Holding, Rung, next_rung, tell

if TYPE_CHECKING:
    from blockswap.steward import Steward

logger = logging.getLogger("blockswap")


class Relief:
    """What one session gives up.

    Attributes:
        is_crowded: memory was out beside neighbours: from then on none stay.
        is_tight: residents were not enough: the ring of the first steps is the smallest.
    """

    def __init__(self, steward: Steward) -> None:
        self._steward = steward
        self.is_crowded = self.is_tight = False

    def is_possible(self) -> bool:
        """Whether anything is left to give up."""
        return next_rung(self._held()) is not None

    def give(self, error: torch.OutOfMemoryError, can_repeat: bool) -> bool:
        """PyTorch found no memory in the forward that has just failed: give up what is next.

        The next step of this input streams everything, and the plan after it keeps more free.

        Args:
            error: gets a note that says so if the forward is not repeated.
            can_repeat: whether that forward can run again to the same result.

        Returns:
            Whether to run it again.
        """
        self._steward.totals.ooms += 1
        held = self._held()
        rung = next_rung(held)
        if rung is not None:
            self._give_up(rung)
        repeats = rung is not None and can_repeat
        note = tell(rung, held, repeats)
        logger.warning("PyTorch is out of memory: %s", note)
        if not repeats and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(note)
        return repeats

    def _held(self) -> Holding:
        plans, state = self._steward.plans, self._steward.state
        plan = plans.plan
        return Holding(
            residents=plan.resident_bytes if plans.is_placed else 0,
            ring=plan.ring_bytes if plans.is_placed else 0,
            smallest_ring=plans.largest_bytes,
            neighbours=state.memory.neighbour_bytes,
            # Weights from the device would go back there while the model is taken in anew.
            outside=0 if state.streams_outside or state.is_from_device else state.fixed.bytes,
        )

    def _give_up(self, rung: Rung) -> None:
        steward = self._steward
        steward.totals.rungs[rung.value] += 1
        if rung is Rung.NEIGHBOURS:
            self.is_crowded = True
            steward.state.memory.dismiss_neighbours()
            return
        steward.learn_anew()
        self.is_tight = self.is_tight or rung is not Rung.SHED
        steward.plans.budget.is_tight = self.is_tight
        # The model is taken in anew before the next forward.
        state = steward.state
        state.streams_outside = state.streams_outside or rung is Rung.LAYERWISE
        steward.plans.vacate()

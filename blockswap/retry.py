"""Runs a forward again that found no memory, where that leads to the same result."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from blockswap.alarm import armed
from blockswap.attempt import Attempt, Stillness
from blockswap.steward import Steward


class Forwards(Protocol):
    """The forwards of the model and its blocks."""

    @property
    def are_foreign(self) -> bool:
        """Whether another tool's forward, which may keep count, is called through one of them."""


class Retry:
    """Whether one session's forward can run again.

    Args:
        steward: gives memory up.
    """

    def __init__(self, steward: Steward) -> None:
        self._steward = steward
        self._forwards: Forwards | None = None
        self._stillness: Stillness | None = None  # since the plan was installed

    def renew(self, forwards: Forwards | None) -> None:
        """Go on with a model that has changed between two forwards."""
        self._forwards = forwards
        self._stillness = None

    def note(self) -> None:
        """Note what the model keeps from call to call, before it runs for the first time."""
        if self._stillness is None and self._steward.state.is_asynchronous:
            self._stillness = Stillness(self._steward.state.model)

    def watched(self, attempt: Attempt) -> AbstractContextManager[None]:
        """Raise where PyTorch finds no memory in this, if it can run again with more."""

        def can_run_again() -> bool:
            can_repeat = self._is_still() and attempt.is_untouched()
            return can_repeat and self._steward.relief.is_possible()

        return armed(self._steward.state.memory, can_run_again)

    def give(self, error: torch.OutOfMemoryError, attempt: Attempt) -> bool:
        """Give memory up after PyTorch had none in a forward; whether to run it again."""
        return self._steward.relief.give(error, self._is_still() and attempt.rewind())

    def _is_still(self) -> bool:
        still = self._stillness is not None and self._stillness.holds()
        return still and self._forwards is not None and not self._forwards.are_foreign

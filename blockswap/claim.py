"""Who has a session to itself: one thread at a time."""

from __future__ import annotations

from threading import get_ident


class Claim:
    """One thread's right to run, or to change, what a session streams.

    Taken and given up by one operation each: Ctrl-C finds it before or behind it, never in between.
    """

    def __init__(self) -> None:
        self._owner: dict[str, int] = {}

    @property
    def is_mine(self) -> bool:
        """Whether this thread has it."""
        return self._owner.get("thread") == get_ident()

    def take(self) -> bool:
        """Take it unless another thread has it; whether this one has it now."""
        return self._owner.setdefault("thread", get_ident()) == get_ident()

    def give_up(self) -> None:
        """Leave it to others. Only for the thread that has it."""
        self._owner.clear()

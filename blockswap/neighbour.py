"""A session that stays on the device while another one under the same cap computes."""

from __future__ import annotations

import weakref

from blockswap.session import Session


class Staying:
    """A denoiser that stays while a visitor computes.

    Weakly: what a visitor's `Share` has noted for its end leads here, and outlives a pipeline that
    is dropped.
    """

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)

    @property
    def bytes(self) -> int:
        """Return what its pool has mapped."""
        session = self._session()
        return 0 if session is None else session._state.memory.pool_mapped_bytes

    def leave(self) -> None:
        """Give it back until its next step."""
        session = self._session()
        if session is not None:
            session.vacate()

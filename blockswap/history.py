"""Who held the device's memory, and when, over a pipeline's call."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from blockswap.device_memory import DeviceMemory
from blockswap.files import PICTURES, check_file

if TYPE_CHECKING:
    from blockswap.session import Session


@dataclasses.dataclass(frozen=True)
class Moment:
    """The device between two parts of a call. Bytes; the CPU's are 0.

    Attributes:
        seconds: since the recording began, on the host's clock.
        part: the component that computes from here on; "" for what runs between components.
        pool_bytes: residents, ring and small parameters of all denoisers.
        torch_bytes: what PyTorch's tensors hold beside that.
        peak_bytes: the most that both held together since the moment before.
        reserved_bytes: the most with what PyTorch cached.
    """

    seconds: float
    part: str
    pool_bytes: int
    torch_bytes: int
    peak_bytes: int
    reserved_bytes: int


class MemoryHistory:
    """What `PipelineSession.record` saw.

    Attributes:
        moments: in the order of time; each part's peak stands in the moment that ends it.
        cap_bytes: what was allowed; None: no cap.
    """

    def __init__(self, cap_bytes: int | None) -> None:
        self.moments: list[Moment] = []
        self.cap_bytes = cap_bytes

    @property
    def peak_bytes(self) -> int:
        """Return the most that was held."""
        return max((moment.peak_bytes for moment in self.moments), default=0)

    def save(self, path: str | Path, title: str = "memory over a call") -> None:
        """Draw it; the suffix of ``path`` chooses the format (.png, .svg, .pdf).

        Raises:
            ConfigError: another suffix, or nothing was recorded.
        """
        from blockswap.plot_history import plot_history

        check_file("path", Path(path), PICTURES)
        plot_history(self, path, title)

    def to_json(self) -> str:
        """Return all moments as JSON."""
        moments = [dataclasses.asdict(moment) for moment in self.moments]
        return json.dumps({"cap_bytes": self.cap_bytes, "moments": moments}, indent=2)


class Recorder:
    """Writes a history.

    Args:
        memory: of the device, nobody else's.
        pools: what all denoisers hold together.
        history: gets the moments.
    """

    def __init__(self, memory: DeviceMemory, pools: Pools, history: MemoryHistory) -> None:
        self._memory = memory
        self._pools = pools
        self._history = history
        self._began = time.perf_counter()
        memory.pool = pools
        memory.watch()

    def note(self, part: str) -> None:
        """Note that ``part`` computes from here on."""
        memory, pool = self._memory, self._pools.bytes
        memory.begin_span()  # notes what the last one took
        self._history.moments.append(
            Moment(
                time.perf_counter() - self._began,
                part,
                pool,
                memory.allocated_bytes() - (pool if memory.counts_pool else 0),
                memory.peak_allocated_bytes,
                memory.peak_device_bytes,
            )
        )
        memory.peak_allocated_bytes = memory.peak_device_bytes = 0

    def end(self) -> None:
        """Note the end."""
        self.note("")
        self._memory.unwatch()


@contextlib.contextmanager
def recording(
    memory: DeviceMemory, cap_bytes: int | None, sessions: Mapping[str, Session]
) -> Iterator[tuple[Recorder, MemoryHistory]]:
    """Record each step of some denoisers; for other components the recorder must be told.

    Args:
        memory: of the device, nobody else's.
        cap_bytes: what is allowed.
        sessions: by component.
    """
    history = MemoryHistory(cap_bytes)
    recorder = Recorder(memory, Pools(sessions.values()), history)
    handles = []
    for name, session in sessions.items():
        begin, end = partial(_hear, recorder, name), partial(_hear, recorder, "")
        handles.append(session.model.register_forward_pre_hook(begin))
        handles.append(session.model.register_forward_hook(end, always_call=True))
    recorder.note("")
    try:
        yield recorder, history
    finally:
        recorder.end()
        for handle in handles:
            handle.remove()


def _hear(recorder: Recorder, part: str, *_: object) -> None:
    recorder.note(part)


class Pools:
    """The pools of several sessions as one.

    Args:
        sessions: those that are attached, paused ones included.
    """

    def __init__(self, sessions: Iterable[Session]) -> None:
        self._states = [session._state for session in sessions]

    @property
    def bytes(self) -> int:
        """Return what they hold together."""
        return sum(int(state.pool.bytes) for state in self._states if state.is_taken)

    @property
    def unused_bytes(self) -> int:
        """Return what lies between, and nobody else can have."""
        return max((int(s.pool.unused_bytes) for s in self._states if s.is_taken), default=0)

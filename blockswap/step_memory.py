"""What PyTorch needed for one step."""

from __future__ import annotations

from dataclasses import dataclass

from blockswap.device_memory import DeviceMemory, Tally

# cuDNN keeps what it chose then for the rest of the process.
OTHER_ALGORITHM = (
    "PyTorch found no memory for something that it could do without, such as a workspace of cuDNN:"
    " the algorithm in its place may give other last bits than in a run with more memory"
)


@dataclass(frozen=True)
class Need:
    """PyTorch's memory in one step, a pool of ours that it counts left out. Bytes.

    Attributes:
        held: what its tensors held before.
        allocated: the most that they held.
        reserved: the most with what it cached.
        found_none: it had no memory for something that it could do without.
        flushed: it found room only by giving its cache back.
    """

    held: int
    allocated: int
    reserved: int
    found_none: bool
    flushed: bool


class StepMemory:
    """Watches PyTorch's memory from a step's begin to its end."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._before: Tally | None = None

    def begin(self, is_first: bool = False) -> None:
        """Watch the step that begins.

        Args:
            is_first: what PyTorch reserves counts, so its cache goes back before.
        """
        if is_first:
            self._memory.give_back()
        self._memory.begin_span()
        self._before = self._memory.tally()

    def skip(self) -> None:
        """Watch nothing until the next `begin`."""
        self._before = None

    def end(self) -> Need | None:
        """Return what the step needed that has just run; None: it was not watched."""
        before, self._before = self._before, None
        if before is None:
            return None
        now = self._memory.tally()
        counted = self._memory.pool_bytes if self._memory.counts_pool else 0
        allocated, reserved = (peak - counted for peak in self._memory.span_peaks())
        found_none = now.ooms > before.ooms
        # PyTorch counts one where it finds nothing even so.
        flushed = now.flushes > before.flushes and not found_none
        return Need(before.allocated, allocated, reserved, found_none, flushed)

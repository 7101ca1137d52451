"""What a device's memory holds."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from blockswap import memory
from blockswap.binding import weights_of
from blockswap.room import Reading, margin_bytes


class Held(Protocol):
    """Device memory that somebody holds beside PyTorch's tensors."""

    @property
    def bytes(self) -> int:
        """Return how much."""

    @property
    def unused_bytes(self) -> int:
        """Return what lies between, and nobody else can have."""


class Neighbour(Protocol):
    """A session under the same cap that stays on the device while another one computes."""

    @property
    def bytes(self) -> int:
        """Return what it holds there."""

    def leave(self) -> None:
        """Give it back."""


@dataclass(frozen=True)
class Tally:
    """PyTorch's allocator, without a pool of ours that it counts. Bytes.

    Attributes:
        allocated: what its tensors hold.
        reserved: the same with what it caches.
        flushes: how often it gave its cache back to find room, since the process began.
        ooms: how often it found none all the same.
    """

    allocated: int
    reserved: int
    flushes: int = 0
    ooms: int = 0


class DeviceMemory:
    """Reads and resets PyTorch's statistics of one device, in bytes.

    PyTorch keeps one peak per device. So that no user of it loses what another one began, all note
    the peak before any of them starts a new span. The CPU keeps no such statistics: what PyTorch
    holds is 0 there, and the device's total is unknown.

    Attributes:
        pool: what this user holds beside PyTorch's allocator, if anything.
        neighbours: others under the same cap that stay while this user computes.
        watches: whether the peaks below grow.
        step_bytes: what a step of this user takes for a while beyond what stays.
        peak_allocated_bytes: the most that PyTorch's tensors and the pool's blocks held together.
        peak_device_bytes: the same with what PyTorch keeps reserved and the pool has mapped.
    """

    _all: ClassVar[weakref.WeakSet[DeviceMemory]] = weakref.WeakSet()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.key = (device.type, device.index or 0)
        is_installed = device.type == "cuda" and memory.is_installed()
        # CUDA's pool lies outside PyTorch's allocator; other devices count it as theirs.
        self.counts_pool = is_installed or device.type not in ("cuda", "cpu")
        self.pool: Held | None = None
        self.neighbours: Collection[Neighbour] = ()
        self.watches = False
        self.step_bytes = 0
        self.peak_allocated_bytes = self.peak_device_bytes = 0
        self._module: ModuleType | memory._InstalledPool | None = None
        if device.type != "cpu":
            self._module = torch.get_device_module(device)
        if is_installed:
            self._module = memory._InstalledPool()
        self._all.add(self)

    def allocated_bytes(self) -> int:
        """Return what PyTorch's tensors hold now."""
        return int(self._module.memory_allocated(self.device)) if self._module else 0

    @property
    def pool_bytes(self) -> int:
        """Return what the pool holds."""
        return 0 if self.pool is None else self.pool.bytes

    @property
    def pool_mapped_bytes(self) -> int:
        """Return what nobody else can have for it."""
        return 0 if self.pool is None else self.pool.bytes + self.pool.unused_bytes

    @property
    def pool_beside_bytes(self) -> int:
        """Return what the pool has mapped beyond what PyTorch counts."""
        return 0 if self.counts_pool else self.pool_mapped_bytes

    def held_bytes(self, ours: Iterable[nn.Module]) -> int:
        """Return what PyTorch's tensors hold now, without sessions' pools and without ours.

        Args:
            ours: models whose tensors do not count.
        """
        if self._module is None:
            return 0
        modules = {module for model in ours for module in model.modules()}
        tensors = {t for m in modules for t in (*weights_of(m), *m.buffers(recurse=False))}
        mine = sum(tensor.nbytes for tensor in tensors if tensor.device == self.device)
        others = [o for o in list(self._all) if o.key == self.key and o.counts_pool]
        pools = {id(other.pool): other.pool_bytes for other in others}
        return self.allocated_bytes() - mine - sum(pools.values())

    @property
    def neighbour_bytes(self) -> int:
        """Return what the neighbours hold."""
        return sum(neighbour.bytes for neighbour in self.neighbours)

    @property
    def neighbours_beside_bytes(self) -> int:
        """Return what they hold beyond what PyTorch counts."""
        return 0 if self.counts_pool else self.neighbour_bytes

    def dismiss_neighbours(self) -> None:
        """Have them leave."""
        neighbours, self.neighbours = self.neighbours, ()
        for neighbour in neighbours:
            neighbour.leave()

    def free_bytes(self) -> int | None:
        """Return what the driver could give now; None when it is not known."""
        return int(self._module.mem_get_info(self.device)[0]) if self._module else None

    def span_peak_bytes(self) -> int:
        """Return the most that they held in this span."""
        return int(self._module.max_memory_allocated(self.device)) if self._module else 0

    def span_peaks(self) -> tuple[int, int]:
        """Return the same, and the most with what PyTorch cached."""
        if stats := self._stats():
            return stats["allocated_bytes"]["all"]["peak"], stats["reserved_bytes"]["all"]["peak"]
        span = self.span_peak_bytes()
        reserved = getattr(self._module, "max_memory_reserved", None)
        return span, max(span, int(reserved(self.device))) if reserved else span

    def _stats(self) -> dict[str, Any] | None:
        """Return PyTorch's statistics at a fraction of what one of them costs by its own call."""
        nested = getattr(self._module, "memory_stats_as_nested_dict", None)
        return None if nested is None else nested(self.device)

    def watch(self) -> None:
        """Count peaks from here on."""
        self.begin_span()
        self.watches = True

    def unwatch(self) -> None:
        """Count peaks no more, until `watch`."""
        self.note_peak()
        self.watches = False

    def forget(self) -> None:
        """Count peaks no more, and need nothing."""
        self.unwatch()
        self.step_bytes = 0

    def begin_span(self) -> None:
        """Start a new span, after everybody who watches this device has noted the last one."""
        for other in list(self._all):
            if other.key == self.key:
                other.note_peak()
        if self._module:
            self._module.reset_peak_memory_stats(self.device)

    def note_peak(self) -> None:
        """Take the span's peak so far with the pool as it is now, before that changes."""
        if not self.watches:
            return
        allocated, reserved = self.span_peaks()
        in_use = 0 if self.counts_pool else self.pool_bytes
        mapped, theirs = self.pool_beside_bytes, self.neighbours_beside_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, allocated + in_use + theirs)
        self.peak_device_bytes = max(self.peak_device_bytes, reserved + mapped + theirs)

    def total_bytes(self) -> int | None:
        """Return the device's memory; None when it is not known."""
        return int(self._module.mem_get_info(self.device)[1]) if self._module else None

    def tally(self) -> Tally:
        """Return what PyTorch's allocator holds now."""
        # The pool's blocks are PyTorch's on devices whose pool it counts.
        counted = self.pool_bytes if self.counts_pool else 0
        stats = self._stats()
        if stats is None:
            allocated = self.allocated_bytes()
            of_device = getattr(self._module, "memory_reserved", None)
            reserved = int(of_device(self.device)) if of_device else allocated
            return Tally(allocated - counted, reserved - counted)
        used, held = (int(stats[f"{k}_bytes"]["all"]["current"]) for k in ("allocated", "reserved"))
        flushes, ooms = int(stats["num_alloc_retries"]), int(stats["num_ooms"])
        return Tally(used - counted, held - counted, flushes, ooms)

    def reading(self) -> Reading | None:
        """Return who holds the device's memory now; None when it is not known."""
        if self._module is None:
            return None
        tally = self.tally()
        free = int(self._module.mem_get_info(self.device)[0])
        return Reading(unused=free + tally.reserved - tally.allocated, pool=self.pool_bytes)

    def limit(self) -> float:
        """Return what PyTorch may reserve, as a share of the device's memory."""
        get = getattr(self._module, "get_per_process_memory_fraction", None)
        return min(1.0, float(get(self.device))) if get else 1.0  # some backends say more

    def set_limit(self, share: float) -> None:
        """Let PyTorch reserve no more than this share; devices that know no limit ignore it."""
        put = getattr(self._module, "set_per_process_memory_fraction", None)
        if put is not None:
            put(share, self.device)

    def on_out_of_memory(self, hear: Callable[[int, int, int, int], None]) -> None:
        """Have PyTorch call this, for good, before it raises an error.

        Not every device offers it, nor does a pool of ours that is installed in its place.

        Args:
            hear: called with the device's index, and in bytes what was asked for, what PyTorch may
                reserve, and what is free.
        """
        if self.device.type == "cuda" and not memory.is_installed():
            torch.cuda.init()
            # cudaMallocAsync and other tools' allocators refuse.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_attach_out_of_memory_observer(hear)  # type: ignore[attr-defined]
        elif attach := getattr(self._module, "attach_out_of_memory_observer", None):
            attach(hear)

    def limited_bytes(self) -> int | None:
        """Return what a limit is a share of; None when it is not known."""
        total = self.total_bytes()
        if total is None or self.device.type != "cuda":
            return total
        # PyTorch takes one or the other, by its version: with the larger one, no limit is too high.
        return max(total, int(torch.cuda.get_device_properties(self.device).total_memory))

    def available_bytes(self) -> int | None:
        """Return what PyTorch may take beyond what its tensors hold; None when it is not known."""
        now, total = self.reading(), self.total_bytes()
        if now is None or total is None:
            return None
        return now.unused - margin_bytes(total)

    def most_step_bytes(self) -> int:
        """Return the most that a step of any session on this device takes for a while."""
        return max(other.step_bytes for other in list(self._all) if other.key == self.key)

    def give_back(self) -> int:
        """Return PyTorch's unused cached memory to the device; the bytes given back."""
        if self._module is None or not hasattr(self._module, "empty_cache"):
            return 0
        before = int(self._module.mem_get_info(self.device)[0])
        self._module.empty_cache()
        return int(self._module.mem_get_info(self.device)[0]) - before

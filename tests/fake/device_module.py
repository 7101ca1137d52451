"""What `torch.get_device_module("fake")` returns: the part of `torch.cuda` that callers use, and controls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch


class FakeDeviceModule(ModuleType):
    """Functions that take `device` accept an index, a `torch.device`, a string, or None for the current one."""

    def __init__(self, extension: ModuleType) -> None:
        super().__init__("torch.fake")
        self._extension = extension
        self._others: dict[int, int] = {}  # what other programs hold, by device
        self._shares: dict[int, float] = {}  # of the limit, what PyTorch may take

    # --- devices ---------------------------------------------------------------------------------

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def init(self) -> None:
        pass

    def _lazy_init(self) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return int(self._extension.num_devices)

    def current_device(self) -> int:
        return int(self._extension.current_device())

    def set_device(self, device: Any) -> None:
        self._extension.set_device(self._index(device))

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before = self.current_device()
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    def get_device_name(self, device: Any = None) -> str:
        return f"fake accelerator {self._index(device)}"

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return (0, 0)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    # Random operators draw from the CPU's generator, which torch.manual_seed has seeded already.

    def manual_seed(self, seed: int) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    # --- streams and events ----------------------------------------------------------------------

    def Stream(self, device: Any = None, priority: int = 0) -> torch.Stream:
        """A stream of the pool: 7 per device, handed out round robin."""
        return torch.Stream(device=torch.device("fake", self._index(device)), priority=priority)

    def Event(self, enable_timing: bool = False, blocking: bool = False) -> torch.Event:
        return torch.Event(device=torch.device("fake"), enable_timing=enable_timing)

    def _stream(self, stream_id: int, index: int) -> torch.Stream:
        kind = torch._C._autograd.DeviceType.PrivateUse1.value
        return torch.Stream(stream_id=stream_id, device_index=index, device_type=kind)

    def current_stream(self, device: Any = None) -> torch.Stream:
        index = self._index(device)
        return self._stream(self._extension.current_stream(index), index)

    def default_stream(self, device: Any = None) -> torch.Stream:
        return self._stream(0, self._index(device))

    def set_stream(self, stream: torch.Stream | None) -> None:
        if stream is not None:
            self._extension.set_device(stream.device_index)
            self._extension.set_stream(stream.device_index, stream.stream_id)

    @contextlib.contextmanager
    def stream(self, stream: torch.Stream | None) -> Iterator[torch.Stream | None]:
        """Make a stream, and its device, current; None changes nothing."""
        if stream is None:
            yield None
            return
        device = self.current_device()
        before = self.current_stream(stream.device_index)
        self.set_stream(stream)
        try:
            yield stream
        finally:
            self.set_stream(before)
            self.set_device(device)

    def synchronize(self, device: Any = None) -> None:
        """Wait for all streams of a device. Raises what an operator on one of them raised."""
        self._extension.synchronize(self._index(device))

    def drain(self) -> None:
        """Wait for all streams of all devices, with delays off; failures are dropped. For teardown."""
        self.reset_delays()
        for index in range(self.device_count()):
            for _ in range(self._extension.num_streams):
                with contextlib.suppress(Exception):
                    self.synchronize(index)
                    break

    def reset(self) -> None:
        """Idle, on stream 0 of device 0, no delays, limits, callbacks or counts: between tests."""
        self.drain()
        self.set_oom_callback(None)
        for index in range(self.device_count()):
            self.set_limit(None, index)
            self.set_per_process_memory_fraction(1.0, index)
            self.set_stream(self.default_stream(index))
            self.reset_peak_memory_stats(index)
        self._extension.keep_freed(False)
        self.set_device(0)
        self.clear_sync_fallbacks()

    # --- memory ----------------------------------------------------------------------------------

    def _use(self, device: Any) -> Any:
        return self._extension.memory_use(self._index(device))

    def memory_allocated(self, device: Any = None) -> int:
        return int(self._use(device).used_bytes)

    def max_memory_allocated(self, device: Any = None) -> int:
        return int(self._use(device).peak_bytes)

    def memory_reserved(self, device: Any = None) -> int:
        """The same as allocated unless `cached`."""
        return int(self._use(device).reserved_bytes)

    def max_memory_reserved(self, device: Any = None) -> int:
        return int(self._use(device).peak_reserved_bytes)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        nested = self.memory_stats_as_nested_dict(device)
        flat = {k: nested.pop(k) for k in ("num_alloc_retries", "num_ooms")}
        kinds = {"active_bytes": nested["allocated_bytes"]} | nested
        return flat | {
            f"{k}.all.{when}": n for k, v in kinds.items() for when, n in v["all"].items()
        }

    def memory_stats_as_nested_dict(self, device: Any = None) -> dict[str, Any]:
        """What sessions read of CUDA's: bytes held now, and counts since the process began."""
        use = self._use(device)
        allocated = {"all": {"current": use.used_bytes, "peak": use.peak_bytes}}
        reserved = {"all": {"current": use.reserved_bytes, "peak": use.peak_reserved_bytes}}
        counts = {"num_alloc_retries": use.num_retries, "num_ooms": use.num_ooms}
        return {"allocated_bytes": allocated, "reserved_bytes": reserved} | counts

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self._extension.reset_peak(self._index(device))

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free and total bytes, where total is the limit."""
        ours = int(self._use(device).limit_bytes)
        others = self._others.get(self._index(device), 0)
        return max(0, ours - self.memory_reserved(device)), ours + others

    def empty_cache(self) -> None:
        self._extension.empty_cache()

    def get_per_process_memory_fraction(self, device: Any = None) -> float:
        return self._shares.get(self._index(device), 1.0)

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        index, total = self._index(device), self.mem_get_info(device)[1]
        self._shares[index] = fraction
        self._extension.set_share(index, int(fraction * total) if fraction < 1 else 2**63 - 1)

    # --- controls --------------------------------------------------------------------------------

    def set_limit(self, limit_bytes: int | None, device: Any = 0) -> None:
        """Bytes that a device may have allocated; None: the default of 64 GiB."""
        limit = self._extension.default_limit_bytes if limit_bytes is None else limit_bytes
        self._others.pop(self._index(device), None)
        self._extension.set_limit(self._index(device), limit)

    @contextlib.contextmanager
    def cached(self) -> Iterator[None]:
        """Keep what is freed reserved, as CUDA's allocator does, for all devices and threads."""
        self._extension.keep_freed(True)
        try:
            yield
        finally:
            self._extension.keep_freed(False)

    def cached_pieces(self, device: Any = None) -> list[tuple[int, int, int, bool]]:
        """Segment, place, bytes and whether it is free, for each piece of what is `cached`."""
        return list(self._extension.cached_pieces(self._index(device)))

    def others(self, device: Any = None) -> int:
        """What other programs hold."""
        return self._others.get(self._index(device), 0)

    def set_others(self, num_bytes: int, device: Any = 0) -> None:
        """Let another program hold so much of the limit; it must be free."""
        free, total = self.mem_get_info(device)
        before = self._others.get(self._index(device), 0)
        assert num_bytes <= free + before, "another program cannot take what is not free"
        self._extension.set_limit(self._index(device), total - num_bytes)
        self._others[self._index(device)] = num_bytes

    def set_copy_delay(self, seconds_per_byte: float, seconds_per_copy: float = 0.0) -> None:
        """Make each copy_ that is called from now on last longer, on the worker of its stream."""
        self._extension.set_copy_delay(seconds_per_byte, seconds_per_copy)

    def set_body_delay(self, seconds: float | None) -> None:
        """Let each operator called from now on sleep first, on the worker of its stream.

        Copies and operators that block the caller anyway do not sleep.
        """
        self._extension.set_body_delay(seconds or 0.0)

    def set_random_delays(self, seed: int, max_seconds: float) -> None:
        """Sleep a random time before every task (operators, copies, records, waits); 0 ends it."""
        self._extension.set_random_delays(seed, max_seconds)

    def reset_delays(self) -> None:
        self.set_copy_delay(0.0, 0.0)
        self.set_body_delay(None)
        self.set_random_delays(0, 0.0)

    def num_allocations(self) -> int:
        """How often memory was asked for, on all devices, since the backend was loaded."""
        return int(self._extension.num_allocations())

    def fail_allocation(self, after: int | None) -> None:
        """Let one allocation find no memory, once `after` others from now on were served; None: none."""
        number = -1 if after is None else self.num_allocations() + after
        self._extension.fail_allocation(number)

    def set_oom_callback(self, callback: Callable[[int, int], bool] | None) -> None:
        """Called with (device, bytes) when an allocation finds no room; True: freed something, try again."""
        self._extension.set_oom_callback(callback)

    def attach_out_of_memory_observer(self, observer: Callable[[int, int, int, int], None]) -> None:
        """Called with (device, bytes, allowed, free) before every out-of-memory error, for good."""
        self._extension.attach_out_of_memory_observer(observer)

    def try_workspace(self, num_bytes: int) -> bool:
        """Whether C++ code that catches PyTorch's error found so much memory on the current device."""
        return bool(self._extension.try_workspace(num_bytes))

    def set_oom_function(self, address: int) -> None:
        """The same for C++: the address of a `bool callback()`, as of a FreeMemoryCallback's Execute."""
        self._extension.set_oom_function(address)

    def writes_after_free(self) -> int:
        """How many freed blocks something has written to (only the latest 64 MiB of them are kept)."""
        return int(self._extension.writes_after_free())

    def sync_fallbacks(self) -> dict[str, int]:
        """Operators whose meta kernel failed, with calls: they ran while the caller waited."""
        fallbacks = self._extension.sync_fallbacks()
        return {name: num_calls for name, (num_calls, _) in fallbacks.items()}

    def sync_fallback_reasons(self) -> dict[str, str]:
        """What the meta kernels of `sync_fallbacks` said last."""
        return {name: reason for name, (_, reason) in self._extension.sync_fallbacks().items()}

    def clear_sync_fallbacks(self) -> None:
        self._extension.clear_sync_fallbacks()

    def _index(self, device: Any) -> int:
        if isinstance(device, str):
            device = torch.device(device)
        if isinstance(device, torch.device):
            if device.type not in ("fake", "privateuseone"):
                raise ValueError(f"expected a fake device, got {device}")
            device = device.index
        return self.current_device() if device is None else int(device)

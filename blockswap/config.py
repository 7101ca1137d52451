"""SwapConfig: what the user asks for. The one place that owns the default of every option."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from blockswap.errors import CapError, ConfigError, DeviceError
from blockswap.options import CONVERT, Mode, Priority, nearest, setting
from blockswap.sizes import format_bytes, parse_size

__all__ = ["Mode", "Priority", "ResolvedConfig", "SwapConfig", "format_bytes", "parse_size"]


@dataclass(frozen=True)
class ResolvedConfig:
    """SwapConfig as plain numbers for one device; None means that the planner decides."""

    vram_bytes: int | None
    reserve_bytes: int | None
    offload_bytes: int | None
    offload_blocks: int | None
    offload_blocks_per_list: dict[str, int] | None
    host_memory_bytes: int | None
    swap_space_bytes: int | None
    block_size_bytes: int | None
    mode: Mode
    lookahead: int | None
    copy_streams: int
    throttle_gb_per_s: float | None
    check: bool


@dataclass(frozen=True)
class SwapConfig:
    """Every option of ``blockswap.attach``; checked when made, as far as no model is needed.

    Sizes are an int of bytes or text with a unit (``"10GiB"``); they are kept as bytes, so that
    two spellings of one setting are equal. Every option but ``priorities`` and ``blocks`` takes
    its default from the environment variable ``BLOCKSWAP_<OPTION>`` where that is set.

    Args:
        device: where the model runs; None is the current accelerator, else the CPU.
        vram: hard cap on what PyTorch reserves and weights take together while the model computes:
            bytes, ``"10GiB"``, or a share of the device's memory as a float in (0, 1] or
            ``"80%"``. None: what is free.
        offload: how much stays off the device. An int counts blocks, a dict counts them per list
            (``{"transformer_blocks": 19}``), text is bytes of weights (``"8GiB"``).
        reserve: bytes of device memory left to other programs, on top of the margin that stays
            free without it; what they take beyond that is made room for between steps.
        host_memory: bound on pinned host bytes, 1 MiB or more. What may not be pinned passes
            through a small pinned ring. None: as much as the system allows.
        swap_space: bytes of the ring. None: the planner decides.
        block_size: bytes that move together. None: the planner decides.
        mode: "adaptive" streams blocks in pieces of the planner's choice, "layerwise" streams the
            modules outside the blocks too, "chunkwise" packs equal slots of ``block_size``.
        lookahead: blocks fetched ahead; 0 copies on the compute stream. None: as far as the ring
            allows.
        donors: placement on other devices (not supported yet).
        compress: "off"; "auto", "f3" and "e2" are not supported yet.
        copy_streams: streams that fetch at once, 1 to 16; none is used with ``lookahead=0``.
        priorities: pattern on block or leaf-module names -> int (0 goes first) or "pin".
        blocks: the blocks themselves, or their names or patterns, where they cannot be found.
        throttle: slow the link down to this many GB/s (10^9 bytes), for experiments.
        check: verify invariants after every action and poison freed slots; slow.

    Raises:
        ConfigError: a value that can never work. CapError: sizes that contradict each other.
        UnsupportedError: an option that is not built yet.

    >>> SwapConfig(vram="10GiB", offload=12).resolve(24 * 2**30).vram_bytes
    10737418240
    """

    device: str | torch.device | None = setting("device")  # noqa: RUF009 - returns a field
    vram: int | float | str | None = setting("vram")
    offload: int | str | Mapping[str, int] | None = setting("offload")
    reserve: int | str | None = setting("reserve")
    host_memory: int | str | None = setting("host_memory")
    swap_space: int | str | None = setting("swap_space")
    block_size: int | str | None = setting("block_size")
    mode: Mode = setting("mode", "adaptive")  # noqa: RUF009 - returns a field
    lookahead: int | None = setting("lookahead")
    donors: str | None = setting("donors")
    compress: str = setting("compress", "off")
    copy_streams: int = setting("copy_streams", 1)
    priorities: Mapping[str, Priority] | None = None
    blocks: nn.Module | str | Iterable[nn.Module | str] | None = None
    throttle: float | None = setting("throttle")
    check: bool = setting("check", False)

    def __post_init__(self) -> None:
        for name, convert in CONVERT.items():
            object.__setattr__(self, name, convert(name, getattr(self, name)))
        if isinstance(self.vram, int) and isinstance(self.swap_space, int):
            _refuse_ring_above_cap(self.swap_space, self.vram)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> SwapConfig:
        """Make a config; an unknown option is refused with the nearest and all valid names.

        Raises:
            ConfigError: unknown option, or as the class says.
        """
        valid = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in valid:
                raise ConfigError(
                    f"unknown option {name!r}{nearest(name, valid)};"
                    f" options are: {', '.join(valid)}"
                )
        return cls(**kwargs)

    def differences(self, other: SwapConfig) -> list[str]:
        """Return the names of the options in which ``other`` differs, in order of declaration."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]

    def target_device(self) -> torch.device:
        """Return the device where the model runs, with its index.

        Raises:
            DeviceError: the device does not exist here.
        """
        device = torch.accelerator.current_accelerator(check_available=True)
        if self.device is not None:
            device = torch.device(self.device)
        if device is None or device.type == "cpu":
            return torch.device("cpu")
        try:
            return torch.empty(0, device=device).device  # fails where the device does not exist
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise DeviceError(
                f'device "{device}" cannot be used: {reason}; pass device="cpu" or one that exists'
            ) from error

    def resolve(self, total_device_bytes: int | None) -> ResolvedConfig:
        """Return plain numbers for a device of ``total_device_bytes`` (None: not known).

        Raises:
            CapError: ``vram`` is more than the device has, a share of an unknown total, or less
                than ``swap_space``; ``reserve`` leaves nothing, or the total is not known.
        """
        vram_bytes: int | None = None
        if isinstance(self.vram, float):
            if total_device_bytes is None:
                raise CapError(
                    f"vram={self.vram} is a share of the device's memory, whose size is not known:"
                    " give bytes, as in vram='10GiB'"
                )
            vram_bytes = int(self.vram * total_device_bytes)
        elif isinstance(self.vram, int):
            vram_bytes = self.vram
            if total_device_bytes is not None and vram_bytes > total_device_bytes:
                raise CapError(
                    f"vram is {format_bytes(vram_bytes)} but the device has"
                    f" {format_bytes(total_device_bytes)}:"
                    " lower vram, or leave it out to use what is free"
                )
        ring = self.swap_space if isinstance(self.swap_space, int) else None
        if ring is not None and vram_bytes is not None:
            _refuse_ring_above_cap(ring, vram_bytes)
        offload = self.offload
        return ResolvedConfig(
            vram_bytes=vram_bytes,
            reserve_bytes=_checked_reserve(self.reserve, total_device_bytes),
            offload_bytes=parse_size(offload, "offload") if isinstance(offload, str) else None,
            offload_blocks=offload if isinstance(offload, int) else None,
            offload_blocks_per_list=dict(offload) if isinstance(offload, Mapping) else None,
            host_memory_bytes=int(self.host_memory) if self.host_memory is not None else None,
            swap_space_bytes=ring,
            block_size_bytes=self.block_size if isinstance(self.block_size, int) else None,
            mode=self.mode,
            lookahead=self.lookahead,
            copy_streams=self.copy_streams,
            throttle_gb_per_s=self.throttle,
            check=self.check,
        )

    def check_offload(self, counts: Mapping[str, int]) -> None:
        """Refuse counts of blocks that the model does not have.

        Args:
            counts: blocks per list, as ``blocks.list_counts`` gives them.

        Raises:
            ConfigError: an unknown list, or more blocks than there are.
        """
        lists = ", ".join(f"{count} in {name!r}" for name, count in counts.items())
        if isinstance(self.offload, int):
            total = sum(counts.values())
            if self.offload > total:
                raise ConfigError(
                    f"offload={self.offload} blocks but the model has {total} ({lists}):"
                    f" give 0 to {total}, or bytes as in '8GiB'"
                )
        elif isinstance(self.offload, Mapping):
            for name, count in self.offload.items():
                if name not in counts:
                    hint = nearest(name, counts)
                    raise ConfigError(f"offload names no list {name!r}{hint}; there are {lists}")
                if count > counts[name]:
                    raise ConfigError(
                        f"offload[{name!r}]={count} but that list has {counts[name]} blocks:"
                        f" give 0 to {counts[name]}"
                    )


def _checked_reserve(reserve: int | str | None, total_bytes: int | None) -> int | None:
    if not isinstance(reserve, int):
        return None
    if total_bytes is None:
        raise CapError(
            f"reserve is {format_bytes(reserve)}, but how much memory this device has is not known:"
            " leave it out"
        )
    if reserve >= total_bytes:
        raise CapError(
            f"reserve is {format_bytes(reserve)} but the device has {format_bytes(total_bytes)}:"
            " lower reserve"
        )
    return reserve


def _refuse_ring_above_cap(swap_space_bytes: int, vram_bytes: int) -> None:
    if swap_space_bytes > vram_bytes:
        raise CapError(
            f"swap_space is {format_bytes(swap_space_bytes)} but the cap is"
            f" {format_bytes(vram_bytes)}: lower swap_space or leave it to the planner"
        )

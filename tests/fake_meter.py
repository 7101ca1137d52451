"""A meter for machines that are not here: their links have the speeds that a test names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockswap.probe import CHUNK_BYTES, Device, Link, SecondsPerCopy, list_links

MIB = 2**20
PINNED = [17.8, 36.0, 48.5, 53.6, 55.0, 55.4, 55.3]


class FakeMeter:
    """A machine of known speeds: by label of the link, one GB/s per size or one for all.

    `room` is how many bytes can be had at each end of the links that it names.
    """

    torch_version = "2.99"

    def __init__(
        self,
        num_gpus: int = 1,
        speeds: Mapping[str, float | Sequence[float]] | None = None,
        room: Mapping[str, int] | None = None,
        access: Mapping[tuple[str, str], bool | None] | None = None,
        chosen: str = "auto",
    ) -> None:
        self.gpus = [f"cuda:{index}" for index in range(num_gpus)]
        self.speeds = speeds or {}
        self.room = room or {}
        self.access = access or {}
        self.chosen = chosen
        self.opened: list[tuple[str, int]] = []

    def devices(self) -> list[Device]:
        gpus = [Device(id=gpu, name="Fast Card") for gpu in self.gpus]
        return [Device(id="host", name="Slow CPU"), *gpus]

    def links(self) -> list[Link]:
        return list_links(self.gpus, self.chosen, lambda a, b: self.access.get((a, b), True))

    def open(self, link: Link, span_bytes: int) -> SecondsPerCopy:
        self.opened.append((link.label, span_bytes))
        if span_bytes > self.room.get(link.label, 2**40):
            raise MemoryError(f"{span_bytes // MIB} MiB could not be had")
        speed = self.speeds.get(link.label, 10.0)

        def seconds_per_copy(chunk_bytes: int) -> float:
            is_list = isinstance(speed, Sequence)
            gb_per_s = speed[CHUNK_BYTES.index(chunk_bytes)] if is_list else speed
            return chunk_bytes * (2 if link.is_memory else 1) / gb_per_s / 1e9

        return seconds_per_copy

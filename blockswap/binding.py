"""What a parameter is: its host image outside a forward, its device bytes inside one.

The C++ ``Binding`` changes the addresses; here is what notices that somebody looks at a parameter.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, ItemsView, ValuesView
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
from torch import nn

from blockswap import _C
from blockswap.callers import is_running, reader, reads_metadata
from blockswap.errors import UseError

ONE_CALLER = (
    "a session streams for one caller at a time; wait for the other thread, or attach a second copy"
)


@dataclass(eq=False, slots=True)
class Unit:
    """A leaf as the hooks see it.

    Holds no module: the C++ binding's references must not keep a model alive that nobody else
    uses any more.

    Attributes:
        index: the leaf's number in the engine.
        weights: its parameters, in the order of its image.
        entries: their numbers in the C++ binding.
        piece: the streamed piece it belongs to; -1 when it is always on the device.
        plan_piece: the piece, streamed or resident; -1 for small parameters.
        is_first, is_last: its streamed piece begins, ends with it.
        is_repeated: it runs more than once in a step.
        runs_of_last: how often the leaf that ends its piece runs in a step.
        is_planned: it has a device address; without one it is copied when it is used.
        is_diverted: a copy of its own serves until this forward ends.
        is_read_outside: somebody other than the module itself reads its weights in a forward.
        readers: code that was seen to read its weights while its module ran, by its id; C++ looks
            into this very dict.
    """

    index: int
    name: str
    weights: list[torch.Tensor]
    entries: list[int]
    piece: int = -1
    plan_piece: int = -1
    is_first: bool = False
    is_last: bool = False
    is_repeated: bool = False
    runs_of_last: int = 1
    is_planned: bool = False
    is_diverted: bool = False
    is_read_outside: bool = False
    readers: dict[int, CodeType] = field(default_factory=dict)


@dataclass(slots=True)
class Gate:
    """What the hooks and the watched parameters share, read at every leaf: kept flat.

    While a session learns, every leaf has hooks that keep ``running``, and code that reads a leaf's
    weights then is noted as one of its readers. Later only the leaves at the ends of a piece have
    hooks: a read is right when the piece is live and the reader is known. Any other read may come
    from code that keeps the weight longer than its piece lives, and gets a copy of its own.
    """

    is_open: bool = False  # a forward runs, parameters are bound to the device
    learns: bool = True  # every leaf has hooks
    running: Unit | None = None  # the leaf whose forward runs now
    live: int = -1  # the piece that was acquired and not yet released
    runs_left: int = 0  # of the leaf that ends the live piece
    root: Any = None  # the outermost module of ours that runs
    is_whole: bool = False  # and it is a model, not a block that was called alone
    owner: int = 0  # the thread that runs it
    touched: set[Unit] = field(default_factory=set)  # looked at since the last forward
    # Called with a unit whose weight is read by somebody else; weak, as Unit says.
    read_outside: weakref.WeakMethod[Callable[[Unit], None]] | None = None

    def is_stale(self) -> bool:
        """Whether it is open although this thread's forward has ended: interrupted."""
        is_ours = self.is_open and self.owner == threading.get_ident()
        return is_ours and not is_running(self.root)

    def note(self, unit: Unit, reader: FrameType) -> None:
        """Somebody reads a parameter of ``unit`` from its module."""
        if not self.is_open:
            self.touched.add(unit)
            return
        if unit.piece < 0 and unit.is_planned:
            return
        if threading.get_ident() != self.owner:
            raise UseError(f"{unit.name} is read beside a forward that streams it: {ONE_CALLER}")
        if unit.is_diverted:
            return
        if self.learns:
            if self.running is unit:
                unit.readers[id(reader.f_code)] = reader.f_code
                if unit.is_planned:
                    return
        elif unit.piece >= 0 and unit.piece == self.live and id(reader.f_code) in unit.readers:
            return
        # Without an address on the device it lies on the host, and says so if it is asked.
        if unit.is_planned and reads_metadata(reader):
            return
        fetch = self.read_outside() if self.read_outside is not None else None
        if fetch is not None:
            fetch(unit)


class TurnGate(Gate):
    """The gate of a component that is on the device whole and does not compute: never open."""

    def note(self, unit: Unit, reader: FrameType) -> None:
        """Somebody reads a parameter, and may write it."""
        if not reads_metadata(reader):
            self.touched.add(unit)


class WatchedParameters(_C.WatchedDict):
    """A module's ``_parameters`` while attached: an access between forwards may be an edit.

    ``p.data += delta`` changes neither the parameter's address nor its version, so that whoever got
    hold of it through the module counts as having written it. During a forward a read of a weight
    that is not on the device fetches it. Reads that are certainly harmless stay in C++.
    """

    __slots__ = ("gate", "unit")

    def __init__(self, values: dict[str, nn.Parameter | None], gate: Gate, unit: Unit) -> None:
        super().__init__(values)
        self.gate = gate
        self.unit = unit
        self.set_readers(unit.readers)

    def read(self, key: str) -> nn.Parameter | None:
        """Return what ``self[key]`` asks for, after it was noted."""
        self.gate.note(self.unit, reader())
        return dict.__getitem__(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        self.gate.note(self.unit, reader())
        return dict.get(self, key, default)

    def items(self) -> ItemsView[str, nn.Parameter | None]:  # type: ignore[override]
        self.gate.note(self.unit, reader())
        return dict.items(self)

    def values(self) -> ValuesView[nn.Parameter | None]:  # type: ignore[override]
        self.gate.note(self.unit, reader())
        return dict.values(self)

    def pop(self, *args: Any) -> Any:
        self.gate.note(self.unit, reader())
        return dict.pop(self, *args)

    def copy(self) -> dict[str, nn.Parameter | None]:
        self.gate.note(self.unit, reader())
        return dict(dict.items(self))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UseError(
            "a model that blockswap streams cannot be copied or pickled as it is: call"
            " session.pause() first, or save model.state_dict()"
        )


def unwatch(plain: dict[nn.Module, dict[str, nn.Parameter | None]]) -> None:
    """Give modules their own ``_parameters`` back, with what is in the watched ones now."""
    for module, own in plain.items():
        if isinstance(module._parameters, WatchedParameters):
            values = dict.copy(module._parameters)
            own.clear()
            own.update(values)
            module._parameters = own


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    """Return a module's own parameters without noting an access."""
    return [p for p in dict.values(module._parameters) if p is not None]


def is_alike(parameter: object, image: torch.Tensor) -> bool:
    """Whether a parameter's bytes could lie in an image as they are."""
    return (
        isinstance(parameter, nn.Parameter)
        and parameter.shape == image.shape
        and parameter.dtype == image.dtype
        and parameter.stride() == image.stride()
    )

"""Tensors that never stream: on the device while attached, back where they were afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from blockswap import _C


@dataclass(frozen=True)
class _Home:
    """Where a parameter stays in host memory while it is on the device.

    Attributes:
        values: there.
        version, address: of the parameter when it was copied.
    """

    values: torch.Tensor
    version: int
    address: int

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter has not changed since."""
        return parameter._version == self.version and parameter.data_ptr() == self.address


class FixedTensors:
    """Moves a model's unmanaged parameters and buffers to the device and back.

    A parameter stays the same object. Nothing is moved twice: tied tensors move once.

    Attributes:
        are_away: they have left the device for a while.
    """

    def __init__(self, model: nn.Module, managed: set[nn.Parameter], device: torch.device) -> None:
        self._device = device
        self._parameters: list[tuple[nn.Parameter, torch.device]] = []
        self._buffers: list[tuple[nn.Module, str, torch.device]] = []
        self._homes: dict[nn.Parameter, _Home] = {}
        self.are_away = False
        for parameter in model.parameters():
            if parameter not in managed:
                self._parameters.append((parameter, parameter.device))
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self._buffers.append((module, name, buffer.device))

    @property
    def bytes(self) -> int:
        """Return the bytes of all of them."""
        buffers = (module._buffers[name] for module, name, _ in self._buffers)
        return sum(p.nbytes for p, _ in self._parameters) + sum(
            buffer.nbytes for buffer in buffers if buffer is not None
        )

    def to_device(self) -> None:
        """Bring them to the device; on failure everything is where it was."""
        try:
            self._move(self._device)
        except BaseException:
            self.to_origin()
            raise

    def to_origin(self) -> None:
        """Bring them back to where each one came from."""
        self._homes.clear()
        self._move(None)

    def leave(self) -> None:
        """Go to host memory until `come_back`; what was written on the device is kept."""
        for parameter, home in self._homes.items():
            if home.holds(parameter):
                _C.set_data(parameter, home.values)
        self._homes.clear()
        self._move(torch.device("cpu"))
        self.are_away = True

    def come_back(self) -> None:
        """Be on the device again after `leave`; on failure everything is in host memory."""
        if not self.are_away:
            return
        before = {parameter: parameter.detach() for parameter, _ in self._parameters}
        try:
            self._move(self._device)
        except BaseException:
            self._move(torch.device("cpu"))
            raise
        self._homes = {p: _Home(v, p._version, p.data_ptr()) for p, v in before.items()}
        self.are_away = False

    def _move(self, device: torch.device | None) -> None:
        moved: dict[torch.Tensor, torch.Tensor] = {}
        for parameter, origin in self._parameters:
            target = device or origin
            if parameter.device != target:
                # `.data =` refuses some changes of device; the parameter must stay the same object.
                _C.set_data(parameter, parameter.detach().to(target))
        for module, name, origin in self._buffers:
            buffer = module._buffers.get(name)
            target = device or origin
            if buffer is not None and buffer.device != target:
                if buffer not in moved:
                    moved[buffer] = buffer.to(target)
                module._buffers[name] = moved[buffer]

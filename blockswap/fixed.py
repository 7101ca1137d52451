"""Tensors that never stream: on the device while attached, back where they were afterwards."""

from __future__ import annotations

import torch
from torch import nn

from blockswap import _C
from blockswap.home import Home


class FixedTensors:
    """Moves a model's unmanaged parameters and buffers to the device and back.

    A parameter stays the same object. Nothing is moved twice: tied tensors move once.

    Args:
        model: whose they are.
        managed: its parameters that are not moved.
        device: where they go.
        pins: whether what leaves the device for a while lies in pinned memory meanwhile.

    Attributes:
        are_away: they have left the device for a while, or begun to.
    """

    def __init__(
        self, model: nn.Module, managed: set[nn.Parameter], device: torch.device, pins: bool
    ) -> None:
        self._model = model
        self._device = device
        self._pins = pins
        self._home: Home | None = None
        self._origin = next((p.device for p in model.parameters()), device)  # of all: preflight
        self._parameters: list[tuple[nn.Parameter, torch.device]] = []
        self._buffers: list[tuple[nn.Module, str, torch.device]] = []
        self._homes: dict[nn.Parameter, torch.Tensor] = {}  # host memory to go back to
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

    @property
    def pinned_bytes(self) -> int:
        """Return the bytes of pinned memory that is theirs while they are away."""
        return 0 if self._home is None else int(self._home.arena.pinned_bytes)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def to_device(self) -> None:
        """Bring them to the device; on failure everything is where it was."""
        try:
            self._move(self._device)
        except BaseException:
            self.to_origin()
            raise

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def to_origin(self) -> None:
        """Bring them back to where each one came from.

        A parameter that came in meanwhile, made of one that lay on the device, goes with them.
        """
        if self._home is not None:
            self._home.unpin()
            self._home = None
        try:
            self._move(None)
            for parameter in self._model.parameters():
                if parameter.device == self._device != self._origin:
                    _C.set_data(parameter, parameter.detach().to(self._origin))
        except RuntimeError:
            for parameter, home in self._homes.items():
                if parameter.device == self._device:
                    _C.set_data(parameter, home)
            raise
        finally:
            self._homes.clear()
        self.are_away = False

    @property
    def unread(self) -> list[str]:
        """Return the names of those that are still on the device and did not come from there."""
        if self._device == self._origin:
            return []
        tensors = (*self._model.named_parameters(), *self._model.named_buffers())
        return [name for name, tensor in tensors if tensor.device == self._device]

    def leave(self) -> None:
        """Go to host memory until `come_back`.

        Values are copied back, for nothing tells whether ``p.data`` was written.
        """
        self.are_away = True
        with torch.inference_mode(mode=False), torch.no_grad():
            for parameter, home in self._homes.items():
                if parameter.shape == home.shape and parameter.dtype == home.dtype:
                    home.copy_(parameter)
                    _C.set_data(parameter, home)
            self._homes.clear()
            self._move(torch.device("cpu"))
            if self._pins and self._home is None:
                self._home = Home([parameter for parameter, _ in self._parameters], self._device)

    def come_back(self) -> None:
        """Be on the device again after `leave`; on failure everything is in host memory."""
        if not self.are_away:
            return
        with torch.inference_mode(mode=False), torch.no_grad():
            self._homes = {parameter: parameter.detach() for parameter, _ in self._parameters}
            try:
                self._move(self._device)
            except BaseException:
                self._move(torch.device("cpu"))
                raise
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

"""What a pipeline's components take, unswapped: the cap and the floor of a row come from it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from blockswap.blocks import find_blocks
from blockswap.components import can_stream, denoisers_of
from blockswap.pieces import find_leaves, image_bytes
from blockswap.room import cap_that_leaves

KEPT_OF_ALL = 0.3  # of all weights: the cap, unless a component needs more


@dataclass
class Part:
    """What one component did in an unswapped call.

    Attributes:
        weight_bytes: of its parameters.
        runs: how often it was called.
        seconds: in all its calls.
        first: the number of its first call, among those of all components.
        last: the number of its last call.
        activation_bytes: the most that was allocated in a call beside all weights.
        reserved_bytes: the most that PyTorch reserved in a call beside all weights.
        mallocs: how often PyTorch asked the driver for memory in its calls.
    """

    weight_bytes: int
    runs: int = 0
    seconds: float = 0.0
    first: int = 0
    last: int = 0
    activation_bytes: int = 0
    reserved_bytes: int = 0
    mallocs: int = 0


@dataclass(frozen=True)
class Phase:
    """Components that take turns: a ControlNet and its UNet, two text encoders."""

    parts: list[Part]

    def least_bytes(self, cap_bytes: int, stays: bool = False) -> int:
        """Return what must cross the link: all once, and what the cap cannot hold in each step.

        Args:
            cap_bytes: of the cap.
            stays: what the cap can hold is there from the last call.
        """
        weights = sum(part.weight_bytes for part in self.parts)
        activations = max(part.activation_bytes for part in self.parts)
        excess = min(weights, max(0, weights + activations - cap_bytes))
        at_first = excess if stays else weights
        return at_first + (min(part.runs for part in self.parts) - 1) * excess


def cap_for(pipe: Any, parts: dict[str, Part]) -> int:
    """Return 30 % of all weights, or what the component that needs most needs at its least.

    Denoisers are on the device together: their rings and the weights that never stream add up.
    """
    denoisers = denoisers_of(pipe)
    together = sum(least_bytes(module, include_outside=False) for module in denoisers.values())
    needed = [int(KEPT_OF_ALL * sum(part.weight_bytes for part in parts.values()))]
    for name, part in parts.items():
        module = pipe.components[name]
        if name in denoisers:
            least = together
        elif can_stream(module):
            least = least_bytes(module, include_outside=True)
        else:
            least = part.weight_bytes
        needed.append(part.reserved_bytes + least)
    return cap_that_leaves(max(needed))


def least_bytes(module: nn.Module, include_outside: bool) -> int:
    """Return what a model has on the device at its least: what never streams, and one leaf."""
    leaves = find_leaves(module, find_blocks(module), include_outside).streamable
    streamable = sum(leaf.bytes for leaf in leaves)
    ring = max(image_bytes(p for _, p in leaf.parameters) for leaf in leaves)
    return sum(p.nbytes for p in module.parameters()) - streamable + ring


def phases_of(parts: dict[str, Part]) -> list[Phase]:
    """Return the phases of a call: components whose calls alternate share one."""
    phases: list[list[Part]] = []
    end = -1
    for part in sorted((p for p in parts.values() if p.runs), key=lambda p: p.first):
        if part.first > end:
            phases.append([])
        phases[-1].append(part)
        end = max(end, part.last)
    return [Phase(members) for members in phases]


def floor_seconds(
    parts: dict[str, Part],
    cap_bytes: int,
    link_bytes_per_s: float,
    staying: Collection[str] = (),
) -> float:
    """Return the least that a call can take under the cap.

    A phase finds none of its weights on the device: what came before left no room for them.

    Args:
        parts: the components.
        cap_bytes: of the cap.
        link_bytes_per_s: of the link.
        staying: components of which what the cap can hold is there from the last call. That other
            components need room meanwhile does not count: nothing can be faster than this.
    """
    stay = {id(parts[name]) for name in staying}
    seconds = 0.0
    for phase in phases_of(parts):
        num_bytes = phase.least_bytes(cap_bytes, any(id(part) in stay for part in phase.parts))
        seconds += max(sum(part.seconds for part in phase.parts), num_bytes / link_bytes_per_s)
    return seconds

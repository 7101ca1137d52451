"""What no plan can do is refused before a model is taken: at attach, and after an edit."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from blockswap.blocks import Block, find_again, list_counts
from blockswap.config import SwapConfig
from blockswap.device_memory import DeviceMemory
from blockswap.errors import ConfigError
from blockswap.pieces import Leaves, find_leaves, image_bytes
from blockswap.preflight import check_weights
from blockswap.request import Requests
from blockswap.together import name_of

if TYPE_CHECKING:
    from blockswap.model_state import ModelState


def check_plannable(
    model: nn.Module,
    blocks: list[Block],
    config: SwapConfig,
    leaving: Collection[nn.Module] = (),
    streams_outside: bool = False,
) -> None:
    """Refuse what no plan can do. The model's weights are ordinary ones.

    Args:
        model: it.
        blocks: of it.
        config: what was asked for.
        leaving: others that may be on the device now, and then are not.
        streams_outside: what lies outside the blocks streams in any mode.

    Raises:
        ConfigError: more blocks are to be offloaded than there are, nothing is large enough to
            stream, or the largest module does not fit into the ring.
        CapError: the cap is below the smallest possible plan.
    """
    memory = DeviceMemory(config.target_device())
    resolved = config.resolve(memory.total_bytes())
    config.check_offload(list_counts(blocks))
    leaves = find_leaves(model, blocks, streams_outside or resolved.mode == "layerwise")
    sizes = [image_bytes([p for _, p in leaf.parameters]) for leaf in leaves.streamable]
    if not sizes:
        raise ConfigError(
            f"the blocks of {name_of(model)} hold no module of 64 KiB or more: nothing to stream"
        )
    requests = Requests(leaves, resolved, config.priorities, sizes, lambda *_: True)
    ring = resolved.swap_space_bytes
    if ring is not None and ring < requests.largest_bytes:
        raise ConfigError(requests.ring_too_small(ring))
    if resolved.vram_bytes is not None:
        fixed = memory.held_bytes([model, *leaving]) + _fixed_bytes(model, leaves)
        requests.check_smallest(
            resolved.vram_bytes, fixed, image_bytes([p for _, _, p in leaves.small])
        )


def renew_blocks(state: ModelState, config: SwapConfig) -> None:
    """Find a model's blocks anew; refuse of its edits what `blockswap.attach` would refuse.

    Args:
        state: of its session; its weights have been given back.
        config: what was asked for.

    Raises:
        ConfigError, CapError, UnsupportedError: as `check_plannable` and `check_weights` do.
    """
    state.blocks = find_again(state.model, config.blocks)
    if state.is_relieved():  # nobody has edited it
        return
    check_weights(state.model)
    state.memory.dismiss_neighbours()  # none stay while it learns anew
    check_plannable(state.model, state.blocks, config, streams_outside=state.streams_outside)


def _fixed_bytes(model: nn.Module, leaves: Leaves) -> int:
    managed = {p for leaf in leaves.streamable for _, p in leaf.parameters}
    managed.update(p for _, _, p in leaves.small)
    parameters = sum(p.nbytes for p in model.parameters() if p not in managed)
    return parameters + sum(b.nbytes for b in model.buffers())

"""From what the user asks and what was learned to a question for the planner. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from blockswap import _C
from blockswap.blocks import match_priorities
from blockswap.config import Priority, ResolvedConfig
from blockswap.errors import CapError
from blockswap.learning import Learned
from blockswap.pieces import Leaves
from blockswap.sizes import format_bytes

LAYERWISE_RING = 1.5  # of the largest leaf, when no cap or size says otherwise
CHUNK_PIECE_BYTES = 64 * 2**20
LEARNING_RING_BYTES = 256 * 2**20
LEARNING_SHARE = 8  # of the room that a cap leaves, for the ring of the first steps
MARGIN_BYTES = 2 * 2**20  # rounding of PyTorch's allocator from step to step
# Before anything is measured: only the order of plans depends on it.
ASSUMED_LINK_BYTES_PER_S = 25e9
SMALLEST_CUT = 1  # every leaf a piece of its own


def offloads(config: ResolvedConfig) -> bool:
    """Whether the user said how much stays off the device."""
    counts = config.offload_blocks, config.offload_blocks_per_list
    return config.offload_bytes is not None or counts != (None, None)


class Requests:
    """Builds plan requests for one session's leaves.

    Args:
        leaves: what may stream.
        config: the user's options as numbers.
        priorities: the user's priorities by pattern, or None.
        image_bytes: size of each leaf's image.
        follows: whether one leaf's image lies right behind another's.
    """

    def __init__(
        self,
        leaves: Leaves,
        config: ResolvedConfig,
        priorities: Mapping[str, Priority] | None,
        image_bytes: Sequence[int],
        follows: Callable[[int, int], bool],
    ) -> None:
        self._leaves = leaves
        self._config = config
        self._image_bytes = image_bytes
        self._follows = follows
        names = [name for name, _ in leaves.blocks] + [leaf.name for leaf in leaves.streamable]
        self._priorities = match_priorities(names, priorities)

    @property
    def largest_bytes(self) -> int:
        """Return the largest image: no ring may be smaller."""
        return max((self._image_bytes[leaf.index] for leaf in self._leaves.streamable), default=0)

    def check_smallest(self, vram_bytes: int, fixed_bytes: int, small_bytes: int) -> None:
        """Refuse a cap below the smallest possible plan.

        Raises:
            CapError: naming that plan's parts.
        """
        smallest = fixed_bytes + small_bytes + self.largest_bytes
        if vram_bytes < smallest:
            layerwise = self._config.mode == "layerwise"
            largest = max(self._leaves.streamable, key=lambda leaf: leaf.bytes)
            way_out = "raise vram" if layerwise else 'raise vram or set mode="layerwise"'
            raise CapError(
                f"the smallest plan needs {format_bytes(smallest)} but the cap is"
                f" {format_bytes(vram_bytes)}: {format_bytes(fixed_bytes)} of weights outside the"
                f" blocks, {format_bytes(small_bytes)} of small parameters and a ring of"
                f" {format_bytes(self.largest_bytes)} for {largest.name}, activations not counted:"
                f" {way_out}"
            )

    def ring_too_small(self, ring_bytes: int) -> str:
        """Return what to tell when a ring cannot hold the largest leaf."""
        largest = max(self._leaves.streamable, key=lambda leaf: leaf.bytes)
        return (
            f"swap_space is {format_bytes(ring_bytes)}, but the largest module that streams,"
            f" {largest.name}, needs a ring of {format_bytes(self.largest_bytes)}: raise swap_space"
            f" to at least {self.largest_bytes} bytes"
        )

    def streaming(
        self, order: Sequence[int], room_bytes: int | None
    ) -> tuple[_C.Plan, _C.PlanRequest]:
        """Return the plan of the first steps: every leaf a streamed piece, a small ring.

        Args:
            order: leaf numbers.
            room_bytes: what there is for ring and activations; None: no bound.
        """
        request = self.unbounded(Learned(order=list(order)), ASSUMED_LINK_BYTES_PER_S)
        config = self._config
        wanted = LEARNING_RING_BYTES if room_bytes is None else room_bytes // LEARNING_SHARE
        if config.swap_space_bytes is not None:
            wanted = min(wanted, config.swap_space_bytes)
        elif config.mode == "layerwise" and config.vram_bytes is None:
            wanted = min(wanted, int(LAYERWISE_RING * self.largest_bytes))
        total = sum(self._image_bytes[leaf] for leaf in order)
        ring = max(self.largest_bytes, min(wanted, LEARNING_RING_BYTES, total))
        plan = _C.Plan()
        plan.pieces = [
            _C.Piece(first_leaf=i, end_leaf=i + 1, bytes=self._image_bytes[leaf])
            for i, leaf in enumerate(order)
        ]
        plan.ring_bytes = ring
        plan.streamed_bytes = total
        _C.assign_slots(plan, request)
        return plan, request

    def planned(
        self, learned: Learned, link_bytes_per_s: float, budget_bytes: int | None, pinned: set[int]
    ) -> tuple[_C.Plan, _C.PlanRequest]:
        """Return the best plan for what was learned.

        Args:
            learned: order and times.
            link_bytes_per_s: measured, or the throttle's.
            budget_bytes: bound on residents and ring; None: no cap.
            pinned: leaves that must stay on the device.

        Raises:
            CapError, ConfigError: as the planner says.
        """
        request = self.unbounded(learned, link_bytes_per_s, pinned)
        config = self._config
        free = (leaf for leaf in request.leaves if leaf.priority != _C.PINNED)
        streamable = sum(leaf.bytes for leaf in free)
        if budget_bytes is not None:
            request.budget_bytes = budget_bytes
        if config.offload_bytes is not None:
            request.offload_bytes = min(config.offload_bytes, streamable)
        if config.offload_blocks is not None:
            request.offload_blocks = [("", config.offload_blocks)]
        elif config.offload_blocks_per_list is not None:
            request.offload_blocks = list(config.offload_blocks_per_list.items())
        if config.swap_space_bytes is not None:
            request.ring_bytes = config.swap_space_bytes
        if config.lookahead is not None:
            request.lookahead = config.lookahead
        if config.mode == "layerwise":
            request.piece_bytes = config.block_size_bytes or SMALLEST_CUT
            if config.vram_bytes is None and not offloads(config):
                request.offload_bytes = streamable
                request.ring_bytes = request.ring_bytes or int(LAYERWISE_RING * self.largest_bytes)
        elif config.mode == "chunkwise":
            request.piece_bytes = config.block_size_bytes or CHUNK_PIECE_BYTES
        elif config.block_size_bytes is not None:
            request.piece_bytes = config.block_size_bytes
        return _C.make_plan(request), request

    def unbounded(
        self, learned: Learned, link_bytes_per_s: float, pinned: set[int] | None = None
    ) -> _C.PlanRequest:
        """Return the leaves with what was learned of them, without any bound on memory."""
        request = _C.PlanRequest()
        request.blocks = [_C.Block(name=name, list=of) for name, of in self._leaves.blocks]
        request.link = _C.Link(bytes_per_second=link_bytes_per_s)
        request.head_seconds = learned.head_seconds
        request.host_seconds = learned.head_host_seconds
        request.host_seconds_per_copy = learned.host_seconds_per_copy
        leaves = []
        seconds = learned.seconds
        before: int | None = None
        for index in learned.order:
            leaf = self._leaves.streamable[index]
            leaves.append(
                _C.Leaf(
                    name=leaf.name,
                    bytes=self._image_bytes[index],
                    seconds=seconds.get(index, 0.0),
                    tail_seconds=seconds.get(index, 0.0) * learned.tails.get(index, 0.0),
                    host_seconds=learned.host_seconds.get(index, 0.0),
                    block=leaf.block,
                    priority=self._priority(leaf.name, index in (pinned or ())),
                    cut_before=before is not None and not self._follows(index, before),
                )
            )
            before = index
        request.leaves = leaves
        return request

    def _priority(self, name: str, pinned: bool) -> int:
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        found = next((self._priorities[p] for p in prefixes if p in self._priorities), None)
        if pinned or found == "pin":
            return int(_C.PINNED)
        return int(_C.NO_PRIORITY) if found is None else int(found)

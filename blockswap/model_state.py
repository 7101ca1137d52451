"""The model's side of a session: its parameters' two addresses, and what changed them."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from blockswap import _C
from blockswap.binding import Gate, Unit, WatchedParameters, is_alike
from blockswap.blocks import Block
from blockswap.casting import Casts
from blockswap.config import ResolvedConfig, SwapConfig
from blockswap.device_memory import DeviceMemory
from blockswap.errors import DeviceError
from blockswap.fixed import FixedTensors
from blockswap.giving_back import give_back
from blockswap.host import Host
from blockswap.pieces import SMALL, Leaves, find_leaves
from blockswap.placement import Placement
from blockswap.share import Share

WRITTEN = 3  # Change::Kind::kWritten: the image itself holds the new values


class ModelState:
    """Owns arena, binding, pool and engine of one model while it is taken.

    `take` moves the weights to their images, `give_back` makes them ordinary again; between them
    `place` gives leaves device addresses. Everything can be taken again after it was given back.
    """

    def __init__(
        self, model: nn.Module, config: SwapConfig, blocks: list[Block], gate: Gate
    ) -> None:
        self.model = model
        self.gate = gate
        self.device = config.target_device()
        self.is_asynchronous = self.device.type != "cpu"  # beside the host
        self.memory = DeviceMemory(self.device)
        self.config: ResolvedConfig = config.resolve(self.memory.total_bytes())
        self.share = Share(self.memory, self.config.vram_bytes)
        self.streams_outside = self.config.mode == "layerwise"
        self.priorities = config.priorities
        self.blocks = blocks
        self.is_taken = self.is_detached = False
        self._diverted: list[Unit] = []  # in this forward
        self.strangers: set[int] = set()  # leaves that were used without being in the plan
        self.unit_of: dict[nn.Module, Unit] = {}
        self.units: dict[int, Unit] = {}
        self.token = torch.empty(0)
        self.is_visitor = False  # what never streams leaves the device, too, when it is vacated
        self.small_bytes = self.weight_bytes = self.recopied = 0

    def take(self) -> None:
        """Find the leaves, move their weights to the arena and all else to the device.

        On failure or Ctrl-C every parameter keeps whole values, and nothing else has changed.
        """
        self.weight_bytes = sum(p.nbytes for p in self.model.parameters())
        self._has_outside = self.streams_outside
        self.leaves: Leaves = find_leaves(self.model, self.blocks, self.streams_outside)
        there = self.device.type, self.device.index or 0
        self.driver = _C.make_device(*there)
        self.engine = _C.Engine(self.driver, self.config.copy_streams, self.config.check)
        self.memory.pool = self.pool = _C.Pool(*there, self.driver)
        self.token = torch.zeros(1, dtype=torch.uint8, device=self.device)
        self.binding = _C.Binding(self.token, self.engine)
        self.entries: list[tuple[WatchedParameters, str, nn.Parameter]] = []
        self.origins: list[torch.device] = []
        self.plain: dict[nn.Module, dict[str, nn.Parameter | None]] = {}
        self.casts = Casts(self.model)
        self.is_taken = True  # from here on there is something to give back
        try:
            self._watch_parameters()
            managed = {parameter for _, _, parameter in self.entries}
            pins = self.is_asynchronous and self.config.host_memory_bytes is None
            self.fixed = FixedTensors(self.model, managed, self.device, pins)
            self.host = Host(self.binding, self.driver, self.config.host_memory_bytes)
            self.placement = Placement(self.pool, self.memory, self.engine, self.host, self.token)
            self.host.take(len(self.origins), self.engine if self.is_asynchronous else None)
            self.fixed.to_device()
            for module in self.model.modules():
                self.binding.watch(module._modules, True)
                managed_here = isinstance(module._parameters, WatchedParameters)
                self.binding.watch(module._parameters, not managed_here)
        except BaseException:
            self.give_back(detach=True)
            raise
        self.is_detached = False
        self.strangers.clear()
        self.gate.touched.clear()

    def _watch_parameters(self) -> None:
        watched: dict[nn.Module, WatchedParameters] = {}
        self.unit_of, self.units = {}, {}

        def add(unit: Unit, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
            if module not in watched:
                self.plain[module] = module._parameters
                watched[module] = WatchedParameters(module._parameters, self.gate, unit)
            entry = self.binding.add(watched[module], name, parameter, unit.index)
            unit.entries.append(entry)
            unit.weights.append(parameter)
            self.entries.append((watched[module], name, parameter))
            self.origins.append(parameter.device)

        for leaf in self.leaves.streamable:
            unit = self.units[leaf.index] = Unit(leaf.index, leaf.name, [], [])
            self.unit_of[leaf.module] = unit
            for name, parameter in leaf.parameters:
                add(unit, leaf.module, name, parameter)
        if self.leaves.small:
            small = self.units[len(self.units)] = Unit(len(self.units), SMALL, [], [])
            small.is_planned = True
            for module, name, parameter in self.leaves.small:
                add(small, module, name, parameter)
        for module, parameters in watched.items():
            module._parameters = parameters
        self.casts.take()
        self.is_from_device = self.is_asynchronous and self.device in self.origins

    def give_back(self, detach: bool, settles: bool = False) -> DeviceError | None:
        """Make the weights ordinary: each where it came from, no watching. Safe to call twice.

        Arguments and result as of `giving_back.give_back`.
        """
        failure = None
        if self.is_taken:
            failure = give_back(self, settles)
            self.unit_of, self.units = {}, {}
            self.gate.touched.clear()
            self.is_taken = False  # whatever breaks off what follows
            self.entries, self.plain = [], {}
            for name in ("placement", "binding", "host", "engine"):
                self.__dict__.pop(name, None)
        self.is_detached = self.is_detached or detach
        return failure

    # Device addresses ----------------------------------------------------------------------------
    def place(
        self,
        plan: _C.Plan,
        order: list[int],
        runs: dict[int, tuple[int, int]],
    ) -> None:
        """Give every leaf of the plan its device address, and start streaming.

        Args:
            plan: which pieces stay, and where the others pass through.
            order: leaf numbers, as the plan's pieces count them.
            runs: as `Learned.runs`.
        """
        self.engine.stop()
        for unit in self.units.values():
            unit.piece, unit.plan_piece = -1, -1
            unit.is_first = unit.is_last = unit.is_planned = unit.is_repeated = False
        small = next((u for u in self.units.values() if u.name == SMALL), None)
        self.small_bytes = self.host.image_bytes[small.index] if small else 0
        staying = [
            leaf
            for piece in plan.pieces
            if piece.resident
            for leaf in order[piece.first_leaf : piece.end_leaf]
        ]
        staying += [small.index] if small else []
        images = [self.host.image(order[piece.first_leaf]) for piece in plan.pieces]

        def stream() -> None:
            self.engine.load(plan, images, self.placement.ring, self.token)

        self.placement.change(staying, plan.ring_bytes, stream)
        for number, piece in enumerate(plan.pieces):
            members = order[piece.first_leaf : piece.end_leaf]
            address = self.placement.ring + piece.slot_offset
            last = max(members, key=lambda leaf: runs.get(leaf, (-1, 1))[0])
            if last not in runs:
                last = members[-1]
            for leaf in members:
                unit = self.units[leaf]
                unit.is_repeated = not piece.resident and runs.get(leaf, (0, 1))[1] > 1
                unit.runs_of_last = runs.get(last, (0, 1))[1]
                unit.plan_piece = number
                unit.piece = -1 if piece.resident else number
                unit.is_first = not piece.resident and leaf == members[0]
                unit.is_last = not piece.resident and leaf == last
                self._place(unit, self.placement.address(leaf) if piece.resident else address)
                address += self.host.image_bytes[leaf]
        if small is not None:
            self._place(small, self.placement.address(small.index))
        planned = set(order)
        for unit in self.units.values():
            if unit is not small and unit.index not in planned:
                self.binding.place_device(unit.index, 0, self.token, -1, False)

    def vacate(self, at_least_bytes: int | None = None) -> None:
        """Give the pool's memory back until `place`: all of it, or so much."""
        self.engine.stop()
        if at_least_bytes is not None:
            self.placement.leave_room(at_least_bytes)
            return
        self.placement.clear()
        if self.is_visitor:
            self.fixed.leave()

    def _place(self, unit: Unit, address: int) -> None:
        unit.is_planned = True
        self.binding.place_device(unit.index, address, self.token, unit.piece, unit.is_last)

    # One forward ---------------------------------------------------------------------------------

    def begin_step(self, continues: bool) -> None:
        """Bind parameters to the device; ``continues``: a further part of the same step."""
        self.share.impose(self.memory.pool_beside_bytes + self.memory.neighbours_beside_bytes)
        self.engine.begin_step(self.token, continues)
        self.binding.bind()

    def end_step(self) -> list[str]:
        """Bind parameters to their images; the names of those that the forward changed.

        Safe to call twice, and where no step or only a part of one has begun.
        """
        with contextlib.ExitStack() as always:  # each of them, whatever becomes of the others
            always.callback(self._forget_diverted)
            always.callback(self.share.lift)
            always.callback(self.engine.end_step, self.token)
            always.callback(self.casts.store)
            edited = self.binding.unbind()
        return [self._name(entry) for entry in edited]

    def _forget_diverted(self) -> None:
        while self._diverted:
            self._diverted.pop().is_diverted = False

    def divert(self, unit: Unit) -> None:
        """Copy a unit's weights to memory of their own for the rest of this forward."""
        unit.is_diverted = True
        self._diverted.append(unit)
        if unit.is_planned:
            unit.is_read_outside = True
        else:
            self.strangers.add(unit.index)
        for entry in unit.entries:
            self.binding.divert(entry, self.token)

    def requires_grad(self) -> bool:
        """Whether any managed parameter requires grad."""
        return bool(self.binding.requires_grad())

    def is_relieved(self) -> bool:
        """Whether what lies outside the blocks is to stream from now on: memory was out."""
        return self._has_outside is not self.streams_outside

    def is_restructured(self) -> bool:
        """Whether modules came or went, or parameters other than the managed ones."""
        return self.is_relieved() or self.binding.is_restructured()

    def reconcile(self) -> bool:
        """Bring edits made since the last forward into the images and to the device.

        Returns False, having changed nothing, when a parameter now has another shape or dtype, or
        is cast by a hook that came since.
        """
        changes = self.binding.changes()
        touched = self.gate.touched
        if not changes and not touched:
            return True
        held = {c.index: self._held(c.index) for c in changes if c.kind != WRITTEN}
        if any(not is_alike(now, self.binding.host(i)) for i, now in held.items()):
            return False
        if self._is_shared(held) or not self.casts.is_complete():
            return False
        for now in held.values():
            if now is not None and self.host.holds(now):
                # Its values lie in some image, which may be about to change itself.
                _C.set_data(now, now.detach().clone())
        for entry, now in held.items():
            if now is not None:
                self._adopt(entry, now)
        dirty = touched | {self.units[self.binding.leaf_of(c.index)] for c in changes}
        pieces: set[int] = set()
        for unit in dirty:
            if unit.index in self.placement:
                self.placement.copy(unit.index)
                self.recopied += 1
            elif unit.piece >= 0:
                pieces.add(unit.piece)
        for piece in sorted(pieces):
            self.engine.invalidate(piece)
        self.binding.settle()
        touched.clear()
        return True

    def _is_shared(self, held: dict[int, nn.Parameter | None]) -> bool:
        """Whether a parameter that came in is now held under two names: tied."""
        others = {p for i, (_, _, p) in enumerate(self.entries) if i not in held}
        return len(set(held.values())) < len(held) or not others.isdisjoint(held.values())

    def _held(self, entry: int) -> nn.Parameter | None:
        """Return what the module holds now under the entry's name."""
        watched, name, _ = self.entries[entry]
        return dict.get(watched, name)

    def _adopt(self, entry: int, now: nn.Parameter) -> None:
        """Copy what the module holds now into the image; from here on it is the parameter."""
        watched, name, before = self.entries[entry]
        if now is not before:
            # Whoever keeps the old parameter keeps its values: the image is about to change.
            _C.set_data(before, before.detach().clone())
            self.entries[entry] = (watched, name, now)
            weights = watched.unit.weights
            weights[watched.unit.entries.index(entry)] = now
        self.binding.replace(entry, now)

    def _name(self, entry: int) -> str:
        watched, name, _ = self.entries[entry]
        return f"{watched.unit.name}.{name}"

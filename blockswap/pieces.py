"""The leaf modules of a model's blocks: what a piece is cut from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from blockswap.blocks import Block, find_blocks
from blockswap.together import members_of

# Smaller leaves (norms, small projections) never stream: they cost more calls than bytes. In a
# model whose largest leaf is small itself, the bound is a share of that one.
MIN_LEAF_BYTES = 64 * 1024
MIN_LEAF_SHARE = 1 / 64
ALIGNMENT = 256  # csrc/plan.h, kAlignment
OUTSIDE = "(outside the blocks)"
SMALL = "(small parameters)"


@dataclass
class Leaf:
    """A module whose own parameters move together, and where it stands in the model.

    ``index`` is its number in the engine, ``block`` an index into ``Leaves.blocks``.
    """

    index: int
    name: str
    module: nn.Module
    block: int
    parameters: list[tuple[str, nn.Parameter]]
    bytes: int


@dataclass
class Leaves:
    """What streams, what stays, and what is not ours.

    Attributes:
        blocks: (block name, list name) of every block that holds a leaf.
        streamable: leaves in the order in which the model declares them.
        small: parameters of the blocks that always stay on the device: of small leaves, read by a
            block itself, or shared between modules. (module, parameter name, parameter).
        block_bytes: bytes of all leaf modules in the blocks, the reference for "kept".
    """

    blocks: list[tuple[str, str]] = field(default_factory=list)
    streamable: list[Leaf] = field(default_factory=list)
    small: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)
    block_bytes: int = 0


def find_leaves(model: nn.Module, blocks: list[Block], include_outside: bool) -> Leaves:
    """Return the leaves of ``blocks``; with ``include_outside`` those of the other modules, too.

    A model's first parameter never streams: code asks it for the model's device and dtype.
    """
    shared = _shared_parameters(model)
    largest = max((_own_bytes(module) for module in model.modules()), default=0)
    least = int(min(MIN_LEAF_BYTES, MIN_LEAF_SHARE * largest))
    firsts = {next(part.parameters(), None) for part in members_of(model).values()}
    leaves = Leaves()
    names = {module: name for name, module in model.named_modules()}
    inside: set[nn.Module] = set()
    for block in blocks:
        leaves.blocks.append((block.name, block.list_name))
        for module in block.module.modules():
            if module in inside:
                continue  # of an earlier block, too: it runs again
            inside.add(module)
            _add(leaves, names[module], module, len(leaves.blocks) - 1, shared, set(), True, least)
    if include_outside:
        leaves.blocks.append((OUTSIDE, OUTSIDE))
        for module, name in names.items():
            if module not in inside:
                _add(leaves, name, module, len(leaves.blocks) - 1, shared, firsts, False, least)
    return leaves


def _add(
    leaves: Leaves,
    name: str,
    module: nn.Module,
    block: int,
    shared: set[nn.Parameter],
    firsts: set[nn.Parameter | None],
    in_block: bool,
    least_bytes: int,
) -> None:
    own = [(key, p) for key, p in module._parameters.items() if p is not None]
    movable = [(key, p) for key, p in own if p not in shared and is_dense(p)]
    num_bytes = sum(p.nbytes for _, p in movable)
    holds_modules = any(child._parameters for child in module.modules() if child is not module)
    if in_block and not holds_modules:
        leaves.block_bytes += sum(p.nbytes for _, p in own)
    is_first = any(p in firsts for _, p in own)
    # A module that also holds others reads its own tensors at any time: they stay.
    if num_bytes >= max(1, least_bytes) and not holds_modules and not is_first:
        index = len(leaves.streamable)
        leaves.streamable.append(Leaf(index, name, module, block, movable, num_bytes))
    elif in_block:
        leaves.small.extend((module, key, p) for key, p in movable)


def _own_bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module._parameters.values() if p is not None)


def is_dense(parameter: nn.Parameter) -> bool:
    """Whether the parameter's bytes lie together, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return parameter.numel() > 0


def _shared_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that several modules hold (tied weights), or twice one module."""
    seen: Counter[nn.Parameter] = Counter()
    for module in model.modules():
        seen.update(p for p in module._parameters.values() if p is not None)
    return {parameter for parameter, count in seen.items() if count > 1}


def image_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return what parameters take in one image, each at an aligned offset."""
    return sum(-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in parameters)


def leaf_bytes(model: nn.Module) -> int:
    """Return the bytes of all leaf modules in a model's blocks, the reference for "kept"."""
    return find_leaves(model, find_blocks(model), include_outside=False).block_bytes

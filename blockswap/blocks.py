"""Find a model's blocks: from what the user says, what the model declares, or its structure."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from blockswap import structure
from blockswap.errors import ConfigError
from blockswap.options import Priority, nearest
from blockswap.preflight import require_module
from blockswap.together import members_of

_PATTERN_SIGNS = frozenset("*?[")


@dataclass(frozen=True)
class Block:
    """One repeated module of a model; ``list_name`` is the list that counts it.

    The list is the container that holds the block (``"transformer_blocks"``); in a UNet it is the
    stage (``"down_blocks"``, ``"mid_block"``, ``"up_blocks"``).
    """

    name: str
    list_name: str
    module: nn.Module


def find_blocks(
    model: nn.Module, explicit: Iterable[nn.Module | str] | nn.Module | str | None = None
) -> list[Block]:
    """Return the model's blocks in the order in which the model declares them.

    That need not be the order in which they run, and a block may run more than once a step.

    Args:
        model: the model.
        explicit: the blocks as modules, names or patterns (``"transformer_blocks.*"``); a
            ModuleList stands for its members. None: found from the model.

    Raises:
        ConfigError: not a module, no block found, an unknown name, or blocks inside blocks.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    >>> [block.name for block in find_blocks(model)]
    ['0', '2']
    """
    require_module(model)
    names = {module: name for name, module in model.named_modules()}
    if explicit is not None:
        if isinstance(explicit, (str, nn.Module)):
            explicit = (explicit,)
        found = _explicit_modules(model, names, list(explicit))
    else:
        found = []
        for part in members_of(model).values():
            inside = structure.find_modules(part)
            if not inside:
                raise ConfigError(_nothing_found(part))
            found += [module for module in inside if module not in found]
    order = {module: index for index, module in enumerate(names)}
    return [
        Block(names[module], structure.list_name(names[module], model), module)
        for module in sorted(found, key=order.__getitem__)
    ]


def find_again(
    model: nn.Module, blocks: nn.Module | str | Iterable[nn.Module | str] | None
) -> list[Block]:
    """Return the blocks of a model that was edited; explicit ones that have left it are ignored.

    Raises:
        ConfigError: as `find_blocks` does.
    """
    if blocks is None:
        return find_blocks(model, None)
    if isinstance(blocks, (nn.Module, str)):
        blocks = (blocks,)
    modules = set(model.modules())
    return find_blocks(model, [b for b in blocks if isinstance(b, str) or b in modules])


def list_counts(blocks: Iterable[Block]) -> dict[str, int]:
    """Return the number of blocks per list, in order of declaration."""
    return dict(Counter(block.list_name for block in blocks))


def match_priorities(
    names: Iterable[str], priorities: Mapping[str, Priority] | None
) -> dict[str, Priority]:
    """Return the priority of each name that a pattern matches.

    A pattern matches a name, or a block that holds the name: ``"blocks.3"`` matches
    ``"blocks.3.attn.to_q"``. ``*`` also crosses dots. Of several patterns the last one wins.

    Args:
        names: of all blocks and leaf modules.
        priorities: pattern -> int from 0 (goes first) or "pin".

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    known = list(names)
    matched: dict[str, Priority] = {}
    for pattern, priority in (priorities or {}).items():
        hits = [name for name in known if _matches(name, pattern)]
        if not hits:
            raise ConfigError(
                f"priorities: {pattern!r} matches no block or leaf module{nearest(pattern, known)};"
                f" there are {len(known)} names, such as {_some(known)}"
            )
        matched.update(dict.fromkeys(hits, priority))
    return matched


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes)


def _explicit_modules(
    model: nn.Module, names: Mapping[nn.Module, str], entries: Sequence[nn.Module | str]
) -> list[nn.Module]:
    chosen: dict[nn.Module, str] = {}  # module -> the entry that named it, for the error text
    for entry in entries:
        label = repr(entry) if isinstance(entry, str) else type(entry).__name__
        for module in _modules_of(model, names, entry):
            if module in chosen:
                raise ConfigError(
                    f"blocks: {names[module]!r} is given twice, by {chosen[module]} and {label}:"
                    " give each block once"
                )
            chosen[module] = label
    for module in chosen:
        for inner in module.modules():
            if inner is not module and inner in chosen:
                raise ConfigError(
                    f"blocks: {names[inner]!r} lies inside {names[module]!r}: a block cannot hold"
                    " another, so give only one of them"
                )
    if not chosen:
        raise ConfigError("blocks is empty; leave it out to have the blocks found")
    return list(chosen)


def _modules_of(
    model: nn.Module, names: Mapping[nn.Module, str], entry: nn.Module | str
) -> list[nn.Module]:
    """Return the modules with parameters that one entry of an explicit list means."""
    if isinstance(entry, str) and _PATTERN_SIGNS & set(entry):
        hits = [m for m, name in names.items() if name and fnmatch.fnmatchcase(name, entry)]
        if not hits:
            raise ConfigError(f"blocks: {entry!r} matches no module{_nearest(entry, names)}")
        whole = set(members_of(model).values())
        hits = [m for m in hits if structure.has_parameters(m) and structure.has_forward(m)]
        hits = [m for m in hits if m not in whole]
        if not hits:
            raise ConfigError(
                f"blocks: what {entry!r} matches cannot be called or holds no weights"
            )
        return structure.outermost(hits)
    if isinstance(entry, str):
        try:
            module = model.get_submodule(entry)
        except AttributeError:
            hint = _nearest(entry, names)
            raise ConfigError(f"blocks: the model has no module {entry!r}{hint}") from None
    else:
        module = entry
    if module is model or module in members_of(model).values():
        raise ConfigError("blocks: the model itself cannot be a block: name modules inside it")
    if module not in names:
        raise ConfigError(f"blocks: this {type(module).__name__} is not part of the model")
    members = [module] if structure.has_forward(module) else list(module.children())
    members = [m for m in members if structure.has_parameters(m)]
    if not members:
        raise ConfigError(f"blocks: {names[module]!r} holds no parameters, so nothing to move")
    if not all(structure.has_forward(m) for m in members):
        raise ConfigError(
            f"blocks: {names[module]!r} has no forward, nor have its members: a block is called"
        )
    return members


def _nearest(entry: str, names: Mapping[nn.Module, str]) -> str:
    hint = nearest(entry, filter(None, names.values()))
    return (
        hint or f"; there are {len(names) - 1} modules, such as {_some(list(names.values())[1:])}"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _nothing_found(model: nn.Module) -> str:
    seen = Counter(type(m).__name__ for m in model.modules() if m is not model)
    classes = ", ".join(f"{name} x{count}" for name, count in seen.most_common(12))
    return (
        f"no blocks found in {type(model).__name__}: it declares none and has no list of repeated"
        f" modules with parameters. Classes seen: {classes or 'none'}. Pass blocks=[...]:"
        " modules, names or patterns, such as blocks=['layers.*']"
    )

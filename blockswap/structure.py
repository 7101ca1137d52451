"""PURE. A model -> the modules that are its blocks, by declaration, by name or by structure.

Sources, in order: the stages of a UNet, ``_repeated_blocks``, ``_no_split_modules``, lists with
the names that diffusers uses, then lists of repeated modules at any depth. Nothing here imports
diffusers or transformers: models are known by what they declare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
#: diffusers' ``_ALL_TRANSFORMER_BLOCK_IDENTIFIERS``
_LIST_NAMES = (
    "blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "visual_transformer_blocks",
    "temporal_transformer_blocks",
)
_UNET_STAGES = ("down_blocks", "mid_block", "up_blocks")
#: A whole stage is a useless unit (SDXL's up_blocks.0 holds 47 % of its bytes): these are taken.
_UNET_BLOCKS = (
    "BasicTransformerBlock",
    "TemporalBasicTransformerBlock",
    "SpatioTemporalResBlock",
    "TemporalConvLayer",
    "ResnetBlock",
)
_MAIN_SHARE = 0.5  # of the parameters: what the main blocks hold at least
_MINOR_SHARE = 0.02  # a list with less than this is not worth streaming


def find_modules(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of ``model``, none inside another, or nothing where none are found."""
    declared = _declared(model)
    if declared:
        return declared
    # A wrapper declares nothing itself, its parts may: believe them where they cover the model.
    parts = [block for child in model.children() for block in _declared_below(child)]
    total = _num_parameters([model])
    if parts and _num_parameters(parts) >= _MAIN_SHARE * total:
        return parts
    repeated = _repeated(model, total)
    return max(repeated, parts, key=_num_parameters)


def list_name(block_name: str, model: nn.Module) -> str:
    """Return the name of the list that counts the block of this name.

    The container that holds it, or in a UNet its stage: ``"encoder.down_blocks"``.
    """
    parts = block_name.split(".")
    for index, part in enumerate(parts[:-1]):
        owner = model.get_submodule(".".join(parts[:index]))
        if part in _UNET_STAGES and _is_staged(owner):
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1])


def has_parameters(module: nn.Module) -> bool:
    """Say whether the module or anything in it holds a parameter."""
    return next(module.parameters(), None) is not None


def has_forward(module: nn.Module) -> bool:
    """Say whether the module can be called: a ModuleList cannot, so no hook on it would fire."""
    return getattr(type(module), "forward", None) is not nn.Module.forward


def outermost(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules that lie in no other of them; each once."""
    chosen = dict.fromkeys(modules)
    inside = {inner for m in chosen for inner in m.modules() if inner is not m}
    return [m for m in chosen if m not in inside]


def _is_staged(module: nn.Module) -> bool:
    """Say whether this is a UNet or one half of one, not a DiT whose list has such a name."""
    stages = [getattr(module, name, None) for name in _UNET_STAGES]
    present = [stage for stage in stages if isinstance(stage, nn.Module)]
    return any(_is_unet_block(m) for stage in present for m in stage.modules())


def _is_unet_block(module: nn.Module) -> bool:
    return type(module).__name__.startswith(_UNET_BLOCKS)


def _declared_below(module: nn.Module) -> Iterator[nn.Module]:
    found = _declared(module)
    if found:
        yield from found
        return
    for child in module.children():
        yield from _declared_below(child)


def _declared(module: nn.Module) -> list[nn.Module]:
    """Return the blocks that this one module declares, by class names or by its lists' names."""
    if _is_staged(module):
        return _with_parameters(m for m in module.modules() if _is_unet_block(m))
    for attribute in ("_repeated_blocks", "_no_split_modules"):
        class_names = getattr(module, attribute, None)
        if isinstance(class_names, (list, tuple, set, frozenset)):
            found = _instances(module, set(class_names))
            if found:
                return found
    lists = (getattr(module, name, None) for name in _LIST_NAMES)
    return _with_parameters(
        m for holder in lists if isinstance(holder, nn.ModuleList) for m in holder.children()
    )


def _instances(module: nn.Module, class_names: set[str]) -> list[nn.Module]:
    """Return instances of the classes that are repeated: embedders declared beside are not."""
    named = [m for m in module.modules() if m is not module and type(m).__name__ in class_names]
    counts = Counter(type(m).__name__ for m in named)
    listed = {m for c in module.modules() if isinstance(c, _CONTAINERS) for m in c.children()}
    return _with_parameters(m for m in named if m in listed or counts[type(m).__name__] > 1)


def _with_parameters(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return outermost(m for m in modules if has_parameters(m) and has_forward(m))


def _repeated(model: nn.Module, total: int) -> list[nn.Module]:
    """Return the outermost siblings of one class in a container, wherever they lie."""
    groups = list(_sibling_groups(model))
    groups = [group for group in groups if _num_parameters(group) >= _MINOR_SHARE * total]
    compound = [m for group in groups if not _is_leaf(group[0]) for m in group]
    if _num_parameters(compound) >= _MAIN_SHARE * total:
        return compound
    return [m for group in groups for m in group]


def _sibling_groups(module: nn.Module) -> Iterator[list[nn.Module]]:
    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    if isinstance(module, _CONTAINERS):
        for child in module.children():
            if has_parameters(child) and has_forward(child):
                by_class.setdefault(type(child), []).append(child)
    groups = [group for group in by_class.values() if len(group) > 1 and not _are_stages(group)]
    yield from groups
    taken = {m for group in groups for m in group}
    for child in module.children():
        if child not in taken:
            yield from _sibling_groups(child)


def _are_stages(group: list[nn.Module]) -> bool:
    """Say whether these siblings are stages: of different sizes, made of lists of their own."""
    if len({_num_parameters([m]) for m in group}) == 1:
        return False
    inner = [
        b for m in group for found in _sibling_groups(m) if not _is_leaf(found[0]) for b in found
    ]
    return _num_parameters(inner) >= _MAIN_SHARE * _num_parameters(group)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _num_parameters(modules: Iterable[nn.Module]) -> int:
    return sum({p: p.numel() for m in modules for p in m.parameters()}.values())

"""Draws docs/families.md from the catalogue: `python -m tests.families.page` rewrites it."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path

from torch import nn

from blockswap.blocks import find_blocks
from blockswap.pieces import find_leaves
from tests.families.catalogue import EXCLUDED, FAMILIES
from tests.families.family import Family, build_meta, class_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
TITLES = {
    "transformers": "Transformers",
    "unets": "UNets",
    "controlnets": "ControlNets",
    "autoencoders": "Others",
}
OTHERS = "Others"
_NUMBER = re.compile(r"\.\d+(?=\.|$)")

HEAD = """\
# Model classes

<!-- Drawn by `python -m tests.families.page` from tests/families: edit that, not this page. -->

Every class here streams in the test suite at toy size, with random weights in fp32 and bf16: nine steps are compared
bit for bit with the model before attaching, and after `detach()` nothing of blockswap is left in it. Real weights,
speed and memory are another matter: what was measured stands in the [README](../README.md).

A class that is not here may work as well: blocks are found from what a model declares or from its structure, and
where they are not, `blocks=[...]` names them ([attach.md](attach.md)). Several names in the first column are variants
of one class.

**Lists** are the names for `offload={"name": count}`; `*` stands for any number. In UNets a list is a stage, and its
blocks are the transformer and ResNet blocks inside it. **Cut** says how blocks move: in *pieces* of a few modules
each, or as *whole* blocks where a block holds one module only. Weights outside the lists stay on the device
(`mode="layerwise"` streams them, too).
"""

LEFT_OUT = """\
## Left out

These classes of diffusers are not in the suite. In a pipeline, autoencoders and encoders take turns on the device, whole
([pipelines.md](pipelines.md)).

| class | why |
| --- | --- |
"""


def make_page() -> str:
    """Return the whole page."""
    by_class: dict[str, list[Family]] = {}
    for family in FAMILIES:
        by_class.setdefault(family.cls_name, []).append(family)
    sections: dict[str, list[str]] = {title: [] for title in TITLES.values()}
    for cls_name, families in sorted(by_class.items()):
        sections[_section(families[0])].append(_row(cls_name, families))
    parts = [HEAD]
    for title, rows in sections.items():
        if rows:
            table = ["| class | tested as | lists: blocks | cut |", "| --- | --- | --- | --- |"]
            parts.append("\n".join([f"## {title}", "", *table, *rows, ""]))
    parts.append(LEFT_OUT + "".join(f"| `{n}` | {why} |\n" for n, why in EXCLUDED.items()))
    return "\n".join(parts)


def _section(family: Family) -> str:
    folders = class_of(family).__module__.split(".")
    return next((title for folder, title in TITLES.items() if folder in folders), OTHERS)


def _row(cls_name: str, families: list[Family]) -> str:
    lists: dict[str, dict[str, None]] = {}  # list -> classes of its blocks
    is_cut: set[bool] = set()
    for family in families:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build_meta(family)
        blocks = find_blocks(model)
        for block in blocks:
            name = _NUMBER.sub(".*", block.list_name)
            lists.setdefault(name, {})[type(block.module).__name__] = None
        is_cut.add(_is_cut(model))
    cut = "pieces" if True in is_cut else "whole"
    named = "; ".join(f"`{name}`: {', '.join(classes)}" for name, classes in lists.items())
    return f"| `{cls_name}` | {', '.join(f.name for f in families)} | {named} | {cut} |"


def _is_cut(model: nn.Module) -> bool:
    """Whether most blocks hold several modules that may move apart from each other."""
    leaves = find_leaves(model, find_blocks(model), include_outside=False)
    of_block = Counter(leaf.block for leaf in leaves.streamable)
    return sum(count > 1 for count in of_block.values()) > len(of_block) / 2


if __name__ == "__main__":
    PAGE.write_text(make_page(), "utf-8")

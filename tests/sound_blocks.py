"""What holds for the blocks of every model, and their names."""

from blockswap.blocks import list_counts


def names(blocks):
    return [block.name for block in blocks]


def assert_sound(model, blocks):
    """What holds for every model: names lead to modules, in order, disjoint, none empty."""
    assert blocks
    order = {module: index for index, module in enumerate(model.modules())}
    positions = [order[block.module] for block in blocks]
    assert positions == sorted(set(positions))
    for block in blocks:
        assert model.get_submodule(block.name) is block.module
        assert block.name.startswith(block.list_name)
        assert any(True for _ in block.module.parameters())
    inside = [m for block in blocks for m in block.module.modules()]
    assert len(inside) == len(set(inside)), "a block lies inside another"
    assert sum(list_counts(blocks).values()) == len(blocks)

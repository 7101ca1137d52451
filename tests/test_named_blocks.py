"""Blocks and priorities that the caller names, by module, name or pattern."""

import pytest
from sound_blocks import assert_sound, names
from torch import nn

from blockswap.bench import zoo
from blockswap.blocks import find_blocks, list_counts, match_priorities
from blockswap.errors import ConfigError

# --- blocks ---------------------------------------------------------------------------------------


@pytest.fixture
def flux():
    return zoo.build_meta("flux", "tiny")


def test_blocks_can_be_given_as_modules_names_or_patterns(flux):
    everything = [*names(find_blocks(flux))[:2], "single_transformer_blocks.0"]
    given = [flux.single_transformer_blocks[0], "transformer_blocks.1", "transformer_blocks.[0]"]
    blocks = find_blocks(flux, given)
    assert_sound(flux, blocks)
    assert names(blocks) == everything  # in order of declaration, whatever the order given


def test_a_list_stands_for_its_members(flux):
    for entry in ("transformer_blocks", flux.transformer_blocks, "transformer_blocks.*"):
        assert names(find_blocks(flux, [entry])) == ["transformer_blocks.0", "transformer_blocks.1"]
    assert names(find_blocks(flux, flux.transformer_blocks)) == [
        "transformer_blocks.0",
        "transformer_blocks.1",
    ]


def test_pattern_takes_the_outermost_of_what_it_matches(flux):
    assert names(find_blocks(flux, ["*.attn*"]))[0] == "transformer_blocks.0.attn"
    assert len(find_blocks(flux, ["*.attn*"])) == 5


@pytest.mark.parametrize("entry", ["transformer_block", "transformer_blocks.9", "nothing.*"])
def test_unknown_name_is_refused_with_a_name_that_exists(flux, entry):
    with pytest.raises(ConfigError, match=r"did you mean|there are \d+ modules") as error:
        find_blocks(flux, [entry])
    assert repr(entry) in str(error.value)


def test_block_inside_another_is_refused_with_both_names(flux):
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn' lies inside 'transformer_blocks\.0'"):
        find_blocks(flux, ["transformer_blocks.0.attn", "transformer_blocks"])


def test_block_given_twice_is_refused(flux):
    with pytest.raises(ConfigError, match=r"'transformer_blocks\.0' is given twice"):
        find_blocks(flux, ["transformer_blocks.0", flux.transformer_blocks[0]])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (nn.Linear(2, 2), "not part of the model"),
        ("pos_embed", "holds no parameters"),
        ("pos_emb*", "holds no weights"),
        ("", "the model itself"),
    ],
)
def test_entry_that_cannot_be_a_block_is_refused(flux, entry, message):
    with pytest.raises(ConfigError, match=message):
        find_blocks(flux, [entry])


def test_empty_list_of_blocks_is_refused(flux):
    with pytest.raises(ConfigError, match="empty"):
        find_blocks(flux, [])


def test_explicit_block_of_a_unet_is_counted_in_its_stage():
    unet = zoo.build_meta("sdxl", "tiny")
    blocks = find_blocks(unet, ["mid_block.resnets", "up_blocks.*.transformer_blocks.*"])
    assert list_counts(blocks) == {"up_blocks": 4, "mid_block": 2}


# --- priorities ----------------------------------------------------------------------------------


LEAVES = ["blocks.0", "blocks.1", "blocks.0.attn.to_q", "blocks.1.attn.to_q", "blocks.10.fc"]


def test_pattern_covers_a_block_and_what_is_in_it_and_nothing_else():
    assert match_priorities(LEAVES, {"blocks.1": 5}) == {"blocks.1": 5, "blocks.1.attn.to_q": 5}
    assert match_priorities(LEAVES, {"*.fc": "pin"}) == {"blocks.10.fc": "pin"}
    assert match_priorities(LEAVES, None) == {}


def test_later_pattern_wins():
    matched = match_priorities(LEAVES, {"blocks.*": 0, "*.to_q": "pin"})
    assert matched["blocks.0"] == 0
    assert matched["blocks.0.attn.to_q"] == "pin"


def test_pattern_that_matches_nothing_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'block\.1' matches no.*did you mean 'blocks\.1'"):
        match_priorities(LEAVES, {"blocks.0": 1, "block.1": 2})

"""Options: their defaults, what each means, and what is refused."""

import dataclasses

import pytest
import torch
from torch import nn
from unset_options import clean_environment  # noqa: F401

from blockswap.config import SwapConfig
from blockswap.errors import CapError, ConfigError, DeviceError, UnsupportedError

GIB = 2**30


def test_defaults_are_the_ones_of_the_design():
    config = SwapConfig()
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert {name for name, value in values.items() if value is not None} == {
        "mode",
        "compress",
        "copy_streams",
        "check",
    }
    assert (config.mode, config.compress, config.copy_streams, config.check) == (
        "adaptive",
        "off",
        1,
        False,
    )


def test_metadata_holds_each_default_and_variable_for_the_docs():
    for field in dataclasses.fields(SwapConfig):
        if field.name not in ("priorities", "blocks"):
            assert field.metadata["default"] == getattr(SwapConfig(), field.name)
            assert field.metadata["env"] == f"BLOCKSWAP_{field.name.upper()}"


def test_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SwapConfig().vram = 1


def test_replaced_config_is_checked_and_equal_where_nothing_changed():
    config = SwapConfig(vram="80%", offload="64B", block_size="64B", device=torch.device("cpu"))
    assert dataclasses.replace(config) == config
    with pytest.raises(ConfigError):
        dataclasses.replace(config, copy_streams=0)


# --- vram ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vram", "num_bytes"),
    [
        (None, None),
        ("10GiB", 10 * GIB),
        (10 * GIB, 10 * GIB),
        (0.5, 8 * GIB),
        ("50%", 8 * GIB),
        ("0.5", 8 * GIB),
        (1.0, 16 * GIB),
        ("100%", 16 * GIB),
    ],
)
def test_vram_resolves_to_bytes(vram, num_bytes):
    assert SwapConfig(vram=vram).resolve(16 * GIB).vram_bytes == num_bytes


@pytest.mark.parametrize(
    "vram", [0, 0.0, "0%", -1, 1.5, float("nan"), float("inf"), "150%", "junk", True, [], "0B"]
)
def test_impossible_vram_is_refused_with_the_value_and_what_is_accepted(vram):
    with pytest.raises(ConfigError, match=r"accepted.*10GiB") as error:
        SwapConfig(vram=vram)
    assert "vram=" in str(error.value)


def test_vram_above_the_device_is_refused_with_both_numbers():
    with pytest.raises(CapError, match=r"vram is 32\.00 GiB but the device has 24\.00 GiB"):
        SwapConfig(vram="32GiB").resolve(24 * GIB)


def test_share_of_an_unknown_total_is_refused():
    with pytest.raises(CapError, match="not known"):
        SwapConfig(vram=0.5).resolve(None)
    assert SwapConfig(vram="8GiB").resolve(None).vram_bytes == 8 * GIB


@pytest.mark.parametrize("vram", ["1GiB", "10%"])
def test_ring_larger_than_the_cap_is_refused_with_both_numbers(vram):
    with pytest.raises(CapError, match=r"swap_space is 2\.00 GiB but the cap is 1\.00 GiB"):
        SwapConfig(vram=vram, swap_space="2GiB").resolve(10 * GIB)


def test_ring_larger_than_a_cap_in_bytes_is_refused_at_once():
    with pytest.raises(CapError):
        SwapConfig(vram="1GiB", swap_space="2GiB")


# --- offload ------------------------------------------------------------------------------------


def test_offload_int_counts_blocks_text_is_bytes_and_dict_counts_per_list():
    def resolved(offload):
        r = SwapConfig(offload=offload).resolve(GIB)
        return r.offload_blocks, r.offload_bytes, r.offload_blocks_per_list

    assert resolved(None) == (None, None, None)
    assert resolved(20) == (20, None, None)
    assert resolved(0) == (0, None, None)
    assert resolved("8GiB") == (None, 8 * GIB, None)
    assert resolved("12345B") == (None, 12345, None)
    assert resolved({"blocks": 3, "vace_blocks": 0}) == (
        None,
        None,
        {"blocks": 3, "vace_blocks": 0},
    )


def test_offload_of_bytes_as_int_is_refused_with_the_way_to_write_it():
    with pytest.raises(ConfigError, match="an int counts blocks; for bytes write '8GiB'"):
        SwapConfig(offload=8 * GIB)
    with pytest.raises(ConfigError, match="an int counts blocks"):
        SwapConfig(offload={"blocks": 8 * GIB})


@pytest.mark.parametrize(
    "offload", [-1, True, 1.5, "20", "junk", {"blocks": "8GiB"}, {"blocks": -1}, {3: 1}, "50%"]
)
def test_ambiguous_offload_is_refused(offload):
    with pytest.raises(ConfigError, match=r"offload.*blocks"):
        SwapConfig(offload=offload)


def test_more_blocks_than_the_model_has_are_refused_with_both_numbers():
    counts = {"transformer_blocks": 19, "single_transformer_blocks": 38}
    SwapConfig(offload=57).check_offload(counts)
    SwapConfig(offload={"transformer_blocks": 19}).check_offload(counts)
    SwapConfig(offload="8GiB").check_offload(counts)
    with pytest.raises(ConfigError, match="offload=58 blocks but the model has 57"):
        SwapConfig(offload=58).check_offload(counts)
    with pytest.raises(ConfigError, match="=20 but that list has 19"):
        SwapConfig(offload={"transformer_blocks": 20}).check_offload(counts)
    with pytest.raises(ConfigError, match="did you mean 'transformer_blocks'"):
        SwapConfig(offload={"transformer_block": 1}).check_offload(counts)


# --- the other options --------------------------------------------------------------------------


def test_reserve_is_bytes_and_may_be_nothing():
    assert SwapConfig(reserve="2GiB").resolve(8 * GIB).reserve_bytes == 2 * GIB
    assert SwapConfig(reserve=0).resolve(8 * GIB).reserve_bytes == 0
    assert SwapConfig().resolve(8 * GIB).reserve_bytes is None
    for junk in (-1, "junk", 0.5, True, "80%"):
        with pytest.raises(ConfigError, match="reserve"):
            SwapConfig(reserve=junk)
    for much in (8 * GIB, "9GiB"):
        with pytest.raises(CapError, match=r"but the device has 8.00 GiB: lower reserve"):
            SwapConfig(reserve=much).resolve(8 * GIB)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("donors", "cuda:1,8GiB;cpu,*"),
        ("compress", "auto"),
        ("compress", "f3"),
        ("compress", "e2"),
    ],
)
def test_option_that_is_not_built_is_refused_by_name(option, value):
    with pytest.raises(UnsupportedError, match=f"{option}.*not supported yet"):
        SwapConfig(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mode", "adaptve"),
        ("mode", None),
        ("compress", "zip"),
        ("lookahead", -1),
        ("lookahead", True),
        ("lookahead", 1.0),
        ("copy_streams", 0),
        ("copy_streams", 17),
        ("copy_streams", None),
        ("throttle", 0),
        ("throttle", -1.0),
        ("throttle", float("nan")),
        ("throttle", float("inf")),
        ("throttle", True),
        ("throttle", "fast"),
        ("check", 1),
        ("swap_space", "80%"),
        ("swap_space", 0),
        ("block_size", 64.0),
        ("block_size", ""),
        ("device", "gpu0"),
        ("device", "meta"),
        ("device", 0),
        ("priorities", ["a"]),
        ("priorities", {"a": "pinned"}),
        ("priorities", {"a": -1}),
        ("priorities", {"a": True}),
        ("priorities", {"": 1}),
        ("blocks", []),
        ("blocks", [1]),
        ("blocks", 7),
        ("blocks", [""]),
    ],
)
def test_bad_value_is_refused_with_its_option_and_what_is_accepted(option, value):
    with pytest.raises(ConfigError, match=option) as error:
        SwapConfig(**{option: value})
    assert "accepted" in str(error.value)


def test_good_values_of_every_option_are_kept():
    block = nn.Linear(2, 2)
    config = SwapConfig(
        device="cpu",
        swap_space="256MiB",
        block_size=64 * 2**20,
        mode="layerwise",
        lookahead=0,
        copy_streams=16,
        priorities={"blocks.*": 0, "blocks.0": "pin"},
        blocks=[block, "blocks.1"],
        throttle=25,
        check=True,
    )
    resolved = config.resolve(None)
    assert (resolved.swap_space_bytes, resolved.block_size_bytes) == (2**28, 2**26)
    assert (resolved.mode, resolved.lookahead, resolved.copy_streams) == ("layerwise", 0, 16)
    assert (resolved.throttle_gb_per_s, resolved.check) == (25.0, True)
    assert config.priorities == {"blocks.*": 0, "blocks.0": "pin"}
    assert config.blocks == (block, "blocks.1")
    assert SwapConfig(blocks="blocks.*").blocks == ("blocks.*",)
    assert SwapConfig(blocks=block).blocks == (block,)


def test_later_changes_to_a_dict_do_not_reach_the_config():
    priorities = {"a": 1}
    config = SwapConfig(priorities=priorities)
    priorities["b"] = 2
    assert config.priorities == {"a": 1}


def test_unknown_option_is_refused_with_the_nearest_and_all_names():
    with pytest.raises(ConfigError, match="did you mean 'block_size'") as error:
        SwapConfig.from_kwargs(block_sizes="64MiB")
    assert all(f.name in str(error.value) for f in dataclasses.fields(SwapConfig))
    assert SwapConfig.from_kwargs(vram="1GiB") == SwapConfig(vram=GIB)


def test_two_spellings_of_one_setting_do_not_differ_and_two_settings_do():
    a = SwapConfig(vram="10GiB", offload="1GiB", device="cpu")
    b = SwapConfig(vram=10 * GIB, offload="1024MiB", device=torch.device("cpu"))
    assert a == b
    assert a.differences(b) == []
    assert a.differences(dataclasses.replace(b, vram="9GiB", lookahead=1)) == ["vram", "lookahead"]


# --- device -------------------------------------------------------------------------------------


def test_cpu_is_the_device_where_there_is_no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **kwargs: None)
    assert SwapConfig().target_device() == torch.device("cpu")
    assert SwapConfig(device="cpu").target_device() == torch.device("cpu")


def test_device_that_does_not_exist_is_refused_by_name():
    with pytest.raises(DeviceError, match="cuda:99"):
        SwapConfig(device="cuda:99").target_device()

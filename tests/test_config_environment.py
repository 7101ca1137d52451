"""Options from the environment: BLOCKSWAP_<OPTION> gives the default."""

import pytest
from unset_options import clean_environment  # noqa: F401

from blockswap.config import SwapConfig
from blockswap.errors import ConfigError, UnsupportedError

GIB = 2**30


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("vram", "10GiB", 10 * GIB),
        ("vram", "80%", 0.8),
        ("offload", "12", 12),
        ("offload", "12GiB", f"{12 * GIB}B"),
        ("swap_space", "256MiB", 2**28),
        ("block_size", "64B", 64),
        ("mode", "chunkwise", "chunkwise"),
        ("lookahead", "0", 0),
        ("copy_streams", "2", 2),
        ("throttle", "12.5", 12.5),
        ("check", "1", True),
        ("check", "off", False),
        ("device", "cpu", "cpu"),
    ],
)
def test_environment_gives_the_default_and_an_argument_wins(monkeypatch, option, text, value):
    monkeypatch.setenv(f"BLOCKSWAP_{option.upper()}", text)
    assert getattr(SwapConfig(), option) == value
    other = {"mode": "layerwise", "copy_streams": 3, "check": True}.get(option)
    assert getattr(SwapConfig(**{option: other}), option) == other


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("vram", "junk"),
        ("lookahead", "two"),
        ("check", "maybe"),
        ("throttle", "x"),
        ("offload", "many"),
        ("copy_streams", "99"),
    ],
)
def test_junk_in_the_environment_is_refused_with_the_variable(monkeypatch, option, text):
    monkeypatch.setenv(f"BLOCKSWAP_{option.upper()}", text)
    with pytest.raises(ConfigError, match=f"BLOCKSWAP_{option.upper()}") as error:
        SwapConfig()
    assert "accepted" in str(error.value)


def test_option_that_is_not_built_is_refused_in_the_environment_too(monkeypatch):
    monkeypatch.setenv("BLOCKSWAP_COMPRESS", "f3")
    with pytest.raises(UnsupportedError, match="BLOCKSWAP_COMPRESS"):
        SwapConfig()


def test_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("BLOCKSWAP_VRAM", " ")
    assert SwapConfig().vram is None

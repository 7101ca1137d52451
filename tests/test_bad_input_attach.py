"""Every refusal comes before anything is changed, and says what, the numbers and the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from session_models import (
    HIDDEN,
    Block,
    assert_same,
    assert_unchanged,
    attach,
    describe,
    make_input,
    make_pair,
    make_stack,
)
from torch import nn

import blockswap
from blockswap.config import SwapConfig
from blockswap.errors import BlockswapError, CapError, ConfigError, UnsupportedError

X = make_input()

# (options, error, what its text must name)
BAD_OPTIONS: list[tuple[dict[str, Any], type[BlockswapError], str]] = [
    ({"vrm": "1GiB"}, ConfigError, r"unknown option 'vrm' \(did you mean 'vram'\?\); options are"),
    ({"vram": "10 bananas"}, ConfigError, r"vram.*bananas"),
    ({"vram": -1}, ConfigError, r"vram.*-1"),
    ({"vram": 0}, ConfigError, r"vram=0 is no memory"),
    ({"vram": 1.5}, ConfigError, r"vram=1\.5.*not in \(0, 1\]"),
    ({"vram": float("nan")}, ConfigError, r"vram=nan"),
    ({"vram": True}, ConfigError, r"vram.*True"),
    ({"vram": [1]}, ConfigError, r"vram"),
    ({"vram": 0.5}, CapError, r"vram=0\.5 is a share.*not known: give bytes"),
    ({"vram": "600KiB"}, CapError, r"smallest plan needs .* but the cap is 600\.0 KiB.*raise vram"),
    ({"vram": "600KiB", "mode": "layerwise"}, CapError, r"cap is 600\.0 KiB.*raise vram$"),
    ({"vram": "8MiB", "swap_space": "9MiB"}, CapError, r"swap_space is 9\.0 MiB.*8\.0 MiB: lower"),
    ({"offload": 7}, ConfigError, r"offload=7 blocks but the model has 6 .*give 0 to 6"),
    ({"offload": -1}, ConfigError, r"offload=-1 is negative"),
    ({"offload": "8"}, ConfigError, r"offload='8' has no unit: write '8GiB'"),
    ({"offload": 8 * 2**30}, ConfigError, r"offload=8589934592: an int counts blocks"),
    ({"offload": {"block": 1}}, ConfigError, r"no list 'block' \(did you mean 'blocks'\?\).*6 in"),
    ({"offload": {"blocks": 9}}, ConfigError, r"offload\['blocks'\]=9 .*6 blocks: give 0 to 6"),
    ({"swap_space": "100KiB"}, ConfigError, r"100\.0 KiB.*514\.0 KiB"),
    ({"swap_space": 0}, ConfigError, r"swap_space=0"),
    ({"block_size": 0}, ConfigError, r"block_size=0"),
    ({"block_size": "big"}, ConfigError, r"block_size.*big"),
    ({"mode": "layerwize"}, ConfigError, r"did you mean 'layerwise'\?.*accepted: adaptive"),
    ({"lookahead": -1}, ConfigError, r"lookahead=-1 is out of range; accepted: 0 and above"),
    ({"copy_streams": 0}, ConfigError, r"copy_streams=0 is out of range; accepted: 1 to 16"),
    ({"copy_streams": 17}, ConfigError, r"copy_streams=17 is out of range"),
    ({"priorities": {"block.3": 0}}, ConfigError, r"'block\.3' matches no.*did you mean 'blocks"),
    ({"priorities": {"blocks.3": -1}}, ConfigError, r"priorities\['blocks\.3'\]=-1 is negative"),
    ({"priorities": {"blocks.3": "first"}}, ConfigError, r"priorities\['blocks\.3'\]"),
    ({"priorities": ["blocks.3"]}, ConfigError, r"priorities=.* is a list; accepted: a dict"),
    ({"blocks": ["blocks.9"]}, ConfigError, r"no module 'blocks\.9'"),
    ({"blocks": ["layers.*"]}, ConfigError, r"'layers\.\*' matches no module"),
    ({"blocks": []}, ConfigError, r"blocks is empty; leave it out"),
    ({"blocks": ["blocks.1", "blocks.1.up"]}, ConfigError, r"'blocks\.1\.up' lies inside"),
    ({"blocks": ["blocks.1", "blocks.1"]}, ConfigError, r"'blocks\.1' is given twice"),
    ({"blocks": [nn.Linear(2, 2)]}, ConfigError, r"this Linear is not part of the model"),
    ({"throttle": 0}, ConfigError, r"throttle=0 is not a speed"),
    ({"throttle": float("inf")}, ConfigError, r"throttle=inf is not a speed"),
    ({"check": "yes"}, ConfigError, r"check='yes' is a str; accepted: True, False"),
    ({"device": "gpu0"}, ConfigError, r"device='gpu0' is not a device"),
    ({"device": "meta"}, ConfigError, r"device='meta' holds no values"),
    ({"reserve": "1GiB"}, CapError, r"reserve is 1.00 GiB, but how much memory .* is not known"),
    ({"reserve": -1}, ConfigError, r"reserve=-1"),
    ({"host_memory": "512KiB"}, ConfigError, r"host_memory='512KiB' is too little for the ring"),
    ({"host_memory": 0}, ConfigError, r"host_memory=0 is no memory at all"),
    ({"donors": "cuda:1,8GiB"}, UnsupportedError, r"donors is not supported yet"),
    ({"compress": "f3"}, UnsupportedError, r"compress='f3' is not supported yet; use"),
]


@pytest.mark.parametrize(
    ("options", "error", "text"), BAD_OPTIONS, ids=[str(options) for options, _, _ in BAD_OPTIONS]
)
def test_bad_option_is_refused_and_the_model_untouched(
    options: dict[str, Any], error: type[BlockswapError], text: str
) -> None:
    model = make_stack()
    before = describe(model)
    with pytest.raises(error, match=text):
        attach(model, **options)
    assert_unchanged(model, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that is not there")
def test_device_that_is_not_there_is_refused_and_the_model_untouched() -> None:
    model = make_stack()
    before = describe(model)
    with pytest.raises(BlockswapError, match=r'"cuda:7" cannot be used.*pass device="cpu"'):
        attach(model, device="cuda:7")
    assert_unchanged(model, before)


def test_config_and_options_together_are_refused() -> None:
    model = make_stack()
    before = describe(model)
    config = SwapConfig(device="cpu")
    for options in ({"offload": 2}, {"vram": "1GiB"}):
        with pytest.raises(ConfigError, match="either config= or options, not both"):
            blockswap.attach(model, config=config, **options)  # type: ignore[arg-type]
    assert_unchanged(model, before)


def test_refusal_leaves_the_way_free_for_a_right_attach() -> None:
    model, right = make_pair()
    before = describe(model)
    for options, error, _ in BAD_OPTIONS:
        with pytest.raises(error):
            attach(model, **options)
    session = attach(model, offload="4MiB")
    assert_same(model, right, X, 8)
    session.detach()
    assert_unchanged(model, before)


def test_refusal_of_a_second_attach_leaves_the_first_one_alive() -> None:
    model, right = make_pair()
    session = attach(model, offload="4MiB")
    assert_same(model, right, X, 2)
    for options, error, _ in BAD_OPTIONS:
        if options.keys() & {"vrm", "check", "compress", "lookahead"}:
            with pytest.raises(error):
                attach(model, **options)
            assert_same(model, right, X, 1)
    session.detach()


# Models ------------------------------------------------------------------------------------------


class Packed(torch.Tensor):
    """A tensor subclass, as quantisers make them."""


def lonely() -> nn.Module:
    """A model without repeated modules."""

    class Lonely(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.only(x)

    return Lonely()


def on_meta() -> nn.Module:
    model = make_stack()
    model.blocks[3].to("meta")
    return model


def packed() -> nn.Module:
    model = make_stack()
    model.blocks[3].up.bias = nn.Parameter(
        torch.zeros(2 * HIDDEN).as_subclass(Packed), requires_grad=False
    )
    return model


def offloaded_otherwise() -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(make_stack(), execution_device=torch.device("cpu"))


BAD_MODELS = [
    (lonely, ConfigError, r"no blocks found in Lonely.*Linear x1.*Pass blocks="),
    (on_meta, ConfigError, r"8 of 52 parameters are on the meta device.*'blocks\.3\.norm\.weight'"),
    (packed, UnsupportedError, r"'blocks\.3\.up\.bias' is Packed"),
    (offloaded_otherwise, ConfigError, r"accelerate offloads.*remove_hook_from_module"),
    (lambda: nn.ModuleList([nn.ReLU(), nn.ReLU()]), ConfigError, r"holds no parameters"),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD_MODELS)
def test_unfit_model_is_refused_and_untouched(
    make: Any, error: type[BlockswapError], text: str
) -> None:
    model = make()
    hooks = [(m, list(m.__dict__), dict(m._forward_pre_hooks)) for m in model.modules()]
    tensors = [(n, id(p), p._version) for n, p in model.named_parameters()]
    with pytest.raises(error, match=text):
        attach(model, offload=1)
    assert [(m, list(m.__dict__), dict(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [(n, id(p), p._version) for n, p in model.named_parameters()] == tensors


@pytest.mark.parametrize("thing", [None, "flux", Block, torch.zeros(2)])
def test_what_is_no_model_is_refused_by_type(thing: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"accepted: a diffusers pipeline, or a torch\.nn\.Module"
    ):
        blockswap.attach(thing, device="cpu")


def test_blocks_without_anything_to_stream_are_refused() -> None:
    # The norms are far below 1/64 of the largest module.
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN))
    with pytest.raises(ConfigError, match="hold no module of 64 KiB or more: nothing to stream"):
        attach(model.requires_grad_(False), blocks=["1", "2"])

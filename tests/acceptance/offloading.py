"""Attaches what diffusers wants to put under group offloading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.hooks import group_offloading
from torch import nn

import blockswap
from blockswap import shim
from blockswap.pieces import image_bytes
from blockswap.session import Session

Attached = Callable[[Session], None]


def replace_group_offloading(attached: Attached) -> None:
    """Let diffusers attach models instead; every way to group offloading ends in one function.

    `apply_group_offloading`, `enable_group_offload` of models and of pipelines and the LoRA loaders
    call it after their own checks, which stay in force.

    Args:
        attached: hears of each new session.
    """

    def apply(module: nn.Module, config: Any) -> None:
        attached(attach(module, config))

    group_offloading._apply_group_offloading = apply


def attach(module: nn.Module, config: group_offloading.GroupOffloadingConfig) -> Session:
    """Attach a module as a group offloading config asks: as little of it on the device as can be.

    It is frozen: some tests call it in grad mode, which a streamed model refuses, and none asks
    for gradients.
    """
    module.requires_grad_(False)
    is_leaf_level = config.offload_type is group_offloading.GroupOffloadingType.LEAF_LEVEL
    lookahead = 0 if config.stream is None else 1
    largest = max(image_bytes(part.parameters(recurse=False)) for part in module.modules())
    session = blockswap.attach(
        module,
        device=config.onload_device,
        offload=f"{sum(p.nbytes for p in module.parameters())} B",
        swap_space=largest * (1 + lookahead),
        mode="layerwise" if is_leaf_level else "adaptive",
        lookahead=lookahead,
    )
    assert isinstance(session, Session)
    shim.register(module, shim.ShimConfig(session.config.target_device()))
    return session

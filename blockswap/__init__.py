"""Run diffusion models that do not fit in VRAM at the speed of ones that do, bit-identical."""

from blockswap._version_check import check

check()

from blockswap.attach import attach  # noqa: E402
from blockswap.config import SwapConfig  # noqa: E402
from blockswap.errors import (  # noqa: E402
    BlockswapError,
    CapError,
    ConfigError,
    DeviceError,
    UnsupportedError,
    UseError,
)
from blockswap.pieces import leaf_bytes  # noqa: E402
from blockswap.pipeline import PipelineSession  # noqa: E402
from blockswap.pipeline_report import PipelineReport  # noqa: E402
from blockswap.report import Report, Timeline  # noqa: E402
from blockswap.session import Session  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BlockswapError",
    "CapError",
    "ConfigError",
    "DeviceError",
    "PipelineReport",
    "PipelineSession",
    "Report",
    "Session",
    "SwapConfig",
    "Timeline",
    "UnsupportedError",
    "UseError",
    "attach",
    "leaf_bytes",
]

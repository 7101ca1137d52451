"""The tests that fail with blockswap, each with its reason; any other failure is one.

A test on this list must fail, and with the error that stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest

from blockswap.errors import ConfigError


@dataclass(frozen=True)
class Deviation:
    """Tests that are expected to fail.

    Attributes:
        tests: pattern on the test's id.
        reason: why blockswap, or diffusers itself, does not do what they ask.
        raises: how they fail.
    """

    tests: str
    reason: str
    raises: pytest.RaisesExc[Any]


NO_BLOCKS = "a model without repeated modules is refused; the refusal says to name its blocks"
REFUSED = pytest.RaisesExc(ConfigError, match="no blocks found")

DEVIATIONS = (
    Deviation(
        "tests/hooks/*::test_offloading_forward_pass",
        "wants leaf level with streams below block level without; ours holds two leaves with streams"
        " and one without, at either level",
        pytest.RaisesExc(AssertionError, match=r"^assert \d+ <=? \d+"),
    ),
    Deviation(
        "tests/hooks/*::test_error_raised_if_streams_used_and_no_accelerator_device",
        "fails without blockswap, too: diffusers 0.42 no longer asks whether the device is there",
        pytest.RaisesExc(pytest.fail.Exception, match="DID NOT RAISE ValueError"),
    ),
    Deviation(
        "tests/hooks/*::test_model_with_only_standalone_layers",
        NO_BLOCKS,
        REFUSED,
    ),
    Deviation(
        "tests/pipelines/ltx/test_ltx_latent_upsample.py::*::test_pipeline_level_group_offloading_inference",
        NO_BLOCKS,
        REFUSED,
    ),
    Deviation(
        "*::test_pipeline_level_group_offloading_sanity_checks",
        "wants a model's first parameter on the CPU between forwards; ours stays on the device, so"
        " that code that asks it for the model's device is told the right one",
        pytest.RaisesExc(AssertionError),
    ),
    Deviation(
        "*::test_group_offloading_with_disk*",
        "weights stay in host memory, no files are written; the test makes its model under"
        " torch.inference_mode(), and such parameters are refused",
        pytest.RaisesExc(ConfigError, match="inference_mode"),
    ),
)


def deviation(test: str) -> Deviation | None:
    """Return the deviation that a test is, if it is one."""
    return next((entry for entry in DEVIATIONS if fnmatchcase(test, entry.tests)), None)

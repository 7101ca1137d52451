"""Fixtures for the fake accelerator's own tests. Other suites that use it call `fake.load()` themselves."""

from __future__ import annotations

import pytest

from tests import fake


@pytest.fixture(scope="session")
def device_module():
    return fake.load()


@pytest.fixture(autouse=True)
def clean(device_module):
    """Every test starts idle, without delays or limits, on stream 0 of device 0."""
    yield
    device_module.reset()

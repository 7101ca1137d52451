"""Sessions on the fake accelerator: asynchronous operators, real races. Own pytest process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests import fake

TOTAL = 128 * 2**20


@pytest.fixture(scope="session")
def accelerator() -> ModuleType:
    return fake.load()


@pytest.fixture
def base(accelerator: ModuleType) -> int:
    """What earlier tests still hold; the rest of the card is `TOTAL`."""
    gc.collect()
    held = int(accelerator.memory_allocated())
    accelerator.set_limit(held + TOTAL)
    return held


@pytest.fixture(autouse=True)
def idle(accelerator: ModuleType) -> Iterator[None]:
    """Every test starts and ends without delays or limits."""
    yield
    accelerator.drain()
    accelerator.reset_delays()
    accelerator.set_limit(None)
    accelerator.fail_allocation(None)
    assert accelerator.get_per_process_memory_fraction() == 1.0, "PyTorch's limit was left behind"

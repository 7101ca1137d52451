"""Sessions on the fake accelerator: asynchronous operators, real races. Own pytest process."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests import fake


@pytest.fixture(scope="session")
def accelerator() -> ModuleType:
    return fake.load()


@pytest.fixture(autouse=True)
def idle(accelerator: ModuleType) -> Iterator[None]:
    """Every test starts and ends without delays or limits."""
    yield
    accelerator.drain()
    accelerator.reset_delays()
    accelerator.set_limit(None)
    accelerator.fail_allocation(None)
    assert accelerator.get_per_process_memory_fraction() == 1.0, "PyTorch's limit was left behind"

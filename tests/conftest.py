"""Makes the repository root importable: ``from blockswap.bench import zoo``; common fixtures."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Slow, shared machines run these: no deadline, and inputs may take their time to be found.
settings.register_profile(
    "blockswap",
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("blockswap")


@pytest.fixture(autouse=True)
def settles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests count the steps of learning: on a machine that does other things, too."""
    monkeypatch.setattr("blockswap.learning.MOST_SETTLED", 1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread: results do not depend on how work is shared out."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""An environment that sets no option of blockswap."""

import dataclasses

import pytest

from blockswap.config import SwapConfig


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for field in dataclasses.fields(SwapConfig):
        monkeypatch.delenv(f"BLOCKSWAP_{field.name.upper()}", raising=False)

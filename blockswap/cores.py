"""Processor cores."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Return how many this thread, and one that it begins, may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

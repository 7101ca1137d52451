"""Makes the repository root importable, so that tests can say ``from blockswap.bench import zoo``."""

import sys
from pathlib import Path

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

"""Makes the repository root importable, so that tests can say ``from benchmarks import zoo``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

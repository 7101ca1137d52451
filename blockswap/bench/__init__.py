"""Engines side by side: `blockswap bench`."""

from blockswap.bench.compare import Comparison, compare
from blockswap.bench.run import BenchRequest, run_bench

__all__ = ["BenchRequest", "Comparison", "compare", "run_bench"]

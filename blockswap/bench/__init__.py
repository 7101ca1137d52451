"""Engines side by side: `blockswap bench`."""

from blockswap.bench.compare import Comparison, compare
from blockswap.bench.request import BenchRequest
from blockswap.bench.run import run_bench

__all__ = ["BenchRequest", "Comparison", "compare", "run_bench"]

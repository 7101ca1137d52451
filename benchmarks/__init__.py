"""Benchmarks of blockswap and its peers; also the model zoo that the tests use."""

"""`blockswap demo`: a real diffusers pipeline, whole and swapped, from one checkpoint and one seed.

Nothing is downloaded: the weights are random, so the picture is a texture, and what counts is that
both runs draw the same one.
"""

from blockswap.demo.run import DemoRequest, DemoResult, run_demo

__all__ = ["DemoRequest", "DemoResult", "run_demo"]

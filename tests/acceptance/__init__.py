"""diffusers' own group offloading tests, with blockswap in the place of group offloading.

    python -m tests.acceptance --diffusers-tests PATH    # PATH: a checkout of diffusers

The plugin also runs alone, on tests of one's own: `pytest -p tests.acceptance.plugin`.
"""

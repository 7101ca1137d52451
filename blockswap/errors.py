"""The errors that blockswap raises: each names the thing, the numbers and the way out.

All derive from :class:`BlockswapError`; C++ exceptions of the same names become these.
"""

from __future__ import annotations


class BlockswapError(Exception):
    """Base of every error that blockswap raises on purpose."""


class ConfigError(BlockswapError, ValueError):
    """A setting, a model or a file that cannot be used as given; nothing has been changed."""


class CapError(ConfigError):
    """The memory that was allowed is too small, or more than there is; names both numbers."""


class UnsupportedError(ConfigError):
    """An option whose capability is not built yet: refused by name, never ignored."""


class UseError(BlockswapError, RuntimeError):
    """A live session used in a way that would give wrong values (two forwards at once)."""


class DeviceError(BlockswapError, RuntimeError):
    """A device that does not exist, or whose driver reported a failure."""

"""Autocast's cache of cast weights, off while a model streams."""

from __future__ import annotations

import torch


class AutocastCache:
    """Would keep a cast copy of every weight on the device until autocast ends."""

    def __init__(self) -> None:
        self._was_on = False

    def turn_off(self, device_type: str) -> None:
        """Turn it off if autocast is on for this type of device."""
        if torch.is_autocast_enabled(device_type) and torch.is_autocast_cache_enabled():
            torch.set_autocast_cache_enabled(False)
            self._was_on = True

    def restore(self) -> None:
        """Turn it on again if it was. Safe to call twice."""
        if self._was_on:
            torch.set_autocast_cache_enabled(True)
            self._was_on = False

"""Who calls: what the Python stack says about a parameter's reader and a module's forward."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

from torch import nn

_GETATTR = nn.Module.__getattr__.__code__


def reader() -> CodeType:
    """Return the code that asked for a parameter: past the dict and `nn.Module.__getattr__`."""
    frame = sys._getframe(2)
    if frame.f_code is _GETATTR and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code


def is_running(module: nn.Module) -> bool:
    """Whether a call of the module is on this thread's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False

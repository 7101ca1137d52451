"""Who calls: what the Python stack says about a parameter's reader and a module's forward."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

from torch import nn

_MODULE_FILE = nn.Module.__getattr__.__code__.co_filename
_DOORS_FILE = __file__.replace("callers.py", "hooks.py")
# Functions of diffusers and transformers that ask a module's parameters for nothing but that.
_METADATA_READERS = frozenset(
    {"get_parameter_dtype", "get_parameter_device", "get_first_parameter_dtype"}
)


def reader() -> CodeType:
    """Return the code that asked for a parameter: past the dict and `nn.Module`'s own methods."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == _MODULE_FILE and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code


def reads_metadata(code: CodeType) -> bool:
    """Whether code wants a parameter's dtype or device, not its values."""
    return code.co_name in _METADATA_READERS


def is_running(module: nn.Module) -> bool:
    """Whether a call of the module, or of its forward in front of which ours stands, is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name, variables = frame.f_code.co_name, frame.f_locals
        if name == "_call_impl" and variables.get("self") is module:
            return True
        if frame.f_code.co_filename == _DOORS_FILE and variables.get("module") is module:
            return True
        frame = frame.f_back
    return False

"""Who calls: what the Python stack says about a parameter's reader and a module's forward."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Container
from types import CodeType, FrameType

from torch import nn

_MODULE_FILE = nn.Module.__getattr__.__code__.co_filename
_DOORS_FILE = __file__.replace("callers.py", "hooks.py")
# Functions of diffusers and transformers that ask a module's parameters for nothing but that.
_METADATA_READERS = frozenset(
    {"get_parameter_dtype", "get_parameter_device", "get_first_parameter_dtype", "dtype", "device"}
)


# Attributes and methods of a tensor that tell nothing of its values.
_METADATA = frozenset(
    {
        *("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta", "requires_grad"),
        *("dim", "size", "numel", "element_size", "is_floating_point"),
    }
)
_ATTRIBUTE, _CALL = ("LOAD_ATTR", "LOAD_METHOD"), ("CALL", "CALL_FUNCTION")
_NAME = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FAST", "LOAD_DEREF", "LOAD_FAST_BORROW")
_NO_MATTER = ("PRECALL", "CACHE", "PUSH_NULL", "NOP", "EXTENDED_ARG")


def reader() -> FrameType:
    """Return who asked for a parameter: past the dict and `nn.Module`'s own methods."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == _MODULE_FILE and frame.f_back is not None:
        frame = frame.f_back
    return frame


def reads_metadata(frame: FrameType) -> bool:
    """Whether whoever asks wants a parameter's dtype, device, shape or class, not its values."""
    code, caller = frame.f_code, frame.f_back
    # `next(p.dtype for p in self.parameters())`, as transformers has it.
    name = code.co_name
    if name == "<genexpr>" and caller is not None:
        name = caller.f_code.co_name
    return name in _METADATA_READERS or _drops_values(code, frame.f_lasti)


@functools.lru_cache(maxsize=4096)
def _drops_values(code: CodeType, offset: int) -> bool:
    """Whether what the instruction there loads is only asked for metadata.

    ``layer.weight.dtype`` and ``isinstance(layer.weight, Tensor)`` are, as T5 does it.
    """
    told = [i for i in dis.get_instructions(code) if i.opname not in _NO_MATTER]
    at = next((n for n, instruction in enumerate(told) if instruction.offset == offset), None)
    if at is None or told[at].opname not in _ATTRIBUTE or at + 1 == len(told):
        return False
    after = told[at + 1]
    if after.opname in _ATTRIBUTE:
        return after.argval in _METADATA
    return _is_asked_for_its_class(told, at)


def _is_asked_for_its_class(told: list[dis.Instruction], at: int) -> bool:
    """Whether the value goes into ``isinstance(value, some.class)`` and nowhere else."""
    end = at + 1
    while end < len(told) and told[end].opname in (*_NAME, *_ATTRIBUTE):
        end += 1
    begin = at
    while begin > 0 and told[begin].opname in _ATTRIBUTE:
        begin -= 1
    if end in (at + 1, len(told)) or begin == 0:
        return False
    names = sum(instruction.opname in _NAME for instruction in told[at + 1 : end])
    is_call = names == 1 and told[end].opname in _CALL and told[end].arg == 2
    function = told[begin - 1]
    return is_call and function.opname == "LOAD_GLOBAL" and function.argval == "isinstance"


def num_running(owner: object, names: Container[str]) -> int:
    """Return how many calls of an object's methods of these names are running in this thread."""
    frame: FrameType | None = sys._getframe(1)
    found = 0
    while frame is not None:
        if frame.f_code.co_name in names and frame.f_locals.get("self") is owner:
            found += 1
        frame = frame.f_back
    return found


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

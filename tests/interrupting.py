"""Ctrl-C between any two lines of ours."""

from __future__ import annotations

import gc
import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import blockswap

OURS = str(Path(blockswap.__file__).parent) + os.sep


def is_interrupted(act: Callable[[], Any], at: int, within: str | tuple[str, ...] = OURS) -> bool:
    """Run it, with Ctrl-C before the line of blockswap that is the ``at``-th to run.

    Python calls no signal handler between the last line of a ``with`` block and ``__exit__``, and
    so neither does this: an exception there, which only a tracer can raise, would leave locks
    taken.

    Args:
        act: what to run.
        at: from 1.
        within: how the names of the files begin whose lines count.

    Returns:
        Whether there were so many.
    """
    line = 0

    def hear(called: FrameType, _event: str, _arg: Any) -> Any:
        if not called.f_code.co_filename.startswith(within):
            return None
        entered: set[int] = set()

        def step(frame: FrameType, event: str, _arg: Any) -> Any:
            nonlocal line
            if event == "line" and not is_leaving(frame, entered):
                line += 1
                if line == at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return step

        return step

    before = sys.gettrace()
    gc.disable()  # finalizers of what earlier tests left are not what is to be interrupted
    sys.settrace(hear)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        gc.enable()
    return False


def is_leaving(frame: FrameType, entered: set[int]) -> bool:
    """Whether a frame's line is a ``with`` that comes by for the second time, to be left.

    Args:
        frame: stands before a line.
        entered: lines of the ``with`` blocks it is in; brought up to date.
    """
    number = frame.f_lineno
    if not linecache.getline(frame.f_code.co_filename, number).lstrip().startswith("with "):
        return False
    is_second = number in entered
    entered ^= {number}
    return is_second

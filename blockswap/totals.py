"""What happened to one session's plans."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Totals:
    """What happened since attach.

    Attributes:
        mispredicted, refetched: pieces, under the plans before the installed one.
        sheds, growths: plans for less, for more memory, since it was taken or left.
        ooms: forwards that PyTorch ended for lack of memory.
        rungs: how often each rung of the ladder was taken then.
    """

    mispredicted: int = 0
    refetched: int = 0
    sheds: int = 0
    growths: int = 0
    ooms: int = 0
    rungs: Counter[str] = field(default_factory=Counter)

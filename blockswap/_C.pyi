"""The C++ engine; its classes are documented in csrc/*.h."""

from types import CodeType
from typing import Any

from torch.nn import Parameter

class WatchedDict(dict[str, Parameter | None]):
    """A dict that calls `read` unless reading is harmless."""

    def set_readers(self, readers: dict[int, CodeType]) -> None: ...

def __getattr__(name: str) -> Any: ...

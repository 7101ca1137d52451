"""The C++ engine; its classes are documented in csrc/*.h."""

from typing import Any

def __getattr__(name: str) -> Any: ...

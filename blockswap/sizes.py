"""Bytes as people write them: the only place in Python where text becomes bytes and back."""

from __future__ import annotations

import operator
import re
from fractions import Fraction

from blockswap.errors import ConfigError

#: Bytes per unit. ``KiB`` and its kin are powers of 1024, ``kB`` and its kin powers of 1000.
UNIT_BYTES: dict[str, int] = {
    "b": 1,
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
}
ACCEPTED_SIZES = "accepted: '10GiB', '512 MiB', '10GB' (10^9), '4096B', or an int of bytes"

_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)", re.ASCII)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*%", re.ASCII)
_DECIMAL = re.compile(r"\d*\.\d+", re.ASCII)
_MAX_BYTES = 2**63 - 1  # what int64_t holds: the engine counts bytes in it
_MAX_TEXT = 64  # longer text is no size, and int() of endless digits is slow


def parse_size(value: int | str, name: str = "size") -> int:
    """Return a size in bytes.

    Args:
        value: bytes as an int, or text: a number and a unit, ``"10GiB"``, ``"1.5 MiB"``,
            ``"10GB"`` (10^9 bytes), ``"4096B"``, in any case; digits alone are bytes.
            Fractions of a byte are cut off.
        name: what the error message calls the value.

    Raises:
        ConfigError: anything else: no or unknown unit after a fraction, NaN, infinite, negative,
            bool, float, or more than 2^63 - 1 bytes.

    >>> parse_size("1.5 GiB")
    1610612736
    """
    if isinstance(value, str):
        num_bytes = _parse_text(value, name)
    else:
        num_bytes = parse_int(value, name, ACCEPTED_SIZES)
    if not 0 <= num_bytes <= _MAX_BYTES:
        raise ConfigError(f"{name}={value!r} is not between 0 and 2^63 - 1 bytes; {ACCEPTED_SIZES}")
    return num_bytes


def parse_int(value: object, name: str, accepted: str) -> int:
    """Return ``value`` as a plain int; a bool, a float or text is refused with ``accepted``.

    Raises:
        ConfigError: not an integer.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise ConfigError(f"{name}={value!r} is a {type(value).__name__}; {accepted}")


def parse_fraction(text: str) -> float | None:
    """Return ``"80%"`` or ``"0.8"`` as 0.8, and None for text that is neither.

    >>> parse_fraction("80 %")
    0.8
    """
    text = text.strip()
    if len(text) > _MAX_TEXT:
        return None
    if match := _PERCENT.fullmatch(text):
        return float(Fraction(match[1]) / 100)
    return float(text) if _DECIMAL.fullmatch(text) else None


def has_unit(text: str) -> bool:
    """Say whether ``text`` is a number followed by a known unit of bytes."""
    match = _SIZE.fullmatch(text.strip())
    return match is not None and match[2].lower() in UNIT_BYTES


def format_bytes(num_bytes: int) -> str:
    """Return bytes for people, the same text as C++ writes: ``"512 B"``, ``"1.25 GiB"``.

    >>> format_bytes(1342177280)
    '1.25 GiB'
    """
    if abs(num_bytes) < 1024:
        return f"{num_bytes} B"
    value = num_bytes / 1024
    units = ["KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.2f} {units[0]}" if units[0] in ("GiB", "TiB") else f"{value:.1f} {units[0]}"


def _parse_text(text: str, name: str) -> int:
    stripped = text.strip()
    if len(stripped) <= _MAX_TEXT:
        if stripped.isascii() and stripped.isdigit():
            return int(stripped)
        match = _SIZE.fullmatch(stripped)
        if match and (unit_bytes := UNIT_BYTES.get(match[2].lower())):
            return int(Fraction(match[1]) * unit_bytes)  # exact: a float would round 2^53 and more
    raise ConfigError(f"{name}={text!r} is not a size; {ACCEPTED_SIZES}")

"""What each option of SwapConfig accepts: text or a value in, its one canonical form out."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from typing import Any, Literal, get_args

import torch
from torch import nn

from blockswap import _C
from blockswap.errors import ConfigError, UnsupportedError
from blockswap.sizes import (
    ACCEPTED_SIZES,
    format_bytes,
    has_unit,
    parse_fraction,
    parse_int,
    parse_size,
)

Mode = Literal["adaptive", "layerwise", "chunkwise"]
Priority = int | Literal["pin"]

_MODES: tuple[str, ...] = get_args(Mode)
_COMPRESS = ("off", "auto", "f3", "e2")
_MAX_COPY_STREAMS = 16
SMALLEST_BOUNCE_BYTES: int = _C.LEAST_BOUNCE_BYTES
BOUNCE_SHARE = 4  # the bounce ring takes this share of pinned memory at most
SMALLEST_HOST_MEMORY = BOUNCE_SHARE * SMALLEST_BOUNCE_BYTES
_MAX_BLOCK_COUNT = 10_000  # a larger int is a slip: bytes where blocks are counted
_FLAGS = dict.fromkeys(("1", "true", "on", "yes"), True)
_FLAGS |= dict.fromkeys(("0", "false", "off", "no"), False)


def setting(name: str, default: object = None) -> Any:
    """Return a dataclass field whose default is ``BLOCKSWAP_<NAME>`` where set, else ``default``.

    The field's metadata holds ``default`` and ``env``, for the docs and their test.
    """
    env = f"BLOCKSWAP_{name.upper()}"

    def from_environment() -> object:
        text = os.environ.get(env, "").strip()
        return CONVERT[name](env, _from_text(name, env, text)) if text else default

    return field(default_factory=from_environment, metadata={"default": default, "env": env})


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the valid name most like ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _from_text(name: str, env: str, text: str) -> object:
    """Turn an environment variable's text into what the option takes in Python."""
    try:
        if name in ("lookahead", "copy_streams") or (name == "offload" and not has_unit(text)):
            return int(text)
        if name == "throttle":
            return float(text)
        if name == "check":
            return _FLAGS[text.lower()]
    except (ValueError, KeyError):
        accepted = {
            "throttle": "accepted: GB/s above 0, such as 12.5",
            "check": f"accepted: {', '.join(_FLAGS)}",
            "offload": "accepted: a count of blocks, or bytes as in 8GiB",
        }.get(name, "accepted: a whole number")
        raise ConfigError(f"{env}={text!r} cannot be read; {accepted}") from None
    return text


def _device(name: str, value: object) -> str | None:
    if value is None:
        return None
    accepted = 'accepted: "cuda", "cuda:1", "cpu", a torch.device, or None for the current one'
    if not isinstance(value, (str, torch.device)):
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}; {accepted}")
    try:
        device = torch.device(value)
    except RuntimeError:
        raise ConfigError(
            f"{name}={value!r} is not a device that torch knows; {accepted}"
        ) from None
    if device.type == "meta":
        raise ConfigError(f"{name}={value!r} holds no values, so nothing can run there; {accepted}")
    return str(device)


def _vram(name: str, value: object) -> int | float | None:
    accepted = f"{ACCEPTED_SIZES}, or a share of the device's memory: 0.8 or '80%'"
    if isinstance(value, str) and (share := parse_fraction(value)) is not None:
        value = share
    if isinstance(value, float):
        if not 0.0 < value <= 1.0:  # NaN fails too
            raise ConfigError(
                f"{name}={value!r} is a float, so a share, but not in (0, 1]; {accepted}"
            )
        return float(value)
    return _size(name, value, accepted)


def _size(name: str, value: object, accepted: str = ACCEPTED_SIZES) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str):
        value = parse_int(value, name, accepted)
    num_bytes = parse_size(value, name)
    if num_bytes == 0:
        raise ConfigError(f"{name}={value!r} is no memory at all; {accepted}")
    return num_bytes


def _reserve(name: str, value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str):
        value = parse_int(value, name, "accepted: bytes, or text with a unit ('2GiB')")
    return parse_size(value, name)


def _host_memory(name: str, value: object) -> int | None:
    num_bytes = _size(name, value)
    if num_bytes is not None and num_bytes < SMALLEST_HOST_MEMORY:
        raise ConfigError(
            f"{name}={value!r} is too little for the ring that unpinned weights pass through;"
            f" accepted: {format_bytes(SMALLEST_HOST_MEMORY)} and above, or None"
        )
    return num_bytes


def _offload(name: str, value: object) -> int | str | dict[str, int] | None:
    accepted = (
        "accepted: an int counts blocks, a dict counts blocks per list"
        " ({'transformer_blocks': 19}), text is bytes of weights ('8GiB')"
    )
    if value is None:
        return None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{name} has the key {key!r}, not a list's name; {accepted}")
        return {key: _count(f"{name}[{key!r}]", value[key], accepted) for key in value}
    if not isinstance(value, str):
        return _count(name, value, accepted)
    if not has_unit(value):
        raise ConfigError(
            f"{name}={value!r} has no unit: write '8GiB' for bytes, 8 for blocks; {accepted}"
        )
    return f"{parse_size(value, name)}B"  # text stays text: an int would count blocks


def _count(name: str, value: object, accepted: str) -> int:
    count = parse_int(value, name, accepted)
    if count < 0:
        raise ConfigError(f"{name}={count} is negative; {accepted}")
    if count > _MAX_BLOCK_COUNT:
        raise ConfigError(
            f"{name}={count}: an int counts blocks; for bytes write '8GiB' or '{count}B'"
        )
    return count


def _one_of(name: str, value: object, valid: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in valid:
        return value
    hint = nearest(value, valid) if isinstance(value, str) else ""
    raise ConfigError(f"{name}={value!r} is not known{hint}; accepted: {', '.join(valid)}")


def _between(name: str, value: object, low: int, high: int | None = None) -> int:
    accepted = f"accepted: {low} to {high}" if high is not None else f"accepted: {low} and above"
    number = parse_int(value, name, accepted)
    if number < low or (high is not None and number > high):
        raise ConfigError(f"{name}={number} is out of range; {accepted}")
    return number


def _lookahead(name: str, value: object) -> int | None:
    return None if value is None else _between(name, value, 0)


def _compress(name: str, value: object) -> str:
    if _one_of(name, value, _COMPRESS) != "off":
        raise UnsupportedError(f'{name}={value!r} is not supported yet; use compress="off"')
    return "off"


def _unsupported(name: str, value: object) -> None:
    if value is not None:
        raise UnsupportedError(f"{name}={value!r}: {name} is not supported yet; leave it out")


def _throttle(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and value is not True and 0 < value < math.inf:
        return float(value)
    raise ConfigError(
        f"{name}={value!r} is not a speed; accepted: GB/s above 0, such as 12.5, or None"
    )


def _check(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{name}={value!r} is a {type(value).__name__}; accepted: True, False")


def _priorities(name: str, value: object) -> dict[str, Priority] | None:
    if value is None:
        return None
    accepted = "accepted: a dict of pattern -> int from 0 (goes first) or 'pin'"
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}; {accepted}")
    found: dict[str, Priority] = {}
    for pattern, priority in value.items():
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"{name} has the pattern {pattern!r}; {accepted}")
        label = f"{name}[{pattern!r}]"
        if isinstance(priority, str) and priority == "pin":
            found[pattern] = "pin"
            continue
        number = parse_int(priority, label, accepted)
        if number < 0:
            raise ConfigError(f"{label}={number} is negative; {accepted}")
        found[pattern] = number
    return found or None


def _blocks(name: str, value: object) -> tuple[nn.Module | str, ...] | None:
    if value is None:
        return None
    accepted = "accepted: a list of modules, names or patterns, such as ['transformer_blocks.*']"
    entries: tuple[object, ...]
    if isinstance(value, (str, nn.Module)):
        entries = (value,)
    elif isinstance(value, Iterable):
        entries = tuple(value)
    else:
        raise ConfigError(f"{name}={value!r} is a {type(value).__name__}; {accepted}")
    checked: list[nn.Module | str] = []
    for entry in entries:
        if not isinstance(entry, (str, nn.Module)) or entry == "":
            raise ConfigError(f"{name} holds {entry!r}, a {type(entry).__name__}; {accepted}")
        checked.append(entry)
    if not checked:
        raise ConfigError(f"{name} is empty; leave it out to have the blocks found; {accepted}")
    return tuple(checked)


#: Option -> what checks it and gives its canonical form; the label is for the error message.
CONVERT: dict[str, Callable[[str, object], object]] = {
    "device": _device,
    "vram": _vram,
    "offload": _offload,
    "reserve": _reserve,
    "host_memory": _host_memory,
    "swap_space": _size,
    "block_size": _size,
    "mode": lambda name, value: _one_of(name, value, _MODES),
    "lookahead": _lookahead,
    "donors": _unsupported,
    "compress": _compress,
    "copy_streams": lambda name, value: _between(name, value, 1, _MAX_COPY_STREAMS),
    "priorities": _priorities,
    "blocks": _blocks,
    "throttle": _throttle,
    "check": _check,
}

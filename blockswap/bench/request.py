"""What a bench is to measure."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from blockswap.bench import zoo
from blockswap.bench.engines import NAMES, PEERS, Engine
from blockswap.errors import ConfigError

MIN_STEPS = 2


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    Attributes:
        models: of `blockswap.bench.zoo`.
        size: "full" as published, or "tiny".
        engines: names; empty: all that are installed.
        steps: timed ones of the fast engines.
        device: where to run.
        out: the result file.
    """

    models: tuple[zoo.Kind, ...]
    size: zoo.Size
    engines: tuple[str, ...]
    steps: int
    device: str
    out: Path

    def __post_init__(self) -> None:
        unknown = [name for name in self.engines if name not in NAMES]
        if unknown:
            raise ConfigError(f"unknown engine {unknown[0]}: choose from {', '.join(NAMES)}")
        strange = [kind for kind in self.models if kind not in zoo.KINDS]
        if strange:
            raise ConfigError(f"unknown model {strange[0]}: choose from {', '.join(zoo.KINDS)}")
        if self.size not in ("tiny", "full"):
            raise ConfigError(f"unknown size {self.size}: tiny or full")
        if self.steps < MIN_STEPS:
            raise ConfigError(f"{self.steps} steps are too few to time: give {MIN_STEPS} or more")
        if importlib.util.find_spec("diffusers") is None:
            raise ConfigError("blockswap bench needs diffusers: pip install diffusers")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ConfigError(
                f"device {self.device}: this machine has no GPU that torch sees; --device cpu runs"
                " blockswap and the resident model alone"
            )

    def chosen_engines(self) -> list[Engine]:
        """Return the engines to run.

        Raises:
            ConfigError: one was named that is not installed.
        """
        if self.device == "cpu":
            return []  # none of them streams to a CPU
        for engine in PEERS:
            if engine.name in self.engines and not engine.is_installed:
                raise ConfigError(f"{engine.name} needs {engine.package}, which is not installed")
        return [e for e in PEERS if e.is_installed and e.name in (self.engines or NAMES)]

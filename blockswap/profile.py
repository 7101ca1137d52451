"""What was learned of a model on a machine, as a file: enough to plan without running."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic import ValidationError as _Invalid

from blockswap import _C
from blockswap.errors import CapError, ConfigError, UseError
from blockswap.room import cap_margin_bytes, cap_that_leaves
from blockswap.sizes import format_bytes
from blockswap.together import name_of

if TYPE_CHECKING:
    from blockswap.session import Session

SCHEMA = 1


class ProfiledLeaf(BaseModel):
    """A leaf module: where it stands, its image, and what it costs device and host."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: str
    block: int
    bytes: PositiveInt
    seconds: NonNegativeFloat
    tail_seconds: NonNegativeFloat = 0.0
    host_seconds: NonNegativeFloat


class _Version(BaseModel):
    schema_version: int = SCHEMA


class Profile(BaseModel):
    """One model, one input shape, one machine.

    Attributes:
        model: class of the model.
        device: name of the device, or its type.
        blocks: (name, list) of each block.
        leaves: in the order in which they run.
        fixed_bytes: what the device holds beside residents and ring: weights that never stream,
            and the peak of what PyTorch reserves for activations.
        link_bytes_per_s: of one pinned copy after the other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    schema_version: int = SCHEMA
    model: str
    device: str
    blocks: list[tuple[str, str]]
    leaves: list[ProfiledLeaf] = Field(min_length=1)
    fixed_bytes: int
    link_bytes_per_s: PositiveFloat
    head_seconds: NonNegativeFloat = 0.0
    head_host_seconds: NonNegativeFloat = 0.0
    host_seconds_per_copy: NonNegativeFloat = 0.0

    @classmethod
    def of(cls, session: Session) -> Profile:
        """Return what a session has learned of the input shape that ran last.

        Raises:
            UseError: it is still learning.
        """
        steward = session._steward
        learned, state = steward.learned, session._state
        if session.state != "ready":
            raise UseError(
                f"the session is {session.state}: run forwards until session.state is 'ready'"
            )
        leaves = [
            ProfiledLeaf(
                name=leaf.name,
                block=leaf.block,
                bytes=leaf.bytes,
                seconds=leaf.seconds,
                tail_seconds=leaf.tail_seconds,
                host_seconds=leaf.host_seconds,
            )
            for leaf in steward.plans.request.leaves
        ]
        return cls(
            model=name_of(session.model),
            device=_device_name(state.device),
            blocks=[(block.name, block.list) for block in steward.plans.request.blocks],
            leaves=leaves,
            fixed_bytes=(learned.fixed_bytes or state.fixed.bytes) + state.small_bytes,
            link_bytes_per_s=steward.plans.link.speed,
            head_seconds=learned.head_seconds,
            head_host_seconds=learned.head_host_seconds,
            host_seconds_per_copy=learned.host_seconds_per_copy,
        )

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file is no profile, or of a newer blockswap.
        """
        content = Path(path).read_bytes()
        try:
            version = _Version.model_validate_json(content).schema_version
            if version > SCHEMA:
                raise ConfigError(
                    f"{path} has schema {version}, this blockswap reads {SCHEMA}: record it anew or"
                    " install a newer blockswap"
                )
            profile = cls.model_validate_json(content)
        except _Invalid as error:
            first: Any = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole file"
            text = f"{path} is no profile of blockswap: {where}: {first['msg']}"
            raise ConfigError(text) from None
        if any(not 0 <= leaf.block < len(profile.blocks) for leaf in profile.leaves):
            raise ConfigError(f"{path} is no profile of blockswap: a leaf names a missing block")
        return profile

    @property
    def is_timed(self) -> bool:
        """Whether it ran; an outline of a model knows bytes alone."""
        return any(leaf.seconds > 0 for leaf in self.leaves)

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all leaves."""
        return sum(leaf.bytes for leaf in self.leaves)

    @property
    def smallest_cap(self) -> int:
        """Return the smallest cap: a ring of the largest leaf beside what never streams."""
        return cap_that_leaves(self.fixed_bytes + max(leaf.bytes for leaf in self.leaves))

    @property
    def largest_cap(self) -> int:
        """Return the cap at which everything stays."""
        return cap_that_leaves(self.fixed_bytes + self.total_bytes)

    def plan(self, cap_bytes: int) -> tuple[_C.Plan, _C.PlanRequest]:
        """Return the plan under a cap, and what it was made for.

        Raises:
            CapError: the cap is below `smallest_cap`.
        """
        if cap_bytes < self.smallest_cap:
            raise CapError(
                f"the smallest plan of {self.model} needs {format_bytes(self.smallest_cap)}"
                f" ({format_bytes(self.fixed_bytes)} of activations and weights that never stream),"
                f" but the cap is {format_bytes(cap_bytes)}: raise --vram"
            )
        request = _C.PlanRequest()
        request.blocks = [_C.Block(name=name, list=of) for name, of in self.blocks]
        request.link = _C.Link(bytes_per_second=self.link_bytes_per_s)
        request.head_seconds = self.head_seconds
        request.host_seconds = self.head_host_seconds
        request.host_seconds_per_copy = self.host_seconds_per_copy
        request.budget_bytes = cap_bytes - self.fixed_bytes - cap_margin_bytes(cap_bytes)
        request.leaves = [_C.Leaf(**leaf.model_dump()) for leaf in self.leaves]
        return _C.make_plan(request), request

    def curve(self, points: int = 16) -> list[tuple[int, float]]:
        """Return (cap in bytes, predicted ms) from the smallest cap to everything resident.

        The points lie closer together where memory is short: there the step falls steeply.
        """
        width, last = self.largest_cap - self.smallest_cap, points - 1
        caps = [self.smallest_cap + width * i**2 // last**2 for i in range(points)]
        return [(cap, 1e3 * self.plan(cap)[0].predicted_seconds) for cap in caps]


def _device_name(device: torch.device) -> str:
    module = torch.get_device_module(device)
    name = getattr(module, "get_device_name", None)
    return str(name(device)) if name is not None else device.type

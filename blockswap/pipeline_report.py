"""What happened to a pipeline's components."""

from __future__ import annotations

import dataclasses
import json

from blockswap.guests import GuestReport
from blockswap.report import Report


@dataclasses.dataclass(frozen=True)
class PipelineReport:
    """What happened to a pipeline's components.

    Attributes:
        parts: the reports of the denoisers' sessions, by component.
        guests: the components that compute whole, by name.
    """

    parts: dict[str, Report]
    guests: dict[str, GuestReport]

    def __str__(self) -> str:
        parts = [f"pipe.{name}\n{report}" for name, report in self.parts.items()]
        guests = [f"pipe.{name}: {report}" for name, report in self.guests.items()]
        return "\n\n".join([*parts, "\n".join(guests)]).rstrip()

    def to_json(self) -> str:
        """Return all reports as one JSON object, by component."""
        parts = {name: json.loads(part.to_json()) for name, part in self.parts.items()}
        guests = {name: dataclasses.asdict(guest) for name, guest in self.guests.items()}
        return json.dumps(parts | guests)

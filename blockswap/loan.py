"""Whether an input shape runs under the plan of another one or has its own installed. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Loan:
    """The plan of another input shape, which stays as long as that is cheaper than to move.

    Shapes may alternate in each step: with prompts of two lengths Qwen-Image copied 16 GB of
    residents anew in every one, and took twice as long. Nobody knows how long a shape stays, so it
    moves once its steps have lost what moving costs: never more than twice the least (ski rental).

    Attributes:
        loss_seconds: what a step takes longer than under a plan of its own.
        price_seconds: what it takes to install that.
    """

    loss_seconds: float
    price_seconds: float
    _paid_seconds: float = field(default=0.0, init=False)

    def pay(self) -> bool:
        """Begin one more step; whether it still runs under the other plan."""
        self._paid_seconds += self.loss_seconds
        return self._paid_seconds <= self.price_seconds

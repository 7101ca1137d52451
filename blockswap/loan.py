"""Whether an input shape runs under the plan of another one or has its own installed. Pure."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property


class Loan:
    """The plan of another input shape, which stays as long as that is cheaper than to move.

    Shapes may alternate in each step: with prompts of two lengths Qwen-Image copied 16 GB of
    residents anew in every one, and took twice as long. Nobody knows how long a shape stays, so it
    moves once its steps have lost what moving costs: never more than twice the least (ski rental).

    Args:
        loss_seconds: what a step takes longer than under a plan of its own.
        price: says what it takes to install that; asked only of a shape that stays.
    """

    def __init__(self, loss_seconds: float, price: Callable[[], float]) -> None:
        self._loss_seconds = loss_seconds
        self._price = price
        self._paid_seconds = 0.0

    @cached_property
    def _price_seconds(self) -> float:
        return self._price()

    def pay(self) -> bool:
        """Begin one more step; whether it still runs under the other plan."""
        self._paid_seconds += self._loss_seconds
        return not self._loss_seconds or self._paid_seconds <= self._price_seconds

"""An input shape runs under the plan of another one until it has lost what moving costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockswap.loan import Loan


def steps_under_it(loan: Loan) -> int:
    """Return after how many steps the shape moves."""
    steps = 0
    while loan.pay():
        steps += 1
    return steps


@pytest.mark.parametrize(("loss_ms", "steps"), [(400, 0), (200, 1), (100, 3), (40, 7)])
def test_a_shape_moves_once_its_steps_have_lost_what_that_costs(loss_ms: int, steps: int) -> None:
    assert steps_under_it(Loan(loss_ms / 1000, lambda: 0.3001)) == steps


def test_a_plan_that_is_as_good_is_never_left() -> None:
    def price() -> float:
        raise AssertionError("nobody needs it")

    loan = Loan(0.0, price)
    assert all(loan.pay() for _ in range(1000))


@given(loss=st.floats(0.01, 10.0), price=st.floats(0.0, 10.0), stay=st.integers(0, 1000))
def test_however_long_it_stays_it_takes_at_most_twice_the_least(
    loss: float, price: float, stay: int
) -> None:
    under_it = min(stay, steps_under_it(Loan(loss, lambda: price)))
    took = loss * under_it + (price if stay > under_it else 0.0)
    assert took <= 2 * min(loss * stay, price) + 1e-6

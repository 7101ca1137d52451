"""What measured steps teach: times of the device and of the host, kept apart."""

from types import SimpleNamespace

import pytest

from blockswap.learning import MOST_SLOWDOWN, Learned, Stage, needed_slowdown, take_times
from blockswap.refine import FAR_AHEAD_S, HOOKS_SHARE, refine

MS = 1e-3


def step(spans, seconds, host_seconds, per_piece=0.0, measuring=0.0, waited=None):
    """A measured step, device and host; spans: (piece, issued, wait_begin, wait_end).

    waited: for the thread that issues fetches, before each piece and in all.
    """
    waited = waited or [0.0] * (len(spans) + 1)
    pieces = [SimpleNamespace(piece=p, wait_begin=b, wait_end=e, run_end=e) for p, _, b, e in spans]
    device = SimpleNamespace(pieces=pieces, step_seconds=seconds)
    host = SimpleNamespace(
        step_seconds=host_seconds,
        issued=[(p, issued) for p, issued, _, _ in spans],
        seconds_per_piece=per_piece,
        measuring_seconds_per_piece=measuring,
        waited=waited[:-1],
        waiting_seconds=waited[-1],
    )
    return device, host


def learn(
    samples, seconds, leaf_of_piece=((0,), (1,)), is_asynchronous=True, earlier=None, **known
):
    learned = Learned(order=list(range(len(seconds))), **known)
    learned.seconds = dict(enumerate(seconds))
    hosts = [host for _, host in samples] if is_asynchronous else []
    refine(learned, samples[-1][0], hosts, leaf_of_piece, earlier)
    return learned


def test_a_device_that_lags_behind_the_host_teaches_its_own_time():
    # The host issues all within 1 ms; the device computes 4 + 6 ms and waits 1 ms for a copy.
    sample = step([(0, 0.0, 0.5 * MS, 0.6 * MS), (1, 0.9 * MS, 4.6 * MS, 5.6 * MS)], 11.6 * MS, MS)
    learned = learn([sample], [1 * MS, 1 * MS])
    assert learned.seconds == pytest.approx({0: 4 * MS, 1: 6 * MS})


def test_a_device_that_caught_up_with_the_host_keeps_its_own_time():
    # It computes 1 ms per leaf, but gets work only every 5 ms.
    sample = step(
        [(0, 0.0, 0.01 * MS, 0.01 * MS), (1, 5 * MS, 5.01 * MS, 5.01 * MS)], 10 * MS, 10 * MS
    )
    learned = learn([sample], [1 * MS, 1 * MS])
    assert learned.seconds == pytest.approx({0: 1 * MS, 1: 1 * MS})
    assert learned.host_seconds == pytest.approx({0: 5 * MS, 1: 5 * MS})


def test_no_leaf_computes_longer_than_the_gap_in_which_it_ran():
    sample = step([(0, 0.0, 0.0, 0.0), (1, 5 * MS, 5 * MS, 5 * MS)], 10 * MS, 10 * MS)
    assert learn([sample], [7 * MS, 1 * MS]).seconds[0] == pytest.approx(5 * MS)


def test_what_a_piece_and_its_measuring_cost_the_host_is_no_leafs_time():
    sample = step(
        [(0, 0.0, 0.0, 0.0), (1, 5 * MS, 5 * MS, 5 * MS)],
        *(10 * MS, 10 * MS),
        per_piece=0.1 * MS,
        measuring=0.3 * MS,
    )
    learned = learn([sample], [1 * MS, 1 * MS])
    assert learned.host_seconds_per_copy == pytest.approx(HOOKS_SHARE * 0.1 * MS)
    assert learned.host_seconds[0] == pytest.approx(5 * MS - HOOKS_SHARE * 0.1 * MS - 0.3 * MS)


def test_a_host_that_waited_for_its_fetches_to_be_issued_is_no_slow_host():
    # It comes to the second piece after 5 ms, 4 of which it waited, and to the end 3 ms later.
    sample = step(
        [(0, 0.0, 0.01 * MS, 4 * MS), (1, 5 * MS, 5.01 * MS, 7 * MS)],
        *(8 * MS, 8 * MS),
        waited=[0.0, 4 * MS, 6 * MS],
    )
    learned = learn([sample], [1 * MS, 1 * MS])
    assert learned.host_seconds == pytest.approx({0: 1 * MS, 1: 1 * MS})


def test_a_host_far_ahead_is_not_in_the_way():
    # It may have waited for room in the device's queue: its own time is unknown, and harmless.
    late = 4 * FAR_AHEAD_S
    sample = step([(0, 0.0, late, late), (1, 5 * MS, 2 * late, 2 * late)], 3 * late, 10 * MS)
    assert learn([sample], [1 * MS, 1 * MS]).host_seconds == {0: 0.0, 1: 0.0}


def test_one_disturbed_step_does_not_count_for_the_host():
    def sample(disturbance):
        end = 5 * MS + disturbance
        return step([(0, 0.0, 0.0, 0.0), (1, end, end, end)], end + 5 * MS, end + 5 * MS)

    learned = learn([sample(0.0), sample(80 * MS), sample(0.0), sample(0.0)], [1 * MS, 1 * MS])
    assert learned.host_seconds[0] == pytest.approx(5 * MS)


@pytest.mark.parametrize("disturbances", [(80 * MS, 0.0), (0.0, 80 * MS)])
def test_of_two_steps_the_one_that_was_not_disturbed_counts_for_the_host(disturbances):
    def sample(disturbance):
        end = 5 * MS + disturbance
        return step([(0, 0.0, 0.0, 0.0), (1, end, end, end)], end + 5 * MS, end + 5 * MS)

    learned = learn([sample(disturbance) for disturbance in disturbances], [1 * MS, 1 * MS])
    assert learned.host_seconds[0] == pytest.approx(5 * MS)


def test_a_host_that_was_disturbed_in_every_step_elsewhere_is_learned_undisturbed():
    def sample(first, second):
        end = 10 * MS + first + second
        spans = [(0, 0.0, 0.0, 0.0), (1, 5 * MS + first, 5 * MS + first, 5 * MS + first)]
        return step(spans, end, end)

    late = 3 * MS
    samples = [sample(late, 0.0), sample(0.0, late), sample(late, 0.0), sample(0.0, late)]
    learned = learn([*samples, sample(late, late)], [1 * MS, 1 * MS])
    assert learned.host_seconds == pytest.approx({0: 5 * MS, 1: 5 * MS})


def test_a_gap_in_which_the_host_was_held_up_and_caught_up_again_keeps_another_steps_time():
    # The host stops for 60 ms after leaf 0; at piece 2 it is 20 ms ahead again.
    calm = step([(0, 0.0, 1 * MS, 1 * MS), (2, 2 * MS, 25 * MS, 25 * MS)], 45 * MS, 3 * MS)
    held_up = step([(0, 0.0, 1 * MS, 1 * MS), (2, 62 * MS, 83 * MS, 83 * MS)], 105 * MS, 63 * MS)
    known = {"earlier": calm[0], "unmeasured_seconds": 47 * MS}
    learned = learn([calm, held_up], [1 * MS] * 3, ((0,), (1,), (2,)), **known)
    assert learned.seconds == pytest.approx({0: 12 * MS, 1: 12 * MS, 2: 22 * MS})


def test_an_earlier_step_that_ran_other_pieces_does_not_count():
    other = step([(0, 0.0, 1 * MS, 1 * MS)], 2 * MS, 1 * MS)
    sample = step([(0, 0.0, 1 * MS, 1 * MS), (1, 1 * MS, 11 * MS, 11 * MS)], 21 * MS, 2 * MS)
    learned = learn([sample], [1 * MS, 1 * MS], earlier=other[0])
    assert learned.seconds == pytest.approx({0: 10 * MS, 1: 10 * MS})


def test_a_step_that_is_a_little_longer_than_an_earlier_one_counts_itself():
    # The clocks fall under load.
    cool = step([(0, 0.0, 1 * MS, 1 * MS), (1, 1 * MS, 11 * MS, 11 * MS)], 21 * MS, 2 * MS)
    hot = step([(0, 0.0, 1 * MS, 1 * MS), (1, 1 * MS, 12 * MS, 12 * MS)], 23 * MS, 2 * MS)
    learned = learn([cool, hot], [1 * MS, 1 * MS], earlier=cool[0])
    assert learned.seconds == pytest.approx({0: 11 * MS, 1: 11 * MS})


def test_residents_between_two_streamed_pieces_share_the_gap():
    # Leaf 1 stays: it runs in the gap that piece 0 begins.
    sample = step([(0, 0.0, 1 * MS, 1 * MS), (2, 0.1 * MS, 7 * MS, 7 * MS)], 9 * MS, 0.2 * MS)
    learned = learn([sample], [1 * MS, 2 * MS, 1 * MS], leaf_of_piece=((0,), (1,), (2,)))
    assert learned.seconds == pytest.approx({0: 2 * MS, 1: 4 * MS, 2: 2 * MS})


def test_work_before_the_first_leaf_is_the_heads():
    sample = step([(0, 2 * MS, 3 * MS, 3 * MS), (1, 2.1 * MS, 5 * MS, 5 * MS)], 7 * MS, 2.2 * MS)
    learned = learn([sample], [1 * MS, 1 * MS])
    assert (learned.head_seconds, learned.head_host_seconds) == pytest.approx((3 * MS, 2 * MS))


def test_a_step_without_streamed_pieces_is_one_gap():
    learned = learn([step([], 9 * MS, 6 * MS)], [1 * MS, 3 * MS], head_seconds=1 * MS)
    assert learned.seconds == pytest.approx({0: 2 * MS, 1: 6 * MS})
    assert sum(learned.host_seconds.values()) == pytest.approx(6 * MS)


def test_a_device_that_is_the_host_teaches_no_host_time():
    sample = step([(0, 0.0, 0.0, 0.0), (1, 5 * MS, 5 * MS, 5 * MS)], 10 * MS, 10 * MS)
    learned = learn([sample], [1 * MS, 1 * MS], is_asynchronous=False)
    assert learned.host_seconds == {0: 0.0, 1: 0.0}
    assert learned.seconds == pytest.approx({0: 5 * MS, 1: 5 * MS})


def test_steps_that_ran_other_pieces_teach_nothing_of_the_host():
    whole = step([(0, 0.0, 0.0, 0.0), (1, 5 * MS, 5 * MS, 5 * MS)], 10 * MS, 10 * MS)
    other = step([(0, 0.0, 0.0, 0.0)], 30 * MS, 30 * MS)
    assert learn([other, whole], [1 * MS, 1 * MS]).host_seconds[0] == pytest.approx(5 * MS)


def test_what_measuring_costs_the_device_is_no_leafs_time():
    # Both leaves compute 4 ms, 0.05 ms more while they are measured.
    measured = 8.1 * MS
    sample = step([(0, 0.0, 0.0, 0.0), (1, 0.1 * MS, 4.05 * MS, 4.05 * MS)], measured, 0.2 * MS)
    learned = learn([sample], [1 * MS, 1 * MS], unmeasured_seconds=8 * MS)
    assert learned.seconds[1] == pytest.approx(4 * MS)


def test_a_step_that_was_longer_for_another_reason_keeps_its_leaf_times():
    sample = step([(0, 0.0, 0.0, 0.0), (1, 0.1 * MS, 40 * MS, 40 * MS)], 80 * MS, 0.2 * MS)
    learned = learn([sample], [1 * MS, 1 * MS], unmeasured_seconds=8 * MS)
    assert learned.seconds[1] == pytest.approx(40 * MS, rel=0.01)


def test_the_step_before_the_last_under_the_first_plan_is_not_measured():
    learned = Learned()
    learned.enter(Stage.SETTLE)
    assert [learned.is_measured_next(done) for done in range(3)] == [True, False, True]
    learned.enter(Stage.TIME)
    assert all(learned.is_measured_next(done) for done in range(3))


def test_the_last_step_whose_host_began_cold_does_not_count_beside_others() -> None:
    warm = step([(0, 0.0, 0.0, 0.0), (1, 5 * MS, 5 * MS, 5 * MS)], 10 * MS, 10 * MS)
    cold = step([(0, 0.0, 0.0, 0.0), (1, 7 * MS, 7 * MS, 7 * MS)], 14 * MS, 14 * MS)
    assert learn([warm, cold], [1 * MS, 1 * MS]).host_seconds[0] == pytest.approx(5 * MS)


def test_a_head_that_waited_for_the_host_keeps_its_own_time() -> None:
    sample = step(
        [(0, 20 * MS, 20 * MS, 20 * MS), (1, 25 * MS, 25 * MS, 25 * MS)], 30 * MS, 30 * MS
    )
    learned = learn([sample], [1 * MS, 1 * MS], head_seconds=0.2 * MS)
    assert (learned.head_seconds, learned.head_host_seconds) == pytest.approx((0.2 * MS, 20 * MS))


def test_what_follows_a_leafs_own_forward_is_its_tail():
    # Leaf 0 begins at 1 ms, its own forward ends at 2 ms, attention follows until leaf 1 begins.
    spans = [
        SimpleNamespace(piece=0, wait_begin=1 * MS, wait_end=1 * MS, run_end=2 * MS),
        SimpleNamespace(piece=1, wait_begin=5 * MS, wait_end=6 * MS, run_end=8 * MS),
    ]
    learned = Learned(order=[0, 1])
    take_times(learned, SimpleNamespace(pieces=spans, step_seconds=8 * MS), [[0], [1]])
    assert learned.seconds == pytest.approx({0: 4 * MS, 1: 2 * MS})
    assert learned.tails == pytest.approx({0: 0.75, 1: 0.0})


@pytest.mark.parametrize(
    ("step_seconds", "host_seconds", "copy_seconds", "slowdown"),
    [
        (430 * MS, 20 * MS, 400 * MS, 1.0),  # far behind the host: it waited for copies
        (101 * MS, 100 * MS, 90 * MS, 2 * 100 / 90),
        (101 * MS, 100 * MS, 20 * MS, MOST_SLOWDOWN),
        (10 * MS, 10 * MS, 0.0, 1.0),  # nothing streams
    ],
)
def test_the_link_is_slowed_until_the_device_waits_for_it_and_not_for_the_host(
    step_seconds: float, host_seconds: float, copy_seconds: float, slowdown: float
) -> None:
    assert needed_slowdown(step_seconds, host_seconds, copy_seconds) == pytest.approx(slowdown)


@pytest.mark.parametrize(
    ("host_ms", "waiting_ms", "is_paced"),
    [([9, 8], 0, True), ([9, 7.9], 0, False), ([9], 2, False)],
)
def test_the_host_sets_the_pace_if_its_own_work_takes_most_of_the_step(
    host_ms: list[float], waiting_ms: float, is_paced: bool
) -> None:
    learned = Learned(unmeasured_seconds=10 * MS)
    assert not learned.is_paced_by_host(), "nothing was measured"
    for ms in host_ms:
        _, host = step([(0, 0.0, 0.0, 0.0)], 10 * MS, ms * MS, waited=[0.0, waiting_ms * MS])
        learned.hosts.append(host)
    assert learned.is_paced_by_host() is is_paced

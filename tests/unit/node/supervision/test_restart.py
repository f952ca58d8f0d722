"""When a process that ended is started again."""

from hypothesis import given
from hypothesis import strategies as st

from skep.node.supervision.supervisor import CRASHES_MAX, GiveUp, StartAgain, after_end, recent


def test_pauses_grow_with_every_end_and_are_spread() -> None:
    pauses = [after_end(tuple(range(count)), 10.0, 1.0, gives_up=False) for count in range(1, 5)]
    assert [round(pause.after_s, 2) for pause in pauses if isinstance(pause, StartAgain)] == [
        0.1,
        0.3,
        0.9,
        2.7,
    ]
    assert after_end((0.0,), 1.0, 0.0, gives_up=True) == StartAgain(0.05)


def test_five_ends_within_a_minute_are_enough() -> None:
    ends = (0.0, 10.0, 20.0, 30.0, 40.0)
    assert isinstance(after_end(ends[:4], 40.0, 1.0, gives_up=True), StartAgain)
    assert after_end(ends, 40.0, 1.0, gives_up=True) == GiveUp(CRASHES_MAX)
    assert isinstance(after_end(ends, 40.0, 1.0, gives_up=False), StartAgain)


def test_ends_of_more_than_a_minute_ago_do_not_count() -> None:
    assert recent((0.0, 10.0, 70.0), 70.5) == (70.0,)
    assert isinstance(after_end((0.0, 10.0, 20.0, 30.0, 95.0), 95.0, 1.0, gives_up=True), StartAgain)


@given(count=st.integers(1, 1000), rng=st.floats(0, 1))
def test_no_pause_is_longer_than_ten_seconds(count: int, rng: float) -> None:
    again = after_end((0.0,) * count, 0.0, rng, gives_up=False)
    assert isinstance(again, StartAgain)
    assert 0 < again.after_s <= 10

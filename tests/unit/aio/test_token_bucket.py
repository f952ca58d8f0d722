"""A bucket that fills steadily."""

from hypothesis import given
from hypothesis import strategies as st

from skep.aio.token_bucket import TokenBucket


def test_so_many_at_once_and_then_so_many_a_second() -> None:
    allowance = TokenBucket(3, 2, now=10.0)
    assert [allowance.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert [allowance.take(11.0) for _ in range(3)] == [True, True, False]
    assert [allowance.take(100.0) for _ in range(4)] == [True, True, True, False]


@given(st.lists(st.floats(0, 1), max_size=200))
def test_never_more_than_the_bucket_and_what_has_run_in(pauses: list[float]) -> None:
    allowance, now, taken = TokenBucket(5, 10, now=0.0), 0.0, 0
    for pause in pauses:
        now += pause
        taken += allowance.take(now)
    assert taken <= 5 + 10 * now + 1e-6

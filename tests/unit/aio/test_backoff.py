import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.aio.backoff import Backoff


def test_delays_double_up_to_the_longest():
    backoff = Backoff(1.0, 8.0, rng=lambda: 1.0)
    assert [backoff.next_delay_s() for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_success_makes_delays_short_again():
    backoff = Backoff(1.0, 8.0, rng=lambda: 1.0)
    backoff.next_delay_s()
    backoff.next_delay_s()
    backoff.reset()
    assert backoff.next_delay_s() == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_every_delay_lies_in_the_upper_half_of_its_step(chances: list[float]):
    given_chances = iter(chances)
    backoff = Backoff(0.5, 4.0, rng=lambda: next(given_chances))
    for number in range(len(chances)):
        step = min(0.5 * 2**number, 4.0)
        assert step / 2 <= backoff.next_delay_s() <= step


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="first_s"):
        Backoff(2.0, 1.0)

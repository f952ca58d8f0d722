"""How often a peer is asked."""

from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.probe.prober import PEERS_AT_FULL_RATE, PERIOD_S, pause_s

CHANCES = st.floats(0, 1)


@given(st.integers(0, PEERS_AT_FULL_RATE), CHANCES, CHANCES)
def test_what_is_closed_is_settled_in_time(peers: int, before: float, after: float) -> None:
    """Closed just after a round, found in the next, confirmed in the one behind it."""
    assert pause_s(peers, before, is_settled=True) + pause_s(peers, after, is_settled=False) <= 20


@given(st.integers(1, 5000), CHANCES)
def test_more_peers_are_asked_less_often_each_and_not_more_in_all(peers: int, rng: float) -> None:
    rounds_per_s = peers / pause_s(peers, rng, is_settled=True)
    assert rounds_per_s <= PEERS_AT_FULL_RATE / (0.75 * PERIOD_S) + 1e-9

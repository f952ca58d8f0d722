"""When a peer is asked again.  Pure.

To ask a peer once, and to answer its round, takes three milliseconds of a core, so up to 64 peers take 2 % at full
pace; who has more asks each less often.
"""

PERIOD_S = 10.0
RECHECK_S = 4.0
"""After a verdict that may be chance."""
PEERS_AT_FULL_PACE = 64


def pause_s(peers: int, rng: float, *, is_settled: bool) -> float:
    """Seconds until the next round with one of so many ``peers``, spread by a quarter to each side.

    ``rng``: from 0 to 1.
    """
    period = PERIOD_S if is_settled else RECHECK_S
    return period * max(1.0, peers / PEERS_AT_FULL_PACE) * (0.75 + 0.5 * rng)

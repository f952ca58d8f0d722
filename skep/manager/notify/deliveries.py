"""When a target gets its next message, and what follows a success or a failure.  Pure.

A message is recorded with its number before its first attempt, and stays recorded until the target has accepted it.  If
the leader ends in between, the next leader sends the same message again under the same id.  So a message is delivered
at least once, and a receiver recognizes the rare second copy by its id.  Losing an alarm would be worse.
"""

from msgspec.structs import replace

from skep.manager.notify.records import MESSAGE_NOTICES_MAX, Delivery
from skep.model.values.times import SECOND_NS

GROUP_S = 5.0
"""Seconds that a notice waits for others.  The services of a lost node degrade within seconds."""
EVERY_S = 60.0
"""Average seconds between two messages to a target, once the burst is used up.  Later notices share a message."""
BURST = 5
"""Messages that a target may get at once, after a quiet time."""
FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 600.0
"""Seconds before the second attempt, and the longest between two.  A target that was down gets its messages soon."""
GIVE_UP_S = 24 * 3600.0
"""Age in seconds of a message that is given up when it fails.  A day later nobody acts on it."""
_CLOCK_SET_NS = 3600 * SECOND_NS
"""A time further in the future was recorded before the clock was set back."""


def due_at_ns(delivery: Delivery, now_ns: int) -> int | None:
    """Return the Unix time of the next attempt, or None without a notice."""
    if delivery.sending:
        at_ns = delivery.retry_at_ns
    elif delivery.waiting:
        allowed_ns = delivery.free_at_ns - _ns((BURST - 1) * EVERY_S)
        at_ns = max(delivery.waiting[0].at_ns + _ns(GROUP_S), allowed_ns)
    else:
        return None
    return at_ns if at_ns - now_ns < _CLOCK_SET_NS else now_ns


def claimed(delivery: Delivery, now_ns: int) -> Delivery:
    """Return ``delivery`` with the next message recorded, unless one is recorded already."""
    if delivery.sending or not delivery.waiting:
        return delivery
    return replace(
        delivery,
        sending=delivery.waiting[:MESSAGE_NOTICES_MAX],
        waiting=delivery.waiting[MESSAGE_NOTICES_MAX:],
        number=delivery.number + 1,
        told_missed=delivery.missed,
        missed=0,
        attempts=0,
        free_at_ns=max(delivery.free_at_ns, now_ns) + _ns(EVERY_S),
    )


def settled(delivery: Delivery, number: int, error: str, now_ns: int, chance: float) -> Delivery:
    """Return ``delivery`` after an attempt to send message ``number``.

    Args:
        error: Reason of a failure, or empty.
        chance: Random number from 0 to 1.
    """
    if number != delivery.number or not delivery.sending:
        return delivery  # another leader has settled it
    if not error:
        return replace(
            delivery,
            sending=(),
            told_missed=0,
            attempts=0,
            retry_at_ns=0,
            failing_since_ns=0,
            error="",
            sent=delivery.sent + 1,
            sent_ns=now_ns,
        )
    failing = replace(
        delivery,
        attempts=delivery.attempts + 1,
        failed=delivery.failed + 1,
        failing_since_ns=delivery.failing_since_ns or now_ns,
        error=error,
        retry_at_ns=now_ns + _ns(_delay_s(delivery.attempts, chance)),
    )
    if now_ns - delivery.sending[0].at_ns < _ns(GIVE_UP_S):
        return failing
    count = len(delivery.sending)
    missed = delivery.missed + delivery.told_missed + count
    return replace(failing, sending=(), told_missed=0, missed=missed, dropped=delivery.dropped + count)


def _delay_s(attempts: int, chance: float) -> float:
    whole = min(FIRST_RETRY_S * 2.0 ** min(attempts, 30), LONGEST_RETRY_S)
    return whole * (0.5 + 0.5 * chance)


def _ns(seconds: float) -> int:
    return round(seconds * SECOND_NS)

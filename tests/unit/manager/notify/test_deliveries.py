"""When a target gets a message: grouping, rate, retries, giving up, and what a new leader sends again."""

from hypothesis import given
from hypothesis import strategies as st

from skep.manager.notify.deliveries import (
    BURST,
    EVERY_S,
    GIVE_UP_S,
    GROUP_S,
    LONGEST_RETRY_S,
    claimed,
    due_at_ns,
    settled,
)
from skep.manager.notify.incidents import with_notices
from skep.manager.notify.messages import message_of
from skep.manager.notify.records import MESSAGE_NOTICES_MAX, WAITING_MAX, Delivery, Incident, Notice
from skep.model.options.notifications import Topic
from skep.model.values.times import SECOND_NS

NOW_NS = 1_800_000_000 * SECOND_NS
NOTHING = Delivery(target_id="t")


def a_notice(number: int = 1, at_ns: int = NOW_NS) -> Notice:
    incident = Incident(
        id=f"node/{number}@1",
        key=f"node/{number}",
        topic=Topic.NODE,
        message=f"node n{number} is down",
        began_ns=at_ns,
        reminded_ns=at_ns,
    )
    return Notice(status="began", incident=incident, at_ns=at_ns)


def after(seconds: float) -> int:
    return NOW_NS + round(seconds * SECOND_NS)


def test_a_notice_waits_for_others_that_follow_within_seconds() -> None:
    delivery = with_notices(NOTHING, [a_notice(1)])
    assert due_at_ns(NOTHING, NOW_NS) is None
    assert due_at_ns(delivery, NOW_NS) == after(GROUP_S)
    both = claimed(with_notices(delivery, [a_notice(2, after(3))]), after(GROUP_S))
    assert [one.incident.key for one in both.sending] == ["node/1", "node/2"]
    assert both.waiting == ()


def test_a_message_stays_recorded_under_its_number_until_it_is_delivered() -> None:
    first = claimed(with_notices(NOTHING, [a_notice(1)]), NOW_NS)
    later = with_notices(first, [a_notice(2)])
    assert claimed(later, NOW_NS) == later, "a new leader sends the same message"
    failed = settled(later, 1, "503", NOW_NS, 0.0)
    assert (failed.sending, failed.number, failed.error) == (first.sending, 1, "503")
    done = settled(failed, 1, "", after(60), 0.0)
    assert (done.sending, done.waiting, done.sent, done.error, done.failing_since_ns) == (
        (),
        later.waiting,
        1,
        "",
        0,
    )
    assert settled(done, 1, "", after(61), 0.0) == done, "a deposed leader's result changes nothing"


def test_a_target_gets_a_few_messages_at_once_and_then_one_a_minute() -> None:
    delivery, now_ns, times = NOTHING, NOW_NS, []
    for number in range(BURST + 3):
        delivery = with_notices(delivery, [a_notice(number, now_ns)])
        due_ns = due_at_ns(delivery, now_ns)
        assert due_ns is not None
        now_ns = max(now_ns, due_ns)
        times.append((now_ns - NOW_NS) / SECOND_NS)
        delivery = claimed(delivery, now_ns)
        delivery = settled(delivery, delivery.number, "", now_ns, 0.5)
    assert times[BURST - 1] <= BURST * GROUP_S
    assert [
        round(later - earlier) for earlier, later in zip(times[BURST:], times[BURST + 1 :], strict=False)
    ] == [round(EVERY_S)] * 2


def test_attempts_become_rare_but_do_not_stop_within_a_day() -> None:
    delivery, now_ns, delays = claimed(with_notices(NOTHING, [a_notice()]), NOW_NS), NOW_NS, []
    while delivery.sending:
        delivery = settled(delivery, 1, "it did not respond", now_ns, 1.0)
        delays.append((delivery.retry_at_ns - now_ns) / SECOND_NS)
        now_ns = delivery.retry_at_ns
    assert delays[:3] == [5, 10, 20]
    assert max(delays) == LONGEST_RETRY_S
    assert now_ns - NOW_NS >= GIVE_UP_S * SECOND_NS
    assert (delivery.dropped, delivery.missed) == (1, 1)
    following = claimed(with_notices(delivery, [a_notice(2, now_ns)]), now_ns)
    assert (following.told_missed, following.missed) == (1, 0), "the next message says what is missing"


def test_the_oldest_notices_are_dropped_and_counted_if_too_many_wait() -> None:
    delivery = with_notices(NOTHING, [a_notice(number) for number in range(WAITING_MAX + 7)])
    assert (len(delivery.waiting), delivery.dropped, delivery.missed) == (WAITING_MAX, 7, 7)
    assert delivery.waiting[-1].incident.key == f"node/{WAITING_MAX + 6}"
    assert len(claimed(delivery, NOW_NS).sending) == MESSAGE_NOTICES_MAX


def test_a_clock_that_was_set_back_does_not_delay_a_message() -> None:
    failed = settled(claimed(with_notices(NOTHING, [a_notice()]), NOW_NS), 1, "503", NOW_NS, 0.0)
    day_before_ns = NOW_NS - 24 * 3600 * SECOND_NS
    assert due_at_ns(failed, day_before_ns) == day_before_ns
    assert due_at_ns(failed, NOW_NS) == failed.retry_at_ns


def test_after_a_restore_no_new_message_has_the_id_of_one_that_was_sent() -> None:
    backup = with_notices(NOTHING, [])
    first = claimed(with_notices(backup, [a_notice(1)]), NOW_NS)
    restored = claimed(with_notices(backup, [a_notice(1, after(3600))]), after(3600))
    assert first.number == restored.number
    assert message_of(first, "default", "c").id != message_of(restored, "default", "c").id
    retried = settled(first, 1, "503", NOW_NS, 0.5)
    assert message_of(retried, "default", "c") == message_of(first, "default", "c")


def test_after_a_restore_a_notice_that_is_sent_with_another_one_has_another_id() -> None:
    """The older state has a notice that waited.  A receiver that knows the id would drop the other one with it."""
    backup = with_notices(NOTHING, [a_notice(1)])
    first, again = claimed(backup, NOW_NS), claimed(backup, after(600))
    more = claimed(with_notices(backup, [a_notice(2, after(600))]), after(600))
    other = claimed(with_notices(backup, [a_notice(3, after(600))]), after(600))
    ids = [message_of(one, "default", "c").id for one in (first, again, more, other)]
    assert (ids[0] == ids[1], len(set(ids))) == (True, 3)


@given(st.lists(st.sampled_from(["add", "claim", "fail", "succeed", "stale"]), max_size=60))
def test_every_notice_is_delivered_once_in_order_dropped_or_still_there(steps: list[str]) -> None:
    delivery, added, told = NOTHING, 0, list[int]()
    now_ns = NOW_NS
    for step in steps:
        now_ns += 7200 * SECOND_NS
        if step == "add":
            delivery, added = with_notices(delivery, [a_notice(added, now_ns)]), added + 1
        elif step == "claim":
            delivery = claimed(delivery, now_ns)
        elif step == "fail":
            delivery = settled(delivery, delivery.number, "503", now_ns, 0.5)
        elif step == "stale":
            assert settled(delivery, delivery.number - 1, "", now_ns, 0.5) == delivery
        elif delivery.sending:
            told += [int(one.incident.key.removeprefix("node/")) for one in delivery.sending]
            delivery = settled(delivery, delivery.number, "", now_ns, 0.5)
    assert told == sorted(set(told))
    assert len(told) + delivery.outstanding + delivery.dropped == added

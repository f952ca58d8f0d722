"""When a manager has lost contact with a quorum."""

from skep.manager.dispatcher.node_sessions.quorum_contact import LOST_AFTER_S, Contact


def test_one_refused_barrier_does_not_lose_the_contact() -> None:
    """etcd refuses waiting reads at once during an election."""
    contact = Contact(10.0).after_failure(10.5)
    assert not contact.is_lost
    assert contact.is_current(10.5)


def test_contact_is_lost_when_barriers_keep_failing() -> None:
    contact = Contact(10.0).after_failure(10.5).after_failure(10.0 + LOST_AFTER_S)
    assert contact.is_lost
    assert contact.at == 10.0


def test_lost_contact_stays_lost_until_a_barrier_succeeds() -> None:
    contact = Contact(10.0, is_lost=True)
    assert contact.after_failure(10.1).is_lost
    assert not contact.is_current(10.1)


def test_contact_is_not_current_before_the_next_check_finds_that() -> None:
    contact = Contact(10.0)
    assert contact.is_current(10.0 + LOST_AFTER_S - 0.1)
    assert not contact.is_current(10.0 + LOST_AFTER_S)
    assert not contact.is_lost

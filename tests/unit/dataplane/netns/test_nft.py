"""Who may use libnftables at the same time."""

from collections.abc import Callable
from threading import Event, Thread

from skep.dataplane.netns.kernel.nft import SharedLock

_DEADLINE_S = 10


def _started(call: Callable[[], None]) -> Thread:
    thread = Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_changes_run_at_once() -> None:
    lock, both = SharedLock(), Event()

    def other() -> None:
        with lock.shared():
            both.set()

    with lock.shared():
        thread = _started(other)
        assert both.wait(_DEADLINE_S)
    thread.join(_DEADLINE_S)


def test_what_looks_up_interfaces_waits_for_all_others_and_they_for_it() -> None:
    lock, order = SharedLock(), list[str]()
    has_asked, has_begun, may_end = Event(), Event(), Event()

    def lister() -> None:
        has_asked.set()
        with lock.alone():
            order.append("list begins")
            has_begun.set()
            assert may_end.wait(_DEADLINE_S)
            order.append("list ends")

    def changer() -> None:
        with lock.shared():
            order.append("change")

    with lock.shared():
        listing = _started(lister)
        assert has_asked.wait(_DEADLINE_S)
        assert not has_begun.is_set()
        order.append("first change ends")
    assert has_begun.wait(_DEADLINE_S)
    changing = _started(changer)
    may_end.set()
    for thread in (listing, changing):
        thread.join(_DEADLINE_S)
    assert order == ["first change ends", "list begins", "list ends", "change"]
